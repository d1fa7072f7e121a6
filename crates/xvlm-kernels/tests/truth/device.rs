//! The devices under test.

use std::sync::OnceLock;

use candle_core::{DType, Device};

/// Something that computes the operations.
#[derive(Clone, Debug)]
pub(crate) enum Computer {
    /// The CPU's own implementation.
    Host,
    /// The CUDA kernels on the CPU.
    #[cfg(feature = "emulation")]
    Emulated,
    /// A GPU.
    #[cfg(feature = "cuda")]
    Gpu(Device),
}

impl Computer {
    /// All there are here.
    pub(crate) fn all() -> &'static [Computer] {
        static ALL: OnceLock<Vec<Computer>> = OnceLock::new();
        ALL.get_or_init(|| {
            #[allow(unused_mut)]
            let mut all = vec![Self::Host];
            #[cfg(feature = "emulation")]
            all.push(Self::Emulated);
            #[cfg(feature = "cuda")]
            match Device::new_cuda(0) {
                Ok(device) => all.push(Self::Gpu(device)),
                Err(error) if std::env::var_os("XVLM_REQUIRE_GPU").is_some() => panic!("expected a GPU: {error}"),
                Err(error) => eprintln!("\n*** NO GPU: ITS TESTS ARE SKIPPED ({error}) ***\n"),
            }
            all
        })
    }

    /// Where its tensors live.
    pub(crate) fn device(&self) -> Device {
        match self {
            Self::Host => Device::Cpu,
            #[cfg(feature = "emulation")]
            Self::Emulated => Device::Cpu,
            #[cfg(feature = "cuda")]
            Self::Gpu(device) => device.clone(),
        }
    }

    /// The float types it is to be tested with.
    pub(crate) fn dtypes(&self) -> &'static [DType] {
        match self {
            Self::Host => &[DType::F32, DType::BF16, DType::F64],
            #[cfg(any(feature = "emulation", feature = "cuda"))]
            _ => &[DType::F32, DType::BF16, DType::F16],
        }
    }

    pub(crate) fn run<R>(&self, work: impl FnOnce() -> R) -> R {
        match self {
            #[cfg(feature = "emulation")]
            Self::Emulated => xvlm_kernels::emulated(work),
            _ => work(),
        }
    }
}
