//! The committed cases hold, and what is wrong with a case is found.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::{Report, verify};
use crate::root;

fn golden() -> PathBuf {
    root().join("xtask/tests/golden")
}

/// A folder with some of the golden files, under the names given.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (from, to) in files {
        std::fs::copy(golden().join(from), folder.path().join(to)).unwrap();
    }
    folder
}

/// A case of its own parameters, and its files under another name.
const CASE: [(&str, &str); 3] = [
    ("bert_tiny.json", "other.json"),
    ("bert_tiny.safetensors", "other.safetensors"),
    ("bert_tiny.params.safetensors", "bert_tiny.params.safetensors"),
];

fn change(path: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

fn describe(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
}

fn failures(report: &Report) -> Vec<String> {
    let of = |case: &super::Verdict| {
        let tensors = case.tensors.iter().filter(|checked| !checked.passed).map(|checked| checked.name.clone());
        tensors.chain(case.failures.iter().cloned()).collect::<Vec<_>>()
    };
    let failures: Vec<String> = report.cases.iter().flat_map(of).collect();
    assert_eq!(failures.len(), report.summary.failed);
    failures
}

#[test]
fn every_committed_case_holds() {
    let report = verify(&golden()).unwrap();
    assert_eq!(failures(&report), Vec::<String>::new());
    assert!(report.summary.cases >= 29 && report.summary.tensors > 750, "{} tensors", report.summary.tensors);
    // The noise of a loss is one draw, which may be small by luck.
    let of_noise = |is_loss: bool| {
        let tensors = report.cases.iter().flat_map(|case| &case.tensors);
        tensors
            .filter(|checked| (checked.name == "out.loss") == is_loss)
            .map(|checked| checked.of_noise)
            .fold(0.0, f64::max)
    };
    assert!(of_noise(false) < 15.0, "{}", of_noise(false));
    assert!(of_noise(true) < 25.0, "{}", of_noise(true));
}

#[test]
fn names_do_not_matter() {
    let folder = folder(&CASE);
    let report = verify(folder.path()).unwrap();
    assert_eq!((report.cases.len(), failures(&report).len()), (1, 0));
    assert_eq!((report.cases[0].name.as_str(), report.cases[0].kind), ("other", "text encoder"));
}

#[test]
fn a_number_that_is_off_is_found() {
    let folder = folder(&CASE);
    change(&folder.path().join("other.safetensors"), |tensors| {
        let moved = (&tensors["out.fusion"] + 0.01).unwrap();
        tensors.insert("out.fusion".to_owned(), moved);
    });
    describe(&folder.path().join("other.json"), |json| {
        json["grad_l2"]["bert.embeddings.LayerNorm.bias"] = json!(1.0);
    });
    assert_eq!(failures(&verify(folder.path()).unwrap()), ["out.fusion", "grad_l2"]);
}

#[test]
fn what_nothing_is_compared_with_is_a_failure() {
    let folder = folder(&CASE);
    let tensors = folder.path().join("other.safetensors");
    change(&tensors, |tensors| {
        tensors.insert("out.surprise".to_owned(), Tensor::new(1f32, &Device::Cpu).unwrap());
    });
    assert_eq!(failures(&verify(folder.path()).unwrap()), ["tensor out.surprise was not checked"]);
    describe(&folder.path().join("other.json"), |json| json["tensors"] = json!({"out.surprise": [[], "float32"]}));
    let report = verify(folder.path()).unwrap();
    assert_eq!(report.cases[0].kind, "unknown");
    assert_eq!(report.summary.failed, 1);
    std::fs::remove_file(tensors).unwrap();
    let missing = failures(&verify(folder.path()).unwrap());
    assert_eq!(missing.len(), 1);
}

#[test]
fn parameters_have_to_be_those_of_the_model() {
    let parameters = |edit: fn(&mut HashMap<String, Tensor>)| {
        let folder = folder(&CASE);
        change(&folder.path().join("bert_tiny.params.safetensors"), edit);
        failures(&verify(folder.path()).unwrap())
    };
    let less = parameters(|tensors| {
        tensors.remove("bert.embeddings.LayerNorm.bias");
    });
    assert!(less[0].contains("bert.embeddings.LayerNorm.bias: expected in the case"), "{less:?}");
    let more = parameters(|tensors| {
        tensors.insert("bert.another".to_owned(), Tensor::new(1f32, &Device::Cpu).unwrap());
    });
    assert!(more[0].contains("bert.another"), "{more:?}");
    let untied = parameters(|tensors| {
        let moved = (&tensors["cls.predictions.decoder.bias"] + 1.0).unwrap();
        tensors.insert("cls.predictions.decoder.bias".to_owned(), moved);
    });
    assert!(untied[0].contains("cls.predictions.decoder.bias"), "{untied:?}");
}

#[test]
fn what_cannot_be_read_does_not_stop_the_others() {
    let folder = folder(&CASE);
    std::fs::write(folder.path().join("broken.json"), "{").unwrap();
    std::fs::write(folder.path().join("stray.safetensors"), "no tensors").unwrap();
    let report = verify(folder.path()).unwrap();
    let named: Vec<_> = report.cases.iter().map(|case| (case.name.as_str(), case.failures.len())).collect();
    assert_eq!(named, [("broken.json", 1), ("stray.safetensors", 1), ("other", 0)]);
    assert_eq!(report.summary.failed, 2);
}

#[test]
fn images_are_those_that_fit() {
    let shared = ["tiny_vision.0", "tiny_vision.1", "bbox_step.params", "bbox_step", "tiny_images"];
    let names: Vec<String> = shared.iter().map(|name| format!("{name}.safetensors")).collect();
    let mut files: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), name.as_str())).collect();
    files.push(("bbox_step.json", "bbox_step.json"));
    let folder = folder(&files);
    let others = Tensor::zeros((9, 3, 64, 64), candle_core::DType::F32, &Device::Cpu).unwrap();
    let others = HashMap::from([("images".to_owned(), others)]);
    candle_core::safetensors::save(&others, folder.path().join("zz.safetensors")).unwrap();
    assert_eq!(failures(&verify(folder.path()).unwrap()), Vec::<String>::new());
    std::fs::remove_file(folder.path().join("tiny_images.safetensors")).unwrap();
    assert!(failures(&verify(folder.path()).unwrap())[0].contains("expected a file of 4 or more, [_, 3, 128, 128]"));
}

#[test]
fn a_folder_without_cases_is_an_error() {
    let error = verify(folder(&[]).path()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("expected cases"), "{error}");
}
