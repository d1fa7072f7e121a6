//! Which implementation computes an operation.

use candle_core::{DType, Result, Tensor};

use crate::error::KernelError;

/// The implementation that fits an operation's arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// Fused loops on the CPU, over `f32`.
    HostF32,
    /// Fused loops on the CPU, over `bf16` with arithmetic in `f32`.
    HostBf16,
    /// Our own CUDA code, over `f32`, `bf16` or `f16` with arithmetic in `f32`.
    #[cfg(gpu)]
    Gpu,
    /// candle's operations, one after the other: every other type and device.
    Composed,
}

impl Path {
    /// The path for float arguments, which must share one type and one device.
    pub(crate) fn of(op: &'static str, arguments: &[(&'static str, &Tensor)]) -> Result<Self> {
        let (_, first) = arguments[0];
        for &(argument, tensor) in arguments {
            if tensor.dtype() != first.dtype() || !tensor.device().same_device(first.device()) {
                let describe = |t: &Tensor| format!("{:?} on {:?}", t.dtype(), t.device().location());
                let (expected, found) = (describe(first), describe(tensor));
                return Err(KernelError::Value { op, argument, expected, found }.into());
            }
        }
        Ok(Self::for_tensor(first))
    }

    /// The path for a tensor like this one.
    pub(crate) fn for_tensor(tensor: &Tensor) -> Self {
        #[cfg(gpu)]
        if crate::gpu::runs(tensor) {
            return Self::Gpu;
        }
        match tensor.dtype() {
            DType::F32 if tensor.device().is_cpu() => Self::HostF32,
            DType::BF16 if tensor.device().is_cpu() => Self::HostBf16,
            _ => Self::Composed,
        }
    }
}

/// Computes by the path of `$like`: `fused!(x, T => on the CPU with T for the float type; on a GPU)`. Only for what
/// [`Path::of`] did not send to [`Path::Composed`].
macro_rules! fused {
    ($like:expr, $T:ident => $host:expr; $gpu:expr) => {
        match $crate::path::Path::for_tensor($like) {
            $crate::path::Path::HostF32 => {
                type $T = f32;
                $host
            }
            $crate::path::Path::HostBf16 => {
                type $T = half::bf16;
                $host
            }
            #[cfg(gpu)]
            $crate::path::Path::Gpu => $gpu,
            $crate::path::Path::Composed => {
                candle_core::bail!("no fused kernel for {:?} on {:?}", $like.dtype(), $like.device().location())
            }
        }
    };
}
pub(crate) use fused;
