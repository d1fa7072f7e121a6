//! Checkpoints of other programs: every form in which they come, and whatever can be wrong with them.

#[path = "../common/mod.rs"]
mod common;
mod reading;
mod refused;
mod writing;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io;

use candle_core::{DType, Device, Tensor};
use common::*;
use xvlm_weights::{
    Checkpoint, CheckpointKind, NamedShape, StoredType, WeightsError, first_non_finite, write_file_atomically,
    write_pytorch,
};

type Outcome = Result<(), Box<dyn Error>>;

fn open(bytes: &[u8]) -> Result<Checkpoint, WeightsError> {
    let (_folder, path) = file(bytes);
    Checkpoint::open(&path)
}

/// The one tensor of a checkpoint.
fn only(bytes: &[u8]) -> Result<Tensor, WeightsError> {
    let (_folder, path) = file(bytes);
    let checkpoint = Checkpoint::open(&path)?;
    let names: Vec<&String> = checkpoint.tensors().keys().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    checkpoint.read(names[0])
}

fn names(bytes: &[u8]) -> Result<Vec<String>, WeightsError> {
    Ok(open(bytes)?.tensors().keys().cloned().collect())
}

fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// That a checkpoint is refused, with a message that names the file and holds all of this.
#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    let (_folder, path) = file(bytes);
    let read = Checkpoint::open(&path)
        .and_then(|checkpoint| checkpoint.tensors().keys().try_for_each(|name| checkpoint.read(name).map(drop)));
    let message = read.expect_err("it should be refused").to_string();
    let path = path.display().to_string();
    assert!(message.starts_with(&path), "{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in {message:?}");
    }
}

fn one_vector() -> Code {
    dict(&[("w", vector("0", 3))])
}

fn three() -> Vec<u8> {
    floats(&[1., -2., 3.5])
}
