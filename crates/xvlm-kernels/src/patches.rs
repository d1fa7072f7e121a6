//! Rows of patches: pixels cut into patches, and Swin's patch merging, each 2 × 2 tokens side by side as one.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, differentiable};
use crate::host::{read, written};
use crate::path::{Path, fused};
use crate::real::Real;

/// Pixels `[N, C, H, W]` → `[N, H/patch · W/patch, C · patch²]`: the patches row by row, each as `[C, patch, patch]`, which a
/// linear layer makes tokens of.
///
/// # Errors
/// If `patch` is 0 or does not divide `H` and `W`.
pub fn split_patches(pixels: &Tensor, patch: usize) -> Result<Tensor> {
    const OP: &str = "split_patches";
    let (n, channels, height, width) = pixels.dims4()?;
    if patch == 0 || !(height.is_multiple_of(patch) && width.is_multiple_of(patch)) {
        let (expected, found) = (format!("a divisor of {height} and {width}"), patch.to_string());
        return Err(KernelError::Value { op: OP, argument: "patch", expected, found }.into());
    }
    let (down, across) = (height / patch, width / patch);
    let split = [n, down * across, channels * patch * patch];
    if !matches!(Path::for_tensor(pixels), Path::HostF32 | Path::HostBf16) {
        let parts = pixels.reshape((n, channels, down, patch, across, patch))?;
        return parts.permute([0, 2, 4, 1, 3, 5])?.contiguous()?.reshape(&split);
    }
    let pixels = &pixels.contiguous()?;
    let cut = Cut { channels, down, across, patch };
    let y =
        fused!(pixels, T => cut.split::<T>(pixels, &split); candle_core::bail!("{OP}: no kernel of its own on a GPU"))?;
    differentiable(OP, [pixels], y, move |[pixels], gradient| {
        let joined = fused!(pixels, T => {
            cut.join::<T>(gradient, pixels.dims())
        }; candle_core::bail!("{OP}: no kernel of its own on a GPU"))?;
        Ok([Some(joined.detached())])
    })
}

/// How images are cut into patches.
#[derive(Clone, Copy)]
struct Cut {
    channels: usize,
    down: usize,
    across: usize,
    patch: usize,
}

impl Cut {
    /// Where line `line` of the patch `column` of a row of patches lies in that row.
    fn place(self, column: usize, channel: usize, line: usize) -> Range<usize> {
        let start = ((column * self.channels + channel) * self.patch + line) * self.patch;
        start..start + self.patch
    }

    /// Numbers of a row of patches.
    fn row(self) -> usize {
        self.across * self.channels * self.patch * self.patch
    }

    /// Numbers of a row of patches in one channel.
    fn band(self) -> usize {
        self.across * self.patch * self.patch
    }

    fn split<T: Real>(self, pixels: &Tensor, shape: &[usize]) -> Result<Fresh> {
        let pixels = &*read::<T>(pixels)?;
        Ok(written(shape, |out: &mut [T]| {
            out.par_chunks_mut(self.row().max(1)).enumerate().for_each(|(row, out)| {
                for channel in 0..self.channels {
                    let band = (row / self.down * self.channels + channel) * self.down + row % self.down;
                    let lines = pixels[band * self.band()..][..self.band()].chunks_exact(self.patch);
                    for (i, from) in lines.enumerate() {
                        out[self.place(i % self.across, channel, i / self.across)].copy_from_slice(from);
                    }
                }
            });
        }))
    }

    fn join<T: Real>(self, patches: &Tensor, shape: &[usize]) -> Result<Fresh> {
        let patches = &*read::<T>(patches)?;
        Ok(written(shape, |out: &mut [T]| {
            out.par_chunks_mut(self.band().max(1)).enumerate().for_each(|(band, out)| {
                let (plane, below) = (band / self.down, band % self.down);
                let row = plane / self.channels * self.down + below;
                let from = &patches[row * self.row()..][..self.row()];
                for (i, line) in out.chunks_exact_mut(self.patch).enumerate() {
                    line.copy_from_slice(&from[self.place(i % self.across, plane % self.channels, i / self.across)]);
                }
            });
        }))
    }
}

/// Tokens `x [N, height·width, C]` of a grid, row by row → `[N, height/2 · width/2, 4·C]`: upper left, lower left, upper right
/// and lower right of each 2 × 2, the order of the official code.
///
/// # Errors
/// On a wrong shape, or if a side of the grid is odd.
pub fn merge_patches(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    const OP: &str = "merge_patches";
    let (n, _, c) = x.dims3()?;
    check_shape(OP, "x", x, &[n, height * width, c])?;
    if !(height.is_multiple_of(2) && width.is_multiple_of(2)) {
        let (expected, found) = ("a grid of even sides".into(), format!("{height} × {width}"));
        return Err(KernelError::Value { op: OP, argument: "grid", expected, found }.into());
    }
    let merged = [n, height / 2 * (width / 2), 4 * c];
    if !matches!(Path::for_tensor(x), Path::HostF32 | Path::HostBf16) {
        let parts = x.reshape((n, height / 2, 2, width / 2, 2, c))?;
        return parts.permute([0, 1, 3, 4, 2, 5])?.contiguous()?.reshape(&merged);
    }
    let x = &x.contiguous()?;
    let y = fused!(x, T => map_rows::<T>(x, &merged, width, c, |out, x, merged, token| {
        out[merged].copy_from_slice(&x[token]);
    }); candle_core::bail!("{OP}: no kernel of its own on a GPU"))?;
    differentiable(OP, [x], y, move |[x], gradient| {
        let dx = fused!(x, T => map_rows::<T>(gradient, x.dims(), width, c, |out, gradient, merged, token| {
            out[token].copy_from_slice(&gradient[merged]);
        }); candle_core::bail!("{OP}: no kernel of its own on a GPU"))?;
        Ok([Some(dx.detached())])
    })
}

/// Calls `copy` for each token of each two rows of the grid, of `width` tokens of `c` numbers: with these rows of the result
/// and of `from`, and with the places in them of the token after merging and before.
fn map_rows<T: Real>(
    from: &Tensor,
    shape: &[usize],
    width: usize,
    c: usize,
    copy: impl Fn(&mut [T], &[T], Range<usize>, Range<usize>) + Sync,
) -> Result<Fresh> {
    let from = &*read::<T>(from)?;
    let rows = (2 * width * c).max(1);
    Ok(written(shape, |out: &mut [T]| {
        out.par_chunks_mut(rows).zip(from.par_chunks(rows)).for_each(|(out, from)| {
            for merged in 0..2 * width {
                let (right, lower) = (merged / 2 % 2, merged % 2);
                let token = lower * width + merged / 4 * 2 + right;
                copy(out, from, merged * c..(merged + 1) * c, token * c..(token + 1) * c);
            }
        });
    }))
}
