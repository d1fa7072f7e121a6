//! What the measurements share: inputs drawn from a seed, and the comparison of an operation with what it could cost.

pub mod base;
pub mod cases;
#[cfg(feature = "criterion")]
mod operations;
pub mod plain;

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[cfg(feature = "criterion")]
pub use operations::{Case, Comparison, Floor, criterion, measure, run};

/// The device that operations are measured on: the first GPU if the benches are built with `cuda`, else the CPU.
///
/// # Panics
/// If they are built for a GPU and there is none.
pub fn device() -> Device {
    if cfg!(feature = "cuda") { Device::new_cuda(0).expect("a GPU to measure on") } else { Device::Cpu }
}

/// Numbers between −1 and 1 of a float type on a device, as a variable.
///
/// # Errors
/// If the tensor cannot be made.
pub fn random_at(shape: &[usize], dtype: DType, device: &Device) -> Result<Var> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
}
