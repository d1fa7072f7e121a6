use candle_core::{Result, Tensor};

/// Bicubic resizing of a grid `x [H, W, C]` → `[height, width, C]`, as `torch.nn.functional.interpolate` does it: a = −0.75,
/// corners not aligned, no antialiasing; places outside the grid have the values of its border.
///
/// # Errors
/// If `x` has not three dimensions, or a size is 0.
pub fn resize_bicubic(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (h, w, c) = x.dims3()?;
    if h * w * height * width == 0 {
        candle_core::bail!("resize_bicubic: expected sizes above 0, found {h} x {w} to {height} x {width}");
    }
    if (h, w) == (height, width) {
        return Ok(x.clone());
    }
    let matrix = |input: usize, output: usize| {
        Tensor::from_vec(weights(input, output), (output, input), x.device())?.to_dtype(x.dtype())
    };
    let columns = x.transpose(0, 1)?.contiguous()?.reshape((w, h * c))?;
    let columns = matrix(w, width)?.matmul(&columns)?.reshape((width, h, c))?;
    let rows = columns.transpose(0, 1)?.contiguous()?.reshape((h, width * c))?;
    matrix(h, height)?.matmul(&rows)?.reshape((height, width, c))
}

/// For each output place its weights over the input places, a row each. In `f32` and with fused multiplications, as PyTorch's
/// vectorised code computes them: on a large grid, the rounding of a place shows in the result.
fn weights(input: usize, output: usize) -> Vec<f32> {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0).mul_add(x, -(A + 3.0)) * x).mul_add(x, 1.0);
    let far = |x: f32| A.mul_add(x, -5.0 * A).mul_add(x, 8.0 * A).mul_add(x, -4.0 * A);
    let scale = input as f32 / output as f32;
    let mut weights = vec![0.0; input * output];
    for (place, row) in weights.chunks_exact_mut(input).enumerate() {
        let source = scale.mul_add(place as f32 + 0.5, -0.5);
        let (base, t) = (source.floor(), source - source.floor());
        for (offset, weight) in [(-1.0, far(t + 1.0)), (0.0, near(t)), (1.0, near(1.0 - t)), (2.0, far(2.0 - t))] {
            row[(base + offset).clamp(0.0, (input - 1) as f32) as usize] += weight;
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn weights_add_up_and_are_symmetric() {
        for (input, output) in [(8, 16), (24, 14), (3, 7), (1, 4), (5, 1)] {
            let weights = weights(input, output);
            let mirrored: Vec<f32> = weights.iter().rev().copied().collect();
            for (row, mirrored) in weights.chunks(input).zip(mirrored.chunks(input)) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{input} to {output}");
                assert!(row.iter().zip(mirrored).all(|(a, b)| (a - b).abs() < 2e-5), "{input} to {output}");
            }
        }
        // Half way between two places: −3/32 of the outer ones, 19/32 of the inner ones.
        assert_eq!(weights(4, 1), [-0.09375, 0.59375, 0.59375, -0.09375]);
    }

    #[test]
    fn a_size_of_nothing_is_refused() {
        let grid = Tensor::zeros((2, 2, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(resize_bicubic(&grid, 0, 3).is_err());
        assert_eq!(resize_bicubic(&grid, 5, 3).unwrap().dims(), [5, 3, 1]);
    }
}
