//! Image captioning: what continues the prompt, and whether it is true. It is trained with [`crate::writing_loss`], then
//! perhaps on rewards ([`Scst`]).

mod evaluate;
mod scst;

use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use xvlm_data::{TextTokenizer, pre_caption};
use xvlm_encoders::Task;

pub use evaluate::{
    CaptionScores, Evaluation, TruthScores, evaluate, evaluate_folder, evaluate_scenes, with_references, write_results,
};
pub use scst::{Drawn, Reward, Rewarded, Scst, documents};

use crate::error::{ConfigProblem, TaskError};
use crate::generate::{Draw, Source, Written, write_rows};
use crate::model::{ImageTokens, Model, ModelConfig};
use crate::search::{Sampling, Search};

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
        match self.search.problem() {
            None => Ok(()),
            Some((field, expected, found)) => {
                let message = format!("expected {expected}, found {found}");
                Err(ConfigProblem { file: field.to_owned(), message }.into())
            }
        }
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
