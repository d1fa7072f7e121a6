//! Rows of patches: pixels cut into patches, and Swin's patch merging, each 2 × 2 tokens side by side as one.

use std::ops::Range;

use candle_core::{Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, differentiable_by_gradient};
use crate::host::{read, written};
use crate::path::Path;
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
    let cut = Cut { n, channels, down, across, patch };
    match Path::for_tensor(pixels) {
        Path::HostF32 => cut.split::<f32>(OP, &pixels.contiguous()?),
        Path::HostBf16 => cut.split::<bf16>(OP, &pixels.contiguous()?),
        _ => {
            let parts = pixels.reshape((n, channels, down, patch, across, patch))?;
            parts.permute([0, 2, 4, 1, 3, 5])?.contiguous()?.reshape((n, down * across, channels * patch * patch))
        }
    }
}

/// How images are cut into patches.
#[derive(Clone, Copy)]
struct Cut {
    n: usize,
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

    fn split<T: Real>(self, op: &'static str, pixels: &Tensor) -> Result<Tensor> {
        let shape = (self.n, self.down * self.across, self.channels * self.patch * self.patch);
        let split = {
            let values = &*read::<T>(pixels)?;
            written(shape, |out: &mut [T]| {
                out.par_chunks_mut(self.row().max(1)).enumerate().for_each(|(row, out)| {
                    for channel in 0..self.channels {
                        let band = (row / self.down * self.channels + channel) * self.down + row % self.down;
                        let lines = values[band * self.band()..][..self.band()].chunks_exact(self.patch);
                        for (i, from) in lines.enumerate() {
                            out[self.place(i % self.across, channel, i / self.across)].copy_from_slice(from);
                        }
                    }
                });
            })
        };
        differentiable_by_gradient(op, [pixels], split, move |gradient| {
            Ok([Some(self.join::<T>(gradient)?.detached())])
        })
    }

    /// The images of these patches.
    fn join<T: Real>(self, patches: &Tensor) -> Result<Fresh> {
        let shape = (self.n, self.channels, self.down * self.patch, self.across * self.patch);
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
    match Path::for_tensor(x) {
        Path::HostF32 => merged::<f32>(OP, &x.contiguous()?, height, width),
        Path::HostBf16 => merged::<bf16>(OP, &x.contiguous()?, height, width),
        _ => {
            let parts = x.reshape((n, height / 2, 2, width / 2, 2, c))?;
            parts.permute([0, 1, 3, 4, 2, 5])?.contiguous()?.reshape((n, height / 2 * (width / 2), 4 * c))
        }
    }
}

fn merged<T: Real>(op: &'static str, x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (n, tokens, c) = x.dims3()?;
    let shape = [n, height / 2 * (width / 2), 4 * c];
    let y = map_rows::<T>(x, shape, width, c, |out, x, merged, token| out[merged].copy_from_slice(&x[token]))?;
    differentiable_by_gradient(op, [x], y, move |gradient| {
        let dx = map_rows::<T>(gradient, [n, tokens, c], width, c, |out, gradient, merged, token| {
            out[token].copy_from_slice(&gradient[merged]);
        })?;
        Ok([Some(dx.detached())])
    })
}

/// Calls `copy` for each token of each two rows of the grid, of `width` tokens of `c` numbers: with these rows of the result
/// and of `from`, and with the places in them of the token after merging and before.
fn map_rows<T: Real>(
    from: &Tensor,
    shape: [usize; 3],
    width: usize,
    c: usize,
    copy: impl Fn(&mut [T], &[T], Range<usize>, Range<usize>) + Sync,
) -> Result<Fresh> {
    let from = &*read::<T>(from)?;
    let rows = (2 * width * c).max(1);
    Ok(written(&shape, |out: &mut [T]| {
        out.par_chunks_mut(rows).zip(from.par_chunks(rows)).for_each(|(out, from)| {
            for merged in 0..2 * width {
                let (right, lower) = (merged / 2 % 2, merged % 2);
                let token = lower * width + merged / 4 * 2 + right;
                copy(out, from, merged * c..(merged + 1) * c, token * c..(token + 1) * c);
            }
        });
    }))
}
