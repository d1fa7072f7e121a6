//! Checkpoints: what is in them, and what each task's model makes of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde_json::Value;
use xvlm::encoders::Task;
use xvlm::tasks::{convert, official};
use xvlm::weights::{Because, Checkpoint, Conversion, LoadRules, Origin, is_buffer, tied_to};

use super::case::{Case, Outcome};

/// The files that a description is about: those beside it that begin with its name, or else those it mentions.
fn checkpoints(case: &Case) -> Outcome<Vec<PathBuf>> {
    let stem = case.path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let what = case.json["what"].as_str().unwrap_or_default();
    let mentioned =
        |name: &str| what.split(|c: char| c.is_whitespace() || "(),;'\"".contains(c)).any(|word| word == name);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&case.shared.folder)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let is_checkpoint = ["th", "pth", "pt", "bin"].iter().any(|end| path.extension().is_some_and(|e| e == *end));
        if is_checkpoint && (name.starts_with(&stem) || mentioned(&name)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The tensors of checkpoints, by their list of keys: each file must hold all of them, and all must hold the same numbers.
pub(super) fn contents(case: &Case) -> Outcome {
    let paths = checkpoints(case)?;
    let keys = case.json["keys"].as_object().ok_or("keys: expected a mapping")?;
    if paths.is_empty() {
        return Err("checkpoint: expected one that begins with the name of the case, found none".into());
    }
    let described: BTreeMap<&str, (Vec<usize>, &str)> = keys
        .iter()
        .map(|(name, value)| {
            Ok((name.as_str(), (serde_json::from_value(value[0].clone())?, value[1].as_str().unwrap_or_default())))
        })
        .collect::<Outcome<_>>()?;
    let mut first: Option<Checkpoint> = None;
    for path in paths {
        let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let checkpoint = Checkpoint::open(&path)?;
        let found: Vec<(&str, (Vec<usize>, &str))> = checkpoint
            .tensors()
            .iter()
            .map(|(name, info)| (name.as_str(), (info.shape().to_vec(), type_name(info.dtype()))))
            .collect();
        let expected: Vec<_> = described.iter().map(|(name, shape)| (*name, shape.clone())).collect();
        case.check_equal(&format!("{file}.keys"), &found, &expected);
        let mut different = 0;
        for name in checkpoint.tensors().keys() {
            let numbers = checkpoint.read(name)?;
            if let Some(first) = &first {
                different += usize::from(values(&numbers)? != values(&first.read(name)?)?);
            }
        }
        case.record(&format!("{file}.numbers"), different as f64, 1.0, 0.0);
        first = first.or(Some(checkpoint));
    }
    Ok(())
}

fn type_name(dtype: Option<DType>) -> &'static str {
    match dtype {
        Some(DType::F32) => "float32",
        Some(DType::F64) => "float64",
        Some(DType::F16) => "float16",
        Some(DType::BF16) => "bfloat16",
        Some(DType::I64) => "int64",
        Some(DType::I32) => "int32",
        Some(DType::U8) => "uint8",
        _ => "another",
    }
}

fn values(tensor: &Tensor) -> candle_core::Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Checks what found no tensor and what found no place against the original's lists, and returns the former.
fn names(case: &Case, name: &str, expected: &Value, conversion: &Conversion) -> Outcome<BTreeSet<String>> {
    let set = |field: &str| -> Outcome<BTreeSet<String>> { Ok(serde_json::from_value(expected[field].clone())?) };
    let of = |list: &[Because]| -> BTreeSet<String> { list.iter().map(|because| because.name.clone()).collect() };
    let (initialised, unused) = (of(&conversion.report().initialised), of(&conversion.report().unused));
    // The original lists buffers too: they follow from the sizes, here as there.
    let missing: BTreeSet<String> = set("missing")?.into_iter().filter(|name| !is_buffer(name)).collect();
    case.check_equal(&format!("{name}.missing"), &Vec::from_iter(initialised), &Vec::from_iter(missing.clone()));
    // It lists some names as it has changed them before it found no place for them.
    let is_unused = |name: &String| {
        let before = [("text_encoder.", "text_encoder.bert."), ("text_decoder.", "text_encoder.")];
        let before = before.map(|(now, then)| name.replacen(now, then, 1));
        is_buffer(name) || unused.contains(name) || before.iter().any(|name| unused.contains(name))
    };
    let astray: Vec<String> = set("unexpected")?.into_iter().filter(|name| !is_unused(name)).collect();
    case.check_equal(&format!("{name}.unexpected"), &astray, &[]);
    Ok(missing)
}

/// The task that a fine-tuning model of the original is for.
fn task(name: &str) -> Outcome<Task> {
    Ok(match name {
        "pretrain" => Task::Pretrain,
        "retrieval" => Task::Retrieval,
        "bbox" | "bbox_pretrain" => Task::Grounding,
        "nlvr" => Task::Nlvr,
        "nlvr_pretrain" => Task::NlvrPretrain,
        "vqa" => Task::Vqa,
        "captioning" | "captioning_pretrain" => Task::Captioning,
        other => return Err(format!("tasks.{other}: expected a task of the original").into()),
    })
}

/// What each fine-tuning model makes of a pre-trained checkpoint: every tensor by its length and its first number, and what
/// found no tensor and no place.
pub(super) fn fine_tuning(case: &Case) -> Outcome {
    let path = checkpoints(case)?.into_iter().next();
    let path = path.ok_or("checkpoint: expected the one that `what` mentions, found none")?;
    let sources = [(Origin::Xvlm, Checkpoint::open(&path)?)];
    for (name, expected) in case.json["tasks"].as_object().ok_or("tasks: expected a mapping")? {
        one(case, name, expected, &sources).map_err(|error| format!("tasks.{name}: {error}"))?;
    }
    Ok(())
}

fn one(case: &Case, name: &str, expected: &Value, sources: &[(Origin, Checkpoint)]) -> Outcome {
    let config = official::from_official(case.config()?, Path::new(&case.path), task(name)?)?;
    let (layout, _) = convert::layout(&config.model, false)?;
    let conversion = Conversion::plan(sources, &layout, &LoadRules::default())?;
    let missing = names(case, name, expected, &conversion)?;

    let lengths = expected["l2"].as_object().ok_or("l2: expected a mapping")?;
    let (mut found, mut wanted) = (Vec::new(), Vec::new());
    let mut seen = BTreeSet::new();
    for (tensor, length) in lengths.iter().filter(|(tensor, _)| !is_buffer(tensor)) {
        let parameter = match layout.parameters.contains_key(tensor) {
            true => tensor.clone(),
            false => tied_to(tensor)
                .filter(|other| layout.parameters.contains_key(other))
                .ok_or_else(|| format!("l2.{tensor}: expected a parameter of the model"))?,
        };
        seen.insert(parameter.clone());
        let Some(value) = conversion.read(&parameter)? else {
            match missing.contains(tensor) {
                true => continue,
                false => return Err(format!("{tensor}: expected a tensor for it, found none").into()),
            }
        };
        let numbers = values(&value)?;
        found.push(numbers.iter().map(|x| x * x).sum::<f64>().sqrt());
        found.push(numbers.first().copied().unwrap_or(0.0));
        wanted.push(length.as_f64().unwrap_or(f64::NAN));
        wanted.push(expected["first"][tensor].as_f64().unwrap_or(f64::NAN));
    }
    if let Some(parameter) = layout.parameters.keys().find(|parameter| !seen.contains(*parameter)) {
        return Err(format!("{parameter}: expected a tensor of the original's model, found none").into());
    }
    // Lengths and numbers are given with nine digits.
    let errors = found.iter().zip(&wanted).map(|(found, wanted)| (found - wanted).abs() / wanted.abs().max(1.0));
    let worst = errors.fold(0.0, f64::max);
    case.record(&format!("{name}.tensors"), worst, f64::from(f32::EPSILON), 1e-5);
    Ok(())
}
