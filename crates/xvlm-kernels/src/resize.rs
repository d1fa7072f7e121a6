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
    fn a_line_stays_a_line_inside() {
        let line: Vec<f32> = (0..8).flat_map(|y| (0..8).map(move |x| (2 * x + y) as f32)).collect();
        let grid = Tensor::from_vec(line, (8, 8, 1), &Device::Cpu).unwrap();
        let found = resize_bicubic(&grid, 16, 12).unwrap();
        assert_eq!(found.dims(), [16, 12, 1]);
        let found = found.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for y in 4..12 {
            for x in 3..9 {
                let (sx, sy) = ((x as f32 + 0.5) * 8.0 / 12.0 - 0.5, (y as f32 + 0.5) * 0.5 - 0.5);
                assert!((found[y * 12 + x] - (2.0 * sx + sy)).abs() < 1e-4);
            }
        }
        assert!(resize_bicubic(&grid, 0, 3).is_err());
    }
}
