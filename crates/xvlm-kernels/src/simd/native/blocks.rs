//! The product in blocks that fit the caches, on all threads.

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr;

use half::bf16;
use rayon::prelude::*;

use super::Product;
use super::pack::{Source, numbers};
use super::tile::{COLUMNS, LANES, Place, ROWS};
use crate::host::Disjoint;

/// Words of the summed dimension that a block takes, a multiple of two vectors: a panel of `b` (64 KiB) and a block of `a`
/// lie in the second cache.
const WORDS: usize = 512;
/// Numbers of the summed dimension that are packed for several panels in turn, if they lie in the same rows.
const CHUNK: usize = 32;
/// Tiles above each other in a block.
const TILES: usize = 8;
/// Panels of `b` beside each other in a block.
const PANELS: usize = 16;
/// Bytes of `b` that are packed at a time, if those are as deep as a block.
const SLAB: usize = 16 << 20;
/// Blocks for each thread, so that none waits long for the last.
const BLOCKS_A_THREAD: usize = 4;
/// Multiplications below which waking other threads costs more than they save.
const FEW: usize = 1 << 18;

/// A vector of words: aligned so that none crosses a line of the cache.
#[repr(C, align(64))]
struct Line(#[allow(dead_code)] [MaybeUninit<u32>; LANES]);

/// The numbers of the summed dimension that a block takes.
const fn depth<T>() -> usize {
    WORDS * numbers::<T>()
}

/// A float type with instructions of its own.
pub(crate) trait Native: Copy + Send + Sync {
    /// Whether this CPU has them.
    fn is_native() -> bool;

    /// [`Place::sum_up`] of this type.
    ///
    /// # Safety
    /// As there.
    unsafe fn sum_up(place: Place<Self>, rows: usize);
}

/// Whether this CPU has what all types need.
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl")
}

impl Native for f32 {
    fn is_native() -> bool {
        has_avx512()
    }

    unsafe fn sum_up(place: Place<Self>, rows: usize) {
        // SAFETY: the caller's promise.
        unsafe { place.sum_up(rows) }
    }
}

impl Native for bf16 {
    fn is_native() -> bool {
        has_avx512() && is_x86_feature_detected!("avx512bf16")
    }

    unsafe fn sum_up(place: Place<Self>, rows: usize) {
        // SAFETY: the caller's promise.
        unsafe { place.sum_up(rows) }
    }
}

/// A CPU that has the instructions for `T`.
pub(crate) struct Multiplier<T>(PhantomData<T>);

impl<T: Native> Multiplier<T> {
    pub(crate) fn find() -> Option<Self> {
        T::is_native().then_some(Self(PhantomData))
    }

    /// # Panics
    /// If a factor, the bias or the result has another size than the product says.
    pub(crate) fn multiply(self, product: Product<T>) {
        let Product { size: (m, n, k), a, b, bias, out } = product;
        let (a, b) = (Source::of(a, m, k), Source::of(b, n, k));
        assert!(out.len() == m * n && bias.is_none_or(|bias| bias.len() == n), "a result of {m} rows of {n}");
        if m == 0 || n == 0 {
            return;
        }
        let mut sums = Vec::<f32>::with_capacity(if k > depth::<T>() { m * n } else { 0 });
        let slab_depth = (SLAB / (size_of::<T>() * n) / depth::<T>()).max(1) * depth::<T>();
        let mut panels = Vec::<Line>::with_capacity(n.div_ceil(LANES) * k.min(slab_depth).div_ceil(numbers::<T>()));
        let whole = Whole {
            size: (m, n, k),
            a,
            b,
            bias: Disjoint::of(bias.map_or(ptr::null_mut(), |bias| bias.as_ptr().cast_mut())),
            panels: Disjoint::of(panels.as_mut_ptr().cast()),
            sums: Disjoint::of(sums.as_mut_ptr()),
            out: Disjoint::new(out),
        };
        let in_parallel = m * n * k > FEW && rayon::current_num_threads() > 1;
        let grid = Grid::of(m, n, if in_parallel { rayon::current_num_threads() } else { 1 });
        // Once if there is nothing to sum, for the bias.
        for start in (0..k.max(1)).step_by(slab_depth) {
            let slab = start..k.min(start + slab_depth);
            let (beside, packs) = whole.packs(&slab);
            // SAFETY: the sizes are as checked; `self` is the proof that the instructions are there. Each part packs what no
            // other does, and each block sums up a part of the result of its own, from panels that are packed.
            let pack = |i: usize| unsafe { whole.pack(&slab, i % beside, i / beside) };
            let block = |i: usize| {
                let (rows, columns) = grid.block(i);
                // SAFETY: as above.
                with_scratch(|scratch| unsafe { whole.sum_up(&slab, rows, columns, scratch) })
            };
            let blocks = grid.blocks();
            if in_parallel {
                (0..packs).into_par_iter().for_each(pack);
                (0..blocks).into_par_iter().with_max_len(1).for_each(block);
            } else {
                (0..packs).for_each(pack);
                (0..blocks).for_each(block);
            }
        }
    }
}

/// How the result is cut into blocks. Not one bit of it depends on that.
struct Grid {
    m: usize,
    n: usize,
    /// Blocks above each other, of as many rows or one less.
    row_blocks: usize,
    /// Columns of a block, whole panels.
    columns: usize,
}

impl Grid {
    fn of(m: usize, n: usize, threads: usize) -> Self {
        let (mut tiles, mut panels) = (TILES, PANELS);
        loop {
            let grid = Self { m, n, row_blocks: m.div_ceil(tiles * ROWS), columns: panels * COLUMNS };
            if threads == 1 || grid.blocks() >= BLOCKS_A_THREAD * threads || tiles == 1 {
                return grid;
            }
            // Packing `a` again for other columns costs more than reading `b` again for other rows.
            if tiles > 4 || panels <= 4 { tiles /= 2 } else { panels /= 2 }
        }
    }

    fn blocks(&self) -> usize {
        self.row_blocks * self.n.div_ceil(self.columns)
    }

    /// Blocks above each other follow each other, since they share columns of `b`.
    fn block(&self, i: usize) -> (Range<usize>, Range<usize>) {
        let column = i / self.row_blocks * self.columns;
        (part(self.m, self.row_blocks, i % self.row_blocks), column..self.n.min(column + self.columns))
    }
}

/// The `i`-th of `parts` parts of `0..len`, of the same length or one less.
fn part(len: usize, parts: usize, i: usize) -> Range<usize> {
    let end = |i: usize| len / parts * i + i.min(len % parts);
    end(i)..end(i + 1)
}

/// A depth in parts, as starts and lengths, to pack one after the other: all panels of a part while its rows are near.
fn chunks<T>(depths: Range<usize>, source: &Source<T>) -> impl Iterator<Item = (usize, usize)> + use<T> {
    let step = if source.across { CHUNK } else { depth::<T>() };
    depths.clone().step_by(step).map(move |at| (at, step.min(depths.end - at)))
}

/// A product with its memory.
struct Whole<T> {
    size: (usize, usize, usize),
    a: Source<T>,
    b: Source<T>,
    /// Of `n` numbers, or null.
    bias: Disjoint<T>,
    /// A slab of `b`: for each panel of [`COLUMNS`] columns, but for the last, which may be one vector wide, `[words, width]`.
    panels: Disjoint<u32>,
    /// As the result, but for products with no more than one block in depth.
    sums: Disjoint<f32>,
    out: Disjoint<T>,
}

impl<T: Native> Whole<T> {
    /// Where a panel of a slab of so many words begins, and the columns it has, with those of its padding.
    fn panel(&self, words: usize, panel: usize) -> (usize, usize, usize) {
        let columns = (self.size.1 - panel * COLUMNS).min(COLUMNS);
        (panel * COLUMNS * words, columns, columns.next_multiple_of(LANES))
    }

    /// Depth and panels that are packed at once.
    fn pack_size(&self) -> (usize, usize) {
        // Parts of rows that are not too short, if several lines share a row, or else as much of a line as a block takes.
        if self.b.across { (4 * CHUNK, 8) } else { (depth::<T>(), 1) }
    }

    /// How many parts of a slab are packed, beside each other and in all.
    fn packs(&self, slab: &Range<usize>) -> (usize, usize) {
        let (depth, panels) = self.pack_size();
        let beside = self.size.1.div_ceil(panels * COLUMNS);
        (beside, beside * slab.len().div_ceil(depth))
    }

    /// Packs a part of `b`.
    ///
    /// # Safety
    /// The part is one of [`Self::packs`], and the factors are there; no other thread reads or writes the part in `panels`.
    unsafe fn pack(&self, slab: &Range<usize>, beside: usize, below: usize) {
        let (depth, panels) = self.pack_size();
        let range = below * depth..slab.len().min((below + 1) * depth);
        for (at, depths) in chunks(range, &self.b) {
            for panel in beside * panels..self.size.1.div_ceil(COLUMNS).min((beside + 1) * panels) {
                let (start, columns, width) = self.panel(slab.len().div_ceil(numbers::<T>()), panel);
                // SAFETY: the caller's promise.
                unsafe {
                    let out = self.panels.start().add(start + at / numbers::<T>() * width);
                    self.b.pack((panel * COLUMNS, columns), (slab.start + at, depths), width, out);
                }
            }
        }
    }

    /// Adds a slab to a block of the result.
    ///
    /// # Safety
    /// The slab is packed; no other thread reads or writes this block of the result.
    unsafe fn sum_up(&self, slab: &Range<usize>, rows: Range<usize>, columns: Range<usize>, scratch: *mut u32) {
        let (_, n, k) = self.size;
        let tiles = rows.len().div_ceil(ROWS);
        let tile = |i: usize| part(rows.len(), tiles, i);
        let mut start = slab.start;
        loop {
            let depths = (slab.end - start).min(depth::<T>());
            let words = depths.div_ceil(numbers::<T>());
            for (at, depths) in chunks(0..depths, &self.a) {
                for i in 0..tiles {
                    let (tile, width) = (tile(i).start, tile(i).len());
                    // SAFETY: rows of this block; the scratch has room for them in this depth.
                    unsafe {
                        let out = scratch.add(tile * words + at / numbers::<T>() * width);
                        self.a.pack((rows.start + tile, width), (start + at, depths), width, out);
                    }
                }
            }
            for panel in columns.start / COLUMNS..columns.end.div_ceil(COLUMNS) {
                let (panel_start, panel_columns, width) = self.panel(slab.len().div_ceil(numbers::<T>()), panel);
                for i in 0..tiles {
                    let tile = tile(i);
                    let (row, column) = (rows.start + tile.start, panel * COLUMNS);
                    // SAFETY: the tile lies in this block.
                    unsafe {
                        let bias = self.bias.start();
                        let place = Place {
                            words,
                            a: scratch.add(tile.start * words),
                            b: self.panels.start().add(panel_start + (start - slab.start) / numbers::<T>() * width),
                            sums: self.sums.start().wrapping_add(row * n + column),
                            out: self.out.start().add(row * n + column),
                            bias: if bias.is_null() { bias } else { bias.add(column) },
                            stride: n,
                            columns: panel_columns,
                            is_first: start == 0,
                            is_last: start + depths == k,
                        };
                        T::sum_up(place, tile.len());
                    }
                }
            }
            start += depths;
            if start == slab.end {
                return;
            }
        }
    }
}

/// Lends `work` memory of this thread for a packed block of `a`.
fn with_scratch<R>(work: impl FnOnce(*mut u32) -> R) -> R {
    thread_local! {
        static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    }

    let mut memory = SCRATCH.take();
    memory.reserve(TILES * ROWS * WORDS / LANES);
    let result = work(memory.as_mut_ptr().cast());
    SCRATCH.set(memory);
    result
}
