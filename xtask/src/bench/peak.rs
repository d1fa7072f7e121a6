//! What the machine can do at most: the yardstick for products of matrices.

use std::time::Instant;

use candle_core::{Device, Result, Tensor};
use pulp::{Arch, Simd, WithSimd};
use serde::Serialize;
use xvlm::Precision;
use xvlm::kernels::{Epilogue, PackedLinear};

/// Floating-point operations a second, of all threads together.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Peaks {
    /// Multiply-adds of registers with the widest vectors, and nothing else: no product of matrices can be faster.
    pub(crate) fused_multiply_adds_f32: f64,
    /// The linear layer of this workspace on 2048 rows, 1024 to 4096 wide, its weights laid out for inference.
    pub(crate) linear_f32: f64,
    pub(crate) linear_bf16: f64,
    pub(crate) linear_int8: f64,
}

impl Peaks {
    /// The best of some repeats, so that a busy moment does not lower the mark.
    pub(crate) fn measure() -> Result<Self> {
        Ok(Self {
            fused_multiply_adds_f32: multiply_adds(),
            linear_f32: linear(Precision::F32)?,
            linear_bf16: linear(Precision::Bf16)?,
            linear_int8: linear(Precision::Int8)?,
        })
    }

    /// The larger of each.
    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            fused_multiply_adds_f32: self.fused_multiply_adds_f32.max(other.fused_multiply_adds_f32),
            linear_f32: self.linear_f32.max(other.linear_f32),
            linear_bf16: self.linear_bf16.max(other.linear_bf16),
            linear_int8: self.linear_int8.max(other.linear_int8),
        }
    }

    /// What a precision is measured against: f32 the instruction; the others, whose instructions differ from CPU to CPU, the
    /// largest layer.
    pub(crate) fn of(&self, precision: Precision) -> f64 {
        match precision {
            Precision::F32 => self.fused_multiply_adds_f32,
            Precision::Bf16 => self.linear_bf16,
            Precision::Int8 => self.linear_int8,
        }
    }
}

const REPEATS: usize = 7;

fn best(flops: f64, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(flops / best)
}

fn linear(precision: Precision) -> Result<f64> {
    const ROWS: usize = 2048;
    const INPUTS: usize = 1024;
    const OUTPUTS: usize = 4096;
    let drawn = |shape: &[usize]| Tensor::rand(-1f32, 1.0, shape, &Device::Cpu)?.to_dtype(precision.dtype());
    let (x, weight, bias) = (drawn(&[1, ROWS, INPUTS])?, drawn(&[OUTPUTS, INPUTS])?, drawn(&[OUTPUTS])?);
    let layer = PackedLinear::new(&weight, Some(&bias), precision.packed())?;
    let flops = (2 * ROWS * INPUTS * OUTPUTS) as f64;
    best(flops, || layer.forward(&x, Epilogue::Nothing).map(drop))
}

/// Chains of multiply-adds that depend on nothing but themselves: enough of them to hide the latency of each.
const CHAINS: usize = 16;
const STEPS: usize = 1 << 22;

/// As many chains in each thread.
struct Chains;

impl WithSimd for Chains {
    /// Operations done.
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        // The compiler must not know what comes out, nor that all chains are equal.
        let [factor, term] = std::hint::black_box([0.999, 0.001]).map(|number| simd.splat_f32s(number));
        let mut sums = std::hint::black_box([1.0; CHAINS]).map(|number| simd.splat_f32s(number));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, factor, term);
            }
        }
        let total = sums.into_iter().map(|sum| simd.reduce_sum_f32s(sum)).sum::<f32>();
        std::hint::black_box(total);
        (2 * S::F32_LANES * CHAINS * STEPS) as f64
    }
}

fn multiply_adds() -> f64 {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let rate = || {
        let start = Instant::now();
        let workers: Vec<_> = (0..threads).map(|_| std::thread::spawn(|| Arch::new().dispatch(Chains))).collect();
        let flops: f64 = workers.into_iter().filter_map(|worker| worker.join().ok()).sum();
        flops / start.elapsed().as_secs_f64()
    };
    (0..REPEATS).map(|_| rate()).fold(0.0, f64::max)
}
