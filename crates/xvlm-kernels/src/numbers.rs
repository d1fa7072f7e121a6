//! Numbers as files have them.

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::host::written;
use crate::real::Real;
use crate::simd::vectorized;

/// Numbers that a thread converts at a time.
const CHUNK: usize = 1 << 16;

/// A tensor on the CPU of numbers as they lie in a file: `bytes` of type `stored` in little-endian order, to be of type
/// `dtype`. Each number is converted once, from its bytes to its place; where a CPU computes with `f32` or `bf16`, numbers of two
/// and four bytes are rounded once, to the nearest.
///
/// # Errors
/// If `bytes` are not as many as `shape` has numbers of the type, or candle does not convert one type into the other.
pub fn tensor_of_bytes(bytes: &[u8], stored: DType, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let size = stored.size_in_bytes();
    if shape.elem_count().checked_mul(size) != Some(bytes.len()) {
        bail!("bytes: expected those of shape {:?} of {stored:?}, found {}", shape.dims(), bytes.len());
    }
    let wide = |read: fn(&[u8], &mut [f32])| converted(bytes, size, &shape, read);
    let half = |read: fn(&[u8], &mut [bf16])| converted(bytes, size, &shape, read);
    Ok(match (stored, dtype) {
        (DType::F32, DType::F32) => wide(|bytes, out| {
            numbers(bytes, out, f32::from_le_bytes);
        }),
        (DType::BF16, DType::F32) => wide(|bytes, out| numbers(bytes, out, |x| bf16::from_le_bytes(x).widen())),
        (DType::F16, DType::F32) => wide(from_f16),
        (DType::BF16, DType::BF16) => half(|bytes, out| numbers(bytes, out, bf16::from_le_bytes)),
        (DType::F32, DType::BF16) => half(|bytes, out| numbers(bytes, out, |x| Real::narrow(f32::from_le_bytes(x)))),
        (DType::F16, DType::BF16) => half(|bytes, out| {
            let mut wide = vec![0.0; out.len()];
            from_f16(bytes, &mut wide);
            out.iter_mut().zip(wide).for_each(|(out, x)| *out = Real::narrow(x));
        }),
        _ => Tensor::from_raw_buffer(bytes, stored, shape.dims(), &Device::Cpu)?.to_dtype(dtype)?,
    })
}

fn converted<T: Real>(bytes: &[u8], size: usize, shape: &Shape, read: fn(&[u8], &mut [T])) -> Tensor {
    written(shape, |out: &mut [T]| {
        out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * size)).for_each(|(out, bytes)| read(bytes, out));
    })
    .detached()
}

/// Number by number.
fn numbers<const N: usize, T>(bytes: &[u8], out: &mut [T], number: impl Fn([u8; N]) -> T) {
    let (bytes, _) = bytes.as_chunks::<N>();
    vectorized(
        #[inline(always)]
        || out.iter_mut().zip(bytes).for_each(|(out, bytes)| *out = number(*bytes)),
    );
}

fn from_f16(bytes: &[u8], out: &mut [f32]) {
    /// Numbers that fit the innermost cache beside what they become.
    const PART: usize = 1024;
    let mut part = [f16::ZERO; PART];
    for (out, bytes) in out.chunks_mut(PART).zip(bytes.chunks(2 * PART)) {
        let part = &mut part[..out.len()];
        numbers(bytes, part, f16::from_le_bytes);
        part.convert_to_f32_slice(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of every type, at an odd address, as candle converts them.
    #[test]
    fn numbers_are_those_of_candle() {
        let device = Device::Cpu;
        let len = CHUNK + 1029;
        let values: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin() * 1.5f32.powi(i as i32 % 23 - 11)).collect();
        let values = Tensor::from_vec(values, len, &device).unwrap();
        for stored in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let tensor = values.to_dtype(stored).unwrap();
            let mut bytes = vec![0];
            tensor.write_bytes(&mut bytes).unwrap();
            for dtype in [DType::F32, DType::BF16] {
                let read = tensor_of_bytes(&bytes[1..], stored, dtype, len).unwrap();
                assert_eq!(read.dtype(), dtype);
                let numbers = |x: Tensor| x.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(numbers(read), numbers(tensor.to_dtype(dtype).unwrap()), "{stored:?} {dtype:?}");
            }
            assert!(tensor_of_bytes(&bytes, stored, DType::F32, len).is_err());
        }
        let none = tensor_of_bytes(&[], DType::F32, DType::F32, (0, 3)).unwrap();
        assert_eq!(none.dims(), [0, 3]);
        let scalar = tensor_of_bytes(&1.5f32.to_le_bytes(), DType::F32, DType::F32, ()).unwrap();
        assert_eq!(scalar.to_scalar::<f32>().unwrap(), 1.5);
    }
}
