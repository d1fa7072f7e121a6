//! Patch pooling: from the patches of an image to the representation of a region.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::error::{KernelError, check_shape};
use crate::host::{is_host_f32, read, slice};
use crate::simd::{add_assign, vectorized};

/// The representation of regions (Zeng et al. 2022, §3.1): the mean of the patches a region covers, followed by all the
/// patches of its image.
///
/// `patches [N, L, C]`; region `b` lies in image `index[b]` and covers the patches where `mask [B, L]` is 1. Returns
/// `[B, 1 + L, C]`. A region that covers nothing gets a zero vector.
///
/// # Errors
/// On a wrong shape, or an index that is not below `N`.
pub fn patch_pool(patches: &Tensor, index: &[u32], mask: &Tensor) -> Result<Tensor> {
    let (n, l, _) = patches.dims3()?;
    let regions = index.len();
    check_shape("patch_pool", "mask", mask, &[regions, l])?;
    if let Some(found) = index.iter().find(|&&i| i as usize >= n) {
        let (expected, found) = (format!("below {n}"), found.to_string());
        return Err(KernelError::Value { op: "patch_pool", argument: "index", expected, found }.into());
    }
    if is_host_f32(&[patches, mask]) {
        let op = PatchPool { index: index.to_vec(), mask: mask.contiguous()?.detach() };
        return patches.contiguous()?.apply_op1(op);
    }
    let tokens = patches.index_select(&Tensor::new(index, patches.device())?, 0)?;
    let mask = mask.to_dtype(patches.dtype())?;
    let count = mask.sum_keepdim(1)?.maximum(1f64)?;
    let mean = mask.broadcast_div(&count)?.unsqueeze(1)?.matmul(&tokens)?;
    Tensor::cat(&[&mean, &tokens], 1)
}

struct PatchPool {
    index: Vec<u32>,
    mask: Tensor,
}

impl CustomOp1 for PatchPool {
    fn name(&self) -> &'static str {
        "patch-pool"
    }

    fn cpu_fwd(&self, patches: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, l, c) = layout.shape().dims3()?;
        let patches = slice(patches, layout)?;
        let mask = read::<f32>(&self.mask)?;
        let mask = &*mask;
        let mut out = vec![0f32; self.index.len() * (1 + l) * c];
        out.par_chunks_mut(((1 + l) * c).max(1)).enumerate().for_each(|(region, out)| {
            let image = &patches[self.index[region] as usize * l * c..][..l * c];
            let (mean, rest) = out.split_at_mut(c);
            rest.copy_from_slice(image);
            vectorized(
                #[inline(always)]
                || {
                    let mut covered = 0.0;
                    for (row, &weight) in image.chunks_exact(c).zip(&mask[region * l..][..l]) {
                        if weight != 0.0 {
                            add_assign(mean, row);
                            covered += 1.0;
                        }
                    }
                    let scale = if covered > 0.0 { 1.0 / covered } else { 0.0 };
                    mean.iter_mut().for_each(|x| *x *= scale);
                },
            )
        });
        Ok((CpuStorage::F32(out), (self.index.len(), 1 + l, c).into()))
    }

    fn bwd(&self, patches: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (n, l, c) = patches.dims3()?;
        let grad = grad.contiguous()?;
        let (grads, mask) = (read::<f32>(&grad)?, read::<f32>(&self.mask)?);
        let (grads, mask) = (&*grads, &*mask);
        let mut regions_of = vec![Vec::new(); n];
        for (region, &image) in self.index.iter().enumerate() {
            regions_of[image as usize].push(region);
        }
        let mut out = vec![0f32; n * l * c];
        out.par_chunks_mut((l * c).max(1)).zip(&regions_of).for_each(|(out, regions)| {
            vectorized(
                #[inline(always)]
                || {
                    for &region in regions {
                        let (mean, rest) = grads[region * (1 + l) * c..][..(1 + l) * c].split_at(c);
                        add_assign(out, rest);
                        let weights = &mask[region * l..][..l];
                        let covered = weights.iter().filter(|&&w| w != 0.0).count().max(1);
                        let share: Vec<f32> = mean.iter().map(|g| g / covered as f32).collect();
                        for (row, &weight) in out.chunks_exact_mut(c).zip(weights) {
                            if weight != 0.0 {
                                add_assign(row, &share);
                            }
                        }
                    }
                },
            )
        });
        Ok(Some(Tensor::from_vec(out, patches.shape(), patches.device())?))
    }
}
