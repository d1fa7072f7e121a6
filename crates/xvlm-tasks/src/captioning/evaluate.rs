//! How well a model describes a data set.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};
use xvlm_data::annotations::{CaptionItem, read_captions};
use xvlm_data::scenes::{CaptionCheck, check_caption, read_scenes};
use xvlm_data::{DataError, Picture, Place};
use xvlm_metrics::captions::cider::cider;
use xvlm_metrics::captions::{bleu, ptb, rouge_l};

use super::{Writing, caption};
use crate::error::{TaskError, wrong_data};
use crate::generate::Written;
use crate::json_id;
use crate::model::Model;
use crate::some;
use crate::sweep::{LeftOut, Sweep, Work};

/// What a model wrote about each image of a data set, and how good it is.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The images that were described, with their reference captions.
    pub items: Vec<CaptionItem>,
    /// What was written about each.
    pub answers: Vec<Written>,
    /// Against the references; none if no image has any.
    pub scores: Option<CaptionScores>,
    /// What is right about each, where it is known what is true.
    pub checks: Vec<CaptionCheck>,
    /// How often what is right, where it is known what is true.
    pub truth: Option<TruthScores>,
    /// Identifiers of the images about which no word was written: nothing, or punctuation alone. They are scored.
    pub wordless: Vec<String>,
    /// What is not scored: images that cannot be read, and images without references where others have them.
    pub left_out: Vec<LeftOut>,
}

/// Captions against references, as the official evaluation scores them, PTB tokenisation included: fractions, but that CIDEr
/// reaches 10.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct CaptionScores {
    /// BLEU-1.
    #[serde(rename = "bleu_1")]
    pub bleu1: f64,
    /// BLEU-2.
    #[serde(rename = "bleu_2")]
    pub bleu2: f64,
    /// BLEU-3.
    #[serde(rename = "bleu_3")]
    pub bleu3: f64,
    /// BLEU-4.
    #[serde(rename = "bleu_4")]
    pub bleu4: f64,
    /// ROUGE-L.
    pub rouge_l: f64,
    /// CIDEr, with the document frequencies of the references.
    pub cider: f64,
    /// Number of captions.
    pub count: usize,
}

impl CaptionScores {
    /// Scores captions, each against the references of its image.
    ///
    /// # Errors
    /// If there is no caption, or one has no reference.
    pub fn new(captions: &[&str], references: &[&[String]]) -> Result<Self, TaskError> {
        let counts: Vec<usize> = references.iter().map(|texts| texts.len()).collect();
        let texts: Vec<&str> = references.iter().flat_map(|texts| texts.iter().map(String::as_str)).collect();
        let mut tokenised = ptb::tokenize_all(&texts).into_iter();
        let references: Vec<Vec<String>> =
            counts.into_iter().map(|count| tokenised.by_ref().take(count).collect()).collect();
        let captions = ptb::tokenize_all(captions);
        let [bleu1, bleu2, bleu3, bleu4] = bleu(&captions, &references)?;
        let each = cider(&captions, &references)?;
        Ok(Self {
            bleu1,
            bleu2,
            bleu3,
            bleu4,
            rouge_l: rouge_l(&captions, &references)?,
            cider: each.iter().sum::<f64>() / each.len().max(1) as f64,
            count: captions.len(),
        })
    }
}

/// Captions checked against the scenes they are about, in percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct TruthScores {
    /// Objects, colours and relation are right, all in the same caption.
    pub right: f64,
    /// At least two objects are named, and all that are named are there.
    pub objects: f64,
    /// All objects are named with their colours.
    pub colours: f64,
    /// A relation is told, and all that are told hold.
    pub relation: f64,
    /// Everything is right, sizes, textures and background included.
    pub all: f64,
}

impl TruthScores {
    fn new(checks: &[CaptionCheck]) -> Self {
        let share = |right: fn(&CaptionCheck) -> bool| {
            100.0 * checks.iter().filter(|check| right(check)).count() as f64 / checks.len().max(1) as f64
        };
        Self {
            right: share(|check| check.objects_right && check.colours_right && check.relation_right),
            objects: share(|check| check.objects_right),
            colours: share(|check| check.colours_right),
            relation: share(|check| check.relation_right),
            all: share(CaptionCheck::all_right),
        }
    }
}

/// Gives images the references of a file of their own (`test_gt_file` of the original, which
/// [`xvlm_data::annotations::read_references`] reads) in place of those they have.
///
/// # Errors
/// If the file, which errors call `file`, has references of images that are not among the items: such images would not be scored,
/// and nobody would know.
pub fn with_references(
    items: Vec<CaptionItem>,
    mut references: BTreeMap<String, Vec<String>>,
    file: &str,
) -> Result<Vec<CaptionItem>, TaskError> {
    let own = |item| {
        let item: CaptionItem = item;
        CaptionItem { captions: references.remove(&item.id).unwrap_or_default(), ..item }
    };
    let items: Vec<CaptionItem> = CaptionItem::by_image(items).into_iter().map(own).collect();
    match references.keys().next() {
        None => Ok(items),
        Some(first) => {
            let expected = "references of the images that are described alone";
            let found = format!("those of {} others, image {first} among them", references.len());
            Err(wrong_data(file, Place::Whole, "image_id", expected, found))
        }
    }
}

/// Describes images, `batch` at a time, and scores the descriptions against the references of the items; items of one image are
/// made one.
///
/// # Errors
/// As [`Sweep::run`], and if the model does not caption.
pub fn evaluate(
    model: &Model,
    items: Vec<CaptionItem>,
    writing: &Writing,
    batch: usize,
    sweep: &mut Sweep,
) -> Result<Evaluation, TaskError> {
    let items = CaptionItem::by_image(items);
    let work = Work { name: "captions", options: json!(writing), batch };
    let name = |item: &CaptionItem| json!([item.id, item.image]).to_string();
    let answers = sweep.run(&work, &items, name, |items| {
        let opened: Vec<Result<Picture, DataError>> = items.par_iter().map(|item| Picture::open(&item.image)).collect();
        let (mut pictures, mut problems) = (Vec::new(), Vec::new());
        for opened in opened {
            problems.push(opened.map(|picture| pictures.push(picture)));
        }
        let mut written = match pictures.is_empty() {
            true => Vec::new(),
            false => caption(model, &model.encode(&pictures)?, writing)?,
        }
        .into_iter();
        Ok(problems.into_iter().filter_map(|opened| opened.map(|()| written.next()).transpose()).collect())
    })?;
    let mut left_out = Vec::new();
    let has_references = items.iter().any(|item| !item.captions.is_empty());
    for (number, item) in items.iter().enumerate().filter(|(_, item)| has_references && item.captions.is_empty()) {
        if answers.given[number].is_some() {
            let problem = format!("image {}: expected reference captions, found none", item.id);
            left_out.push(LeftOut { item: number, problem });
        }
    }
    let (items, answers, unread) = answers.split(items);
    left_out.extend(unread);
    left_out.sort_by_key(|out| out.item);
    let scored = items.iter().zip(&answers).filter(|(item, _)| !item.captions.is_empty());
    let (captions, references): (Vec<&str>, Vec<&[String]>) =
        scored.map(|(item, written)| (written.text.as_str(), item.captions.as_slice())).unzip();
    let scores = match captions.is_empty() {
        true => None,
        false => Some(CaptionScores::new(&captions, &references)?),
    };
    let is_wordless = |written: &Written| !written.text.chars().any(char::is_alphanumeric);
    let wordless = items.iter().zip(&answers).filter(|(_, written)| is_wordless(written));
    let wordless = wordless.map(|(item, _)| item.id.clone()).collect();
    Ok(Evaluation { items, answers, scores, checks: Vec::new(), truth: None, wordless, left_out })
}

/// Evaluates on `captions.json` of a folder; if there is `scenes.json`, as in one of the built-in world, the descriptions are
/// checked against what is true, too.
///
/// # Errors
/// As [`evaluate_scenes`], and if `captions.json` cannot be read, has a broken item, or has none.
pub fn evaluate_folder(
    model: &Model,
    data: &Path,
    writing: &Writing,
    batch: usize,
    sweep: &mut Sweep,
) -> Result<Evaluation, TaskError> {
    let file = "captions.json";
    let items = some(read_captions(data.join(file))?, data, file)?;
    evaluate_scenes(model, items, data, writing, batch, sweep)
}

/// Evaluates on the images of `captions.json` of a folder that are given; if there is `scenes.json`, the descriptions are checked
/// against what is true, too.
///
/// # Errors
/// As [`evaluate`], and if there is `scenes.json` without the scene of an image.
pub fn evaluate_scenes(
    model: &Model,
    items: Vec<CaptionItem>,
    data: &Path,
    writing: &Writing,
    batch: usize,
    sweep: &mut Sweep,
) -> Result<Evaluation, TaskError> {
    let scenes = data.join("scenes.json");
    if !scenes.exists() {
        return evaluate(model, items, writing, batch, sweep);
    }
    let truths = read_scenes(&scenes)?;
    let truths: BTreeMap<String, _> = truths.iter().map(|scene| (scene.id.to_string(), scene)).collect();
    if let Some(item) = items.iter().find(|item| !truths.contains_key(&item.id)) {
        let found = format!("none of image {}", item.id);
        return Err(wrong_data(scenes, Place::Whole, "id", "the scene of each image", found));
    }
    let mut done = evaluate(model, items, writing, batch, sweep)?;
    let check = |(item, written): (&CaptionItem, &Written)| {
        truths.get(&item.id).map(|scene| check_caption(scene, &written.text)).unwrap_or_default()
    };
    done.checks = done.items.iter().zip(&done.answers).map(check).collect();
    done.truth = Some(TruthScores::new(&done.checks));
    Ok(done)
}

/// Writes what was written as COCO's evaluation reads it: `[{"image_id": …, "caption": …}]`, identifiers that are numbers as
/// numbers.
///
/// # Errors
/// If the file cannot be written.
pub fn write_results(items: &[CaptionItem], answers: &[Written], out: &mut dyn Write) -> std::io::Result<()> {
    let results = items.iter().zip(answers);
    let results = results.map(|(item, written)| json!({"image_id": json_id(&item.id), "caption": written.text}));
    write!(out, "{}", Value::Array(results.collect()))
}
