//! The product in blocks that fit the caches, on all threads.

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::thread::LocalKey;

use half::bf16;
use rayon::prelude::*;

use super::pack::{Source, numbers};
use super::tile::{COLUMNS, LANES, Place, ROWS};
use super::{Factor, Finish, Product, Second, Then};
use crate::host::Disjoint;

mod lines;

/// Most words of the summed dimension that a block takes, a multiple of two vectors: two panels of `b` (96 KiB each), one of
/// which is fetched, and a block of `a` (504 KiB) lie in the second cache.
const WORDS: usize = 768;
/// Numbers of the summed dimension that are packed for several panels in turn, if they lie in the same rows.
const CHUNK: usize = 32;
/// Most tiles above each other in a block.
const TILES: usize = 12;
/// Bytes of `b` that are packed at a time, if those are as deep as a block.
const SLAB: usize = 16 << 20;
/// Blocks for each thread that are enough to spread any product evenly.
const BLOCKS_A_THREAD: usize = 8;
/// What it costs to pack a word of `a`, and to bring a word of a panel from memory, in units of what it costs to multiply one
/// word of a row by one of a panel; measured.
const PACKING: usize = 1;
const FETCHING: usize = 5;
/// Multiplications below which waking other threads costs more than they save.
const FEW: usize = 1 << 18;

/// A vector of words: aligned so that none crosses a line of the cache.
#[repr(C, align(64))]
struct Line(#[allow(dead_code)] [MaybeUninit<u32>; LANES]);

/// The most numbers of the summed dimension that a block takes.
const fn depth<T>() -> usize {
    WORDS * numbers::<T>()
}

/// The numbers of a summed dimension of `k` that a block takes, so that all take about as many.
fn block_depth<T>(k: usize) -> usize {
    let blocks = k.div_ceil(depth::<T>()).max(1);
    k.div_ceil(blocks).max(1).next_multiple_of(2 * LANES * numbers::<T>())
}

/// A number of factors with instructions of its own.
pub(crate) trait Native: Copy + Send + Sync {
    /// A number of results.
    type Out: Copy + Send + Sync;

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
    type Out = Self;

    fn is_native() -> bool {
        has_avx512()
    }

    unsafe fn sum_up(place: Place<Self>, rows: usize) {
        // SAFETY: the caller's promise.
        unsafe { place.sum_up(rows) }
    }
}

impl Native for bf16 {
    type Out = Self;

    fn is_native() -> bool {
        has_avx512() && is_x86_feature_detected!("avx512bf16")
    }

    unsafe fn sum_up(place: Place<Self>, rows: usize) {
        // SAFETY: the caller's promise.
        unsafe { place.sum_up(rows) }
    }
}

impl Native for i8 {
    type Out = f32;

    fn is_native() -> bool {
        has_avx512() && is_x86_feature_detected!("avx512vnni")
    }

    unsafe fn sum_up(place: Place<Self>, rows: usize) {
        // SAFETY: the caller's promise.
        unsafe { place.sum_up(rows) }
    }
}

/// The second factor of products, packed whole.
pub(crate) struct Panels<T> {
    words: Vec<Line>,
    /// Its columns and the summed dimension.
    size: (usize, usize),
    of: PhantomData<T>,
}

impl<T> Panels<T> {
    /// Its columns and the summed dimension.
    pub(crate) fn size(&self) -> (usize, usize) {
        self.size
    }
}

impl<T: Native + Default> Panels<T> {
    /// As it was before it was packed, `[n, k]`.
    pub(crate) fn unpacked(&self) -> Vec<T> {
        let (n, k) = self.size;
        let mut lines = vec![T::default(); n * k];
        lines.par_chunks_mut(k.max(1)).enumerate().for_each(|(line, out)| {
            let words: *const T = self.words.as_ptr().cast();
            let Panel { start, width, .. } = panel(n, k.div_ceil(numbers::<T>()), line / COLUMNS);
            for (depth, out) in out.iter_mut().enumerate() {
                let word = start + depth / numbers::<T>() * width + line % COLUMNS;
                // SAFETY: `pack` has written all depths of all lines.
                *out = unsafe { *words.add(word * numbers::<T>() + depth % numbers::<T>()) };
            }
        });
        lines
    }
}

/// A CPU that has the instructions for `T`.
pub(crate) struct Multiplier<T>(PhantomData<T>);

impl<T: Native> Multiplier<T> {
    pub(crate) fn find() -> Option<Self> {
        T::is_native().then_some(Self(PhantomData))
    }

    /// Packs a second factor of `n` lines of `k` numbers.
    ///
    /// # Panics
    /// If it has another size.
    pub(crate) fn pack(&self, b: Factor<T>, (n, k): (usize, usize)) -> Panels<T> {
        let mut words = lines::<T>(n, k);
        let packing = Packing { source: Source::of(b, n, k), n, panels: Disjoint::of(words.as_mut_ptr().cast()) };
        let (beside, parts) = packing.parts(k);
        // SAFETY: `self` is the proof that the instructions are there; each part packs what no other does.
        (0..parts).into_par_iter().for_each(|i| unsafe { packing.pack(&(0..k), i % beside, i / beside) });
        // SAFETY: the capacity was reserved, and lines may have no value.
        unsafe { words.set_len(n.div_ceil(LANES) * k.div_ceil(numbers::<T>())) };
        Panels { words, size: (n, k), of: PhantomData }
    }

    /// # Panics
    /// If a factor, what the sums are finished with, or the result has another size than the product says.
    pub(crate) fn multiply(self, product: Product<T>) {
        if let Second::Lines(lines) = product.b {
            return self.multiply_lines(product, lines);
        }
        let Product { size: (m, n, k), a, b, finish, out } = product;
        let a = Source::of(a, m, k);
        check::<T>((m, n), &finish, out);
        if m == 0 || n == 0 {
            return;
        }
        let depth = block_depth::<T>(k);
        let mut sums = Vec::<f32>::with_capacity(if k > depth { m * n } else { 0 });
        let mut slab_depth = k.max(1);
        let mut panels = Vec::new();
        let packing = match b {
            Second::Plain(b) => {
                slab_depth = (SLAB / (size_of::<T>() * n) / depth).max(1) * depth;
                panels = lines::<T>(n, k.min(slab_depth));
                Some(Packing { source: Source::of(b, n, k), n, panels: Disjoint::of(panels.as_mut_ptr().cast()) })
            }
            Second::Packed(panels) => {
                assert!(panels.size == (n, k), "a factor of {n} columns of {k} numbers");
                None
            }
            Second::Lines(_) => unreachable!("multiplied already"),
        };
        let packed = match b {
            Second::Plain(_) => panels.as_ptr(),
            Second::Packed(panels) => panels.words.as_ptr(),
            Second::Lines(_) => unreachable!("multiplied already"),
        };
        let whole = Whole {
            size: (m, n, k),
            depth,
            a,
            panels: Disjoint::of(packed.cast_mut().cast()),
            finish,
            sums: Disjoint::of(sums.as_mut_ptr()),
            out: Disjoint::new(out),
        };
        let in_parallel = m * n * k > FEW && rayon::current_num_threads() > 1;
        let grid = Grid::of(m, n, if in_parallel { rayon::current_num_threads() } else { 1 });
        // Once if there is nothing to sum, for the bias.
        for start in (0..k.max(1)).step_by(slab_depth) {
            let slab = start..k.min(start + slab_depth);
            if let Some(packing) = &packing {
                let (beside, parts) = packing.parts(slab.len());
                // SAFETY: as in `pack`.
                let pack = |i: usize| unsafe { packing.pack(&slab, i % beside, i / beside) };
                if in_parallel { (0..parts).into_par_iter().for_each(pack) } else { (0..parts).for_each(pack) }
            }
            let block = |i: usize| {
                let (rows, columns) = grid.block(i);
                // SAFETY: the sizes are as checked; `self` is the proof that the instructions are there; the slab is packed;
                // each block sums up a part of the result of its own.
                with_scratch(|scratch| unsafe { whole.sum_up(&slab, rows, columns, scratch) })
            };
            let blocks = grid.blocks();
            if in_parallel {
                (0..blocks).into_par_iter().with_max_len(1).for_each(block);
            } else {
                (0..blocks).for_each(block);
            }
        }
    }
}

/// # Panics
/// If what the sums are finished with, or the result, has another size, or is for another type.
fn check<T: Native>((m, n): (usize, usize), finish: &Finish<T::Out>, out: &[T::Out]) {
    let Finish { scales, bias, then } = finish;
    assert!(scales.is_some() == (size_of::<T>() == 1), "scales for bytes, and for nothing else");
    assert!(out.len() == m * n && bias.is_none_or(|bias| bias.len() == n), "a result of {m} rows of {n}");
    assert!(!matches!(then, Then::Add(more) if more.len() != m * n), "as many numbers to add as the result has");
    let fits = |scales: &super::Scales| scales.rows.len() == m && scales.columns.len() == n && scales.sums.len() == n;
    assert!(scales.as_ref().is_none_or(fits), "scales of {m} rows and {n} columns");
}

/// Room for the panels of a factor of `n` lines of `k` numbers.
fn lines<T>(n: usize, k: usize) -> Vec<Line> {
    Vec::with_capacity(n.div_ceil(LANES) * k.div_ceil(numbers::<T>()))
}

/// Of [`COLUMNS`] columns, `[words, width]`; the last of a factor may be one vector wide.
struct Panel {
    /// Words before it.
    start: usize,
    columns: usize,
    /// The columns with those of its padding.
    width: usize,
}

/// A panel of a factor of `n` columns of `words` words.
fn panel(n: usize, words: usize, panel: usize) -> Panel {
    let columns = (n - panel * COLUMNS).min(COLUMNS);
    Panel { start: panel * COLUMNS * words, columns, width: columns.next_multiple_of(LANES) }
}

/// How the result is cut into blocks. Not one bit of it depends on that.
struct Grid {
    m: usize,
    n: usize,
    /// Blocks above and beside each other, of as many rows and panels or one less.
    above: usize,
    beside: usize,
}

impl Grid {
    /// The one that threads of the same speed are done with first: each column of blocks packs all of `a`, each row of blocks
    /// fetches all of `b`, and a thread that finds no block waits for the others.
    fn of(m: usize, n: usize, threads: usize) -> Self {
        let (tiles, panels) = (m.div_ceil(ROWS), n.div_ceil(COLUMNS));
        let fewest = m.div_ceil(TILES * ROWS);
        // Of grids whose widest blocks have the same number of panels, the one with the fewest beside each other.
        let is_fewest = |beside: &usize| panels.div_ceil(panels.div_ceil(*beside)) == *beside;
        let grids = (1..=panels).filter(is_fewest).flat_map(|beside| {
            let enough = fewest.next_multiple_of(threads).max(BLOCKS_A_THREAD * threads / beside);
            (fewest..=enough.min(tiles)).map(move |above| Self { m, n, above, beside })
        });
        let cost = |grid: &Self| {
            let Self { above, beside, .. } = grid;
            let work = m * panels + PACKING * m * beside + FETCHING * panels * above;
            work as f64 * grid.blocks().div_ceil(threads) as f64 / grid.blocks() as f64
        };
        grids.min_by(|a, b| cost(a).total_cmp(&cost(b))).expect("a row and a column at least")
    }

    fn blocks(&self) -> usize {
        self.above * self.beside
    }

    /// Blocks above each other follow each other, since they share columns of `b`.
    fn block(&self, i: usize) -> (Range<usize>, Range<usize>) {
        let panels = part(self.n.div_ceil(COLUMNS), self.beside, i / self.above);
        let columns = panels.start * COLUMNS..self.n.min(panels.end * COLUMNS);
        (part(self.m, self.above, i % self.above), columns)
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

/// A second factor on its way into panels.
struct Packing<T> {
    source: Source<T>,
    n: usize,
    panels: Disjoint<u32>,
}

impl<T: Native> Packing<T> {
    /// Depth and panels that are packed at once.
    fn part_size(&self) -> (usize, usize) {
        // Parts of rows that are not too short, if several lines share a row, or else as much of a line as a block takes.
        if self.source.across { (4 * CHUNK, 8) } else { (depth::<T>(), 1) }
    }

    /// How many parts a slab of a depth has, beside each other and in all.
    fn parts(&self, slab: usize) -> (usize, usize) {
        let (depth, panels) = self.part_size();
        let beside = self.n.div_ceil(panels * COLUMNS);
        (beside, beside * slab.div_ceil(depth))
    }

    /// Packs a part of a slab.
    ///
    /// # Safety
    /// The CPU has the instructions; the part is one of [`Self::parts`], and the factor is there; no other thread reads or
    /// writes the part in `panels`.
    unsafe fn pack(&self, slab: &Range<usize>, beside: usize, below: usize) {
        let (depth, panels) = self.part_size();
        let range = below * depth..slab.len().min((below + 1) * depth);
        for (at, depths) in chunks(range, &self.source) {
            for i in beside * panels..self.n.div_ceil(COLUMNS).min((beside + 1) * panels) {
                let Panel { start, columns, width } = panel(self.n, slab.len().div_ceil(numbers::<T>()), i);
                // SAFETY: the caller's promise.
                unsafe {
                    let out = self.panels.start().add(start + at / numbers::<T>() * width);
                    self.source.pack((i * COLUMNS, columns), (slab.start + at, depths), width, out);
                }
            }
        }
    }
}

/// A product with its memory.
struct Whole<'a, T: Native> {
    size: (usize, usize, usize),
    /// Numbers of the summed dimension that a block takes.
    depth: usize,
    a: Source<T>,
    /// A slab of the second factor.
    panels: Disjoint<u32>,
    finish: Finish<'a, T::Out>,
    /// As the result, but for products with no more than one block in depth.
    sums: Disjoint<f32>,
    out: Disjoint<T::Out>,
}

impl<T: Native> Whole<'_, T> {
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
            let depths = (slab.end - start).min(self.depth);
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
            let panels = columns.start / COLUMNS..columns.end.div_ceil(COLUMNS);
            // The part of a panel that this depth needs.
            let part_of = |i: usize, start: usize| {
                let panel = panel(n, slab.len().div_ceil(numbers::<T>()), i);
                let below = (start - slab.start) / numbers::<T>() * panel.width;
                (self.panels.start().wrapping_add(panel.start + below).cast_const(), panel)
            };
            for i in panels.clone() {
                let (b, panel) = part_of(i, start);
                let next = match i + 1 {
                    next if next < panels.end => part_of(next, start).0,
                    _ if start + depths < slab.end => part_of(panels.start, start + depths).0,
                    _ => b,
                };
                for j in 0..tiles {
                    let tile = tile(j);
                    let (row, column) = (rows.start + tile.start, i * COLUMNS);
                    // The tiles that come first ask the memory for the next part, a line of it for each word.
                    let ahead = if j * LANES < panel.width { next.wrapping_add(j * words * LANES) } else { b };
                    // SAFETY: the tile lies in this block.
                    unsafe {
                        let place = Place {
                            words,
                            a: scratch.add(tile.start * words),
                            b,
                            ahead,
                            ahead_step: if ahead == b { 0 } else { LANES },
                            sums: self.sums.start().wrapping_add(row * n + column),
                            out: self.out.start().add(row * n + column),
                            finish: &self.finish,
                            at: (row, column),
                            stride: n,
                            columns: panel.columns,
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
    lend(&SCRATCH, TILES * ROWS * WORDS, work)
}

/// Lends `work` a thread's `memory`, with room for so many words.
fn lend<R>(memory: &'static LocalKey<Cell<Vec<Line>>>, words: usize, work: impl FnOnce(*mut u32) -> R) -> R {
    let mut lines = memory.take();
    lines.reserve(words / LANES);
    let result = work(lines.as_mut_ptr().cast());
    memory.set(lines);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [(usize, usize); 8] =
        [(1, 1), (1, 768), (49, 4096), (144, 1024), (320, 768), (577, 3072), (9216, 128), (36_865, 97)];

    #[test]
    fn blocks_cover_the_result_once() {
        for (m, n) in SIZES {
            for threads in [1, 2, 3, 7, 64] {
                let grid = Grid::of(m, n, threads);
                let blocks = || (0..grid.blocks()).map(|i| grid.block(i));
                assert!(blocks().all(|(rows, columns)| {
                    (1..=TILES * ROWS).contains(&rows.len())
                        && !columns.is_empty()
                        && columns.start.is_multiple_of(COLUMNS)
                        && rows.end <= m
                        && columns.end <= n
                }));
                let covered: usize = blocks().map(|(rows, columns)| rows.len() * columns.len()).sum();
                let starts: std::collections::HashSet<_> =
                    blocks().map(|(rows, columns)| (rows.start, columns.start)).collect();
                assert_eq!((covered, starts.len()), (m * n, grid.blocks()), "{m} x {n} for {threads} threads");
            }
        }
    }

    #[test]
    fn two_threads_end_together() {
        for (m, n) in SIZES.into_iter().filter(|(m, n)| m * n > 1000) {
            let blocks = Grid::of(m, n, 2).blocks();
            assert!(blocks.is_multiple_of(2) || blocks > 100, "{m} x {n} in {blocks} blocks");
        }
    }

    #[test]
    fn parts_of_a_depth_are_as_many_as_needed_and_alike() {
        for (k, expected) in [(0, 32), (1, 32), (768, 768), (769, 416), (1024, 512), (3072, 768), (4096, 704)] {
            assert_eq!(block_depth::<f32>(k), expected, "of {k}");
            assert_eq!(block_depth::<bf16>(2 * k), 2 * expected, "of {k} pairs");
        }
    }
}
