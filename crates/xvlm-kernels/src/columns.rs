//! Sums over the rows of a matrix: the gradient of whatever is added to every row.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::graph::Fresh;
use crate::host::{read, written};
use crate::path::fused;
use crate::real::Real;
use crate::simd::{add_widened, vectorized};

/// `x [.., C]`, contiguous and on a fused path, → `[C]`.
pub(crate) fn column_sums(x: &Tensor) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1);
    let sums: Fresh = fused!(x, T => on_host::<T>(&read::<T>(x)?, width); on_gpu(x, width)?);
    Ok(sums.detached())
}

fn on_host<T: Real>(values: &[T], width: usize) -> Fresh {
    // Fixed, so that the order of the sums does not depend on the number of threads.
    const ROWS: usize = 256;
    let partial: Vec<Vec<f32>> = values
        .par_chunks((ROWS * width).max(1))
        .map(|rows| {
            vectorized(
                #[inline(always)]
                || {
                    let mut total = vec![0f32; width];
                    rows.chunks_exact(width).for_each(|row| add_widened(&mut total, row));
                    total
                },
            )
        })
        .collect();
    let mut total = vec![0f32; width];
    partial.iter().for_each(|part| add_widened(&mut total, part));
    written(width, |out: &mut [T]| out.iter_mut().zip(&total).for_each(|(out, &x)| *out = T::narrow(x)))
}

#[cfg(gpu)]
fn on_gpu(x: &Tensor, width: usize) -> Result<Fresh> {
    use crate::gpu::{Arg, Buffer, Grid, Kernel, launch};
    use candle_core::DType;
    const THREADS: u32 = 256;
    let kernel = |name| Kernel { file: "columns", name };
    let rows = x.elem_count() / width.max(1);
    let rows_per_part = rows_per_part(rows);
    let parts = rows.div_ceil(rows_per_part);
    let mut partial = Buffer::new(x, DType::F32, (parts, width))?;
    let across = width.div_ceil(THREADS as usize);
    let grid = Grid { blocks: [across, parts, 1], threads: THREADS, shared: 0 };
    let [rows, columns, rows_per_part] = [Arg::size(rows)?, Arg::size(width)?, Arg::size(rows_per_part)?];
    let arguments = &mut [Arg::In(x), Arg::Out(&mut partial), rows, columns, rows_per_part];
    launch(kernel("column_parts"), x, x.dtype(), grid, arguments)?;
    totals_on_gpu(x, &partial, parts, width)
}

/// How many rows are summed before the sums are: so that there are not more of these than a thread adds up quickly.
#[cfg(gpu)]
pub(crate) fn rows_per_part(rows: usize) -> usize {
    rows.div_ceil(256).max(64)
}

/// Sums over the rows of `partial [parts, ..]`, in the type of `like`: the numbers of a row in `shape`.
#[cfg(gpu)]
pub(crate) fn totals_on_gpu(
    like: &Tensor,
    partial: &crate::gpu::Buffer,
    parts: usize,
    shape: impl Into<candle_core::Shape>,
) -> Result<Fresh> {
    use crate::gpu::{Arg, Buffer, Grid, Kernel, launch};
    const THREADS: u32 = 256;
    let shape = shape.into();
    let width = shape.elem_count();
    let mut out = Buffer::like(like, shape)?;
    let arguments = &mut [Arg::Made(partial), Arg::Out(&mut out), Arg::size(parts)?, Arg::size(width)?];
    let grid = Grid::line(width.div_ceil(THREADS as usize), THREADS);
    launch(Kernel { file: "columns", name: "column_totals" }, like, like.dtype(), grid, arguments)?;
    Ok(out.into())
}
