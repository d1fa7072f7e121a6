//! Searching in embeddings.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xvlm_data::{DataError, Picture, Place};

use super::parts::{self, Format, Kind, Numbers, Row, Rows};
use super::pictures::Pictures;
use super::{Options, Summary, embed_some};
use crate::compute::Precision;
use crate::error::{ConfigProblem, TaskError, wrong_data};
use crate::generate::Source;
use crate::matching;
use crate::model::Model;
use crate::retrieval::nearest;
use crate::{BATCH, Counter};

/// The folder of the files with embeddings.
pub(super) const PARTS: &str = "parts";
/// What they are of.
const ABOUT: &str = "index.json";
/// The text whose embedding tells one model from another.
const PROBE: &str = "a picture of something";

/// What `index.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct About {
    format: Format,
    numbers: Numbers,
    /// Numbers of an embedding.
    width: usize,
    /// Whether pictures were turned as their EXIF orientation says.
    upright: bool,
    /// The model's embedding of [`PROBE`].
    probe: Vec<f32>,
    /// What the model computed with: `f32` where it is not said.
    #[serde(default)]
    precision: Precision,
    images: u64,
    regions: u64,
    texts: u64,
    left_out: u64,
    files: Vec<String>,
}

/// Embeddings in memory, to be searched.
pub struct Index {
    name: String,
    /// What made the embeddings, if that was in another process.
    maker: Option<Maker>,
    /// Whether pictures were turned as their EXIF orientation says.
    upright: bool,
    kinds: BTreeMap<Kind, (Vec<Row>, Tensor)>,
}

/// What tells the model that made embeddings.
struct Maker {
    /// Its embedding of [`PROBE`].
    probe: Vec<f32>,
    precision: Precision,
}

/// What is searched for.
#[derive(Clone, Debug)]
pub enum Query {
    /// What a text tells.
    Text(String),
    /// What looks like a picture.
    Like(Picture),
}

/// How it is searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SearchOptions {
    /// What is found.
    pub kind: Kind,
    /// How much of it.
    pub top: usize,
    /// How many of the nearest by embedding are ranked again by matching them with the text; 0 for none. Those that are further
    /// away come after them, by embedding. Pictures are read again for that.
    pub rerank: usize,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self { kind: Kind::Image, top: 10, rerank: 0 }
    }
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Hit {
    /// What it is.
    pub row: Row,
    /// Cosine of its embedding with that of the query.
    pub similarity: f32,
    /// Probability that it matches the text, if it was ranked again.
    pub probability: Option<f32>,
}

/// What was found for a query.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// The best first.
    pub hits: Vec<Hit>,
    /// What could not be ranked again, and why; it comes after what was.
    pub problems: Vec<String>,
}

/// Writes what the files of a folder are.
pub(super) fn write_about(
    model: &Model,
    options: &Options,
    upright: bool,
    summary: &Summary,
    out: &Path,
) -> Result<(), TaskError> {
    let probe = probe(model)?;
    let about = About {
        format: options.format,
        numbers: options.numbers,
        width: probe.len(),
        upright,
        probe,
        precision: model.precision(),
        images: summary.images,
        regions: summary.regions,
        texts: summary.texts,
        left_out: summary.left_out.len() as u64,
        files: summary.files.clone(),
    };
    let path = out.join(ABOUT);
    let problem =
        |error: serde_json::Error| ConfigProblem { file: path.display().to_string(), message: error.to_string() };
    let text = serde_json::to_string_pretty(&about).map_err(problem)?;
    Ok(xvlm_weights::write_file_atomically(&path, |out| out.write_all(text.as_bytes()))?)
}

fn probe(model: &Model) -> Result<Vec<f32>, TaskError> {
    Ok(model.embed_texts(&[PROBE])?.flatten_all()?.to_vec1()?)
}

impl Index {
    /// Opens a folder that [`embed`](super::embed) wrote. Its embeddings are held in memory: 1 KB each in the base model.
    ///
    /// # Errors
    /// If a file is missing or broken.
    pub fn open(dir: &Path) -> Result<Self, TaskError> {
        let path = dir.join(ABOUT);
        let text = std::fs::read(&path).map_err(|source| DataError::Io { path: path.clone(), source })?;
        let broken = |source| DataError::Json { path: path.clone(), place: Place::Whole, source };
        let about: About = serde_json::from_slice(&text).map_err(broken)?;
        let files: Vec<PathBuf> = about.files.iter().map(|file| dir.join(PARTS).join(file)).collect();
        let rows = files.par_iter().map(|file| parts::read(file, about.format)).collect::<Result<Vec<_>, _>>()?;
        let mut all = Rows::default();
        for (rows, file) in rows.into_iter().zip(&files) {
            let (expected, found) = (rows.rows.len() * about.width, rows.embeddings.len());
            if expected != found {
                let (wanted, found) = (format!("{} numbers each", about.width), format!("{found} numbers"));
                return Err(wrong_data(file, Place::Whole, "embedding", wanted, found));
            }
            all.rows.extend(rows.rows);
            all.embeddings.extend(rows.embeddings);
        }
        let maker = Maker { probe: about.probe, precision: about.precision };
        Self::of_rows(dir.display().to_string(), Some(maker), about.upright, all, about.width)
    }

    /// Embeds pictures to search in them, without a file; and what could not be embedded.
    ///
    /// # Errors
    /// If there is nothing to search in, or the model is made for another task.
    pub fn of_pictures(
        model: &Model,
        pictures: &Pictures,
        kinds: &[Kind],
        counter: Counter,
    ) -> Result<(Self, Vec<String>), TaskError> {
        let options = Options {
            images: kinds.contains(&Kind::Image),
            regions: kinds.contains(&Kind::Region),
            texts: kinds.contains(&Kind::Text),
            ..Options::default()
        };
        let (mut rows, mut summary, mut done) = (Rows::default(), Summary::default(), 0);
        for unit in pictures.units()? {
            pictures.visit(&unit, BATCH, &mut |entries| {
                done += entries.len();
                embed_some(model, entries, pictures.upright(), &options, &mut rows, &mut summary)?;
                counter(done, pictures.known().unwrap_or(done));
                Ok(())
            })?;
        }
        let width = model.config().model.embed_dim;
        Ok((Self::of_rows("pictures".to_owned(), None, pictures.upright(), rows, width)?, summary.left_out))
    }

    fn of_rows(name: String, maker: Option<Maker>, upright: bool, rows: Rows, width: usize) -> Result<Self, TaskError> {
        if rows.rows.is_empty() {
            return Err(TaskError::Empty { what: format!("{name}: embeddings") });
        }
        let mut split: BTreeMap<Kind, (Vec<Row>, Vec<f32>)> = BTreeMap::new();
        for (row, embedding) in rows.rows.into_iter().zip(rows.embeddings.chunks(width.max(1))) {
            let (own, embeddings) = split.entry(row.kind).or_default();
            own.push(row);
            embeddings.extend_from_slice(embedding);
        }
        let mut kinds = BTreeMap::new();
        for (kind, (rows, embeddings)) in split {
            let shape = (rows.len(), width);
            kinds.insert(kind, (rows, Tensor::from_vec(embeddings, shape, &Device::Cpu)?));
        }
        Ok(Self { name, maker, upright, kinds })
    }

    /// How many embeddings of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        self.kinds.get(&kind).map_or(0, |(rows, _)| rows.len())
    }

    /// Searches.
    ///
    /// # Errors
    /// If a text has no words, there is nothing of the kind, the index was made by another model, or the model is made for
    /// another task.
    pub fn search(&self, model: &Model, queries: &[Query], options: SearchOptions) -> Result<Vec<Found>, TaskError> {
        self.check(model)?;
        let Some((rows, embeddings)) = self.kinds.get(&options.kind) else {
            return Err(TaskError::Empty {
                what: format!("{}: embeddings of kind {}", self.name, options.kind.name()),
            });
        };
        queries.iter().map(|query| self.search_one(model, query, rows, embeddings, options)).collect()
    }

    fn search_one(
        &self,
        model: &Model,
        query: &Query,
        rows: &[Row],
        embeddings: &Tensor,
        options: SearchOptions,
    ) -> Result<Found, TaskError> {
        let asked = match query {
            Query::Text(text) => model.embed_texts(&[text])?,
            Query::Like(picture) => model.embed_images(&model.encode(std::slice::from_ref(picture))?)?,
        };
        let asked = asked.to_device(&Device::Cpu)?.t()?;
        let similarities: Vec<f32> = embeddings.matmul(&asked)?.flatten_all()?.to_vec1()?;
        let text = match query {
            Query::Text(text) if options.rerank > 0 => Some(text),
            _ => None,
        };
        let wanted = text.map_or(options.top, |_| options.rerank.max(options.top));
        let hit = |&row: &u32| Hit {
            row: rows[row as usize].clone(),
            similarity: similarities[row as usize],
            probability: None,
        };
        let mut found = Found { hits: nearest(&similarities, wanted).iter().map(hit).collect(), problems: Vec::new() };
        if let Some(text) = text {
            let nearest = options.rerank.min(found.hits.len());
            let nearest = &mut found.hits[..nearest];
            found.problems = rerank(model, text, nearest, self.upright)?;
            nearest.sort_by(|a, b| b.probability.unwrap_or(-1.0).total_cmp(&a.probability.unwrap_or(-1.0)));
            found.hits.truncate(options.top);
        }
        Ok(found)
    }

    /// Refuses a model other than the one that made the embeddings, in whatever precision.
    fn check(&self, model: &Model) -> Result<(), TaskError> {
        let Some(maker) = &self.maker else { return Ok(()) };
        let found = probe(model)?;
        let cosine: f32 = maker.probe.iter().zip(&found).map(|(a, b)| a * b).sum();
        let (searching, made) = (model.precision(), maker.precision);
        if maker.probe.len() == found.len() && cosine > least_cosine(searching, made) {
            return Ok(());
        }
        let expected = format!("embeddings of the model that searches (in {searching})");
        Err(wrong_data(&self.name, Place::Whole, "probe", expected, format!("those of another (in {made})")))
    }
}

/// The cosine that is exceeded by two embeddings of one text by one model.
fn least_cosine(a: Precision, b: Precision) -> f32 {
    match [a, b].contains(&Precision::Int8) {
        // Weights and activations of 8 bits turn an embedding by up to 0.1 (a cosine of 0.995), in other directions on another CPU.
        true => 0.98,
        // Half precision, or another machine, turns it by far less than 0.045.
        false => 0.999,
    }
}

/// Matches a text with what was found; what cannot be read again is named.
fn rerank(model: &Model, text: &str, hits: &mut [Hit], upright: bool) -> Result<Vec<String>, TaskError> {
    let side = model.config().model.vision_config.image_res();
    let mut problems = Vec::new();
    for hits in hits.chunks_mut(BATCH) {
        let open = |hit: &Hit| -> Result<(Picture, Option<[f32; 4]>), String> {
            let path = Path::new(&hit.row.image);
            let picture = if upright { Picture::open_upright(path) } else { Picture::open(path) };
            let picture = picture.map_err(|error| error.to_string())?;
            let (width, height) = (picture.width(), picture.height());
            let bounds = hit.row.bounds.map(|bounds| {
                let problem = || format!("{}: expected a box inside {width}x{height}, found {bounds:?}", hit.row.image);
                matching::fractions(bounds, width, height).ok_or_else(problem)
            });
            Ok((picture.resized_square(side), bounds.transpose()?))
        };
        let opened: Vec<Result<_, String>> = hits.par_iter().map(open).collect();
        let (mut pictures, mut boxes, mut of) = (Vec::new(), Vec::new(), Vec::new());
        for (at, opened) in opened.into_iter().enumerate() {
            match opened {
                Ok((picture, bounds)) => {
                    // A whole picture is a region like any other.
                    boxes.push((pictures.len() as u32, bounds.unwrap_or([0.5, 0.5, 1.0, 1.0])));
                    pictures.push(picture);
                    of.push(at);
                }
                Err(problem) => problems.push(problem),
            }
        }
        if pictures.is_empty() {
            continue;
        }
        let is_whole = hits.iter().all(|hit| hit.row.bounds.is_none());
        let concepts = matching::encode_placed(model, &pictures, if is_whole { &[] } else { &boxes })?;
        let source = match concepts.regions {
            Some(regions) => regions,
            None => Source::images(&concepts.images)?,
        };
        for (at, scores) in of.into_iter().zip(matching::scores(model, &source, &[text])?) {
            hits[at].probability = scores.first().map(|score| score.probability);
        }
    }
    Ok(problems)
}
