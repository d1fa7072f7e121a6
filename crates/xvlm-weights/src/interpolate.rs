//! Tables of positions at another size, as the original makes them when a checkpoint moves to another resolution.

use candle_core::{DType, Result, Tensor};
use xvlm_kernels as kernels;

/// Absolute position embeddings `[.., 1 + P·P, C]` for another grid of patches: that of the class token stays, the others are
/// resized bicubically (`interpolate_pos_embed` of the original's `models/vit.py`).
///
/// # Errors
/// If the embeddings are not those of a class token and a square of patches.
pub fn resize_positions(positions: &Tensor, side: usize) -> Result<Tensor> {
    let mut shape = positions.dims().to_vec();
    let &[rows, width] = shape.last_chunk::<2>().unwrap_or(&[0, 0]);
    let before = rows.saturating_sub(1).isqrt();
    if rows != before * before + 1 || before == 0 || positions.elem_count() != rows * width {
        candle_core::bail!("positions: expected one, and a square of patches, found shape {shape:?}");
    }
    let table = positions.reshape((rows, width))?.to_dtype(DType::F32)?;
    let grid = table.narrow(0, 1, rows - 1)?.reshape((before, before, width))?;
    let resized = kernels::resize_bicubic(&grid, side, side)?.reshape((side * side, width))?;
    let at = shape.len() - 2;
    shape[at] = side * side + 1;
    Tensor::cat(&[&table.narrow(0, 0, 1)?, &resized], 0)?.reshape(shape)?.to_dtype(positions.dtype())
}

/// Relative-position biases `[S·S, heads]` of a window for another window: `S = 2·window − 1` becomes `side`
/// (`interpolate_relative_pos_embed` of the original's `models/swin_transformer.py`).
///
/// The offsets of the source lie on a grid whose steps grow geometrically, dense in the middle, so that it reaches as far as the
/// target's even grid; a bicubic spline through them is read off there. A table of fewer than four offsets along a side, where
/// the original fails, gets a spline of lower degree.
///
/// # Errors
/// If the table is not that of a square window.
pub fn resize_relative_positions(table: &Tensor, side: usize) -> Result<Tensor> {
    let (rows, heads) = table.dims2()?;
    let source = rows.isqrt();
    if source * source != rows || source.is_multiple_of(2) || side.is_multiple_of(2) {
        candle_core::bail!(
            "relative positions: expected an odd number squared for {side} squared, found {:?}",
            table.dims()
        );
    }
    if source == side {
        return Ok(table.clone());
    }
    let (_, places) = geometric_grid(source, side);
    let reach = (side / 2) as f64;
    let targets: Vec<f64> = (0..side).map(|i| i as f64 - reach).collect();
    let spline = spline_matrix(&places, &targets);
    let device = table.device();
    let spline = Tensor::from_vec(spline, (side, source), device)?;
    let values = table.to_dtype(DType::F64)?.reshape((source, source * heads))?;
    let rows = spline.matmul(&values)?.reshape((side, source, heads))?;
    let columns = rows.transpose(0, 1)?.contiguous()?.reshape((source, side * heads))?;
    let resized = spline.matmul(&columns)?.reshape((side, side, heads))?.transpose(0, 1)?.contiguous()?;
    resized.reshape((side * side, heads))?.to_dtype(table.dtype())
}

/// The places of `source` offsets along a side whose target has `target`, and the ratio of neighbouring steps. The ratio is
/// found by halving an interval, as the original does, with its bounds and its end.
pub fn geometric_grid(source: usize, target: usize) -> (f64, Vec<f64>) {
    let half = source / 2;
    let (mut left, mut right, mut ratio) = (1.01f64, 1.5f64, 1.01f64);
    while right - left > 1e-6 {
        ratio = (left + right) / 2.0;
        let reach = (1.0 - ratio.powi(half as i32)) / (1.0 - ratio);
        if reach > (target / 2) as f64 {
            right = ratio;
        } else {
            left = ratio;
        }
    }
    let mut reach = 1.0;
    let mut steps = Vec::with_capacity(half);
    for i in 1..=half {
        steps.push(reach);
        reach += ratio.powi(i as i32);
    }
    let places = steps.iter().rev().map(|step| -step).chain([0.0]).chain(steps.iter().copied()).collect();
    (ratio, places)
}

/// The linear map from values at `places` to those at `targets` of the interpolating spline, row-major. The spline is cubic, of
/// as low a degree as there are places for, and has no knot at the second and the last but one place (what FITPACK's
/// `regrid` without smoothing does); targets outside the places get the value at the nearest end.
fn spline_matrix(places: &[f64], targets: &[f64]) -> Vec<f64> {
    let n = places.len();
    let degree = 3.min(n - 1);
    let (first, last) = (places[0], places[n - 1]);
    let inside = if degree == 3 { &places[2..n.max(4) - 2] } else { &places[..0] };
    let mut knots = vec![first; degree + 1];
    knots.extend(inside);
    knots.extend(vec![last; degree + 1]);

    // Coefficients solve `basis · c = values`: eliminate on [basisᵀ | basis at targetsᵀ] to get the map without inverting.
    let basis: Vec<Vec<f64>> = places.iter().map(|&x| basis_functions(&knots, degree, n, x)).collect();
    let wanted: Vec<Vec<f64>> =
        targets.iter().map(|&x| basis_functions(&knots, degree, n, x.clamp(first, last))).collect();
    let mut rows: Vec<Vec<f64>> =
        (0..n).map(|i| basis.iter().map(|at| at[i]).chain(wanted.iter().map(|at| at[i])).collect()).collect();
    for column in 0..n {
        let pivot = (column..n).max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()));
        rows.swap(column, pivot.unwrap_or(column));
        let pivot = rows[column].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(i, _)| *i != column) {
            let factor = row[column] / pivot[column];
            row.iter_mut().zip(&pivot).skip(column).for_each(|(x, p)| *x -= factor * p);
        }
    }
    let solved = |target: usize, place: usize| rows[place][n + target] / rows[place][place];
    (0..targets.len()).flat_map(|target| (0..n).map(move |place| (target, place))).map(|(t, p)| solved(t, p)).collect()
}

/// The values at `x` of the `count` B-splines over `knots` (Cox and de Boor).
fn basis_functions(knots: &[f64], degree: usize, count: usize, x: f64) -> Vec<f64> {
    // The last interval holds its right end.
    let span = (degree..count).rev().find(|&i| knots[i] <= x).unwrap_or(degree);
    let mut values = vec![0.0; count];
    values[span] = 1.0;
    for d in 1..=degree {
        for i in span - d..=span {
            let part = |from: usize, to: usize| {
                let length = knots[to] - knots[from];
                if length > 0.0 { 1.0 / length } else { 0.0 }
            };
            let rising = (x - knots[i]) * part(i, i + d) * values[i];
            let next = values.get(i + 1).copied().unwrap_or(0.0);
            values[i] = rising + (knots[i + d + 1] - x) * part(i + 1, i + d + 1) * next;
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn splines_reproduce_cubics_and_their_places() {
        let places = [-5.0, -2.5, -1.0, 0.0, 1.0, 2.5, 5.0];
        let cubic = |x: f64| 0.3 * x * x * x - x * x + 2.0 * x - 7.0;
        let targets = [-5.0, -3.3, 0.2, 1.0, 4.9, 9.0];
        let matrix = spline_matrix(&places, &targets);
        for (row, x) in matrix.chunks(places.len()).zip(targets) {
            let found: f64 = row.iter().zip(places).map(|(weight, place)| weight * cubic(place)).sum();
            assert!((found - cubic(x.min(5.0))).abs() < 1e-9, "{x}: {found}");
        }
        let three = spline_matrix(&[-1.0, 0.0, 1.0], &[0.5]);
        let found: f64 = three.iter().zip([1.0, 0.0, 1.0]).map(|(weight, value)| weight * value).sum();
        assert!((found - 0.25).abs() < 1e-12, "a parabola through three places");
        assert_eq!(spline_matrix(&[0.0], &[-1.0, 3.0]), [1.0, 1.0]);
    }

    #[test]
    fn tables_that_are_no_squares_are_refused() {
        let zeros = |rows| Tensor::zeros((rows, 2), DType::F32, &Device::Cpu).unwrap();
        assert!(resize_relative_positions(&zeros(24), 7).is_err());
        assert!(resize_positions(&zeros(16), 3).is_err());
        assert_eq!(resize_positions(&zeros(17), 6).unwrap().dims(), [37, 2]);
        assert_eq!(resize_relative_positions(&zeros(9), 7).unwrap().dims(), [49, 2]);
    }
}
