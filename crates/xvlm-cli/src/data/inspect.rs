//! `xvlm data inspect`: what a model sees of a data set.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde::Serialize;
use xvlm::data::{
    BatchBuilder, BatchConfig, BrokenRecord, CaptionBatch, ImageCache, Padding, Rect, RegionBatch, TextTokenizer,
    scenes,
};
use xvlm::tasks::PretrainConfig;
use xvlm::{Picture, PixelBox};

use super::Shards;
use crate::draw;
use crate::output::{self, CliError};

/// Print samples of a data set as training draws them, and draw them with their boxes
///
/// Pictures are cropped, mirrored and changed, texts cleaned and cut, as the configuration says. The sheet is a PNG with
/// the pictures side by side, whose boxes have the numbers that the list of texts has.
#[derive(Args)]
pub(crate) struct Inspect {
    #[command(flatten)]
    shards: Shards,
    /// Which stream of pre-training to draw from
    #[arg(long, value_enum, default_value_t = Stream::Regions)]
    stream: Stream,
    /// Number of pictures
    #[arg(long, value_name = "N", default_value_t = 12, value_parser = clap::value_parser!(u16).range(1..=400))]
    count: u16,
    /// Which batch of a run to draw
    #[arg(long, value_name = "N", default_value_t = 0)]
    step: u64,
    /// PNG file to draw them into
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Configuration file of a run [default: the preset base-4m]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Replace one value of the configuration, such as data.augment=null; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the samples as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Stream {
    /// Whole pictures with a text each
    Captions,
    /// Pictures with texts of parts of them
    Regions,
}

/// One picture.
#[derive(Serialize)]
pub(crate) struct Sample {
    record: String,
    pub(crate) texts: Vec<Shown>,
    #[serde(skip)]
    picture: Picture,
}

/// One text.
#[derive(Serialize)]
pub(crate) struct Shown {
    text: String,
    /// Its tokens, with those masked that are to be predicted, if that is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) masked: Option<String>,
    /// In pixels of the picture as it is seen: `xmin, ymin, xmax, ymax`. None of a text of the whole.
    #[serde(rename = "box")]
    bounds: Option<[f32; 4]>,
}

impl Shown {
    /// A text, and its box in pixels.
    pub(crate) fn new(text: String, bounds: Option<[f32; 4]>) -> Self {
        Self { text, masked: None, bounds }
    }
}

impl Inspect {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let config = match &self.config {
            Some(path) => PretrainConfig::open(path, &self.set)?,
            None => PretrainConfig::preset("base-4m", &self.set)?,
        };
        // Texts are shown, and none of their tokens: instead of the preset's any vocabulary that knows the letters does.
        let of_preset = PretrainConfig::preset("base-4m", &[])?.tokenizer;
        let is_told = |path: &PathBuf| self.config.is_some() || of_preset.as_ref() != Some(path);
        let tokenizer = match config.tokenizer.filter(is_told) {
            Some(path) => TextTokenizer::from_file(path)?,
            None => TextTokenizer::from_vocabulary(&scenes::vocabulary())?,
        };
        let count = usize::from(self.count);
        let data = BatchConfig {
            resolution: config.model.vision_config.image_res(),
            final_stride: config.model.vision_config.stride(),
            batch_size: count,
            max_images: count,
            max_regions: count * config.data.regions_per_image,
            padding: Padding::None,
            ..config.data
        };
        let side = data.resolution;
        let dataset = Arc::new(self.shards.open()?);
        let say_broken = |broken: &BrokenRecord| output::say(&format!("left out: {broken}"));
        dataset.broken().examples().iter().for_each(say_broken);
        let builder = BatchBuilder::new(dataset, Arc::new(tokenizer), data, Arc::new(ImageCache::new(0)))?;
        let samples = match self.stream {
            Stream::Captions => of_captions(builder.captions(self.step)?, side),
            Stream::Regions => of_regions(builder.regions(self.step)?, side),
        };
        builder.broken().iter().for_each(say_broken);
        if let Some(path) = &self.out {
            output::write(path, &sheet(&samples.iter().collect::<Vec<_>>(), side as u32).to_png()?)?;
        }
        output::print(self.json, &samples, |samples| list(samples))
    }
}

/// The pictures of a batch of the image stream.
pub(crate) fn of_captions(batch: CaptionBatch, side: usize) -> Vec<Sample> {
    let pictures = pictures(&batch.pixels, side);
    let rows = batch.origins.into_iter().zip(batch.text.texts).zip(pictures);
    let sample = |((record, text), picture)| {
        let texts = vec![Shown::new(text, None)];
        Sample { record, texts, picture }
    };
    rows.map(sample).collect()
}

/// The pictures of a batch of the region stream.
pub(crate) fn of_regions(batch: RegionBatch, side: usize) -> Vec<Sample> {
    let pictures = pictures(&batch.pixels, side);
    let rows = batch.origins.into_iter().zip(pictures);
    let mut samples: Vec<Sample> =
        rows.map(|(record, picture)| Sample { record, texts: Vec::new(), picture }).collect();
    for (row, text) in batch.text.texts.into_iter().enumerate() {
        let bounds = (!batch.is_image[row]).then_some(edges(batch.boxes[row], side));
        samples[batch.image_index[row] as usize].texts.push(Shown::new(text, bounds));
    }
    samples
}

/// Pictures of normalised pixels `[N, 3, side, side]`, with the texts of each.
pub(crate) fn of_pixels(pixels: &[f32], side: usize, texts: impl Iterator<Item = Vec<Shown>>) -> Vec<Sample> {
    let numbered = pictures(pixels, side).zip(texts).enumerate();
    let sample = |(i, (picture, texts))| Sample { record: format!("picture {i}"), texts, picture };
    numbered.map(sample).collect()
}

/// A box `(cx, cy, w, h)` in fractions as its edges in pixels.
pub(crate) fn edges(bounds: [f32; 4], side: usize) -> [f32; 4] {
    let [cx, cy, w, h] = bounds.map(|share| share * side as f32);
    [cx - w / 2.0, cy - h / 2.0, cx + w / 2.0, cy + h / 2.0]
}

/// The texts of pictures, which are numbered as they stand on the sheet.
pub(crate) fn list(samples: &[Sample]) -> String {
    let lines = samples.iter().enumerate().map(|(i, sample)| listed(i + 1, sample));
    lines.collect::<Vec<_>>().join("\n")
}

/// The pictures of normalised pixels `[N, 3, side, side]`.
fn pictures(pixels: &[f32], side: usize) -> impl Iterator<Item = Picture> {
    let each = pixels.chunks_exact(3 * side * side);
    each.filter_map(move |pixels| Picture::from_normalised(pixels, side as u32, side as u32))
}

/// The pictures side by side, each with its boxes.
pub(crate) fn sheet(samples: &[&Sample], side: u32) -> Picture {
    /// Pixels of white between two pictures.
    const GAP: u32 = 4;
    let columns = (1..).find(|n| n * n >= samples.len()).unwrap_or(1).max(1) as u32;
    let rows = (samples.len() as u32).div_ceil(columns).max(1);
    let length = |count: u32| count * (side + GAP) + GAP;
    let mut sheet = Picture::blank(length(columns), length(rows), [255; 3]);
    for (i, sample) in (0..).zip(samples) {
        let mut picture = sample.picture.clone();
        let bounds = sample.texts.iter().filter_map(|shown| shown.bounds);
        let boxes = bounds.map(|[xmin, ymin, xmax, ymax]| PixelBox { xmin, ymin, xmax, ymax });
        draw::number_boxes(&mut picture, &boxes.collect::<Vec<_>>());
        let at = |place: u32| GAP + place * (side + GAP);
        sheet.put(&picture, Rect { x: at(i % columns), y: at(i / columns), width: side, height: side });
    }
    sheet
}

/// A picture's texts; those with a box have the number that the box has on the sheet.
fn listed(number: usize, sample: &Sample) -> String {
    let mut boxes = 0;
    let mut lines = vec![format!("{number}. {}", sample.record)];
    for Shown { text, masked, bounds } in &sample.texts {
        lines.push(match bounds {
            None => format!("   whole: {text}"),
            Some(bounds) => {
                boxes += 1;
                format!("   {boxes}: {text}  {}", place(*bounds))
            }
        });
        lines.extend(masked.as_ref().map(|masked| format!("      {masked}")));
    }
    lines.join("\n")
}

fn place(bounds: [f32; 4]) -> String {
    let [xmin, ymin, xmax, ymax] = bounds.map(f32::round);
    format!("({xmin}, {ymin})-({xmax}, {ymax})")
}
