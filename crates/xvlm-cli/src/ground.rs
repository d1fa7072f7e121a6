//! `xvlm ground`: where phrases point in pictures.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use xvlm::data::annotations::read_proposals;
use xvlm::{Heated, Layers, Picture, PixelBox, Proposal};

use crate::draw;
use crate::output::{self, CliError, Rows};
use crate::predict::{About, Look, edges, percent, worded};

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
    /// Write the picture with numbered boxes, or with --heat a panel for each phrase, to this PNG file; of several pictures to
    /// PNG files in this folder
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
#[derive(Serialize)]
struct Pointed {
    #[serde(flatten)]
    heated: Heated,
    #[serde(skip_serializing_if = "Option::is_none")]
    heat: Option<Vec<Vec<f32>>>,
    /// The best first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    proposals: Vec<Proposal>,
}

impl Ground {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let texts = worded(&self.texts)?;
        if let (Some(path), 2..) = (&self.draw, self.look.images.len())
            && (path.is_file() || path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png")))
        {
            let (expected, found) = ("a folder, since there are several pictures", path.display().to_string());
            return Err(CliError::Option { option: "--draw", expected, found });
        }
        if self.heat { self.heat(&texts) } else { self.boxes(&texts) }
    }

    fn boxes(&self, texts: &[&str]) -> Result<(), CliError> {
        let mut found = self.look.ask(|view| view.ground(texts))?;
        self.draw(&mut found, |about| {
            let boxes: Vec<_> = about.results.iter().map(|found| found.bounds).collect();
            draw::number_boxes(&mut about.picture, &boxes);
            about.picture.to_png()
        })?;
        self.look.print(&found, |i, found| row(i, &found.text, &found.bounds, found.probability))
    }

    fn heat(&self, texts: &[&str]) -> Result<(), CliError> {
        let proposals = self.proposals.as_deref().map(|file| proposals(file, &self.look.images)).transpose()?;
        let layers = self.layer.map_or(Layers::All, Layers::One);
        let grid = |heated: &Heated| heated.map.values.chunks(heated.map.side).map(<[f32]>::to_vec).collect();
        let pointed =
            |heated: Heated| Pointed { heat: self.grid.then(|| grid(&heated)), proposals: Vec::new(), heated };
        let mut found =
            self.look.ask(|view| Ok(view.heat(texts, layers)?.into_iter().map(pointed).collect::<Vec<_>>()))?;
        for (about, boxes) in found.iter_mut().zip(proposals.iter().flatten()) {
            for pointed in &mut about.results {
                pointed.proposals = pointed.heated.rank(boxes);
                pointed.heated.bounds = pointed.proposals[0].bounds;
            }
        }
        self.draw(&mut found, |about| {
            let panels = about.results.iter().enumerate();
            let panels = panels.map(|(i, pointed)| panel(&about.picture, i, &pointed.heated));
            let panels = panels.collect::<Result<Vec<_>, xvlm::Error>>()?;
            Ok::<_, xvlm::Error>(draw::tiles(&panels, COLUMNS).unwrap_or_else(|| about.picture.clone()).to_png()?)
        })?;
        self.look
            .print(&found, |i, Pointed { heated, .. }| row(i, &heated.text, &heated.bounds, Some(heated.probability)))
    }

    /// Draws each picture, and writes it where `--draw` says.
    fn draw<T, E: Into<xvlm::Error>>(
        &self,
        found: &mut [About<T>],
        draw: impl Fn(&mut About<T>) -> Result<Vec<u8>, E>,
    ) -> Result<(), CliError> {
        let Some(path) = &self.draw else { return Ok(()) };
        let drawn = found.iter_mut().map(|about| draw(about).map_err(|error| CliError::from(error.into())));
        let drawn = drawn.collect::<Result<Vec<_>, _>>()?;
        let paths = match found {
            [_] => vec![path.clone()],
            several => {
                std::fs::create_dir_all(path).map_err(CliError::io(path))?;
                names(several.iter().map(|about| about.image.as_path())).map(|name| path.join(name)).collect()
            }
        };
        paths.iter().zip(drawn).try_for_each(|(path, png)| output::write(path, &png))
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
