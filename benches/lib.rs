//! What the measurements share: inputs drawn from a seed, and the two ways to time an operation.

use candle_core::{Device, Result, Tensor, Var};
use criterion::Criterion;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Numbers between −1 and 1 as a variable, so that backward passes reach it.
///
/// # Errors
/// If the tensor cannot be made.
pub fn random(shape: &[usize]) -> Result<Var> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Times `operation` as `name/forward`, and with the gradients of all its variables as `name/training`.
///
/// # Panics
/// If the operation fails: there is nothing to be measured then.
pub fn both_ways(criterion: &mut Criterion, name: &str, operation: impl Fn() -> Result<Tensor>) {
    let mut group = criterion.benchmark_group(name);
    group.bench_function("forward", |bencher| bencher.iter(|| operation().expect(name)));
    group.bench_function("training", |bencher| {
        bencher.iter(|| operation().and_then(|output| output.sum_all()?.backward()).expect(name));
    });
    group.finish();
}

/// The settings of all measurements: few samples, for a machine of two cores.
pub fn criterion() -> Criterion {
    Criterion::default().sample_size(20).configure_from_args()
}
