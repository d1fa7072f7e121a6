//! Window attention on GPUs: launches of `cuda/window.cu`.

use candle_core::{DType, Result, Tensor};

use super::WindowShape;
use crate::columns::totals_on_gpu;
use crate::error::KernelError;
use crate::gpu::attention::{kernels, scale};
use crate::gpu::{Arg, Buffer, launch};
use crate::graph::{Fresh, differentiable_by_result};

/// The most tokens of a window; AREA of window.cu.
const AREA: usize = 256;

/// [`super::window_attention`] over contiguous tensors of one float type.
pub(super) fn window_attention(qkv: &Tensor, bias: &Tensor, shape: WindowShape) -> Result<Tensor> {
    let (images, tokens, packed) = qkv.dims3()?;
    let heads = bias.dims()[0];
    if shape.area() > AREA {
        let (expected, found) = (format!("at most {AREA} tokens in a window"), format!("{shape:?}"));
        return Err(KernelError::Value { op: "window_attention", argument: "shape", expected, found }.into());
    }
    let call = Call { shape, heads, width: packed / 3 / heads, windows: images * shape.windows() };
    let kernels = kernels!("window", call.width)?;
    let mut out = Buffer::like(qkv, (images, tokens, packed / 3))?;
    let mut log_sums = Buffer::new(qkv, DType::F32, (call.windows, heads, shape.area()))?;
    let grid = kernels.forward_grid(qkv.dtype(), shape.area(), call.windows, heads);
    let mut arguments = vec![Arg::In(qkv), Arg::In(bias), Arg::Out(&mut out), Arg::Out(&mut log_sums)];
    arguments.extend(call.sizes()?);
    launch(kernels.forward, qkv, qkv.dtype(), grid, &mut arguments)?;
    let log_sums = Fresh::from(log_sums).detached();
    differentiable_by_result("window_attention", [qkv, bias], out.into(), move |[qkv, bias], out, gradient| {
        let (d_qkv, d_bias) = call.backward(qkv, bias, out, &log_sums, gradient)?;
        Ok([Some(d_qkv), d_bias])
    })
}

#[derive(Clone, Copy)]
struct Call {
    shape: WindowShape,
    heads: usize,
    width: usize,
    /// In all images.
    windows: usize,
}

impl Call {
    fn sizes(&self) -> Result<[Arg<'static>; 7]> {
        let WindowShape { height, width, window, shift } = self.shape;
        let size = Arg::size;
        let scale = Arg::F32(scale(self.width));
        Ok([size(height)?, size(width)?, size(window)?, size(shift)?, size(self.heads)?, size(self.width)?, scale])
    }

    fn backward(
        &self,
        qkv: &Tensor,
        bias: &Tensor,
        out: &Tensor,
        log_sums: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        // Blocks that keep a GPU busy; each sums the gradient of the bias over its windows in memory of its own.
        const BLOCKS: usize = 1024;
        let Self { windows, heads, .. } = *self;
        let area = self.shape.area();
        let kernels = kernels!("window", self.width)?;
        let mut d_qkv = Buffer::like(qkv, qkv.shape())?;
        let mut deltas = Buffer::new(qkv, DType::F32, (windows, heads, area))?;

        let groups = BLOCKS.div_ceil(heads * area.div_ceil(64)).min(windows);
        let partial = || Buffer::new(qkv, DType::F32, (groups, heads, area, area));
        let mut partial = (bias.track_op() && groups > 0).then(partial).transpose()?;
        let grid = kernels.backward_grid(qkv.dtype(), area, groups, heads);
        let mut arguments = vec![Arg::In(qkv), Arg::In(bias), Arg::In(out), Arg::In(gradient), Arg::In(log_sums)];
        arguments.extend([Arg::Out(&mut deltas), Arg::Out(&mut d_qkv)]);
        arguments.push(partial.as_mut().map_or(Arg::Absent, Arg::Out));
        arguments.extend([Arg::size(windows)?, Arg::size(groups)?]);
        arguments.extend(self.sizes()?);
        launch(kernels.queries, qkv, qkv.dtype(), grid, &mut arguments)?;

        let grid = kernels.backward_grid(qkv.dtype(), area, windows, heads);
        let mut arguments = vec![Arg::In(qkv), Arg::In(bias), Arg::In(gradient), Arg::In(log_sums)];
        arguments.extend([Arg::Made(&deltas), Arg::Out(&mut d_qkv)]);
        arguments.extend(self.sizes()?);
        launch(kernels.keys, qkv, qkv.dtype(), grid, &mut arguments)?;

        let d_bias = match &partial {
            Some(partial) => Some(totals_on_gpu(bias, partial, groups, bias.shape())?.detached()),
            // Without images nothing depends on the bias.
            None => bias.track_op().then(|| bias.zeros_like()).transpose()?,
        };
        Ok((Fresh::from(d_qkv).detached(), d_bias))
    }
}
