//! `xvlm match`: how well texts tell pictures and regions of them.

use std::path::Path;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use xvlm::data::DataError;
use xvlm::data::transform::clip_box;
use xvlm::{Bundled, Picture, PixelBox};

use crate::look::{Look, Question, edges, percent, worded};
use crate::output::CliError;
use crate::sweep;

/// Say how well texts tell a picture, or regions of it
///
/// Prints, for each picture and each text, the probability that they belong together, and the cosine (-1 to 1) of their
/// embeddings, which is what a search over many pictures compares first. With --box, the same for what is inside the boxes.
#[derive(Args)]
pub(crate) struct Match {
    #[command(flatten)]
    look: Look,
    /// Text, such as "a red circle above a blue star"; repeatable
    #[arg(long = "text", value_name = "TEXT", required = true)]
    texts: Vec<String>,
    /// Box in pixels of each picture: its left, upper, right and lower edge; repeatable
    #[arg(long = "box", value_name = "XMIN,YMIN,XMAX,YMAX", value_parser = parse_box)]
    boxes: Vec<PixelBox>,
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

#[derive(Serialize, Deserialize)]
struct Matched {
    #[serde(default, rename = "box", skip_serializing_if = "Option::is_none")]
    bounds: Option<PixelBox>,
    #[serde(flatten)]
    matched: xvlm::Match,
}

impl Match {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let (texts, images, boxes) = (worded(&self.texts)?, self.look.images()?, &self.boxes);
        let check = |image: &Path, picture: &Picture| {
            let (width, height) = (picture.width(), picture.height());
            match boxes.iter().position(|bounds| clip_box(bounds.sides(), width, height).is_none()) {
                Some(i) => Err(DataError::BoxOutside {
                    origin: image.display().to_string(),
                    field: format!("box {i}"),
                    bbox: boxes[i].sides(),
                    width,
                    height,
                }),
                None => Ok(()),
            }
        };
        let found = self.look.ask(Bundled::General, &images, |asking| {
            let predictor = asking.predictor;
            let question =
                Question { name: "matches", options: sweep::options(&json!({ "texts": texts, "boxes": boxes }))? };
            asking.of_each(question, check, |_, pictures| {
                if boxes.is_empty() {
                    let named = |matches: Vec<xvlm::Match>| {
                        matches.into_iter().map(|matched| Matched { bounds: None, matched }).collect()
                    };
                    return Ok(predictor.match_images(&pictures, &texts)?.into_iter().map(named).collect());
                }
                let boxed = |matches: Vec<Vec<xvlm::Match>>| {
                    let of_boxes = boxes.iter().zip(matches).flat_map(|(&bounds, matches)| {
                        matches.into_iter().map(move |matched| Matched { bounds: Some(bounds), matched })
                    });
                    of_boxes.collect()
                };
                Ok(predictor.match_regions_of(&pictures, boxes, &texts)?.into_iter().map(boxed).collect())
            })
        })?;
        self.look.tell(found, |_, Matched { bounds, matched }| {
            let bounds = bounds.as_ref().map(|bounds| edges(bounds) + "  ");
            let name = format!("{}{}", bounds.unwrap_or_default(), matched.text);
            let probability = percent(matched.probability);
            vec![(name, Some(format!("{probability:>7}  cosine {:6.3}", matched.similarity)))]
        })
    }
}
