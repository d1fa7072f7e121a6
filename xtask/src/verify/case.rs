//! One case: what was put in, what came out, and how far our numbers are from that.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use serde::Serialize;
use serde_json::Value;
use xvlm::encoders::Xvlm;

pub(super) type Outcome<T = ()> = Result<T, Box<dyn Error>>;
pub(super) type Tensors = BTreeMap<String, Tensor>;

/// How far a faithful implementation may be off where the case does not say how noisy the original is: this share of the
/// tensor's largest magnitude (the `tolerance` of the cases).
pub(super) const SAFE: f64 = 1e-4;

/// How many times the original's own noise a faithful implementation stays within.
const FAITHFUL: f64 = 10.0;

/// What rounding makes of a gradient of 0, as a share of the longest gradient of a model.
const ROUNDING: f64 = 1e-6;

/// What came of a tensor.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Checked {
    pub(super) name: String,
    /// Largest difference.
    pub(super) error: f64,
    /// The noise floor: the largest difference of the original in f32 to itself in f64, but no less than one rounding of the
    /// largest magnitude; a tenth of what is allowed where the case does not tell.
    pub(super) noise: f64,
    /// `error` over `noise`.
    pub(super) of_noise: f64,
    /// The largest `error` that passes.
    pub(super) allowed: f64,
    pub(super) passed: bool,
}

/// The files of a folder that cases share.
pub(super) struct Shared {
    pub(super) folder: PathBuf,
    /// The images of cases that hold none, `[N, 3, R, R]`, by the names of their files.
    pub(super) images: Vec<(String, Tensor)>,
    /// Configurations by the parameter files of the cases that have one; and one that belongs to no case.
    pub(super) configs: Vec<(Vec<String>, Value)>,
    pub(super) config: Option<Value>,
    /// The prompts that captions begin with, as token ids, by the parameter files of the cases that tell them.
    pub(super) prompts: Vec<(Vec<String>, Vec<u32>)>,
}

/// A case that is being verified.
pub(super) struct Case<'a> {
    pub(super) path: PathBuf,
    pub(super) json: Value,
    pub(super) shared: &'a Shared,
    tensors: Tensors,
    touched: RefCell<BTreeSet<String>>,
    checked: RefCell<Vec<Checked>>,
}

impl<'a> Case<'a> {
    pub(super) fn open(path: &Path, json: Value, shared: &'a Shared) -> Outcome<Self> {
        let file = path.with_extension("safetensors");
        let tensors = if file.is_file() { read(&file)? } else { Tensors::new() };
        for (name, described) in json["tensors"].as_object().into_iter().flatten() {
            let tensor = tensors.get(name).ok_or_else(|| format!("{}: lacks tensor {name}", file.display()))?;
            let shape: Vec<usize> = serde_json::from_value(described[0].clone())?;
            if tensor.dims() != shape {
                return Err(format!("{name}: expected shape {shape:?}, found {:?}", tensor.dims()).into());
            }
        }
        Ok(Self {
            path: path.to_owned(),
            json,
            shared,
            tensors,
            touched: RefCell::default(),
            checked: RefCell::default(),
        })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names that begin with a prefix, without it.
    pub(super) fn names(&self, prefix: &str) -> Vec<String> {
        self.tensors.keys().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect()
    }

    /// A tensor that is put in.
    pub(super) fn input(&self, name: &str) -> Outcome<Tensor> {
        self.touched.borrow_mut().insert(name.to_owned());
        Ok(self.tensors.get(name).ok_or_else(|| format!("tensor {name}: expected in the case, found none"))?.clone())
    }

    /// Token ids or indices.
    pub(super) fn ids(&self, name: &str) -> Outcome<Tensor> {
        Ok(self.input(name)?.to_dtype(DType::U32)?)
    }

    /// A mask of zeros and ones.
    pub(super) fn mask(&self, name: &str) -> Outcome<Tensor> {
        Ok(self.input(name)?.to_dtype(DType::F32)?)
    }

    /// Whole numbers in a row.
    pub(super) fn integers(&self, name: &str) -> Outcome<Vec<i64>> {
        Ok(self.input(name)?.flatten_all()?.to_dtype(DType::I64)?.to_vec1()?)
    }

    pub(super) fn index(&self, name: &str) -> Outcome<Vec<u32>> {
        Ok(self.integers(name)?.into_iter().map(|i| i as u32).collect())
    }

    /// The first `count` images for a model: those of the case, or those that cases share, of the file that the case names if
    /// it names one.
    pub(super) fn images(&self, count: usize, model: &Xvlm) -> Outcome<Tensor> {
        if self.has("in.image") {
            return Ok(self.input("in.image")?.narrow(0, 0, count)?);
        }
        let side = model.config().vision_config.image_res();
        let named = self.json["images"].as_str().and_then(|text| text.split('[').next()).unwrap_or_default();
        let fits = |images: &&(String, Tensor)| images.1.dims()[3] == side && images.1.dims()[0] >= count;
        let fitting = self.shared.images.iter().filter(fits);
        let images = fitting.min_by_key(|(file, _)| file.strip_suffix(".safetensors") != Some(named));
        match images {
            Some((_, images)) => Ok(images.narrow(0, 0, count)?),
            None => {
                Err(format!("images: expected a file of {count} or more, [_, 3, {side}, {side}], found none").into())
            }
        }
    }

    /// Compares a result with a tensor of the case; a case that does not have it says nothing about it.
    pub(super) fn check(&self, name: &str, found: &Tensor) -> Outcome {
        self.check_within(name, found, SAFE, 0.0)
    }

    /// As [`Self::check`], with a bound of its own: a share of the largest magnitude, or a difference.
    pub(super) fn check_within(&self, name: &str, found: &Tensor, share: f64, difference: f64) -> Outcome {
        let Some(expected) = self.tensors.get(name) else { return Ok(()) };
        self.touched.borrow_mut().insert(name.to_owned());
        if found.elem_count() != expected.elem_count() || squeezed(found) != squeezed(expected) {
            return Err(format!("{name}: expected shape {:?}, found {:?}", expected.dims(), found.dims()).into());
        }
        let (found, expected) = (numbers(found)?, numbers(expected)?);
        // What is not a number has to be none here either.
        let error = found.iter().zip(&expected).map(|(found, expected)| match expected.is_finite() {
            true => (found - expected).abs(),
            false if found.is_nan() == expected.is_nan() && (found.is_nan() || found == expected) => 0.0,
            false => f64::INFINITY,
        });
        let error = error.fold(0.0, |a: f64, b| if b.is_nan() { f64::INFINITY } else { a.max(b) });
        let largest = expected.iter().filter(|x| x.is_finite()).fold(0.0, |a: f64, b| a.max(b.abs()));
        let noise = &self.json["noise"][name];
        let (noise, allowed) = match (noise[0].as_f64(), noise[1].as_f64()) {
            (Some(noise), Some(largest)) => {
                // That f32 agrees with f64 to less than it can hold is chance.
                let noise = noise.max(f64::from(f32::EPSILON) / 2.0 * largest);
                (noise, (FAITHFUL * noise).max(share * largest).max(difference))
            }
            _ => {
                let allowed = (share * largest).max(difference);
                (allowed / FAITHFUL, allowed)
            }
        };
        self.record(name, error, noise.max(f64::from(f32::MIN_POSITIVE)), allowed);
        Ok(())
    }

    /// Compares whole numbers, all of which have to be equal.
    pub(super) fn check_equal<T: PartialEq>(&self, name: &str, found: &[T], expected: &[T]) {
        self.touched.borrow_mut().insert(name.to_owned());
        let different = found.iter().zip(expected).filter(|(a, b)| a != b).count();
        self.record(name, (different + found.len().abs_diff(expected.len())) as f64, 1.0, 0.0);
    }

    /// Compares indices with a tensor of the case.
    pub(super) fn check_index(&self, name: &str, found: &[i64]) -> Outcome {
        if !self.has(name) {
            return Ok(());
        }
        let expected = self.integers(name)?;
        self.check_equal(name, found, &expected);
        Ok(())
    }

    pub(super) fn record(&self, name: &str, error: f64, noise: f64, allowed: f64) {
        let checked =
            Checked { name: name.to_owned(), error, noise, of_noise: error / noise, allowed, passed: error <= allowed };
        self.checked.borrow_mut().push(checked);
    }

    /// Compares gradients: those of the case in full, and the length of that of every parameter.
    pub(super) fn check_gradients(&self, gradients: &GradStore, parameters: &[(String, Var)]) -> Outcome {
        let lengths = self.json["grad_l2"].as_object();
        let without = |name: &&String| lengths.is_some_and(|lengths| !lengths.contains_key(*name));
        if let Some(name) = parameters.iter().map(|(name, _)| name).find(without) {
            return Err(format!("grad_l2: expected every parameter of the model, found none for {name}").into());
        }
        let longest = lengths.into_iter().flatten().filter_map(|(_, length)| length.as_f64()).fold(0.0, f64::max);
        let mut unseen: BTreeSet<&str> = lengths.into_iter().flatten().map(|(name, _)| name.as_str()).collect();
        let (mut error, mut allowed, mut worst) = (0.0, 1.0, f64::NEG_INFINITY);
        for (name, var) in parameters {
            let gradient = gradients.get(var).map_or_else(|| var.zeros_like(), |gradient| Ok(gradient.clone()))?;
            // A gradient that is 0 but for rounding, such as that of keys' biases, says nothing of its own size.
            let tensor = format!("grad.{name}");
            let rounding = if self.json["noise"].get(&tensor).is_some() { 0.0 } else { ROUNDING * longest };
            self.check_within(&tensor, &gradient, SAFE, rounding)?;
            if unseen.remove(name.as_str()) {
                let expected = self.json["grad_l2"][name].as_f64().unwrap_or(0.0);
                let found = numbers(&gradient)?.iter().map(|g| g * g).sum::<f64>().sqrt();
                let (off, bound) = ((found - expected).abs(), 1e-3 * expected + ROUNDING * longest);
                if off / bound > worst {
                    (error, allowed, worst) = (off, bound, off / bound);
                }
            }
        }
        if let Some(name) = unseen.first() {
            return Err(format!("grad_l2: expected only parameters of the model, found {name}").into());
        }
        if lengths.is_some_and(|lengths| !lengths.is_empty()) {
            self.record("grad_l2", error, allowed / FAITHFUL, allowed);
        }
        Ok(())
    }

    /// What was checked, and what is wrong with the case as a whole.
    pub(super) fn finish(self) -> (Vec<Checked>, Vec<String>) {
        let touched = self.touched.into_inner();
        let untouched = self.tensors.keys().filter(|name| !touched.contains(*name));
        let failures = untouched.map(|name| format!("tensor {name} was not checked")).collect();
        (self.checked.into_inner(), failures)
    }
}

/// Reads a safetensors file as it is.
pub(super) fn read(file: &Path) -> Outcome<Tensors> {
    let tensors = candle_core::safetensors::load(file, &Device::Cpu);
    Ok(tensors.map_err(|error| format!("{}: {error}", file.display()))?.into_iter().collect())
}

/// The sum of a result's numbers, each times that of a cotangent: what the original took gradients of. In f64, since it is not the
/// model's sum.
pub(super) fn product(found: &Tensor, cotangent: &Tensor) -> candle_core::Result<Tensor> {
    (found.to_dtype(DType::F64)? * cotangent.to_dtype(DType::F64)?)?.sum_all()
}

fn numbers(tensor: &Tensor) -> candle_core::Result<Vec<f64>> {
    tensor.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// A shape without its sides of 1.
fn squeezed(tensor: &Tensor) -> Vec<usize> {
    tensor.dims().iter().copied().filter(|&side| side != 1).collect()
}
