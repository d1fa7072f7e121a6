//! Sums of two tensors, of which either may be of a half type.

use candle_core::{DType, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::host::{Changed, change, memory, read, written};
use crate::real::Real;
use crate::simd::vectorized;

/// Numbers that a thread takes at a time.
const CHUNK: usize = 1 << 14;

/// `a + b` in another type.
///
/// # Errors
/// If the shapes differ.
pub(crate) fn sum(a: &Tensor, b: &Tensor, dtype: DType) -> Result<Tensor> {
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let are_on_host = a.device().is_cpu() && b.device().is_cpu() && a.shape() == b.shape();
    match (a.dtype(), b.dtype(), dtype) {
        (DType::F32, DType::F32, DType::F32) if are_on_host => on_host::<f32, f32, f32>(&a, &b),
        (DType::F32, DType::BF16, DType::F32) if are_on_host => on_host::<f32, bf16, f32>(&a, &b),
        (DType::BF16, DType::F32, DType::F32) if are_on_host => on_host::<bf16, f32, f32>(&a, &b),
        (DType::BF16, DType::BF16, DType::F32) if are_on_host => on_host::<bf16, bf16, f32>(&a, &b),
        (DType::BF16, DType::BF16, DType::BF16) if are_on_host => on_host::<bf16, bf16, bf16>(&a, &b),
        _ => a.to_dtype(dtype)? + b.to_dtype(dtype)?,
    }
}

fn on_host<A: Real, B: Real, Out: Real>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (x, y) = (&*read::<A>(a)?, &*read::<B>(b)?);
    let sum = written(a.shape(), |out: &mut [Out]| {
        let parts = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(y.par_chunks(CHUNK));
        parts.for_each(|((out, x), y)| {
            vectorized(
                #[inline(always)]
                || {
                    for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
                        *out = Out::narrow(x.widen() + y.widen());
                    }
                },
            );
        });
    });
    Ok(sum.detached())
}

/// Adds `b` to the numbers of `a`, whoever has them, and says whether there are loops for it.
pub(crate) fn add_in_place(a: &Tensor, b: &Tensor) -> Result<bool> {
    let are_on_host = a.device().is_cpu() && b.device().is_cpu();
    let fit = a.shape() == b.shape() && a.is_contiguous() && a.elem_count() > 0;
    if !are_on_host || !fit || memory(a) == memory(b) {
        return Ok(false);
    }
    let b = &b.contiguous()?;
    match (a.dtype(), b.dtype()) {
        (DType::F32, DType::F32) => add_on_host::<f32, f32>(a, b)?,
        (DType::F32, DType::BF16) => add_on_host::<f32, bf16>(a, b)?,
        (DType::BF16, DType::BF16) => add_on_host::<bf16, bf16>(a, b)?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn add_on_host<A: Real + Changed, B: Real>(a: &Tensor, b: &Tensor) -> Result<()> {
    let addend = &*read::<B>(b)?;
    change(a, |sum: &mut [A]| {
        sum.par_chunks_mut(CHUNK).zip(addend.par_chunks(CHUNK)).for_each(|(sum, addend)| {
            vectorized(
                #[inline(always)]
                || sum.iter_mut().zip(addend).for_each(|(sum, x)| *sum = A::narrow(sum.widen() + x.widen())),
            );
        });
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn sums_of_all_types() {
        // More than a chunk.
        const COLUMNS: usize = CHUNK / 5 + 1;
        let wide = |seed: usize, dtype: DType| {
            let numbers = (0..5 * COLUMNS).map(|i| ((i * 37 + seed) as f32 * 0.618_034).sin());
            Tensor::from_vec(numbers.collect(), (5, COLUMNS), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let wanted = |a: &Tensor, b: &Tensor, dtype: DType| {
            let sum = (a.to_dtype(DType::F32).unwrap() + b.to_dtype(DType::F32).unwrap()).unwrap();
            sum.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let numbers = |x: &Tensor| wanted(x, &x.zeros_like().unwrap(), DType::F32);
        for of_a in [DType::F32, DType::BF16, DType::F16] {
            for of_b in [DType::F32, DType::BF16, DType::F16] {
                let (a, b) = (wide(1, of_a), wide(2, of_b));
                // Of other strides.
                let b = b.t().unwrap().contiguous().unwrap().t().unwrap();
                for dtype in [DType::F32, DType::BF16] {
                    let found = sum(&a, &b, dtype).unwrap();
                    assert_eq!(found.dtype(), dtype);
                    if dtype == DType::F32 || (of_a, of_b) == (dtype, dtype) {
                        assert_eq!(numbers(&found), wanted(&a, &b, dtype), "{of_a:?} {of_b:?} {dtype:?}");
                    }
                }
                let expected = wanted(&a, &b, of_a);
                if add_in_place(&a, &b).unwrap() {
                    assert_eq!(numbers(&a), expected, "{of_a:?} {of_b:?}");
                } else {
                    assert!(of_a == DType::F16 || of_b == DType::F16 || (of_a, of_b) == (DType::BF16, DType::F32));
                    assert_eq!(numbers(&a), numbers(&wide(1, of_a)));
                }
            }
        }
    }
}
