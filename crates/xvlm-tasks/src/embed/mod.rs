//! Embeddings of pictures, of regions in them and of their texts: to files, and to search in.
//!
//! Embeddings are written as they are computed, a file for every thousand pictures, so memory holds those of one file at most,
//! and what is interrupted goes on.

mod index;
mod parts;
mod pictures;

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use xvlm_data::tokens::hash_bytes;
use xvlm_data::{DataError, DecodeOptions, Encoded, ImageSource, Picture, Record};
use xvlm_encoders::Task;

pub use self::index::{Found, Hit, Index, Query, SearchOptions};
pub use self::parts::{Format, Kind, Numbers, Row, Rows};
use self::pictures::Unit;
pub use self::pictures::{Entry, Pictures};
use crate::BATCH;
use crate::error::TaskError;
use crate::matching;
use crate::model::Model;
use crate::sweep::{Sweep, Work};

/// Pictures whose embeddings go into one file.
pub(super) const PART: usize = 1024;
/// Regions that are encoded at a time: each has as many tokens as its picture.
const REGIONS: usize = 128;

/// What is embedded, and how it is filed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Embed whole pictures.
    pub images: bool,
    /// Embed the boxes that the data have.
    pub regions: bool,
    /// Embed the texts that the data have.
    pub texts: bool,
    /// The form of the files.
    pub format: Format,
    /// How numbers are stored.
    pub numbers: Numbers,
}

impl Default for Options {
    fn default() -> Self {
        let (format, numbers) = (Format::default(), Numbers::default());
        Self { images: true, regions: true, texts: true, format, numbers }
    }
}

/// What was embedded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Whole pictures.
    pub images: u64,
    /// Boxes in them.
    pub regions: u64,
    /// Texts.
    pub texts: u64,
    /// The files, in the folder `parts`.
    pub files: Vec<String>,
    /// What could not be embedded, and why.
    pub left_out: Vec<String>,
}

impl Summary {
    fn merge(&mut self, other: Self) {
        self.images += other.images;
        self.regions += other.regions;
        self.texts += other.texts;
        self.files.extend(other.files);
        self.left_out.extend(other.left_out);
    }

    fn count(&mut self, kind: Kind) {
        *match kind {
            Kind::Image => &mut self.images,
            Kind::Region => &mut self.regions,
            Kind::Text => &mut self.texts,
        } += 1;
    }
}

/// Embeds pictures into the folder `out`: files in `parts/`, what they are of in `index.json`, and in `embeddings.jsonl` what is
/// done, by which [`Sweep::resume`] goes on. Pictures, boxes and texts that are broken are counted and named, however many they
/// are: [`Sweep::max_bad_fraction`] is for units that have one answer each, and has no say here.
///
/// # Errors
/// If nothing can be embedded, a file cannot be written, the folder has embeddings of something else, the work was
/// asked to stop, or the model is made for another task.
pub fn embed(
    model: &Model,
    pictures: &Pictures,
    options: &Options,
    out: &Path,
    sweep: &mut Sweep,
) -> Result<Summary, TaskError> {
    model.fit_for("embeddings", &[Task::Pretrain, Task::Retrieval])?;
    let folder = out.join(index::PARTS);
    std::fs::create_dir_all(&folder).map_err(|source| DataError::Io { path: folder.clone(), source })?;
    sweep.folder = Some(out.to_owned());
    let units = pictures.units()?;
    let work = Work { name: "embeddings", options: json!(options), batch: 1 };
    let numbered: Vec<(usize, &Unit)> = units.iter().enumerate().collect();
    let answers = sweep.run(
        &work,
        &numbered,
        |(_, unit)| unit.name(),
        |units| {
            let one = |&&(number, unit): &&(usize, &Unit)| embed_unit(model, pictures, options, &folder, number, unit);
            units.iter().map(|unit| one(unit).map(Ok)).collect()
        },
    )?;
    let mut summary = Summary::default();
    answers.given.into_iter().flatten().for_each(|done: Summary| summary.merge(done));
    if summary.files.is_empty() {
        let first = summary.left_out.first().map(|first| format!(": {first}")).unwrap_or_default();
        return Err(TaskError::Empty { what: format!("pictures to embed{first}") });
    }
    if sweep.ranks.rank() == 0 {
        index::write_about(model, options, pictures.upright(), &summary, out)?;
    }
    Ok(summary)
}

/// Embeds one unit, into files of its own.
fn embed_unit(
    model: &Model,
    pictures: &Pictures,
    options: &Options,
    folder: &Path,
    number: usize,
    unit: &Unit,
) -> Result<Summary, TaskError> {
    let (mut summary, mut rows, mut records) = (Summary::default(), Rows::default(), 0);
    let file = |rows: &mut Rows, summary: &mut Summary| {
        if rows.rows.is_empty() {
            return Ok(());
        }
        let name = format!("{number:06}-{:04}.{}", summary.files.len(), options.format.extension());
        parts::write(&folder.join(&name), rows, options.format, options.numbers)?;
        *rows = Rows::default();
        summary.files.push(name);
        Ok::<(), TaskError>(())
    };
    pictures.visit(unit, BATCH, &mut |entries: Vec<Result<Entry, DataError>>| {
        records += entries.len();
        embed_some(model, entries, pictures.upright(), options, &mut rows, &mut summary)?;
        if records >= PART {
            records = 0;
            file(&mut rows, &mut summary)?;
        }
        Ok(())
    })?;
    file(&mut rows, &mut summary)?;
    Ok(summary)
}

/// A picture at the model's size, and the size it came with.
struct Decoded {
    square: Picture,
    width: u32,
    height: u32,
}

fn decode(record: &Record, upright: bool, side: usize) -> Result<Decoded, DataError> {
    let options = if upright { DecodeOptions::upright() } else { DecodeOptions::default() };
    let picture = Encoded::of(&record.image, &record.origin, options)?.decode()?;
    let (width, height) = (picture.width(), picture.height());
    Ok(Decoded { square: picture.resized_square(side), width, height })
}

/// Embeds what a few records have.
fn embed_some(
    model: &Model,
    entries: Vec<Result<Entry, DataError>>,
    upright: bool,
    options: &Options,
    rows: &mut Rows,
    summary: &mut Summary,
) -> Result<(), TaskError> {
    let side = model.config().model.vision_config.image_res();
    let decoded: Vec<Result<(Entry, Decoded), String>> = entries
        .into_par_iter()
        .map(|entry| {
            let entry = entry.map_err(|error| error.to_string())?;
            match decode(&entry.record, upright, side) {
                Ok(decoded) => Ok((entry, decoded)),
                Err(error) => Err(format!("{}: {error}", entry.id)),
            }
        })
        .collect();
    let (mut squares, mut of) = (Vec::new(), Vec::new());
    let (mut boxes, mut regions, mut texts) = (Vec::new(), Vec::new(), Vec::new());
    for decoded in decoded {
        let (entry, Decoded { square, width, height }) = match decoded {
            Ok(decoded) => decoded,
            Err(problem) => {
                summary.left_out.push(problem);
                continue;
            }
        };
        let at = of.len();
        let (id, record) = (&entry.id, &entry.record);
        for (i, elem) in record.elems.iter().enumerate() {
            let Some(placed) = matching::fractions(elem.bbox, width, height) else {
                let problem = format!("elems[{i}].bb: expected a box inside {width}x{height}, found {:?}", elem.bbox);
                summary.left_out.push(format!("{id}: {problem}"));
                continue;
            };
            boxes.push((at as u32, placed));
            regions.push((at, elem.bbox, elem.texts.first().cloned()));
            texts.extend(elem.texts.iter().map(|text| (at, Some(elem.bbox), text.clone())));
        }
        texts.extend(record.captions.iter().map(|text| (at, None, text.clone())));
        let image = match &record.image {
            ImageSource::Path(path) => std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string(),
            ImageSource::Bytes(_) => record.origin.to_string(),
        };
        squares.push(square);
        of.push((entry.id, image));
    }
    if squares.is_empty() {
        return Ok(());
    }
    let mut push = |at: usize, kind: Kind, bounds, text, embedding: &[f32]| {
        let (id, image) = of[at].clone();
        rows.push(Row { id, image, kind, bounds, text }, embedding);
        summary.count(kind);
    };
    if options.images || (options.regions && !boxes.is_empty()) {
        let boxes: &[_] = if options.regions { &boxes } else { &[] };
        let (mut regions, mut embedded) = (regions.into_iter(), 0);
        for (pictures, own) in portions(squares.len(), boxes) {
            let placed = |&(at, bounds): &(u32, [f32; 4])| (at - pictures.start as u32, bounds);
            let own: Vec<(u32, [f32; 4])> = boxes[own].iter().map(placed).collect();
            let concepts = matching::encode_placed(model, &squares[pictures.clone()], &own)?;
            if options.images {
                let embeddings = model.embed_images(&concepts.images)?.to_vec2::<f32>()?;
                let end = pictures.end;
                for (at, embedding) in pictures.zip(&embeddings).filter(|(at, _)| *at >= embedded) {
                    push(at, Kind::Image, None, None, embedding);
                }
                embedded = end;
            }
            if let Some(concepts) = concepts.regions {
                let embeddings = matching::embed(model, &concepts)?.to_vec2::<f32>()?;
                for (embedding, (at, bounds, text)) in embeddings.iter().zip(&mut regions) {
                    push(at, Kind::Region, Some(bounds), text, embedding);
                }
            }
        }
    }
    if options.texts {
        let mut problems = Vec::new();
        texts.retain(|(at, _, text)| match model.token_row(text) {
            Ok(_) => true,
            Err(error) => {
                problems.push(format!("{}: {error}", of[*at].0));
                false
            }
        });
        let words: Vec<&str> = texts.iter().map(|(_, _, text)| text.as_str()).collect();
        if !words.is_empty() {
            let embeddings = model.embed_texts(&words)?.to_vec2::<f32>()?;
            for ((at, bounds, text), embedding) in texts.into_iter().zip(&embeddings) {
                push(at, Kind::Text, bounds, Some(text), embedding);
            }
        }
        summary.left_out.extend(problems);
    }
    Ok(())
}

/// Pictures and boxes in them (by picture) in portions of at most [`REGIONS`] boxes; a picture with more comes several times.
fn portions(pictures: usize, boxes: &[(u32, [f32; 4])]) -> Vec<(Range<usize>, Range<usize>)> {
    let mut portions = Vec::new();
    let (mut first, mut start, mut end) = (0, 0, 0);
    for at in 0..pictures {
        let until = boxes.partition_point(|&(picture, _)| picture as usize <= at);
        if until - start > REGIONS && first < at {
            portions.push((first..at, start..end));
            (first, start) = (at, end);
        }
        while until - start > REGIONS {
            portions.push((at..at + 1, start..start + REGIONS));
            start += REGIONS;
        }
        end = until;
    }
    portions.push((first..pictures, start..end));
    portions
}

/// A short name for many names.
pub(super) fn digest<'a>(names: impl Iterator<Item = &'a str>) -> u64 {
    names.fold(0, |digest, name| hash_bytes(format!("{digest:x} {name}").as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_come_in_portions() {
        let boxes = |counts: &[usize]| -> Vec<(u32, [f32; 4])> {
            let of = |(at, &count): (u32, &usize)| std::iter::repeat_n((at, [0.5; 4]), count);
            (0..).zip(counts).flat_map(of).collect()
        };
        let cut = |counts: &[usize]| portions(counts.len(), &boxes(counts));
        assert_eq!(cut(&[0, 0]), [(0..2, 0..0)]);
        assert_eq!(cut(&[100, 28, 0]), [(0..3, 0..128)]);
        assert_eq!(cut(&[100, 29, 1]), [(0..1, 0..100), (1..3, 100..130)]);
        assert_eq!(cut(&[1, 300, 2]), [(0..1, 0..1), (1..2, 1..129), (1..2, 129..257), (1..3, 257..303)]);
    }
}
