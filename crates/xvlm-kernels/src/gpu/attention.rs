//! The launches that attention over sequences and over windows have in common; see `cuda/attention.cuh`.

use candle_core::DType;

use super::{Grid, Kernel};

/// Rows of a tile that one warp has.
const WARP_ROWS: usize = 16;
/// Warps of a block at most.
const WARPS: usize = 4;

/// The three kernels for one head width.
#[derive(Clone, Copy)]
pub(crate) struct Kernels {
    pub(crate) forward: Kernel,
    pub(crate) queries: Kernel,
    pub(crate) keys: Kernel,
    /// The width of a head in shared memory, where zeros fill it up.
    padded: usize,
}

/// Those of the file `$file` for heads of `$width`.
macro_rules! kernels {
    ($file:literal, $width:expr) => {{
        let kernels = |forward, queries, keys, padded| {
            let kernel = |name| $crate::gpu::Kernel { file: $file, name };
            $crate::gpu::attention::Kernels::new([forward, queries, keys].map(kernel), padded)
        };
        match $width {
            ..=32 => Ok(kernels(concat!($file, "_32"), concat!($file, "_queries_32"), concat!($file, "_keys_32"), 32)),
            ..=64 => Ok(kernels(concat!($file, "_64"), concat!($file, "_queries_64"), concat!($file, "_keys_64"), 64)),
            ..=128 => {
                Ok(kernels(concat!($file, "_128"), concat!($file, "_queries_128"), concat!($file, "_keys_128"), 128))
            }
            width => Err($crate::error::KernelError::Value {
                op: concat!($file, " kernels"),
                argument: "heads",
                expected: "heads of at most 128 numbers".into(),
                found: format!("heads of {width}"),
            }),
        }
    }};
}
pub(crate) use kernels;

impl Kernels {
    pub(crate) fn new([forward, queries, keys]: [Kernel; 3], padded: usize) -> Self {
        Self { forward, queries, keys, padded }
    }

    /// The grid for `rows` queries of each of `sequences` and of each head.
    pub(crate) fn forward_grid(&self, dtype: DType, rows: usize, sequences: usize, heads: usize) -> Grid {
        // FORWARD_ROWS of attention.cuh
        let across = if dtype == DType::F32 && self.padded == 128 { 32 } else { 64 };
        let warps = warps(rows, WARPS);
        let numbers = self.tiles(dtype, warps * WARP_ROWS + 2 * across) + scratch(dtype, warps, across);
        self.grid(warps, numbers * dtype.size_in_bytes(), rows, sequences, heads)
    }

    /// The grid for the gradients of `rows` queries, or of `rows` keys and values.
    pub(crate) fn backward_grid(&self, dtype: DType, rows: usize, sequences: usize, heads: usize) -> Grid {
        // BACKWARD_ROWS of attention.cuh
        let across = match (dtype, self.padded) {
            (DType::F32, _) => 32,
            (_, 128) => 16,
            _ => 64,
        };
        // So that it fits into the shared memory of every GPU.
        let most = if dtype == DType::F32 && self.padded == 128 { 2 } else { WARPS };
        let warps = warps(rows, most);
        let numbers = self.tiles(dtype, 2 * (warps * WARP_ROWS + across)) + scratch(dtype, warps, across);
        let statistics = 2 * across * DType::F32.size_in_bytes();
        self.grid(warps, numbers * dtype.size_in_bytes() + statistics, rows, sequences, heads)
    }

    /// Numbers of shared memory for `rows` rows, one pack longer than their width.
    fn tiles(&self, dtype: DType, rows: usize) -> usize {
        rows * (self.padded + 16 / dtype.size_in_bytes())
    }

    fn grid(&self, warps: usize, shared: usize, rows: usize, sequences: usize, heads: usize) -> Grid {
        let tiles = rows.div_ceil(warps * WARP_ROWS);
        Grid { blocks: [sequences * tiles, heads, 1], threads: (warps * 32) as u32, shared }
    }
}

/// Warps of a block, at most `most`, such that tiles fit `rows` closely.
fn warps(rows: usize, most: usize) -> usize {
    let tiles = rows.div_ceil(most * WARP_ROWS).max(1);
    rows.div_ceil(tiles * WARP_ROWS).max(1)
}

/// Numbers of shared memory by which `f32` scores go from a warp's threads to each other.
fn scratch(dtype: DType, warps: usize, across: usize) -> usize {
    if dtype == DType::F32 { warps * WARP_ROWS * (across + 8) } else { 0 }
}

/// `width^−½`.
pub(crate) fn scale(width: usize) -> f32 {
    (width as f32).powf(-0.5)
}
