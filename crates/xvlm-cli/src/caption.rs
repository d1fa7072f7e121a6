//! `xvlm caption`: what is to be seen in pictures; and how pictures are described, for other commands that do.

use clap::Args;
use serde::Serialize;
use serde_json::json;
use xvlm::{Bundled, Sampling, Writing, Written};

use crate::look::{About, Look, Question, any};
use crate::output::CliError;
use crate::sweep;

/// How captions are written. What is left out is as the model's configuration says.
#[derive(Args)]
pub(crate) struct WritingArgs {
    /// What captions begin with, left out of what is printed; it may be empty
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Texts followed at a time; 1 is greedy
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    beams: Option<u8>,
    /// No end before that many tokens after the prompt
    #[arg(long, value_name = "N")]
    min_tokens: Option<u16>,
    /// No more than that many tokens after the prompt
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    max_tokens: Option<u16>,
    /// Makes words that the caption has already unlikelier: above 1, such as 1.2
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
}

impl WritingArgs {
    /// The writing of a model, with what was asked for.
    pub(crate) fn of(&self, model: Writing) -> Writing {
        let Writing { prompt, mut search } = model;
        if let Some(beams) = self.beams {
            search.beams = beams.into();
        }
        if let Some(min_tokens) = self.min_tokens {
            search.min_tokens = min_tokens.into();
        }
        if let Some(max_tokens) = self.max_tokens {
            search.max_tokens = max_tokens.into();
            // The shortest caption of the configuration may be longer than what is asked for.
            search.min_tokens = search.min_tokens.min(self.min_tokens.unwrap_or(max_tokens).into());
        }
        search.repetition_penalty = self.repetition_penalty.unwrap_or(search.repetition_penalty);
        Writing { prompt: self.prompt.clone().unwrap_or(prompt), search }
    }
}

/// Describe pictures
///
/// The caption of a picture is searched for, or, with --sample, drawn: then it differs from seed to seed, and several can be
/// had.
#[derive(Args)]
pub(crate) struct Caption {
    #[command(flatten)]
    look: Look,
    #[command(flatten)]
    writing: WritingArgs,
    /// Draw each word by its probability instead of searching for the likeliest text
    #[arg(long, conflicts_with = "beams")]
    sample: bool,
    /// Captions that are drawn of each picture
    #[arg(long, value_name = "N", default_value_t = 1, requires = "sample", value_parser = clap::value_parser!(u16).range(1..))]
    samples: u16,
    /// Only the K likeliest words are drawn; 0: all
    #[arg(long, value_name = "K", default_value_t = 0, requires = "sample")]
    top_k: u32,
    /// Only the likeliest words are drawn whose probabilities sum to P
    #[arg(long, value_name = "P", default_value_t = 0.9, requires = "sample")]
    top_p: f32,
    /// Below 1 likely words become likelier, above 1 unlikely ones do
    #[arg(long, value_name = "T", default_value_t = 1.0, requires = "sample")]
    temperature: f32,
    /// Seed of what is drawn: the same seed, the same captions of the picture at a place, whatever the others are
    #[arg(long, value_name = "S", default_value_t = 0, requires = "sample")]
    seed: u64,
}

/// What captions are drawn by.
#[derive(Clone, Copy, Serialize)]
struct Draw {
    sampling: Sampling,
    samples: u16,
    seed: u64,
}

impl Caption {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let sampling = Sampling { temperature: self.temperature, top_k: self.top_k as usize, top_p: self.top_p };
        let draw = self.sample.then_some(Draw { sampling, samples: self.samples, seed: self.seed });
        let images = self.look.images()?;
        let found = self.look.ask(Bundled::General, &images, |asking| {
            let predictor = asking.predictor;
            let writing = self.writing.of(predictor.writing());
            let options = sweep::options(&json!({ "writing": writing, "draw": draw }))?;
            asking.of_each(Question { name: "captions", options }, any, |numbers, pictures| match draw {
                Some(Draw { sampling, samples, seed }) => {
                    let number = |at: usize| numbers[at] as u64;
                    predictor.sample_captions(&pictures, &writing, sampling, samples.into(), seed, number)
                }
                None => {
                    let captions = predictor.captions(&pictures, &writing)?;
                    Ok(captions.into_iter().map(|written| vec![written]).collect())
                }
            })
        })?;
        self.look.tell_as(found, |found, several| {
            let line = |about: &About<Written>| {
                let name = if several { format!("{}: ", about.image) } else { String::new() };
                about.results.iter().map(|written| format!("{name}{}\n", written.text)).collect::<String>()
            };
            found.iter().map(line).collect()
        })
    }
}
