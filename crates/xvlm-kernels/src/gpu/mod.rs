//! Launching the kernels of `cuda/`.
//!
//! Over CUDA tensors a launch goes through cudarc to candle's stream. With the feature `emulation` the same kernels,
//! compiled as C++ against a small host shim, run over CPU tensors inside [`crate::emulated`]: every launch, its grid and
//! its arguments can be tested where there is no GPU.

mod address;
pub(crate) mod attention;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "emulation")]
mod emulation;

use candle_core::{DType, Result, Shape, Storage, Tensor, bail};

#[cfg(feature = "emulation")]
pub use emulation::emulated;

pub(crate) use address::{address_of, address_of_variable};

use crate::graph::Fresh;

/// Whether the kernels are for this tensor: its device and its float type.
pub(crate) fn runs(tensor: &Tensor) -> bool {
    let float = matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16);
    #[cfg(feature = "emulation")]
    if emulation::is_on() {
        return float && tensor.device().is_cpu();
    }
    cfg!(feature = "cuda") && float && tensor.device().is_cuda()
}

/// A kernel: the file of `cuda/` it is in and its name there, to which the suffix of the float type is added.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    pub(crate) file: &'static str,
    pub(crate) name: &'static str,
}

/// How many threads run a kernel, and the dynamic shared memory of a block in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) blocks: [usize; 3],
    pub(crate) threads: u32,
    pub(crate) shared: usize,
}

impl Grid {
    /// Blocks in one dimension, without shared memory of a size chosen here.
    pub(crate) fn line(blocks: usize, threads: u32) -> Self {
        Self { blocks: [blocks, 1, 1], threads, shared: 0 }
    }
}

/// How the threads share the rows of a matrix: `lanes` of them take a row.
#[derive(Clone, Copy)]
pub(crate) struct Team {
    pub(crate) lanes: u32,
    pub(crate) grid: Grid,
}

impl Team {
    /// A warp for a short row, several to a block; a block for a long one.
    pub(crate) fn of(rows: usize, width: usize, dtype: DType) -> Self {
        const WARP: u32 = 32;
        let bytes = width * dtype.size_in_bytes();
        let lanes = match bytes {
            0..=2048 => WARP,
            2049..=16384 => 256,
            _ => 512,
        };
        let threads = lanes.max(256);
        Self { lanes, grid: Grid::line(rows.div_ceil((threads / lanes) as usize), threads) }
    }
}

/// Memory that kernels write: a result, or an intermediate one.
pub(crate) struct Buffer {
    storage: Storage,
    shape: Shape,
}

impl Buffer {
    /// Memory of `shape` where `like` lives; not initialised.
    pub(crate) fn new(like: &Tensor, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let storage = match &*like.storage_and_layout().0 {
            #[cfg(feature = "cuda")]
            Storage::Cuda(near) => Storage::Cuda(cuda::allocate(&near.device, dtype, shape.elem_count())?),
            #[cfg(feature = "emulation")]
            Storage::Cpu(_) => Storage::Cpu(emulation::allocate(dtype, shape.elem_count())?),
            _ => bail!("no kernels for {:?}", like.device().location()),
        };
        Ok(Self { storage, shape })
    }

    /// Memory for a result of the type of `like`.
    pub(crate) fn like(like: &Tensor, shape: impl Into<Shape>) -> Result<Self> {
        Self::new(like, like.dtype(), shape)
    }
}

impl From<Buffer> for Fresh {
    fn from(buffer: Buffer) -> Self {
        Self::new(buffer.storage, buffer.shape)
    }
}

/// An argument of a kernel, in the order of its parameters.
pub(crate) enum Arg<'a> {
    /// Read from a contiguous tensor.
    In(&'a Tensor),
    /// Read from what an earlier launch wrote.
    Made(&'a Buffer),
    /// Write (or change) this memory.
    Out(&'a mut Buffer),
    /// A null pointer: an argument the kernel can do without.
    Absent,
    U32(u32),
    F32(f32),
}

impl Arg<'_> {
    /// A size, which kernels take as 32 bits.
    pub(crate) fn size(n: usize) -> Result<Self> {
        // Half of what fits, so that no index of a kernel wraps when it goes a step too far.
        match u32::try_from(n) {
            Ok(size) if size <= u32::MAX / 2 => Ok(Self::U32(size)),
            _ => bail!("a size of {n} is too large for a kernel"),
        }
    }
}

/// Runs `kernel` for the float type `dtype` on the device of `like`. A grid without blocks does nothing.
pub(crate) fn launch(kernel: Kernel, like: &Tensor, dtype: DType, grid: Grid, arguments: &mut [Arg]) -> Result<()> {
    if grid.blocks.contains(&0) {
        return Ok(());
    }
    let [x, y, z] = grid.blocks;
    if x > i32::MAX as usize || y.max(z) > usize::from(u16::MAX) {
        bail!("a grid of {x} × {y} × {z} blocks is too large for a kernel");
    }
    let suffix = match dtype {
        DType::F32 => "f32",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        _ => bail!("no kernel `{}` for {dtype:?}", kernel.name),
    };
    let name = format!("{}_{suffix}", kernel.name);
    match &*like.storage_and_layout().0 {
        #[cfg(feature = "cuda")]
        Storage::Cuda(near) => cuda::launch(&near.device, kernel.file, &name, grid, arguments),
        #[cfg(feature = "emulation")]
        Storage::Cpu(_) => emulation::launch(kernel.file, &name, grid, arguments),
        _ => bail!("no kernels for {:?}", like.device().location()),
    }
}

/// Numbers for a kernel, on the device of `like`. Never none: on a GPU there is no memory of no size.
pub(crate) fn upload(values: &[u32], like: &Tensor) -> Result<Tensor> {
    let values = if values.is_empty() { &[0] } else { values };
    Tensor::from_slice(values, values.len(), like.device())
}

/// The start of a contiguous tensor in its storage, in elements.
fn offset(tensor: &Tensor) -> Result<usize> {
    match tensor.layout().contiguous_offsets() {
        Some((start, _)) => Ok(start),
        None => bail!("expected a contiguous tensor of shape {:?}", tensor.dims()),
    }
}
