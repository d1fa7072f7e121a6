//! `xvlm demo`: everything the model can do, on fresh scenes, as a page and as numbers.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use xvlm::data::SourceConfig;
use xvlm::data::annotations::{read_fill, read_nlvr, read_retrieval, read_vqa};
use xvlm::data::scenes::{Split, SynthOptions};
use xvlm::metrics::boxes::{BoxScores, refer_iou};
use xvlm::metrics::fill::FillScores;
use xvlm::metrics::nlvr::NlvrScores;
use xvlm::metrics::retrieval::RetrievalScores;
use xvlm::metrics::vqa::ExactScores;
use xvlm::tasks::captioning::{self, TruthScores, Writing};
use xvlm::tasks::fill::Completing;
use xvlm::tasks::grounding::WeakScores;
use xvlm::tasks::{Counter, Model, PretrainConfig, Session, Sweep, fill, grounding, nlvr, pretrain, retrieval, vqa};
use xvlm::train::{LossCurve, Warmup, loss_curves, read_metrics};
use xvlm::{Bundled, Picture, Precision, Predictor};

use crate::ModelArgs;
use crate::eval::{
    caption_rows, fill_rows, grounding_rows, pointing_rows, question_rows, retrieval_rows, statement_rows,
};
use crate::output::{self, CliError, Rows, say, table};
use crate::progress::{Stage, Training};
use crate::report::{Blank, Caption, Phrase, Question, Ranked, Ranking, Report, Shown};
use crate::synth;

/// The seed of the scenes that the built-in model was trained on (`presets/scenes.yaml`), and how many there were.
const TRAINING_SEED: u64 = 1;
const TRAINING_SCENES: usize = 20_000;
/// The share of the time that training gives to its first stage.
const ALIGN_SHARE: f64 = 0.15;
/// Pictures of the page: like those of training, and with unseen combinations.
const SHOWN: (usize, usize) = (8, 4);
/// Questions and blanks beside a picture, texts that are searched for, and pictures found for each.
const QUESTIONS: usize = 5;
const BLANKS: usize = 2;
const SEARCHES: usize = 4;
const RANKED: usize = 5;
/// How many of the nearest are ranked again by matching.
const K_TEST: usize = 16;

/// Put the model to every task on fresh scenes, and write a report with pictures and scores
///
/// Needs no argument and no download. The folder gets report.html, scores.json, and the scenes in data/ and
/// data-unseen/.
#[derive(Args)]
pub(crate) struct Demo {
    /// Folder to write; scenes and reports of an earlier demo are replaced
    #[arg(long, value_name = "DIR", default_value = "xvlm-demo")]
    out: PathBuf,
    /// First train a model from nothing: scenes go to DIR/training, the two stages to DIR/align
    /// and DIR/run
    #[arg(long, conflicts_with = "model")]
    train: bool,
    /// Longest time to train, in minutes
    #[arg(long, value_name = "M", default_value_t = 60.0, requires = "train")]
    minutes: f64,
    /// Number of held-out scenes; half as many with unseen combinations are added
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    scenes: u32,
    /// Seed of the scenes; not 1, on which the model was trained
    #[arg(long, value_name = "S", default_value_t = 2022)]
    seed: u64,
    #[command(flatten)]
    model: ModelArgs,
    /// Print the scores as JSON
    #[arg(long)]
    json: bool,
}

/// What `scores.json` holds; scores are in percent.
#[derive(Serialize)]
pub(crate) struct Scores {
    pub(crate) model: String,
    pub(crate) precision: Precision,
    pub(crate) scenes: u32,
    pub(crate) unseen_scenes: u32,
    pub(crate) seed: u64,
    grounding: BoxScores,
    grounding_unseen: BoxScores,
    heat: WeakScores,
    retrieval: RetrievalScores,
    caption: TruthScores,
    questions: ExactScores,
    /// None if there is no model for them.
    statements: Option<NlvrScores>,
    fill: FillScores,
}

impl Demo {
    pub(crate) fn run(self) -> Result<(), CliError> {
        if self.seed == TRAINING_SEED {
            let found = self.seed.to_string();
            return Err(CliError::Option { option: "--seed", expected: "a seed never trained on", found });
        }
        let (data, data_unseen) = (self.out.join("data"), self.out.join("data-unseen"));
        check_replaceable(&data)?;
        check_replaceable(&data_unseen)?;
        let (predictor, model, curves) = match self.train {
            true => self.trained()?,
            false => (self.model.open()?, self.model.name(), Vec::new()),
        };
        let is_built_in = !self.train && self.model.is_built_in();
        let fine_tuned = |model| is_built_in.then(|| self.model.open_or(model)).transpose();
        let (questions, statements) = (fine_tuned(Bundled::Questions)?, fine_tuned(Bundled::Statements)?);
        let models = Models {
            general: predictor.model(),
            questions: questions.as_ref().unwrap_or(&predictor).model(),
            statements: statements.as_ref().map(Predictor::model),
        };
        let started = Instant::now();
        let unseen_scenes = self.scenes.div_ceil(2);
        let scenes =
            |scenes: u32, split| SynthOptions { scenes: scenes as usize, seed: self.seed, split, embed_images: false };
        write_scenes("scenes", &data, scenes(self.scenes, Split::Seen))?;
        write_scenes("unseen combinations", &data_unseen, scenes(unseen_scenes, Split::Unseen))?;

        let found = Found::on(&models, &data)?;
        let unseen = Stage::run("phrases, unseen", |at| boxes(predictor.model(), &data_unseen, at))?;
        let scores = Scores {
            model,
            precision: self.model.precision,
            scenes: self.scenes,
            unseen_scenes,
            seed: self.seed,
            grounding: found.grounding.scores.all,
            grounding_unseen: unseen.scores.all,
            heat: found.heat.scores.clone(),
            retrieval: found.retrieval.scores,
            questions: found.questions.scores.exact.clone().unwrap_or_default(),
            statements: found.statements.as_ref().map(|statements| statements.scores),
            caption: found.captions.truth.unwrap_or_default(),
            fill: found.fill.scores.clone(),
        };
        let report = Report {
            scores: &scores,
            rows: scores.rows(),
            seconds: started.elapsed().as_secs_f64(),
            held_out: images(&found.grounding, SHOWN.0).map(|i| found.about(i)).collect::<Result<_, _>>()?,
            unseen: images(&unseen, SHOWN.1).map(|i| shown(&unseen, i)).collect::<Result<_, _>>()?,
            rankings: found.rankings(predictor.model())?,
            curves,
        };
        let page = self.out.join("report.html");
        output::write(&page, report.html().as_bytes())?;
        output::write(&self.out.join("scores.json"), (serde_json::to_string_pretty(&scores)? + "\n").as_bytes())?;
        say(&format!("report: {}", page.display()));
        output::print(self.json, &scores, |scores| table(&scores.rows()))
    }

    /// Trains a model from nothing, in the two stages of the built-in one.
    fn trained(&self) -> Result<(Predictor, String, Vec<LossCurve>), CliError> {
        let [data, align, run] = ["training", "align", "run"].map(|folder| self.out.join(folder));
        let device = self.model.device.open()?;
        let stage = |preset: &str, share: f64| -> Result<PretrainConfig, CliError> {
            let mut config = PretrainConfig::preset(preset, &[])?;
            config.train_file = vec![SourceConfig::files([data.join("pretrain.jsonl").display().to_string()])];
            config.train.time_limit_minutes = Some(share * self.minutes);
            // The clock decides how many iterations there are: warm up for a share of them, and report often.
            config.train.schedule.warmup = Warmup::Fraction(0.05);
            config.train.log_every = 10;
            config.train.check()?;
            Ok(config)
        };
        let first = stage("scenes-align", ALIGN_SHARE)?;
        let mut second = stage("scenes", 1.0 - ALIGN_SHARE)?;
        second.init_from = Some(align.join("model"));
        for folder in [&align, &run] {
            if folder.exists() {
                let (expected, found) = ("no training run yet", "one; choose another --out, or remove it".to_owned());
                return Err(CliError::File { path: folder.clone(), expected, found });
            }
        }
        let options =
            SynthOptions { scenes: TRAINING_SCENES, seed: TRAINING_SEED, split: Split::Seen, embed_images: false };
        write_scenes("training scenes", &data, options)?;
        pretrain::run(&first, &align, &Session::alone(false), &device, &mut Training::new())?;
        pretrain::run(&second, &run, &Session::alone(false), &device, &mut Training::new())?;
        let curves = loss_curves(&read_metrics(&run.join("metrics.jsonl"))?);
        let model = run.join("model");
        Ok((Predictor::from_folder(&model, self.model.compute(&device))?, model.display().to_string(), curves))
    }
}

/// What tells that a folder of scenes was written by a demo, and may be replaced.
const MARKER: &str = ".written-by-xvlm-demo";

/// Checks that a folder of scenes may be written: it is not there yet, is empty, or is that of an earlier demo.
fn check_replaceable(scenes: &Path) -> Result<(), CliError> {
    if !scenes.exists() || scenes.join(MARKER).exists() {
        return Ok(());
    }
    match fs::read_dir(scenes).map_err(CliError::io(scenes))?.next() {
        None => Ok(()),
        Some(_) => {
            let (expected, found) = ("a folder for the demo's scenes", "one with something else in it".to_owned());
            Err(CliError::File { path: scenes.to_path_buf(), expected, found })
        }
    }
}

/// Writes scenes, in the place of those of an earlier demo.
fn write_scenes(name: &'static str, out: &Path, options: SynthOptions) -> Result<(), CliError> {
    check_replaceable(out)?;
    if out.join(MARKER).exists() {
        fs::remove_dir_all(out).map_err(CliError::io(out))?;
    }
    synth::write(name, out, options)?;
    output::write(&out.join(MARKER), b"")
}

impl Scores {
    /// What matters most.
    pub(crate) fn headlines(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("phrases whose box is found", self.grounding.accuracy),
            ("the same for unseen combinations", self.grounding_unseen.accuracy),
            ("pictures found by their text", self.retrieval.image_r1),
            ("texts found by their picture", self.retrieval.text_r1),
            ("descriptions all right", self.caption.right),
            ("questions answered", self.questions.right),
            ("phrases pointed at, taught without boxes", self.heat.pointing),
            ("blanks filled", self.fill.top1),
        ]
    }

    fn rows(&self) -> Rows {
        let section = |name: &str, rows: Rows| std::iter::once((name.to_owned(), None)).chain(rows).collect::<Rows>();
        [
            section("Find the box of a phrase", grounding_rows(&self.grounding)),
            section("The same, unseen combinations", grounding_rows(&self.grounding_unseen)),
            section("Point at a phrase, by what matching looks at", pointing_rows(&self.heat)),
            section("Match pictures and texts", retrieval_rows(&self.retrieval)),
            section("Describe", caption_rows(&self.caption)),
            section("Answer questions", question_rows(&self.questions)),
            self.statements.iter().flat_map(|scores| section("Judge statements", statement_rows(scores))).collect(),
            section("Fill blanks", fill_rows(&self.fill)),
        ]
        .concat()
    }
}

/// Pictures that are described at a time.
const BATCH: usize = 32;

/// Who is asked what.
struct Models<'a> {
    general: &'a Model,
    questions: &'a Model,
    statements: Option<&'a Model>,
}

/// What the models found on a folder.
struct Found {
    grounding: grounding::Evaluation,
    heat: grounding::WeakEvaluation,
    statements: Option<nlvr::Evaluation>,
    captions: captioning::Evaluation,
    questions: vqa::Evaluation,
    retrieval: retrieval::Evaluation,
    fill: fill::Evaluation,
}

impl Found {
    fn on(models: &Models, data: &Path) -> Result<Self, CliError> {
        let model = models.general;
        let judge = |model: &Model| {
            Stage::run("statements", |at| {
                let items = read_nlvr(data.join("nlvr.json"))?;
                nlvr::evaluate(model, items, &nlvr::Options::default(), &mut Sweep::new(at))
            })
        };
        Ok(Self {
            statements: models.statements.map(judge).transpose()?,
            heat: Stage::run("phrases, by heat", |at| {
                let items = grounding::TestSet::of_folder(data)?.items;
                grounding::evaluate_weakly(model, items, &grounding::WeakOptions::default(), &mut Sweep::new(at))
            })?,
            grounding: Stage::run("phrases", |at| boxes(model, data, at))?,
            captions: Stage::run("captions", |at| {
                captioning::evaluate_folder(model, data, &Writing::of(model.config()), BATCH, &mut Sweep::new(at))
            })?,
            questions: Stage::run("questions", |at| {
                let items = read_vqa(data.join("vqa.json"))?;
                vqa::evaluate(models.questions, items, &vqa::Options::default(), &mut Sweep::new(at))
            })?,
            retrieval: Stage::run("pairs", |at| {
                let items = read_retrieval(data.join("retrieval.json"))?;
                retrieval::evaluate(model, &items, retrieval::Options::new(K_TEST), &mut Sweep::new(at))
            })?,
            fill: Stage::run("blanks", |at| {
                let items = read_fill(data.join("fill.json"))?;
                fill::evaluate(model, items, Completing::default(), &mut Sweep::new(at))
            })?,
        })
    }

    /// Everything about one picture.
    fn about(&self, image: &Path) -> Result<Shown, CliError> {
        let done = &self.captions;
        let mut captions = done.items.iter().zip(&done.answers).zip(&done.checks);
        let caption = captions.find(|((item, _), _)| item.image == image).map(|((item, written), check)| Caption {
            text: written.text.clone(),
            truth: item.captions.first().cloned().unwrap_or_default(),
            marks: [
                ("objects", check.objects_right),
                ("colours", check.colours_right),
                ("relation", check.relation_right),
            ],
        });
        let questions = self.questions.items.iter().zip(&self.questions.answers);
        let questions = questions.filter(|(item, _)| item.image == image).map(|(item, given)| Question {
            question: item.question.clone(),
            answer: given.text.clone(),
            truth: item.answers.first().cloned().unwrap_or_default(),
        });
        let blanks = self.fill.items.iter().zip(&self.fill.answers);
        let blanks = blanks.filter(|(item, _)| item.image == image).map(|(item, words)| Blank {
            text: item.text.clone(),
            words: words.iter().take(3).cloned().collect(),
            truths: item.answers.clone(),
        });
        Ok(Shown {
            caption,
            questions: questions.take(QUESTIONS).collect(),
            blanks: blanks.take(BLANKS).collect(),
            ..shown(&self.grounding, image)?
        })
    }

    /// The first caption of the first pictures, and what is found for each.
    fn rankings(&self, model: &Model) -> Result<Vec<Ranking>, CliError> {
        let retrieval::Evaluation { images, texts, text_to_image, .. } = &self.retrieval;
        let ranking = |own: usize| {
            let text = texts.iter().position(|text| text.image == own).unwrap_or(0);
            let order: Vec<usize> = text_to_image[text].iter().take(RANKED).map(|&(image, _)| image as usize).collect();
            let text = texts[text].caption.clone();
            let pictures =
                order.iter().map(|&image| Picture::open(&images[image].path)).collect::<Result<Vec<_>, _>>()?;
            let pairs: Vec<(u32, &str)> = (0..pictures.len() as u32).map(|image| (image, text.as_str())).collect();
            let probabilities = model.match_pairs(&model.encode(&pictures)?, &pairs)?;
            let ranked = |(image, probability): (usize, f32)| {
                Ok(Ranked { png: read(&images[image].path)?, probability, is_right: image == own })
            };
            let pictures = order.into_iter().zip(probabilities).map(ranked).collect::<Result<_, CliError>>()?;
            Ok(Ranking { text, pictures })
        };
        (0..images.len()).take(SEARCHES).map(ranking).collect()
    }
}

/// The boxes of a folder's phrases.
fn boxes(model: &Model, data: &Path, counter: Counter) -> Result<grounding::Evaluation, xvlm::Error> {
    let items = grounding::TestSet::of_folder(data)?.items;
    grounding::evaluate(model, items, &grounding::BoxOptions::default(), &mut Sweep::new(counter))
}

/// The first images of an evaluation.
fn images(evaluation: &grounding::Evaluation, count: usize) -> impl Iterator<Item = &Path> {
    evaluation.items.chunk_by(|a, b| a.image == b.image).take(count).map(|items| items[0].image.as_path())
}

/// A picture with its phrases.
fn shown(evaluation: &grounding::Evaluation, image: &Path) -> Result<Shown, CliError> {
    let items = evaluation.items.iter().zip(&evaluation.answers).filter(|(item, _)| item.image == image);
    let (width, height) = items.clone().next().map_or((1, 1), |(item, _)| (item.width, item.height));
    let phrases = items.map(|(item, found)| {
        let (found, probability) = (found.pixels(width, height), found.probability);
        let iou = refer_iou(found, item.bbox);
        Phrase { text: item.text.clone(), found, truth: item.bbox, probability, iou }
    });
    let phrases = phrases.collect();
    Ok(Shown { png: read(image)?, width, height, phrases, caption: None, questions: Vec::new(), blanks: Vec::new() })
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    fs::read(path).map_err(CliError::io(path))
}
