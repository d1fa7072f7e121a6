//! `xvlm match`: how well texts tell pictures and regions of them.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use xvlm::{Picture, PixelBox};

use crate::ModelArgs;
use crate::output::{self, CliError, Rows, table};
use crate::predict::{edges, percent, worded};

/// Pictures that are opened at a time.
const AT_ONCE: usize = 32;

/// Say how well texts tell a picture, or regions of it
///
/// Prints, for each picture and each text, the probability that they belong together, and the cosine (-1 to 1) of their
/// embeddings, which is what a search over many pictures compares first. With --box, the same for what is inside the boxes.
#[derive(Args)]
pub(crate) struct Match {
    #[command(flatten)]
    model: ModelArgs,
    /// Picture (JPEG, PNG, WebP or GIF); several may be given
    #[arg(long = "image", value_name = "FILE", required = true, num_args = 1..)]
    images: Vec<PathBuf>,
    /// Text, such as "a red circle above a blue star"; repeatable
    #[arg(long = "text", value_name = "TEXT", required = true)]
    texts: Vec<String>,
    /// Box in pixels of each picture: its left, upper, right and lower edge; repeatable
    #[arg(long = "box", value_name = "XMIN,YMIN,XMAX,YMAX", value_parser = parse_box)]
    boxes: Vec<PixelBox>,
    /// Print the result as JSON: a list with an object for each picture
    #[arg(long)]
    json: bool,
}

/// A box as it is written on the command line.
fn parse_box(text: &str) -> Result<PixelBox, String> {
    let numbers: Vec<f32> = text.split(',').map_while(|number| number.trim().parse().ok()).collect();
    match numbers.as_slice() {
        &[xmin, ymin, xmax, ymax]
            if text.split(',').count() == 4
                && numbers.iter().all(|edge| edge.is_finite())
                && xmin < xmax
                && ymin < ymax =>
        {
            Ok(PixelBox { xmin, ymin, xmax, ymax })
        }
        _ => Err(format!("expected xmin,ymin,xmax,ymax in pixels, xmin below xmax and ymin below ymax, found {text}")),
    }
}

/// What was found out about one picture.
#[derive(Serialize)]
struct About {
    image: PathBuf,
    width: u32,
    height: u32,
    results: Vec<Matched>,
}

#[derive(Serialize)]
struct Matched {
    #[serde(rename = "box", skip_serializing_if = "Option::is_none")]
    bounds: Option<PixelBox>,
    #[serde(flatten)]
    matched: xvlm::Match,
}

impl Match {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let texts = worded(&self.texts)?;
        let predictor = self.model.open()?;
        let mut found = Vec::with_capacity(self.images.len());
        for images in self.images.chunks(AT_ONCE) {
            let pictures = images.iter().map(|image| Picture::open_upright(image)).collect::<Result<Vec<_>, _>>()?;
            let results: Vec<Vec<Matched>> = if self.boxes.is_empty() {
                let whole = |matches: Vec<xvlm::Match>| {
                    matches.into_iter().map(|matched| Matched { bounds: None, matched }).collect()
                };
                predictor.match_images(&pictures, &texts)?.into_iter().map(whole).collect()
            } else {
                let regions = |picture: &Picture| -> Result<Vec<Matched>, CliError> {
                    let matches = predictor.match_regions(picture, &self.boxes, &texts)?;
                    let boxed = self.boxes.iter().zip(matches).flat_map(|(&bounds, matches)| {
                        matches.into_iter().map(move |matched| Matched { bounds: Some(bounds), matched })
                    });
                    Ok(boxed.collect())
                };
                pictures.iter().map(regions).collect::<Result<_, _>>()?
            };
            let about = |((image, picture), results): ((&PathBuf, &Picture), Vec<Matched>)| {
                let (width, height) = (picture.width(), picture.height());
                About { image: image.clone(), width, height, results }
            };
            found.extend(images.iter().zip(&pictures).zip(results).map(about));
        }
        output::print(self.json, &found, |found| {
            let mut rows = Rows::new();
            for about in found {
                if found.len() > 1 {
                    rows.push((about.image.display().to_string(), None));
                }
                rows.extend(about.results.iter().map(|Matched { bounds, matched }| {
                    let bounds = bounds.as_ref().map(|bounds| edges(bounds) + "  ");
                    let name = format!("{}{}", bounds.unwrap_or_default(), matched.text);
                    let probability = percent(matched.probability);
                    (name, Some(format!("{probability:>7}  cosine {:6.3}", matched.similarity)))
                }));
            }
            table(&rows)
        })
    }
}
