//! `xvlm ground`: where phrases point in pictures.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use xvlm::data::DataError;
use xvlm::data::annotations::read_proposals;
use xvlm::{Bundled, Heated, Layers, Picture, PixelBox, Proposal};

use crate::draw;
use crate::look::{Look, Question, any, edges, percent, worded};
use crate::output::{CliError, Rows};
use crate::sweep;

/// Panels of one row of a drawing.
const COLUMNS: usize = 4;
/// The longer side of a drawing is at least this many pixels.
const LEAST_SIDE: u32 = 384;

/// Find the box that a phrase means
///
/// Prints, for each phrase, a box in pixels of the picture (xmin,ymin,xmax,ymax) and the probability that the
/// phrase matches what is inside. A picture is encoded once, however many phrases there are.
///
/// With --heat, it is where the model looks while it matches the phrase with the picture, which needs no box head: the box
/// around the heat, the point it is hottest at, and the probability that the phrase tells the picture.
#[derive(Args)]
pub(crate) struct Ground {
    #[command(flatten)]
    look: Look,
    /// Phrase, such as "the red circle"; repeatable
    #[arg(long = "text", value_name = "TEXT", required = true)]
    texts: Vec<String>,
    /// Write the picture with numbered boxes, or with --heat a panel for each phrase, to this PNG file; of several, or
    /// with --images or --list, to PNG files in this folder
    #[arg(long, value_name = "PATH")]
    draw: Option<PathBuf>,
    /// Show where the model looks while it matches each phrase with the picture
    #[arg(long)]
    heat: bool,
    /// With --heat: the text layer whose cross attention is looked at [default: the sum of all that have one]
    #[arg(long, value_name = "N", requires = "heat")]
    layer: Option<usize>,
    /// With --heat: boxes to choose from, a JSON file {picture: [[x, y, w, h], …]}; pictures are named as given, by file name,
    /// or by file name without extension
    #[arg(long, value_name = "FILE", requires = "heat")]
    proposals: Option<PathBuf>,
    /// With --heat and --json: tell the heat of each patch, row by row
    #[arg(long, requires_all = ["heat", "json"])]
    grid: bool,
}

/// What is told about a phrase with `--heat`.
#[derive(Serialize, Deserialize)]
struct Pointed {
    text: String,
    #[serde(rename = "box")]
    bounds: PixelBox,
    point: [f32; 2],
    probability: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    heat: Option<Vec<Vec<f32>>>,
    /// The best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    proposals: Vec<Proposal>,
}

impl Ground {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let (texts, images) = (worded(&self.texts)?, self.look.images()?);
        if let (Some(path), false) = (&self.draw, self.look.is_of_one())
            && (path.is_file() || path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png")))
        {
            let (expected, found) = ("a folder, unless there is one --image", path.display().to_string());
            return Err(CliError::Option { option: "--draw", expected, found });
        }
        if self.heat { self.heat(&texts, &images) } else { self.boxes(&texts, &images) }
    }

    fn boxes(&self, texts: &[&str], images: &[PathBuf]) -> Result<(), CliError> {
        let drawings = self.drawings(images);
        let found = self.look.ask(Bundled::General, images, |asking| {
            let predictor = asking.predictor;
            let question = Question { name: "grounding", options: json!({ "texts": texts, "draw": self.drawn_to() }) };
            asking.of_each(question, any, |numbers, pictures| {
                let found = predictor.look_at(&pictures)?.ground(texts)?;
                for ((mut picture, found), &number) in pictures.into_iter().zip(&found).zip(numbers) {
                    let Some(path) = drawings.get(number) else { break };
                    let boxes: Vec<PixelBox> = found.iter().map(|found| found.bounds).collect();
                    draw::number_boxes(&mut picture, &boxes);
                    self.write(path, &picture)?;
                }
                Ok(found)
            })
        })?;
        self.look.tell(found, |i, found| row(i, &found.text, &found.bounds, found.probability))
    }

    fn heat(&self, texts: &[&str], images: &[PathBuf]) -> Result<(), CliError> {
        let proposals = self.proposals.as_deref().map(|file| proposals(file, images)).transpose()?;
        let layers = self.layer.map_or(Layers::All, Layers::One);
        let drawings = self.drawings(images);
        let tell = |(heated, proposals): (Heated, Vec<Proposal>)| {
            let Heated { text, bounds, point, probability, map, .. } = heated;
            let heat = self.grid.then(|| map.values.chunks(map.side).map(<[f32]>::to_vec).collect());
            Pointed { text, bounds, point, probability, heat, proposals }
        };
        let proposed = proposals.as_ref().map(sweep::digest).transpose()?;
        let found = self.look.ask(Bundled::General, images, |asking| {
            let predictor = asking.predictor;
            let options = json!({
                "texts": texts, "draw": self.drawn_to(), "layers": layers, "grid": self.grid, "proposals": proposed,
            });
            asking.of_each(Question { name: "heat", options }, any, |numbers, pictures| {
                let heated = predictor.look_at(&pictures)?.heat(texts, layers)?;
                let mut all = Vec::with_capacity(heated.len());
                for ((picture, mut heated), &number) in pictures.into_iter().zip(heated).zip(numbers) {
                    let mut ranked = vec![Vec::new(); heated.len()];
                    if let Some(boxes) = proposals.as_ref().map(|proposals| &proposals[number]) {
                        for (heated, ranked) in heated.iter_mut().zip(&mut ranked) {
                            *ranked = heated.rank(boxes)?;
                            heated.bounds = ranked[0].bounds;
                        }
                    }
                    if let Some(path) = drawings.get(number) {
                        let panels = heated.iter().enumerate().map(|(i, heated)| panel(&picture, i, heated));
                        let panels = panels.collect::<Result<Vec<_>, _>>()?;
                        self.write(path, &draw::tiles(&panels, COLUMNS).unwrap_or(picture))?;
                    }
                    all.push(heated.into_iter().zip(ranked).map(tell).collect());
                }
                Ok(all)
            })
        })?;
        self.look.tell(found, |i, told| row(i, &told.text, &told.bounds, Some(told.probability)))
    }

    /// Where the drawing of each picture goes; nowhere without `--draw`.
    fn drawings(&self, images: &[PathBuf]) -> Vec<PathBuf> {
        match &self.draw {
            None => Vec::new(),
            Some(path) if self.look.is_of_one() => vec![path.clone()],
            Some(folder) => names(images.iter().map(PathBuf::as_path)).map(|name| folder.join(name)).collect(),
        }
    }

    /// What `--draw` says, as options have it.
    fn drawn_to(&self) -> Option<Cow<'_, str>> {
        self.draw.as_deref().map(Path::to_string_lossy)
    }

    /// Writes a drawing; one of several, into the folder they have.
    fn write(&self, path: &Path, drawing: &Picture) -> Result<(), xvlm::Error> {
        if let (false, Some(folder)) = (self.look.is_of_one(), &self.draw) {
            std::fs::create_dir_all(folder).map_err(|source| DataError::Io { path: folder.clone(), source })?;
        }
        let png = drawing.to_png()?;
        Ok(xvlm::weights::write_file_atomically(path, |out| out.write_all(&png))?)
    }
}

fn row(i: usize, text: &str, bounds: &PixelBox, probability: Option<f32>) -> Rows {
    let probability = probability.map(percent).unwrap_or_default();
    vec![(format!("{}  {text}", i + 1), Some(format!("{}  {probability:>7}", edges(bounds))))]
}

/// The picture below the heat of one phrase, with its box and point; enlarged if it is small.
fn panel(picture: &Picture, i: usize, heated: &Heated) -> Result<Picture, xvlm::Error> {
    let (width, height) = (picture.width(), picture.height());
    let times = LEAST_SIDE.div_ceil(width.max(height));
    let mut panel = picture.resized(picture.rect(), width * times, height * times);
    let stretched = heated.map.stretched(panel.width(), panel.height())?;
    draw::heat(&mut panel, stretched.values());
    let scaled = |at: f32| at * times as f32;
    let PixelBox { xmin, ymin, xmax, ymax } = heated.bounds;
    let bounds = PixelBox { xmin: scaled(xmin), ymin: scaled(ymin), xmax: scaled(xmax), ymax: scaled(ymax) };
    draw::number_point(&mut panel, i, &bounds, heated.point.map(scaled));
    Ok(panel)
}

/// A PNG's name for each picture, no two the same.
fn names<'a>(images: impl Iterator<Item = &'a Path>) -> impl Iterator<Item = String> {
    let mut taken = HashSet::new();
    images.map(move |image| {
        let stem = image.file_stem().unwrap_or_default().to_string_lossy();
        let numbered = (2..).map(|number| format!("{stem}-{number}.png"));
        let mut candidates = std::iter::once(format!("{stem}.png")).chain(numbered);
        candidates.find(|name| taken.insert(name.clone())).unwrap_or_default()
    })
}

/// The proposals for each picture.
fn proposals(file: &Path, images: &[PathBuf]) -> Result<Vec<Vec<[f32; 4]>>, CliError> {
    let by_name: HashMap<String, Vec<[f32; 4]>> = read_proposals(file)?;
    let of = |image: &PathBuf| {
        let names = [Some(image.as_os_str()), image.file_name(), image.file_stem()];
        let named = names.into_iter().flatten().find_map(|name| by_name.get(name.to_string_lossy().as_ref()));
        let some = named.filter(|boxes| boxes.iter().any(|[_, _, w, h]| *w > 0.0 && *h > 0.0));
        some.cloned().ok_or_else(|| {
            let found = format!("none for {}", image.display());
            CliError::File { path: file.to_owned(), expected: "boxes for each picture", found }
        })
    };
    images.iter().map(of).collect()
}
