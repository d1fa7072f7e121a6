//! Image–text retrieval: the dual encoder proposes, matching re-ranks (§4.2 of the paper).
//!
//! # What is held in memory
//!
//! A set of any size is worked through with the embeddings of all images and texts (1 KB each in the base model), the
//! candidates, and the images of one batch. An image is encoded twice: for its embedding, and when it is matched with all
//! texts that propose it or that it proposes. Keeping the patch tokens instead (0.6 MB an image at 384 pixels, 3 GB for the test
//! split of COCO) would spare one pass of the vision encoder for about 1,500 passes of the fusion layers. Encoded texts are
//! kept as long as they fit into [`Options::memory_mib`]; beyond that, those that a batch needs are encoded again.

mod candidates;
mod matching;
mod texts;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use candle_core::Tensor;
use rayon::prelude::*;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::json;
use xvlm_data::annotations::RetrievalItem;
use xvlm_data::tokens::hash_bytes;
use xvlm_data::{DataError, Picture, TextTensors, pre_caption};
use xvlm_encoders::{Pass, Task, Xvlm};
use xvlm_metrics::retrieval::RetrievalScores;
use xvlm_train::Losses;
use xvlm_train::ranks::Communicator;

use crate::align::{Alignment, Negatives};
use crate::config::{ItcGradient, Objective};
use crate::error::{SweepProblem, TaskError};
use crate::generate::Source;
use crate::model::{ImageTokens, Model};
use crate::sweep::{LeftOut, Sweep, Work};
use candidates::{Matches, both_ways};
use matching::match_images;
use texts::encode_texts;

pub(crate) use candidates::{nearest, propose};
pub(crate) use matching::{Compared, match_all};

/// The losses of fine-tuning (`models/model_retrieval.py`): ITC and ITM of each image with its text. Texts of equal key are
/// about the same image. Where several `ranks` train together, ITC compares the samples of all.
///
/// # Errors
/// If a tensor operation fails, or the model has no heads for it.
pub fn losses(
    model: &Xvlm,
    images: &ImageTokens,
    texts: &TextTensors,
    pass: &Pass,
    negatives: Negatives,
    ranks: Option<(&Arc<dyn Communicator>, ItcGradient)>,
) -> candle_core::Result<Losses> {
    let objectives = [Objective::Itc, Objective::Itm];
    let alignment = Alignment { model, objectives: &objectives, pass, weights: None, ranks };
    Ok(Losses(alignment.losses(texts, Some(&Source::images(images)?), None, negatives)?))
}

/// How retrieval is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many candidates of the dual encoder are matched, both ways. What is not among them is not found.
    pub k_test: usize,
    /// Images that are encoded at a time.
    pub batch_size: usize,
    /// Texts that are encoded at a time.
    pub batch_size_text: usize,
    /// Memory for encoded texts, in MiB.
    pub memory_mib: usize,
}

impl Options {
    /// The original's batch sizes, with a number of candidates.
    pub fn new(k_test: usize) -> Self {
        Self { k_test, batch_size: 64, batch_size_text: 256, memory_mib: 1024 }
    }
}

/// An image that is searched, or searched with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its identifier.
    pub id: String,
    /// Its file.
    pub path: PathBuf,
}

/// A text that is searched, or searched with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Its number in the annotations: all captions of all files are counted from 0, in their order.
    pub number: usize,
    /// Its image, as an index of [`Evaluation::images`].
    pub image: usize,
    /// The caption.
    pub caption: String,
}

/// Candidates and the logit of their match, the best first.
pub type Ranking = Vec<(u32, f32)>;

/// Retrieval over a data set.
pub struct Evaluation {
    /// The images that took part.
    pub images: Vec<Image>,
    /// The texts that took part.
    pub texts: Vec<Text>,
    /// For each image its candidates among the texts.
    pub image_to_text: Vec<Ranking>,
    /// For each text its candidates among the images.
    pub text_to_image: Vec<Ranking>,
    /// Recalls both ways.
    pub scores: RetrievalScores,
    /// What did not take part, and why; by the number of the annotation.
    pub left_out: Vec<LeftOut>,
}

impl Evaluation {
    /// What `xvlm score retrieval` reads: for each image the numbers of its texts, and for each text the identifiers of its
    /// images, the best first.
    pub fn results(&self) -> serde_json::Value {
        let texts = |ranking: &Ranking| -> Vec<usize> {
            ranking.iter().map(|&(text, _)| self.texts[text as usize].number).collect()
        };
        let images = |ranking: &Ranking| -> Vec<&str> {
            ranking.iter().map(|&(image, _)| self.images[image as usize].id.as_str()).collect()
        };
        let of_images = self.images.iter().zip(&self.image_to_text);
        let of_texts = self.texts.iter().zip(&self.text_to_image);
        json!({
            "image_to_text": of_images.map(|(image, found)| (image.id.clone(), json!(texts(found)))).collect::<serde_json::Map<_, _>>(),
            "text_to_image": of_texts.map(|(text, found)| (text.number.to_string(), json!(images(found)))).collect::<serde_json::Map<_, _>>(),
        })
    }
}

/// Floats as base64 of their bytes (little endian): short, and exact.
#[derive(Clone, Debug, PartialEq)]
struct Packed(Vec<f32>);

impl Serialize for Packed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self.0.iter().flat_map(|x| x.to_le_bytes()).collect();
        serializer.serialize_str(&BASE64.encode(bytes))
    }
}

impl<'de> Deserialize<'de> for Packed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = BASE64.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)?;
        let (floats, rest) = bytes.as_chunks::<4>();
        match rest.is_empty() {
            true => Ok(Self(floats.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())),
            false => Err(D::Error::custom("expected floats of four bytes each")),
        }
    }
}

/// The set as it is evaluated: each image once, each text with its tokens.
#[derive(Default)]
struct Set {
    images: Vec<Image>,
    texts: Vec<Text>,
    tokens: Vec<Vec<u32>>,
    /// The first annotation of each image.
    first: Vec<usize>,
    /// The annotation of each text.
    item: Vec<usize>,
    left_out: Vec<LeftOut>,
}

impl Set {
    fn new(model: &Model, items: &[RetrievalItem]) -> Result<Self, TaskError> {
        let mut set = Self::default();
        let mut places: HashMap<&str, usize> = HashMap::new();
        let (config, mut number) = (model.config(), 0);
        for (item, annotated) in items.iter().enumerate() {
            let RetrievalItem { image, image_id, captions, .. } = annotated;
            let place = *places.entry(image_id.as_str()).or_insert_with(|| {
                set.images.push(Image { id: image_id.clone(), path: image.clone() });
                set.first.push(item);
                set.images.len() - 1
            });
            let known = &set.images[place].path;
            let is_other = known != image;
            if is_other {
                let (known, found) = (known.display(), image.display());
                let problem = format!("image {image_id}: expected one file, {known}, found {found} too");
                set.left_out.push(LeftOut { item, problem });
            }
            for caption in captions {
                number += 1;
                if is_other {
                    continue;
                }
                match pre_caption(caption, config.max_words) {
                    Ok(cleaned) => {
                        set.tokens.push(model.tokenizer().encode(&cleaned, config.max_tokens, false)?);
                        set.texts.push(Text { number: number - 1, image: place, caption: caption.clone() });
                        set.item.push(item);
                    }
                    Err(error) => {
                        set.left_out.push(LeftOut { item, problem: format!("text of image {image_id}: {error}") });
                    }
                }
            }
        }
        let mut has_text = vec![false; set.images.len()];
        set.texts.iter().for_each(|text| has_text[text.image] = true);
        let problem = |image: &Image| Some(format!("image {}: expected at least one text, found none", image.id));
        set.keep(&has_text, problem);
        Ok(set)
    }

    /// Leaves out images, and their texts with them.
    fn keep(&mut self, kept: &[bool], problem: impl Fn(&Image) -> Option<String>) {
        let mut place = vec![usize::MAX; self.images.len()];
        let (mut images, mut first) = (Vec::new(), Vec::new());
        for (at, (image, item)) in std::mem::take(&mut self.images).into_iter().zip(&self.first).enumerate() {
            if kept[at] {
                place[at] = images.len();
                images.push(image);
                first.push(*item);
            } else if let Some(problem) = problem(&image) {
                self.left_out.push(LeftOut { item: *item, problem });
            }
        }
        (self.images, self.first) = (images, first);
        let texts = std::mem::take(&mut self.texts).into_iter().zip(std::mem::take(&mut self.tokens));
        let texts = texts.zip(std::mem::take(&mut self.item));
        for ((text, tokens), item) in texts.filter(|((text, _), _)| kept[text.image]) {
            self.texts.push(Text { image: place[text.image], ..text });
            self.tokens.push(tokens);
            self.item.push(item);
        }
    }
}

/// Evaluates retrieval over annotated images; matching re-ranks the `k_test` best of the dual encoder, both ways. Annotations of
/// equal identifier are about one image.
///
/// Left out, and so neither searched nor counted as not found: images that cannot be read, with their texts; texts without a
/// word; images without text; further files of an identifier that has one.
///
/// # Errors
/// If nothing is left, more than [`Sweep::max_bad_fraction`] of the annotations are left out, or the model is made for another task.
pub fn evaluate(
    model: &Model,
    items: &[RetrievalItem],
    options: Options,
    sweep: &mut Sweep,
) -> Result<Evaluation, TaskError> {
    model.fit_for("retrieval", &[Task::Pretrain, Task::Retrieval])?;
    let mut set = Set::new(model, items)?;
    let limit = sweep.max_bad_fraction;
    check_left_out(&set.left_out, items.len(), limit)?;
    let side = model.config().model.vision_config.image_res();
    let open = |images: &[&Image]| -> Vec<Result<Picture, DataError>> {
        images.par_iter().map(|image| Ok(Picture::open(&image.path)?.resized_square(side))).collect()
    };

    let work = Work { name: "retrieval-images", options: json!({}), batch: options.batch_size };
    let name = |image: &Image| json!([image.id, image.path]).to_string();
    let embedded = sweep.run(&work, &set.images, name, |images| {
        of_readable(open(images), |pictures| {
            let rows = model.embed_images(&model.encode(pictures)?)?.to_vec2::<f32>()?;
            Ok(rows.into_iter().map(Packed).collect())
        })
    })?;
    set.leave_out(&embedded.given, embedded.left_out);
    if set.images.is_empty() {
        return Err(TaskError::Empty { what: "images with texts".to_owned() });
    }
    let rows: Vec<Vec<f32>> = embedded.given.into_iter().flatten().map(|Packed(row)| row).collect();
    let image_embeddings = Tensor::new(rows, model.device())?;
    let (text_embeddings, states) = encode_texts(model.xvlm(), &set.tokens, model.precision().dtype(), options)?;
    let texts_of_image = propose(&image_embeddings, &text_embeddings, options.k_test)?;
    let images_of_text = propose(&text_embeddings, &image_embeddings, options.k_test)?;

    let wanted = both_ways(&texts_of_image, &images_of_text, &set.tokens);
    let units: Vec<usize> = (0..set.images.len()).collect();
    let work =
        Work { name: "retrieval-matches", options: json!({ "k_test": options.k_test }), batch: options.batch_size };
    // What is proposed follows from the embeddings of both, which a resumed run may have computed on another machine.
    let name = |&image: &usize| {
        let proposed: Vec<u8> = wanted[image].iter().flat_map(|text| text.to_le_bytes()).collect();
        json!([set.images[image].id, hash_bytes(&proposed)]).to_string()
    };
    let matched = sweep.run(&work, &units, name, |units| {
        let images: Vec<&Image> = units.iter().map(|&&image| &set.images[image]).collect();
        let opened = open(&images);
        let readable = units.iter().zip(&opened).filter(|(_, picture)| picture.is_ok());
        let wanted: Vec<&[u32]> = readable.map(|(&&image, _)| wanted[image].as_slice()).collect();
        of_readable(opened, |pictures| {
            let images = model.encode(pictures)?;
            let logits = match_images(model.xvlm(), &images, &set.tokens, states.as_ref(), &wanted, options)?;
            Ok(logits.into_iter().map(Packed).collect())
        })
    })?;
    if let Some(out) = matched.left_out.first() {
        // It could be read a moment ago.
        let (left_out, units) = (matched.left_out.len(), set.images.len());
        return Err(SweepProblem::TooManyBroken { left_out, units, limit: 0.0, first: out.problem.clone() }.into());
    }
    let logits = matched.given.into_iter().map(|logits| logits.map_or_else(Vec::new, |Packed(logits)| logits));
    let [image_to_text, text_to_image] = Matches::new(&wanted, logits).rankings(&texts_of_image, &images_of_text);
    check_left_out(&set.left_out, items.len(), limit)?;
    let scores = recalls(&set.texts, &image_to_text, &text_to_image);
    let Set { images, texts, mut left_out, .. } = set;
    left_out.sort_by_key(|out| out.item);
    Ok(Evaluation { images, texts, image_to_text, text_to_image, scores, left_out })
}

impl Set {
    /// Leaves out the images that have no answer.
    fn leave_out<A>(&mut self, given: &[Option<A>], left_out: Vec<LeftOut>) {
        let kept: Vec<bool> = given.iter().map(Option::is_some).collect();
        let first = &self.first;
        let named = left_out.into_iter().map(|out| LeftOut { item: first[out.item], ..out });
        self.left_out.extend(named.collect::<Vec<_>>());
        if kept.contains(&false) {
            self.keep(&kept, |_| None);
        }
    }
}

fn check_left_out(left_out: &[LeftOut], items: usize, limit: f64) -> Result<(), TaskError> {
    let mut broken: Vec<usize> = left_out.iter().map(|out| out.item).collect();
    broken.sort_unstable();
    broken.dedup();
    match left_out.first() {
        Some(first) if broken.len() as f64 > limit * items as f64 => {
            let first = first.problem.clone();
            Err(SweepProblem::TooManyBroken { left_out: broken.len(), units: items, limit, first }.into())
        }
        _ => Ok(()),
    }
}

/// Answers about the pictures that could be opened, in the places of all.
fn of_readable<A>(
    opened: Vec<Result<Picture, DataError>>,
    ask: impl FnOnce(&[Picture]) -> Result<Vec<A>, TaskError>,
) -> Result<Vec<Result<A, DataError>>, TaskError> {
    let mut pictures = Vec::with_capacity(opened.len());
    let problems: Vec<Option<DataError>> =
        opened.into_iter().map(|opened| opened.map(|picture| pictures.push(picture)).err()).collect();
    let answers = if pictures.is_empty() { Vec::new() } else { ask(&pictures)? };
    let mut answers = answers.into_iter();
    Ok(problems
        .into_iter()
        .filter_map(|problem| match problem {
            Some(problem) => Some(Err(problem)),
            None => answers.next().map(Ok),
        })
        .collect())
}

/// Images and texts that are in memory, compared.
pub struct Scores {
    /// Cosines of the dual encoder `[N, M]`.
    pub similarities: Tensor,
    /// For each image its candidates among the texts.
    pub image_to_text: Vec<Ranking>,
    /// For each text its candidates among the images.
    pub text_to_image: Vec<Ranking>,
}

/// Compares all images with all texts, given as rows of token ids, by the dual encoder, and the `k_test` best of each by
/// matching (the original's `evaluation`).
///
/// # Errors
/// If a tensor operation fails, or the model has no heads for it.
pub fn score(model: &Xvlm, images: &ImageTokens, texts: &[Vec<u32>], k_test: usize) -> candle_core::Result<Scores> {
    let options = Options { memory_mib: usize::MAX >> 20, ..Options::new(k_test) };
    let image_embeddings = model.project_image(images.tensor())?;
    let (text_embeddings, states) = encode_texts(model, texts, images.tensor().dtype(), options)?;
    let texts_of_image = propose(&image_embeddings, &text_embeddings, k_test)?;
    let images_of_text = propose(&text_embeddings, &image_embeddings, k_test)?;
    let wanted = both_ways(&texts_of_image, &images_of_text, texts);
    let texts_wanted: Vec<&[u32]> = wanted.iter().map(Vec::as_slice).collect();
    let logits = match_images(model, images, texts, states.as_ref(), &texts_wanted, options)?;
    let matches = Matches::new(&wanted, logits);
    let [image_to_text, text_to_image] = matches.rankings(&texts_of_image, &images_of_text);
    let similarities = image_embeddings.matmul(&text_embeddings.t()?)?;
    Ok(Scores { similarities, image_to_text, text_to_image })
}

/// Recalls both ways (`itm_eval` of the original). What is no candidate is not found; the original sorts it behind the
/// candidates in no order, which with fewer than ten of them finds something by chance.
fn recalls(texts: &[Text], image_to_text: &[Ranking], text_to_image: &[Ranking]) -> RetrievalScores {
    let place = |ranking: &Ranking, is_own: &dyn Fn(usize) -> bool| {
        ranking.iter().position(|&(found, _)| is_own(found as usize))
    };
    let of_images = image_to_text.iter().enumerate();
    let text_ranks = of_images.map(|(image, ranking)| place(ranking, &|text| texts[text].image == image));
    let of_texts = text_to_image.iter().zip(texts);
    let image_ranks = of_texts.map(|(ranking, text)| place(ranking, &|image| image == text.image));
    RetrievalScores::of_ranks(text_ranks, image_ranks)
}
