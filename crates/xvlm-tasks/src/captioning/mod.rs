//! Image captioning: what continues the prompt, and whether it is true. It is trained with [`crate::writing_loss`], then
//! perhaps on rewards ([`Scst`]).

mod scst;

use std::path::Path;

use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use xvlm_data::annotations::{CaptionItem, read_captions};
use xvlm_data::scenes::{CaptionCheck, check_caption, read_scenes};
use xvlm_data::{Picture, TextTokenizer, pre_caption};
use xvlm_encoders::Task;
use xvlm_metrics::captions::{bleu, rouge_l};

pub use scst::{Drawn, Reward, Rewarded, Scst, documents, rewarded};

use crate::error::{ConfigProblem, TaskError};
use crate::generate::{Draw, Source, Written, write_rows};
use crate::model::{ImageTokens, Model, ModelConfig};
use crate::search::{Sampling, Search};
use crate::{BATCH, Counter, some};

/// How images are described.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Writing {
    /// What captions begin with, left out of the answer. It may be empty.
    pub prompt: String,
    /// How they are searched for; of captions that are drawn, how long they are and what repetition costs.
    pub search: Search,
}

impl Writing {
    /// As the model's configuration says.
    pub fn of(config: &ModelConfig) -> Self {
        Self { prompt: config.prompt.clone(), search: config.search }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// Which is out of its range.
    fn check(&self) -> Result<(), TaskError> {
        let Search { beams, min_tokens, max_tokens, repetition_penalty, .. } = self.search;
        let problem = |field: &str, expected: String, found: String| {
            Err(ConfigProblem { file: field.to_owned(), message: format!("expected {expected}, found {found}") }.into())
        };
        if beams == 0 || max_tokens == 0 {
            let field = if beams == 0 { "beams" } else { "max_tokens" };
            return problem(field, "at least 1".to_owned(), "0".to_owned());
        }
        if min_tokens > max_tokens {
            return problem("min_tokens", format!("at most max_tokens ({max_tokens})"), min_tokens.to_string());
        }
        if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
            return problem("repetition_penalty", "a positive number".to_owned(), repetition_penalty.to_string());
        }
        Ok(())
    }
}

/// Describes each image.
///
/// # Errors
/// If the model is made for another task, a value is out of its range, the prompt leaves no room for a caption, or a tensor
/// operation fails.
pub fn caption(model: &Model, images: &ImageTokens, writing: &Writing) -> Result<Vec<Written>, TaskError> {
    continue_prompt(model, images, writing, 1, None)
}

/// Draws `count` captions of each image. The same generator in the same state gives the same captions, of an image whatever
/// images come after it.
///
/// # Errors
/// As [`caption`].
pub fn sample(
    model: &Model,
    images: &ImageTokens,
    writing: &Writing,
    sampling: Sampling,
    count: usize,
    rng: &mut ChaCha8Rng,
) -> Result<Vec<Vec<Written>>, TaskError> {
    let problem = |message| ConfigProblem { file: "sampling".to_owned(), message };
    sampling.check().map_err(problem)?;
    if count == 0 {
        return Err(problem("samples: expected at least 1, found 0".to_owned()).into());
    }
    let mut drawn = continue_prompt(model, images, writing, count, Some((sampling, rng)))?.into_iter();
    Ok((0..images.len()).map(|_| drawn.by_ref().take(count).collect()).collect())
}

/// Writes `count` captions of each image, one after the other; keys and values of an image are computed once for those that
/// are written at a time.
fn continue_prompt(
    model: &Model,
    images: &ImageTokens,
    writing: &Writing,
    count: usize,
    draw: Option<Draw>,
) -> Result<Vec<Written>, TaskError> {
    model.fit_for("captions", &[Task::Pretrain, Task::Captioning])?;
    writing.check()?;
    let config = model.config();
    let room = config.model.text_config.longest_text();
    let prompt = prompt_tokens(&writing.prompt, model.tokenizer(), config.max_words, room + 1)?;
    if prompt.len() >= room {
        let message = format!("expected fewer than {room} tokens, found {} or more", prompt.len());
        return Err(ConfigProblem { file: "prompt".to_owned(), message }.into());
    }
    let rows: Vec<(u32, Vec<u32>)> = (0..images.len() as u32)
        .flat_map(|image| std::iter::repeat_n(image, count))
        .map(|image| (image, prompt.clone()))
        .collect();
    write_rows(model, &Source::images(images)?, &rows, writing.search, draw)
}

/// `[CLS]` and the tokens of a prompt, which may be empty.
fn prompt_tokens(
    prompt: &str,
    tokenizer: &TextTokenizer,
    max_words: usize,
    max_tokens: usize,
) -> Result<Vec<u32>, TaskError> {
    let cleaned = match prompt.trim() {
        "" => String::new(),
        prompt => pre_caption(prompt, max_words)?,
    };
    Ok(tokenizer.encode(&cleaned, max_tokens, false)?)
}

/// What the model wrote about each picture of the built-in world, and what is right about it.
pub struct Evaluation {
    /// The pictures with their reference captions.
    pub items: Vec<CaptionItem>,
    /// What was written about each.
    pub written: Vec<Written>,
    /// What is right about each text.
    pub checks: Vec<CaptionCheck>,
    /// How often what is right.
    pub scores: CaptionScores,
}

/// Captions checked against the scenes they are about, in percent; BLEU-4 and ROUGE-L against the reference captions as
/// fractions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct CaptionScores {
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
    /// BLEU-4.
    pub bleu4: f64,
    /// ROUGE-L.
    pub rouge_l: f64,
    /// Number of captions.
    pub count: usize,
}

impl CaptionScores {
    fn new(items: &[CaptionItem], written: &[Written], checks: &[CaptionCheck]) -> Result<Self, TaskError> {
        let share = |right: fn(&CaptionCheck) -> bool| {
            100.0 * checks.iter().filter(|check| right(check)).count() as f64 / checks.len().max(1) as f64
        };
        let texts: Vec<&str> = written.iter().map(|written| written.text.as_str()).collect();
        let references =
            items.iter().map(|item| item.captions.iter().map(|text| pre_caption(text, usize::MAX)).collect());
        let references = references.collect::<Result<Vec<Vec<String>>, _>>()?;
        Ok(Self {
            right: share(|check| check.objects_right && check.colours_right && check.relation_right),
            objects: share(|check| check.objects_right),
            colours: share(|check| check.colours_right),
            relation: share(|check| check.relation_right),
            all: share(CaptionCheck::all_right),
            bleu4: bleu(&texts, &references)?[3],
            rouge_l: rouge_l(&texts, &references)?,
            count: checks.len(),
        })
    }
}

/// Evaluates on `captions.json` of a folder of the built-in world, whose `scenes.json` says what is true.
///
/// # Errors
/// If a file or an image cannot be read, or the two files are not about the same pictures.
pub fn evaluate(model: &Model, data: &Path, search: Search, counter: Counter) -> Result<Evaluation, TaskError> {
    let (file, scenes) = (data.join("captions.json"), data.join("scenes.json"));
    let (items, truths) = (some(read_captions(&file)?, data, "captions.json")?, read_scenes(&scenes)?);
    if items.len() != truths.len() {
        let message = format!(
            "expected {} scenes, one for each image of {}, found {}",
            items.len(),
            file.display(),
            truths.len()
        );
        return Err(ConfigProblem { file: scenes.display().to_string(), message }.into());
    }
    if let Some((item, scene)) = items.iter().zip(&truths).find(|(item, scene)| item.id != scene.id.to_string()) {
        let message = format!("expected scene {}, as in {}, found {}", item.id, file.display(), scene.id);
        return Err(ConfigProblem { file: scenes.display().to_string(), message }.into());
    }
    let mut written = Vec::with_capacity(items.len());
    for items in items.chunks(BATCH) {
        let pictures = items.iter().map(|item| Picture::open(&item.image)).collect::<Result<Vec<_>, _>>()?;
        written.extend(caption(model, &model.encode(&pictures)?, &Writing { search, ..Writing::of(model.config()) })?);
        counter(written.len(), truths.len());
    }
    let checks: Vec<CaptionCheck> =
        truths.iter().zip(&written).map(|(scene, written)| check_caption(scene, &written.text)).collect();
    Ok(Evaluation { scores: CaptionScores::new(&items, &written, &checks)?, items, written, checks })
}
