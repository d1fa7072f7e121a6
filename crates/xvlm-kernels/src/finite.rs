//! Telling numbers from what is none.

use candle_core::{DType, Result, Tensor};

/// Whether every number of a tensor of any shape is finite; a tensor without numbers has no other. A device is waited for.
///
/// # Errors
/// If the device does not compute it.
pub fn all_finite(x: &Tensor) -> Result<bool> {
    // 0 times infinity is not a number, as is every sum with one; a maximum may pass over it.
    let zeros = x.detach().to_dtype(DType::F32)?.affine(0.0, 0.0)?;
    Ok(zeros.sum_all()?.to_scalar::<f32>()? == 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn finds_what_is_no_number() {
        let is_finite = |numbers: &[f32]| all_finite(&Tensor::new(numbers, &Device::Cpu).unwrap()).unwrap();
        assert!(is_finite(&[]) && is_finite(&[0.0, -1.5, f32::MAX, f32::MIN_POSITIVE, f32::MAX]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in 0..67 {
                let mut numbers = [1.0; 67];
                numbers[place] = bad;
                assert!(!is_finite(&numbers), "{bad} at {place}");
            }
        }
        let half = Tensor::new(&[1f32, f32::INFINITY], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        assert!(!all_finite(&half).unwrap());
    }
}
