//! Products whose second factor is packed on the way, a block at a time into memory that stays in the cache: for a factor that
//! is used once, from wherever it lies.

use std::cell::Cell;

use rayon::prelude::*;

use super::{
    COLUMNS, FEW, LANES, Line, Multiplier, Native, Panel, Panels, ROWS, TILES, WORDS, Whole, block_depth, check, lend,
    lines, panel, part, with_scratch,
};
use crate::host::Disjoint;
use crate::numbers::Lines;
use crate::simd::native::pack::{Source, numbers};
use crate::simd::native::{Factor, Product};

/// The most panels that are packed together: three quarters of the second cache.
const TOGETHER: usize = 8;
/// The fewest of them for more rows than a block has, which are packed again for each group of panels; fewer only if threads
/// would have no work.
const FEWEST: usize = 4;
/// The fewest rows for whose sake panels are packed once more.
const FEWEST_ROWS: usize = 448;
/// Tasks for each thread, so that none waits long for the last.
const TASKS_A_THREAD: usize = 4;

impl<T: Native> Multiplier<T> {
    /// Packs a second factor of `n` lines of `k` numbers.
    ///
    /// # Panics
    /// If it has another size.
    pub(crate) fn pack_lines(&self, b: &Lines<T>, (n, k): (usize, usize)) -> Panels<T> {
        assert!(b.size() == (n, k), "a factor of {n} lines of {k} numbers");
        let mut words = lines::<T>(n, k);
        let (out, depth) = (Disjoint::<u32>::of(words.as_mut_ptr().cast()), block_depth::<T>(k));
        (0..n.div_ceil(COLUMNS)).into_par_iter().for_each(|i| {
            let Panel { start, width, .. } = panel(n, k.div_ceil(numbers::<T>()), i);
            for at in (0..k).step_by(depth) {
                let depths = (k - at).min(depth);
                // SAFETY: `self` is the proof that the instructions are there; each panel has a place of its own.
                unsafe { pack_part(b, n, i, (at, depths), out.start().add(start + at / numbers::<T>() * width)) };
            }
        });
        // SAFETY: the capacity was reserved, and lines may have no value.
        unsafe { words.set_len(n.div_ceil(LANES) * k.div_ceil(numbers::<T>())) };
        Panels { words, size: (n, k), of: std::marker::PhantomData }
    }

    /// The product with a second factor of these lines instead of its own, to the bit what it is with the same lines packed
    /// before.
    pub(super) fn multiply_lines(self, product: Product<T>, b: &Lines<T>) {
        let Product { size: (m, n, k), a, finish, out, .. } = product;
        assert!(b.size() == (n, k), "a factor of {n} columns of {k} numbers");
        let a = Source::of(a, m, k);
        check::<T>((m, n), &finish, out);
        if m == 0 || n == 0 {
            return;
        }
        let depth = block_depth::<T>(k);
        let mut sums = Vec::<f32>::with_capacity(if k > depth { m * n } else { 0 });
        let (sums, out) = (Disjoint::of(sums.as_mut_ptr()), Disjoint::new(out));
        let in_parallel = m * n * k > FEW && rayon::current_num_threads() > 1;
        let tasks = Tasks::of(m, n, if in_parallel { rayon::current_num_threads() } else { 1 });
        let task = |i: usize| {
            let (rows, panels) = tasks.task(i);
            let columns = panels.start * COLUMNS..n.min(panels.end * COLUMNS);
            let blocks = rows.len().div_ceil(TILES * ROWS);
            // Once if there is nothing to sum, for the bias.
            let sum_up = |packed: *mut u32, scratch: *mut u32| {
                for start in (0..k.max(1)).step_by(depth) {
                    let slab = start..k.min(start + depth);
                    let before = panels.start * COLUMNS * slab.len().div_ceil(numbers::<T>());
                    for i in panels.clone() {
                        let Panel { start: at, .. } = panel(n, slab.len().div_ceil(numbers::<T>()), i);
                        // SAFETY: `self` is the proof that the instructions are there; the memory has room for the panels.
                        unsafe { pack_part(b, n, i, (start, slab.len()), packed.add(at - before)) };
                    }
                    let panels = Disjoint::of(packed.wrapping_sub(before));
                    let whole = Whole { size: (m, n, k), depth, a, panels, finish, sums, out };
                    for block in 0..blocks {
                        let block = part(rows.len(), blocks, block);
                        let rows = rows.start + block.start..rows.start + block.end;
                        // SAFETY: the sizes are as checked; the slab's panels of these columns are packed; each task sums up
                        // a part of the result of its own.
                        unsafe { whole.sum_up(&slab, rows, columns.clone(), scratch) };
                    }
                }
            };
            with_scratch(|scratch| with_panels(|packed| sum_up(packed, scratch)));
        };
        if in_parallel {
            (0..tasks.count()).into_par_iter().with_max_len(1).for_each(task);
        } else {
            (0..tasks.count()).for_each(task);
        }
    }
}

/// Packs a depth of a panel.
///
/// # Safety
/// The CPU has the instructions; the panel and the depth are there; `out` has room.
unsafe fn pack_part<T: Native>(b: &Lines<T>, n: usize, i: usize, (at, depths): (usize, usize), out: *mut u32) {
    let Panel { columns, width, .. } = panel(n, 0, i);
    for from in (0..columns).step_by(LANES) {
        let count = (columns - from).min(LANES);
        let first = i * COLUMNS + from;
        // SAFETY: the caller's promise.
        let out = unsafe { out.add(from) };
        if let Some(values) = b.plain(first..first + count) {
            let source = Source::of(Factor::Along(values), count, b.size().1);
            // SAFETY: as above; the numbers are there.
            unsafe { source.pack((0, count), (at, depths), width, out) };
            continue;
        }
        let mut read = [0u32; LANES * WORDS];
        // SAFETY: memory of numbers, of which every pattern of bits is one; a block is as deep at most.
        let read = unsafe { std::slice::from_raw_parts_mut(read.as_mut_ptr().cast::<T>(), count * depths) };
        for (line, out) in read.chunks_exact_mut(depths).enumerate() {
            b.read(first + line, at, out);
        }
        let source = Source::of(Factor::Along(read), count, depths);
        // SAFETY: as above.
        unsafe { source.pack((0, count), (0, depths), width, out) };
    }
}

/// How a product is cut: rows in parts, and panels in groups. Not one bit of the result depends on that.
struct Tasks {
    m: usize,
    row_parts: usize,
    panels: usize,
    together: usize,
}

impl Tasks {
    fn of(m: usize, n: usize, threads: usize) -> Self {
        let panels = n.div_ceil(COLUMNS);
        let mut tasks = Self { m, row_parts: 1, panels, together: TOGETHER };
        let fewest = if m > TILES * ROWS { FEWEST } else { 1 };
        while threads > 1 && tasks.count() < TASKS_A_THREAD * threads {
            if m / (2 * tasks.row_parts) >= FEWEST_ROWS {
                tasks.row_parts *= 2;
            } else if tasks.together > fewest {
                tasks.together /= 2;
            } else {
                break;
            }
        }
        // No thread is without work, whatever is packed once more for it.
        while tasks.count() < threads {
            if tasks.together > 1 {
                tasks.together /= 2;
            } else if m / (2 * tasks.row_parts) >= ROWS {
                tasks.row_parts *= 2;
            } else {
                break;
            }
        }
        tasks
    }

    fn groups(&self) -> usize {
        self.panels.div_ceil(self.together)
    }

    fn count(&self) -> usize {
        self.row_parts * self.groups()
    }

    /// Rows and panels of a task.
    fn task(&self, i: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let rows = part(self.m, self.row_parts, i % self.row_parts);
        let first = i / self.row_parts * self.together;
        (rows, first..self.panels.min(first + self.together))
    }
}

/// Lends `work` memory of this thread for the packed panels of a task.
fn with_panels<R>(work: impl FnOnce(*mut u32) -> R) -> R {
    thread_local! {
        static PANELS: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    }
    lend(&PANELS, TOGETHER * COLUMNS * WORDS, work)
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    const SIZES: [(usize, usize); 6] = [(1, 1), (13, 2100), (168, 33), (169, 500), (400, 768), (1000, 31)];
    const THREADS: [usize; 5] = [1, 2, 3, 7, 64];

    /// Fails unless each number of a result is in one of some parts, rows and columns.
    fn check_cover((m, n): (usize, usize), parts: impl Iterator<Item = (Range<usize>, Range<usize>)>) {
        let mut times = vec![0u8; m * n];
        for (rows, columns) in parts {
            for row in rows {
                times[row * n..][columns.clone()].iter_mut().for_each(|times| *times += 1);
            }
        }
        assert!(times.iter().all(|times| *times == 1), "{m} x {n}");
    }

    #[test]
    fn tasks_cover_the_result_once() {
        for (m, n) in SIZES {
            for threads in THREADS {
                let tasks = Tasks::of(m, n, threads);
                let task = |i: usize| {
                    let (rows, panels) = tasks.task(i);
                    (rows, panels.start * COLUMNS..n.min(panels.end * COLUMNS))
                };
                check_cover((m, n), (0..tasks.count()).map(task));
            }
        }
    }

    #[test]
    fn many_threads_all_have_work() {
        for threads in THREADS {
            for (m, n) in [(13, 2100), (169, 500), (400, 768), (1000, 31)] {
                let found = Tasks::of(m, n, threads).count();
                assert!(found >= threads, "{found} tasks of {m} x {n} for {threads} threads");
            }
        }
    }
}
