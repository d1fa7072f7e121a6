//! Rows of a table.

use candle_core::{DType, Device, Result, Storage, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, collect_rows, differentiable};
use crate::host::{change, read, written};
use crate::numbers::{Readable, Reader, StoredTensor};
use crate::path::{Path, fused};
use crate::real::Real;
use crate::simd::{add_widened, vectorized};

const OP: &str = "embedding";

/// Rows of a table: `table [V, C]`, `ids [..]` (u32) → `[.., C]`. The gradient of a row is the sum over the places where it
/// occurs, in their order; the row of the `padding` id, if there is one, gets none (as PyTorch's `padding_idx`).
///
/// On a GPU the backward pass reads the ids back, for the CPU to sort; the forward pass waits for nothing, and so cannot
/// tell which ids are wrong: there the rows of ids that are not below `V` are NaN, and only the backward pass fails.
///
/// # Errors
/// If `table` is no matrix, `ids` are not u32, or an id is not below `V`.
pub fn embedding(table: &Tensor, ids: &Tensor, padding: Option<u32>) -> Result<Tensor> {
    let (_, width) = table.dims2()?;
    if ids.dtype() != DType::U32 || !ids.device().same_device(table.device()) {
        let expected = format!("U32 on {:?}", table.device().location());
        let found = format!("{:?} on {:?}", ids.dtype(), ids.device().location());
        return Err(KernelError::Value { op: OP, argument: "ids", expected, found }.into());
    }
    let shape = [ids.dims(), &[width]].concat();
    let (table, ids) = (&table.contiguous()?, ids.flatten_all()?);
    if Path::for_tensor(table) == Path::Composed {
        let found = table.index_select(&ids, 0)?;
        let Some(padding) = padding.filter(|_| found.track_op()) else { return found.reshape(shape) };
        let trained = ids.ne(padding)?.unsqueeze(1)?.broadcast_as(found.shape())?;
        return trained.where_cond(&found, &found.detach())?.reshape(shape);
    }
    let rows = fused!(table, T => gather_on_host::<T>(table, &ids, &shape); gpu::gather(table, &ids, &shape))?;
    differentiable(OP, [table], rows, move |[table], gradient| {
        let places = Places::of(&read_back(&ids)?, table.dim(0)?, padding)?;
        let rows = Rows { shape: table.dims2()?, places, gradient: gradient.clone() };
        let is_on_host = matches!(Path::for_tensor(table), Path::HostF32 | Path::HostBf16);
        let rows = if is_on_host { collect_rows(table, rows) } else { Some(rows) };
        Ok([rows.map(|rows| rows.whole()).transpose()?])
    })
}

/// Rows of a table in a file, converted to `dtype`: `table [V, C]`, `ids [..]` (u32) on the CPU → `[.., C]`. No others are read,
/// unless candle converts the numbers.
///
/// # Errors
/// As [`embedding`], or if the file was written to.
pub fn stored_embedding(table: &StoredTensor, dtype: DType, ids: &Tensor) -> Result<Tensor> {
    let rows = match (dtype, f32::reader(table.dtype()), bf16::reader(table.dtype())) {
        (DType::F32, Some(read), _) => gather_stored(table, read, ids)?,
        (DType::BF16, _, Some(read)) => gather_stored(table, read, ids)?,
        _ => embedding(&table.read(dtype, &Device::Cpu)?, ids, None)?,
    };
    table.check_unchanged()?;
    Ok(rows)
}

fn gather_stored<T: Real>(table: &StoredTensor, read_row: Reader<T>, ids: &Tensor) -> Result<Tensor> {
    let &[rows, width] = table.dims() else {
        let found = table.dims().to_vec();
        return Err(KernelError::Shape { op: OP, argument: "table", expected: "[V, C]".into(), found }.into());
    };
    let ids = ids.contiguous()?;
    let numbers = read::<u32>(&ids)?;
    check_ids(&numbers, rows)?;
    let (size, bytes) = (width * table.dtype().size_in_bytes(), table.bytes());
    let gathered = gather([ids.dims(), &[width]].concat(), &numbers, width, |id, out: &mut [T]| {
        read_row(&bytes[id * size..][..size], out);
    });
    Ok(gathered.detached())
}

/// The gradient of a table, of which most is 0.
pub(crate) struct Rows {
    /// Of the table.
    shape: (usize, usize),
    places: Places,
    /// What the rows at the places are handed, `[.., C]`.
    gradient: Tensor,
}

impl Rows {
    /// As a tensor like the table.
    pub(crate) fn whole(&self) -> Result<Tensor> {
        let sums: Fresh = fused!(&self.gradient, T => {
            self.on_host::<T>()
        }; gpu::sum(self))?;
        Ok(sums.detached())
    }

    fn on_host<T: Real>(&self) -> Result<Fresh> {
        let (rows, width) = self.shape;
        let mut sums = T::zeros(rows * width);
        self.add_to_numbers::<T, T>(&mut sums)?;
        Ok(Fresh::new(Storage::Cpu(T::to_cpu_storage_owned(sums)), self.shape))
    }

    /// Adds the gradient to a sum, whoever has it: `f32`, contiguous, on the CPU.
    ///
    /// # Errors
    /// If it is another, or of another shape than the table.
    pub(crate) fn add_to(&self, sum: &Tensor) -> Result<()> {
        let (rows, width) = self.shape;
        check_shape(OP, "sum", sum, &[rows, width])?;
        if sum.elem_count() == 0 {
            return Ok(());
        }
        match self.gradient.dtype() {
            DType::BF16 => change(sum, |sum: &mut [f32]| self.add_to_numbers::<bf16, f32>(sum))?,
            _ => change(sum, |sum: &mut [f32]| self.add_to_numbers::<f32, f32>(sum))?,
        }
    }

    /// Touches only the rows that occur.
    fn add_to_numbers<T: Real, Out: Real>(&self, sums: &mut [Out]) -> Result<()> {
        /// Rows of the table that a thread takes at a time.
        const ROWS: usize = 64;
        let (_, width) = self.shape;
        let gradient = &*read::<T>(&self.gradient)?;
        sums.par_chunks_mut((ROWS * width).max(1)).enumerate().for_each(|(part, sums)| {
            let rows = sums.chunks_exact_mut(width.max(1)).enumerate();
            let rows = rows.map(|(i, row)| (row, self.places.of_row(part * ROWS + i)));
            vectorized(
                #[inline(always)]
                || {
                    let mut total = Vec::new();
                    for (row, places) in rows.filter(|(_, places)| !places.is_empty()) {
                        total.clear();
                        total.resize(width, 0f32);
                        for &place in places {
                            add_widened(&mut total, &gradient[place as usize * width..][..width]);
                        }
                        row.iter_mut().zip(&total).for_each(|(out, &x)| *out = Out::narrow(out.widen() + x));
                    }
                },
            );
        });
        Ok(())
    }
}

fn check_ids(ids: &[u32], rows: usize) -> Result<()> {
    let Some(id) = ids.iter().find(|&&id| id as usize >= rows) else { return Ok(()) };
    let (expected, found) = (format!("below {rows}, the rows of `table`"), id.to_string());
    Err(KernelError::Value { op: OP, argument: "ids", expected, found }.into())
}

fn read_back(ids: &Tensor) -> Result<Vec<u32>> {
    match &*ids.storage_and_layout().0 {
        Storage::Cpu(_) => Ok(read::<u32>(ids)?.to_vec()),
        _ => ids.to_vec1(),
    }
}

/// Where each row of the table occurs among the ids.
struct Places {
    /// Places by row, those of a row in their order.
    order: Vec<u32>,
    /// Of each row, where its places start in `order`; one number more, where those of the last row end.
    starts: Vec<u32>,
}

impl Places {
    /// By a counting sort. The padding occurs nowhere.
    fn of(ids: &[u32], rows: usize, padding: Option<u32>) -> Result<Self> {
        check_ids(ids, rows)?;
        let trained = || ids.iter().enumerate().filter(|(_, id)| Some(**id) != padding);
        let mut starts = vec![0u32; rows + 1];
        trained().for_each(|(_, &id)| starts[id as usize + 1] += 1);
        for row in 0..rows {
            starts[row + 1] += starts[row];
        }
        let mut next = starts.clone();
        let mut order = vec![0u32; starts[rows] as usize];
        for (place, &id) in trained() {
            order[next[id as usize] as usize] = place as u32;
            next[id as usize] += 1;
        }
        Ok(Self { order, starts })
    }

    fn of_row(&self, row: usize) -> &[u32] {
        &self.order[self.starts[row] as usize..self.starts[row + 1] as usize]
    }
}

fn gather_on_host<T: Real>(table: &Tensor, ids: &Tensor, shape: &[usize]) -> Result<Fresh> {
    let (rows, width) = table.dims2()?;
    let (table, ids) = (&*read::<T>(table)?, &*read::<u32>(ids)?);
    check_ids(ids, rows)?;
    Ok(gather(shape.to_vec(), ids, width, |id, out: &mut [T]| out.copy_from_slice(&table[id * width..][..width])))
}

/// A result of `shape`, a row of `width` numbers for each id, which `row` writes.
fn gather<T: Real>(shape: Vec<usize>, ids: &[u32], width: usize, row: impl Fn(usize, &mut [T]) + Sync) -> Fresh {
    let at_a_time = (1 << 14) / width.max(1) + 1;
    written(shape, |out: &mut [T]| {
        let parts = out.par_chunks_mut((at_a_time * width).max(1)).zip(ids.par_chunks(at_a_time));
        parts.for_each(|(out, ids)| {
            out.chunks_exact_mut(width).zip(ids).for_each(|(out, &id)| row(id as usize, out));
        });
    })
}

#[cfg(gpu)]
mod gpu {
    use candle_core::{Result, Tensor};

    use super::Rows;
    use crate::gpu::{Arg, Buffer, Grid, Kernel, launch, upload};
    use crate::graph::Fresh;

    /// Of a block; each warp takes a row.
    const THREADS: u32 = 256;

    fn kernel(name: &'static str) -> Kernel {
        Kernel { file: "embedding", name }
    }

    fn grid(rows: usize) -> Grid {
        Grid::line(rows.div_ceil(THREADS as usize / 32), THREADS)
    }

    pub(super) fn gather(table: &Tensor, ids: &Tensor, shape: &[usize]) -> Result<Fresh> {
        let ((rows, width), count) = (table.dims2()?, ids.elem_count());
        let mut out = Buffer::like(table, shape)?;
        let arguments = &mut [
            Arg::In(table),
            Arg::In(ids),
            Arg::Out(&mut out),
            Arg::size(count)?,
            Arg::size(rows)?,
            Arg::size(width)?,
        ];
        launch(kernel("embedding"), table, table.dtype(), grid(count), arguments)?;
        Ok(out.into())
    }

    pub(super) fn sum(rows: &Rows) -> Result<Fresh> {
        let Rows { shape: (rows, width), places, gradient } = rows;
        let (rows, width) = (*rows, *width);
        let (order, starts) = (upload(&places.order, gradient)?, upload(&places.starts, gradient)?);
        let mut out = Buffer::like(gradient, (rows, width))?;
        let arguments = &mut [
            Arg::In(gradient),
            Arg::In(&order),
            Arg::In(&starts),
            Arg::Out(&mut out),
            Arg::size(rows)?,
            Arg::size(width)?,
        ];
        launch(kernel("embedding_backward"), gradient, gradient.dtype(), grid(rows), arguments)?;
        Ok(out.into())
    }
}
