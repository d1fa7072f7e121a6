//! `xvlm search`: one's own pictures, by text and by example.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use serde::Serialize;
use xvlm::tasks::embed;
use xvlm::{Index, Picture, PixelBox, Query, SearchOptions};

use crate::ModelArgs;
use crate::embed::{PictureArgs, What};
use crate::look::{edges, percent, worded};
use crate::output::{self, CliError, Rows, table};
use crate::progress::Stage;

/// Find pictures that a text tells, or that look like a picture
///
/// Searches in what `xvlm embed` has written (--index), or embeds pictures on the spot. Prints the nearest by the cosine of their
/// embeddings. With --rerank K, the K nearest to a text are ranked again by matching them with it, which is slower and better.
#[derive(Args)]
#[command(group = ArgGroup::new("where").required(true).args(["index", "images", "list", "annotations", "shards"]))]
pub(crate) struct Search {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder that `xvlm embed` wrote
    #[arg(long, value_name = "DIR")]
    index: Option<PathBuf>,
    #[command(flatten)]
    pictures: PictureArgs,
    /// What paths of images in --annotations and --shards are relative to [default: the folder of the file]
    #[arg(long, value_name = "DIR")]
    image_root: Option<PathBuf>,
    /// Text to search for, such as "a red circle"; repeatable
    #[arg(long = "text", value_name = "TEXT", required_unless_present = "like")]
    texts: Vec<String>,
    /// Picture to search for others like it; repeatable
    #[arg(long, value_name = "FILE")]
    like: Vec<PathBuf>,
    /// What to find: pictures, boxes in them, or texts
    #[arg(long, value_name = "KIND", value_enum, default_value_t = What::Image)]
    kind: What,
    /// How many to find
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    top: u32,
    /// How many of the nearest to a text to rank again by matching; 0 for none; what is further away comes after them
    #[arg(long, value_name = "K", default_value_t = 0)]
    rerank: u32,
    /// Print the result as JSON: a list with an object for each text and each picture
    #[arg(long)]
    json: bool,
}

/// What was found for one text or picture.
#[derive(Serialize)]
struct Searched<'a> {
    query: String,
    hits: Vec<Hit<'a>>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    problems: &'a [String],
}

/// Something that was found.
#[derive(Serialize)]
struct Hit<'a> {
    id: &'a str,
    image: &'a str,
    kind: embed::Kind,
    #[serde(rename = "box", skip_serializing_if = "Option::is_none")]
    bounds: Option<PixelBox>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    similarity: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    probability: Option<f32>,
}

impl<'a> From<&'a embed::Hit> for Hit<'a> {
    fn from(embed::Hit { row, similarity, probability }: &'a embed::Hit) -> Self {
        Self {
            id: &row.id,
            image: &row.image,
            kind: row.kind,
            bounds: row.bounds.map(PixelBox::from),
            text: row.text.as_deref(),
            similarity: *similarity,
            probability: *probability,
        }
    }
}

impl Search {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let mut queries: Vec<Query> = worded(&self.texts)?.iter().map(|text| Query::Text((*text).to_owned())).collect();
        for path in &self.like {
            queries.push(Query::Like(Picture::open_upright(path)?));
        }
        let names = self.texts.iter().cloned().chain(self.like.iter().map(|path| path.display().to_string()));
        let predictor = self.model.open()?;
        let kind = self.kind.kind();
        let index = match &self.index {
            Some(dir) => Index::open(dir)?,
            None => {
                let pictures = self.pictures.open(self.image_root.as_deref())?;
                let embed = |counter: &mut dyn FnMut(usize, usize)| {
                    Index::of_pictures(predictor.model(), &pictures, &[kind], counter)
                };
                let (index, left_out) = Stage::run("pictures", embed)?;
                left_out.iter().take(8).for_each(|problem| output::say(&format!("left out: {problem}")));
                if left_out.len() > 8 {
                    output::say(&format!("left out: {} in all", left_out.len()));
                }
                index
            }
        };
        let options = SearchOptions { kind, top: self.top as usize, rerank: self.rerank as usize };
        let found = predictor.search(&index, &queries, options)?;
        for problem in found.iter().flat_map(|found| &found.problems) {
            output::say(&format!("not ranked again: {problem}"));
        }
        let searched = names.zip(&found).map(|(query, found)| Searched {
            query,
            hits: found.hits.iter().map(Hit::from).collect(),
            problems: &found.problems,
        });
        let searched: Vec<Searched> = searched.collect();
        output::print(self.json, &searched, |searched| {
            let mut rows = Rows::new();
            for Searched { query, hits, .. } in searched {
                if searched.len() > 1 {
                    rows.push((query.clone(), None));
                }
                rows.extend(hits.iter().map(row));
            }
            table(&rows)
        })
    }
}

fn row(hit: &Hit) -> (String, Option<String>) {
    let mut name = hit.id.to_owned();
    if let Some(bounds) = &hit.bounds {
        name += &format!("  {}", edges(bounds));
    }
    if let Some(text) = hit.text {
        name += &format!("  {text}");
    }
    let probability = hit.probability.map(|probability| format!("{:>7}  ", percent(probability))).unwrap_or_default();
    (name, Some(format!("{probability}cosine {:6.3}", hit.similarity)))
}
