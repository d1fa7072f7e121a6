//! Patch pooling: from the patches of an image to the representation of a region.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use crate::boxes::patch_rectangle_mask;
use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, differentiable_by_gradient};
use crate::host::{cast, read, written};
use crate::path::{Path, fused};
use crate::real::Real;
use crate::simd::{add_widened, sum, vectorized};

const OP: &str = "patch_pool";

/// Which patches of its image each region covers.
#[derive(Clone, Copy, Debug)]
pub enum Cover<'a> {
    /// `[B, L]`: those where it is not 0.
    Mask(&'a Tensor),
    /// `[B, 4]` in `f32`, `(cx, cy, w, h)` in fractions of an image of `L = side²` patches: those of the
    /// [`patch_rectangle`](crate::patch_rectangle) of the box.
    Boxes(&'a Tensor),
}

/// The representation of regions (Zeng et al. 2022, §3.1): the mean of the patches a region covers, followed by all the
/// patches of its image.
///
/// `patches [N, L, C]`; region `b` lies in image `index[b]`. Returns `[B, 1 + L, C]`. A region that covers nothing, which
/// only a mask can tell, has a mean of zeros. Neither masks nor boxes get a gradient. The gradient of a patch is summed over
/// the regions in their order.
///
/// # Errors
/// On a wrong shape, an index that is not below `N`, boxes that are not `f32` or a grid that is not square, or a cover on
/// another device.
pub fn patch_pool(patches: &Tensor, index: &[u32], cover: Cover) -> Result<Tensor> {
    let wrong = |argument, expected: String, found: String| KernelError::Value { op: OP, argument, expected, found };
    let &[n, l, _] = patches.dims() else {
        let (expected, found) = ("[N, L, C]".into(), patches.dims().to_vec());
        return Err(KernelError::Shape { op: OP, argument: "patches", expected, found }.into());
    };
    let regions = index.len();
    let (argument, tensor) = match cover {
        Cover::Mask(mask) => ("mask", mask),
        Cover::Boxes(boxes) => ("boxes", boxes),
    };
    match cover {
        Cover::Mask(mask) => check_shape(OP, argument, mask, &[regions, l])?,
        Cover::Boxes(boxes) => {
            check_shape(OP, argument, boxes, &[regions, 4])?;
            if boxes.dtype() != DType::F32 {
                return Err(wrong(argument, "F32".into(), format!("{:?}", boxes.dtype())).into());
            }
            if l == 0 || l.isqrt().pow(2) != l {
                return Err(wrong("patches", "those of a square grid".into(), format!("{l} an image")).into());
            }
        }
    }
    if !tensor.device().same_device(patches.device()) {
        let at = |tensor: &Tensor| format!("on {:?}", tensor.device().location());
        return Err(wrong(argument, at(patches), at(tensor)).into());
    }
    if let Some(found) = index.iter().find(|&&image| image as usize >= n) {
        return Err(wrong("index", format!("below {n}"), found.to_string()).into());
    }
    let patches = &patches.contiguous()?;
    let shares = shares(patches, cover)?;
    if Path::for_tensor(patches) == Path::Composed {
        let tokens = patches.index_select(&Tensor::new(index, patches.device())?, 0)?;
        let means = shares.to_dtype(patches.dtype())?.unsqueeze(1)?.matmul(&tokens)?;
        return Tensor::cat(&[&means, &tokens], 1);
    }
    let result = pool(patches, index, &shares)?;
    let index = index.to_vec();
    differentiable_by_gradient(OP, [patches], result, move |gradient| {
        Ok([Some(spread(&Groups::new(&index, n), &shares, gradient)?.detached())])
    })
}

/// The weight of each patch in the mean of each region `[B, L]`, in `f32` where the patches are: one over the number of
/// patches the region covers, or 0 outside it.
fn shares(patches: &Tensor, cover: Cover) -> Result<Tensor> {
    // Neither is trained.
    let cover = match cover {
        Cover::Mask(mask) => Cover::Mask(&cast(&mask.detach(), DType::F32)?.contiguous()?),
        Cover::Boxes(boxes) => Cover::Boxes(&boxes.detach().contiguous()?),
    };
    #[cfg(gpu)]
    if Path::for_tensor(patches) == Path::Gpu {
        return on_gpu::shares(patches, cover);
    }
    let l = patches.dim(1)?;
    let mut shares = match cover {
        Cover::Mask(mask) => {
            let mask = mask.flatten_all()?.to_vec1::<f32>()?;
            mask.into_iter().map(|covers| f32::from(u8::from(covers != 0.0))).collect()
        }
        Cover::Boxes(boxes) => {
            let boxes = boxes.flatten_all()?.to_vec1::<f32>()?;
            let boxes = boxes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
            boxes.flat_map(|bounds| patch_rectangle_mask(bounds, l.isqrt())).collect::<Vec<_>>()
        }
    };
    for row in shares.chunks_exact_mut(l.max(1)) {
        let covered = sum(row);
        if covered > 0.0 {
            row.iter_mut().for_each(|covers| *covers /= covered);
        }
    }
    let regions = shares.len() / l.max(1);
    Tensor::from_vec(shares, (regions, l), patches.device())
}

fn pool(patches: &Tensor, index: &[u32], shares: &Tensor) -> Result<Fresh> {
    fused!(patches, T => pool_on_host::<T>(patches, index, shares); on_gpu::pool(patches, index, shares))
}

fn pool_on_host<T: Real>(patches: &Tensor, index: &[u32], shares: &Tensor) -> Result<Fresh> {
    let (_, l, c) = patches.dims3()?;
    let (values, shares) = (&*read::<T>(patches)?, &*read::<f32>(shares)?);
    Ok(written((index.len(), 1 + l, c), |out: &mut [T]| {
        out.par_chunks_mut(((1 + l) * c).max(1)).zip(index).enumerate().for_each(|(region, (out, &image))| {
            let image = &values[image as usize * l * c..][..l * c];
            let (mean, rest) = out.split_at_mut(c);
            vectorized(
                #[inline(always)]
                || {
                    let mut total = vec![0f32; c];
                    let mut scale = 0.0;
                    let rows = rest.chunks_exact_mut(c.max(1)).zip(image.chunks_exact(c.max(1)));
                    for ((out, row), &share) in rows.zip(&shares[region * l..][..l]) {
                        out.copy_from_slice(row);
                        if share != 0.0 {
                            add_widened(&mut total, row);
                            scale = share;
                        }
                    }
                    for (mean, x) in mean.iter_mut().zip(&total) {
                        *mean = T::narrow(x * scale);
                    }
                },
            )
        });
    }))
}

/// The gradient of the patches.
fn spread(groups: &Groups, shares: &Tensor, gradient: &Tensor) -> Result<Fresh> {
    fused!(
        gradient,
        T => spread_on_host::<T>(groups, shares, gradient);
        on_gpu::spread(groups, shares, gradient)
    )
}

fn spread_on_host<T: Real>(groups: &Groups, shares: &Tensor, gradient: &Tensor) -> Result<Fresh> {
    /// Patches a thread takes at a time.
    const ROWS: usize = 16;
    let (n, l, c) = groups.patches(gradient)?;
    let (gradients, shares) = (&*read::<T>(gradient)?, &*read::<f32>(shares)?);
    // Token `token` of what a region was made into.
    let token = |region: u32, token: usize| &gradients[(region as usize * (1 + l) + token) * c..][..c];
    Ok(written((n, l, c), |out: &mut [T]| {
        out.par_chunks_mut((ROWS * c).max(1)).enumerate().for_each(|(chunk, out)| {
            vectorized(
                #[inline(always)]
                || {
                    let mut total = vec![0f32; c];
                    for (i, out) in out.chunks_exact_mut(c.max(1)).enumerate() {
                        let (image, patch) = ((chunk * ROWS + i) / l, (chunk * ROWS + i) % l);
                        total.fill(0.0);
                        for &region in groups.of(image) {
                            add_widened(&mut total, token(region, 1 + patch));
                            let share = shares[region as usize * l + patch];
                            if share != 0.0 {
                                for (total, g) in total.iter_mut().zip(token(region, 0)) {
                                    *total += share * g.widen();
                                }
                            }
                        }
                        for (out, &x) in out.iter_mut().zip(&total) {
                            *out = T::narrow(x);
                        }
                    }
                },
            )
        });
    }))
}

/// The regions of each image, in ascending order.
struct Groups {
    /// Where the regions of an image start in `regions`, and, after the last image, their number.
    starts: Vec<u32>,
    regions: Vec<u32>,
}

impl Groups {
    fn new(index: &[u32], images: usize) -> Self {
        let mut regions: Vec<u32> = (0..index.len() as u32).collect();
        regions.sort_by_key(|&region| index[region as usize]);
        let before = |image: usize| regions.partition_point(|&region| (index[region as usize] as usize) < image) as u32;
        Self { starts: (0..=images).map(before).collect(), regions }
    }

    /// The sizes of the patches that a result `[B, 1 + L, C]` was made of: `N`, `L` and `C`.
    fn patches(&self, result: &Tensor) -> Result<(usize, usize, usize)> {
        let (_, tokens, c) = result.dims3()?;
        Ok((self.starts.len() - 1, tokens - 1, c))
    }

    fn of(&self, image: usize) -> &[u32] {
        &self.regions[self.starts[image] as usize..self.starts[image + 1] as usize]
    }
}

#[cfg(gpu)]
mod on_gpu {
    use super::*;
    use crate::gpu::{Arg, Buffer, Grid, Kernel, launch, upload};

    /// As in `cuda/pool.cu`: a block works on so many patches, and on so many packs of sixteen bytes of each.
    const ROWS: usize = 32;
    const PACKS: usize = 8;
    const THREADS: u32 = (ROWS * PACKS) as u32;

    fn kernel(name: &'static str) -> Kernel {
        Kernel { file: "pool", name }
    }

    /// A block for each of `rows`, and for each part of the channels.
    fn grid(rows: usize, patches: &Tensor, channels: usize) -> Grid {
        let per_block = PACKS * 16 / patches.dtype().size_in_bytes();
        Grid { blocks: [rows, channels.div_ceil(per_block), 1], threads: THREADS, shared: 0 }
    }

    pub(super) fn shares(patches: &Tensor, cover: Cover) -> Result<Tensor> {
        let l = patches.dim(1)?;
        let ([mask, boxes], regions) = match cover {
            Cover::Mask(mask) => ([Arg::In(mask), Arg::Absent], mask.dim(0)?),
            Cover::Boxes(boxes) => ([Arg::Absent, Arg::In(boxes)], boxes.dim(0)?),
        };
        let mut shares = Buffer::new(patches, DType::F32, (regions, l))?;
        let arguments = &mut [mask, boxes, Arg::Out(&mut shares), Arg::size(l)?, Arg::size(l.isqrt())?];
        launch(kernel("pool_shares"), patches, DType::F32, Grid::line(regions, THREADS), arguments)?;
        Ok(Fresh::from(shares).detached())
    }

    pub(super) fn pool(patches: &Tensor, index: &[u32], shares: &Tensor) -> Result<Fresh> {
        let (_, l, c) = patches.dims3()?;
        let images = upload(index, patches)?;
        let mut out = Buffer::like(patches, (index.len(), 1 + l, c))?;
        let inputs = [Arg::In(patches), Arg::In(&images), Arg::In(shares)];
        let [patches_in, images, shares] = inputs;
        let arguments = &mut [patches_in, images, shares, Arg::Out(&mut out), Arg::size(l)?, Arg::size(c)?];
        launch(kernel("pool"), patches, patches.dtype(), grid(index.len(), patches, c), arguments)?;
        Ok(out.into())
    }

    pub(super) fn spread(groups: &Groups, shares: &Tensor, gradient: &Tensor) -> Result<Fresh> {
        let (n, l, c) = groups.patches(gradient)?;
        let (starts, regions) = (upload(&groups.starts, gradient)?, upload(&groups.regions, gradient)?);
        let mut out = Buffer::like(gradient, (n, l, c))?;
        let arguments = &mut [
            Arg::In(gradient),
            Arg::In(&starts),
            Arg::In(&regions),
            Arg::In(shares),
            Arg::Out(&mut out),
            Arg::size(l)?,
            Arg::size(c)?,
        ];
        let grid = grid(n * l.div_ceil(ROWS), gradient, c);
        launch(kernel("pool_backward"), gradient, gradient.dtype(), grid, arguments)?;
        Ok(out.into())
    }
}
