//! `cargo xtask verify`: our numbers against those of the original implementation.
//!
//! A folder holds cases, each a JSON description with its tensors beside it. What kind a case is follows from what it holds, not
//! from its name; a kind that is not known, and a tensor that nothing was compared with, are failures.

mod case;
mod encoders;
mod functions;
mod models;
mod tasks;
#[cfg(test)]
mod tests;
mod training;
mod weights;
mod writing;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use self::case::{Case, Checked, Outcome, Shared, read};
use self::models::parameter_files;
use self::writing::Language;
use crate::Done;

/// Compare with outputs of the original implementation
#[derive(Args)]
pub(crate) struct Verify {
    /// Folder of cases
    #[arg(long)]
    golden: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// What came of a case.
#[derive(Serialize)]
pub(crate) struct Verdict {
    name: String,
    kind: &'static str,
    tensors: Vec<Checked>,
    failures: Vec<String>,
}

#[derive(Serialize)]
pub(crate) struct Report {
    cases: Vec<Verdict>,
    summary: Summary,
}

/// All cases together.
#[derive(Serialize)]
pub(crate) struct Summary {
    cases: usize,
    tensors: usize,
    /// The largest error over the noise floor of its tensor.
    worst_of_noise: f64,
    /// Tensors that are off, and whatever else is wrong.
    failed: usize,
}

impl Verify {
    pub(crate) fn run(&self) -> Done {
        let report = verify(&self.golden)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            report.print();
        }
        match report.summary.failed {
            0 => Ok(()),
            failed => Err(format!("{failed} of the comparisons with {} failed", self.golden.display()).into()),
        }
    }
}

impl Report {
    fn print(&self) {
        for verdict in &self.cases {
            println!("{} ({})", verdict.name, verdict.kind);
            for Checked { name, error, noise, of_noise, passed, allowed } in &verdict.tensors {
                let result =
                    if *passed { String::new() } else { format!("  FAILED: at most {allowed:.1e} is allowed") };
                println!("  {of_noise:>9.2} of noise {noise:.1e}  error {error:.1e}  {name}{result}");
            }
            verdict.failures.iter().for_each(|failure| println!("  FAILED: {failure}"));
        }
        let Summary { cases, tensors, worst_of_noise, failed } = self.summary;
        println!("{cases} cases, {tensors} tensors, worst {worst_of_noise:.2} of noise, {failed} failed");
    }
}

/// A description of a case that can be read.
type Description = (PathBuf, Value);

/// Verifies every case of a folder.
pub(crate) fn verify(folder: &Path) -> Outcome<Report> {
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_, std::io::Error>>()?;
    files.sort();
    // What cannot be read is a failure of its own.
    let (mut descriptions, mut cases) = (Vec::new(), Vec::new());
    for path in files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "json")) {
        match std::fs::read(path).map_err(Into::into).and_then(|text| Ok(serde_json::from_slice::<Value>(&text)?)) {
            Ok(json) => descriptions.push((path.clone(), json)),
            Err(error) => cases.push(unreadable(path, error)),
        }
    }
    if descriptions.is_empty() && cases.is_empty() {
        return Err(format!("{}: expected cases, files NAME.json, found none", folder.display()).into());
    }
    let shared = shared(folder, &files, &descriptions, &mut cases);
    let mut tokenizer = None;
    for (path, json) in &descriptions {
        match functions::tokenizer(json) {
            Ok(found) => tokenizer = tokenizer.or(found),
            Err(error) => cases.push(unreadable(path, error)),
        }
    }
    let language = Language { tokenizer };
    cases.extend(descriptions.iter().map(|(path, json)| judge(path, json, &descriptions, &shared, &language)));
    let tensors = cases.iter().flat_map(|case| &case.tensors);
    let summary = Summary {
        cases: cases.len(),
        tensors: tensors.clone().count(),
        worst_of_noise: tensors.clone().map(|checked| checked.of_noise).fold(0.0, f64::max),
        failed: tensors.filter(|checked| !checked.passed).count()
            + cases.iter().map(|case| case.failures.len()).sum::<usize>(),
    };
    Ok(Report { cases, summary })
}

fn unreadable(path: &Path, error: Box<dyn std::error::Error>) -> Verdict {
    Verdict { name: file_name(path), kind: "unreadable", tensors: Vec::new(), failures: vec![error.to_string()] }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What several cases use: images, which lie in files of their own, configurations, and prompts.
fn shared(folder: &Path, files: &[PathBuf], descriptions: &[Description], failed: &mut Vec<Verdict>) -> Shared {
    let parameters: BTreeSet<String> = descriptions.iter().flat_map(|(_, json)| parameter_files(json)).collect();
    let mut images = Vec::new();
    for path in files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")) {
        if parameters.contains(&file_name(path)) || path.with_extension("json").exists() {
            continue;
        }
        match read(path) {
            Ok(tensors) => {
                let pictures = tensors.into_values().filter(|tensor| matches!(tensor.dims(), [_, 3, h, w] if h == w));
                images.extend(pictures.map(|pictures| (file_name(path), pictures)));
            }
            Err(error) => failed.push(unreadable(path, error)),
        }
    }
    let configs =
        descriptions.iter().filter_map(|(_, json)| Some((parameter_files(json), json.get("config")?.clone())));
    let configs: Vec<_> = configs.filter(|(files, _)| !files.is_empty()).collect();
    let config = descriptions.iter().find(|(_, json)| kind(json) == Some(Kind::Shared));
    let config = config.map(|(_, json)| json["config"].clone());
    // A case whose prompt cannot be read fails by itself.
    let prompts = descriptions.iter().filter_map(|(path, json)| Some((parameter_files(json), prompt(path, json)?)));
    Shared { folder: folder.to_owned(), images, configs, config, prompts: prompts.collect() }
}

/// The tokens that the texts of a case begin with, if it says how many.
fn prompt(path: &Path, json: &Value) -> Option<Vec<u32>> {
    let length = json["prompt_length"].as_u64()? as usize;
    let ids = read(&path.with_extension("safetensors")).ok()?.remove("in.text_ids")?;
    let first = ids.get(0).ok()?.to_dtype(DType::U32).ok()?.to_vec1::<u32>().ok()?;
    first.get(..length).map(<[u32]>::to_vec)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Shared,
    Vision,
    Text,
    PretrainStep,
    PretrainSteps,
    Optimizer,
    Retrieval,
    Grounding,
    HeatMap,
    Statements,
    Assignment,
    Answers,
    Ranking,
    Captions,
    Search,
    Boxes,
    Positions,
    RelativePositions,
    Images,
    Texts,
    Checkpoint,
    FineTuning,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared by others",
            Self::Vision => "vision encoder",
            Self::Text => "text encoder",
            Self::PretrainStep => "pre-training step",
            Self::PretrainSteps => "pre-training steps",
            Self::Optimizer => "optimizer",
            Self::Retrieval => "retrieval",
            Self::Grounding => "grounding",
            Self::HeatMap => "weakly supervised grounding",
            Self::Statements => "NLVR2",
            Self::Assignment => "text assignment",
            Self::Answers => "VQA",
            Self::Ranking => "VQA, ranking",
            Self::Captions => "captioning",
            Self::Search => "captioning, search",
            Self::Boxes => "box operations",
            Self::Positions => "position embeddings",
            Self::RelativePositions => "relative-position tables",
            Self::Images => "images",
            Self::Texts => "texts",
            Self::Checkpoint => "checkpoint",
            Self::FineTuning => "fine-tuning from a checkpoint",
        }
    }
}

/// What a case is, by what it holds.
fn kind(json: &Value) -> Option<Kind> {
    let has = |field: &str| json.get(field).is_some();
    let tensor = |name: &str| json["tensors"].get(name).is_some();
    let begins =
        |prefix: &str| json["tensors"].as_object().is_some_and(|all| all.keys().any(|name| name.starts_with(prefix)));
    // Inputs that are named for what they go from and to: g14_to_g24, w7_to_w12.
    let moves = |letter: char| {
        let names = json["tensors"].as_object();
        names.is_some_and(|names| {
            let mut inputs = names.keys().filter_map(|name| name.strip_prefix("in.")).peekable();
            inputs.peek().is_some() && inputs.all(|name| name.starts_with(letter) && name.contains("_to_"))
        })
    };
    Some(match () {
        () if has("keys") => Kind::Checkpoint,
        () if has("tasks") && has("config") => Kind::FineTuning,
        () if has("rows") && has("vocab") => Kind::Texts,
        () if has("config") && !has("tensors") => Kind::Shared,
        () if tensor("out.vision") => Kind::Vision,
        () if tensor("out.text") && tensor("out.fusion") => Kind::Text,
        () if tensor("out.losses") && has("optimizer") => Kind::PretrainSteps,
        () if tensor("out.loss_mlm") => Kind::PretrainStep,
        () if begins("in.param.") && has("groups") => Kind::Optimizer,
        () if tensor("out.loss_itm") => Kind::Retrieval,
        () if tensor("out.coord") => Kind::Grounding,
        () if tensor("out.gradcam") => Kind::HeatMap,
        () if tensor("draw.rand") && tensor("out.prediction") => Kind::Assignment,
        () if tensor("out.prediction") => Kind::Statements,
        () if tensor("out.topk_ids") => Kind::Ranking,
        () if tensor("in.q_ids") => Kind::Answers,
        () if begins("case.") => Kind::Boxes,
        () if moves('g') => Kind::Positions,
        () if moves('w') => Kind::RelativePositions,
        () if has("mean") && has("std") => Kind::Images,
        () if has("cases") && json["tensors"].as_object()?.keys().any(|name| name.ends_with(".sequences")) => {
            Kind::Search
        }
        () if tensor("in.text_ids") && tensor("out.loss") => Kind::Captions,
        () => return None,
    })
}

fn judge(
    path: &Path,
    json: &Value,
    descriptions: &[(PathBuf, Value)],
    shared: &Shared,
    language: &Language,
) -> Verdict {
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let Some(kind) = kind(json) else {
        let failures = vec!["expected a kind of case that is known, found another".to_owned()];
        return Verdict { name, kind: "unknown", tensors: Vec::new(), failures };
    };
    let case = match Case::open(path, json.clone(), shared) {
        Ok(case) => case,
        Err(error) => {
            return Verdict { name, kind: kind.name(), tensors: Vec::new(), failures: vec![error.to_string()] };
        }
    };
    let outcome = match kind {
        _ if json["mode"].as_str().is_some_and(|mode| mode != "eval") => {
            Err(format!("mode: expected eval, found {}", json["mode"]).into())
        }
        Kind::Shared => Ok(()),
        Kind::Vision => encoders::vision(&case),
        Kind::Text => encoders::text(&case),
        Kind::PretrainStep => training::step(&case),
        Kind::PretrainSteps => with_batch(&case, descriptions, shared),
        Kind::Optimizer => training::optimizer(&case),
        Kind::Retrieval => tasks::retrieval(&case),
        Kind::Grounding => tasks::grounding(&case),
        Kind::HeatMap => tasks::heat_map(&case),
        Kind::Statements => tasks::statements(&case),
        Kind::Assignment => tasks::assignment(&case),
        Kind::Answers => tasks::answers(&case),
        Kind::Ranking => tasks::ranking(&case),
        Kind::Captions => tasks::captions(&case),
        Kind::Search => writing::search(&case, language),
        Kind::Boxes => functions::box_operations(&case),
        Kind::Positions => functions::positions(&case),
        Kind::RelativePositions => functions::relative_positions(&case),
        Kind::Images => functions::images(&case),
        Kind::Texts => functions::texts(&case),
        Kind::Checkpoint => weights::contents(&case),
        Kind::FineTuning => weights::fine_tuning(&case),
    };
    let (tensors, mut failures) = case.finish();
    if let Err(error) = outcome {
        failures.insert(0, error.to_string());
    }
    Verdict { name, kind: kind.name(), tensors, failures }
}

/// Several steps are made on the batch of a single one that has the same parameters.
fn with_batch(case: &Case, descriptions: &[(PathBuf, Value)], shared: &Shared) -> Outcome {
    let first = descriptions.iter().find(|(_, json)| {
        let images = json["tensors"].get("in.idx_to_group_img").is_none();
        kind(json) == Some(Kind::PretrainStep) && images && parameter_files(json) == parameter_files(&case.json)
    });
    let (path, json) = first.ok_or("batch: expected a pre-training step with the same parameters, found none")?;
    training::steps(case, &Case::open(path, json.clone(), shared)?)
}
