//! Image captioning: what continues the prompt, and whether it is true. It is trained with [`crate::writing_loss`].

use std::path::Path;

use serde::Serialize;
use xvlm_data::annotations::{CaptionItem, read_captions};
use xvlm_data::scenes::{CaptionCheck, check_caption, read_scenes};
use xvlm_data::{Picture, pre_caption};
use xvlm_encoders::Task;
use xvlm_metrics::captions::{bleu, rouge_l};

use crate::error::{ConfigProblem, TaskError};
use crate::generate::{Source, Written, write};
use crate::model::{ImageTokens, Model};
use crate::search::Search;
use crate::{BATCH, Counter, some};

/// Describes each image.
///
/// # Errors
/// If the model is made for another task, or a tensor operation fails.
pub fn caption(model: &Model, images: &ImageTokens, search: Search) -> Result<Vec<Written>, TaskError> {
    model.fit_for("captions", &[Task::Pretrain, Task::Captioning])?;
    let config = model.config();
    let prompt = pre_caption(&config.prompt, config.max_words)?;
    let prompt = model.tokenizer().encode(&prompt, config.max_tokens, false)?;
    let rows: Vec<(u32, Vec<u32>)> = (0..images.len() as u32).map(|image| (image, prompt.clone())).collect();
    write(model, &Source::images(images)?, &rows, search)
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
        written.extend(caption(model, &model.encode(&pictures)?, search)?);
        counter(written.len(), truths.len());
    }
    let checks: Vec<CaptionCheck> =
        truths.iter().zip(&written).map(|(scene, written)| check_caption(scene, &written.text)).collect();
    Ok(Evaluation { scores: CaptionScores::new(&items, &written, &checks)?, items, written, checks })
}
