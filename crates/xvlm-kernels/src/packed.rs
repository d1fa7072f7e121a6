//! Linear layers for inference: weights laid out once as the CPU multiplies by them, and what follows a layer computed on its
//! results while they are near.

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{DType, Device, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::activation::{Curve, gelu, quick_gelu};
use crate::dropout::add_branch;
use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, differentiable};
use crate::host::{read, written};
use crate::linear::{linear, linear_without_bias, times_weight};
use crate::numbers::{Lines, Readable, StoredTensor};
use crate::path::Path;
use crate::simd::native::{Factor, Finish, Multiplier, Native, Panels, Product, Scales, Second, Then};
use crate::simd::vectorized;

/// What the weights of a [`PackedLinear`] are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackedWeights {
    /// The type they are given in.
    AsGiven,
    /// Bytes, a scale for each output: `w ≈ scale · q`, q in −127..=127. Each row of what goes in is rounded to 255 steps
    /// (256 values) from its least to its greatest number, or 0. Of `f32` layers alone, of at most 66 311 inputs: the sum of as
    /// many products of bytes, 255 · 127 at most, is an `i32`. Where the CPU has no instructions for products of bytes
    /// (AVX-512 VNNI), the weights alone are rounded, and kept in `f32`.
    Int8,
}

/// What is done to the results of a linear layer.
#[derive(Clone, Copy)]
pub enum Epilogue<'a> {
    /// Nothing.
    Nothing,
    /// [`gelu`].
    Gelu,
    /// [`quick_gelu`].
    QuickGelu,
    /// A residual of their shape is added.
    Add(&'a Tensor),
}

/// A linear layer `x · wᵀ + b` for inference: nothing of it has gradients, but `x` and a residual do.
///
/// With AVX-512, weights of `f32`, and of `bf16` or bytes where the CPU multiplies them, are packed into panels, and the
/// epilogue is computed on the sums in `f32`. Elsewhere, on GPUs too, it is [`linear`], and what follows.
///
/// Of weights that are [`Self::stored`] and can stay where they lie, the first two products are computed from there, and panels are
/// made for the third: who asks one question does not wait for memory to be filled that is used once or twice. Results are the
/// same to the bit.
#[derive(Clone)]
pub struct PackedLinear {
    outputs: usize,
    inputs: usize,
    dtype: DType,
    layout: Arc<Layout>,
    bias: Option<Tensor>,
}

const OP: &str = "packed_linear";

/// The most inputs of a layer of bytes: sums of more products of an unsigned and a signed byte may not be an `i32`.
const MOST_INPUTS: usize = (i32::MAX / (u8::MAX as i32 * i8::MAX as i32)) as usize;

enum Layout {
    Packed(Weights),
    Stored(Stored),
    /// `[N, K]`.
    Plain(Tensor),
}

enum Weights {
    F32(Panels<f32>),
    Bf16(Panels<bf16>),
    Int8(Quantised),
}

impl PackedLinear {
    /// Lays out `weight [N, K]`, with a bias `[N]` or none.
    ///
    /// # Errors
    /// If one of `K` and `N` is 0, the bias is not `[N]` of the type and on the device of the weight, or weights other than `f32`
    /// or with `K` above 66 311 are to be bytes.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, weights: PackedWeights) -> Result<Self> {
        let (outputs, inputs) = check(weight, bias, weights)?;
        let dtype = weight.dtype();
        let weight = &weight.detach().contiguous()?;
        let layout = match (Path::for_tensor(weight), weights) {
            (Path::HostF32, PackedWeights::Int8) => {
                let rounded = Rounded::of(&Lines::of_numbers(&read(weight)?, inputs), Vec::new());
                match Multiplier::<i8>::find() {
                    Some(multiplier) => Layout::Packed(Weights::Int8(Quantised::new(&multiplier, rounded))),
                    None => Layout::of_f32(&Tensor::from_vec(rounded.widened(), weight.shape(), weight.device())?)?,
                }
            }
            (Path::HostF32, PackedWeights::AsGiven) => Layout::of_f32(weight)?,
            (Path::HostBf16, _) => match Multiplier::<bf16>::find() {
                Some(multiplier) => {
                    let panels = multiplier.pack(Factor::Along(&read(weight)?), (outputs, inputs));
                    Layout::Packed(Weights::Bf16(panels))
                }
                None => Layout::Plain(weight.clone()),
            },
            (_, PackedWeights::Int8) => {
                let numbers = weight.flatten_all()?.to_vec1::<f32>()?;
                let rounded = Rounded::of(&Lines::of_numbers(&numbers, inputs), Vec::new()).widened();
                Layout::Plain(Tensor::from_vec(rounded, weight.shape(), weight.device())?)
            }
            _ => Layout::Plain(weight.clone()),
        };
        let bias = bias.map(|bias| bias.detach().contiguous()).transpose()?;
        Ok(Self { outputs, inputs, dtype, layout: Arc::new(layout), bias })
    }

    /// The layer whose weights lie in files, `[Nᵢ, K]` one above the other, to compute with in `dtype` on a device. Where the CPU
    /// multiplies by panels, and if the weights can all stay where they are ([`StoredTensor::can_stay`]), this layer keeps the files
    /// open, and they must not be written to, until it is packed for its third product; they are read here otherwise.
    ///
    /// # Errors
    /// As [`Self::new`], or if there are no weights, or not all of `K` columns.
    pub fn stored(
        stored: Vec<StoredTensor>,
        bias: Option<&Tensor>,
        weights: PackedWeights,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let inputs = stored.first().and_then(|first| first.dims().get(1)).copied().unwrap_or(0);
        let lines = |tensor: &StoredTensor| match *tensor.dims() {
            [lines, columns] if columns == inputs => Ok(lines),
            _ => {
                let (expected, found) = (format!("[N, {inputs}]"), tensor.dims().to_vec());
                Err(KernelError::Shape { op: OP, argument: "weight", expected, found })
            }
        };
        let outputs = stored.iter().map(lines).sum::<std::result::Result<usize, _>>()?;
        let like = Tensor::zeros((), dtype, device)?.broadcast_as((outputs, inputs))?;
        check(&like, bias, weights)?;
        if device.is_cpu() && Stored::is_read(&stored, dtype, weights) {
            let bias = bias.map(|bias| bias.detach().contiguous()).transpose()?;
            let layout = Layout::Stored(Stored {
                weights: Mutex::new(Some(stored.into())),
                dtype,
                kept_in: weights,
                uses: AtomicUsize::new(0),
                packed: OnceLock::new(),
            });
            return Ok(Self { outputs, inputs, dtype, layout: Arc::new(layout), bias });
        }
        let read = stored.iter().map(|tensor| tensor.read(dtype, device)).collect::<Result<Vec<_>>>()?;
        check_unchanged(&stored)?;
        let whole = if let [one] = read.as_slice() { one.clone() } else { Tensor::cat(&read, 0)? };
        Self::new(&whole, bias, weights)
    }

    /// `x [.., K]` → `[.., N]`.
    ///
    /// # Errors
    /// If the last dimension of `x` is not `K`, `x` is not of the weights' type and on their device, or a residual is not `[.., N]`.
    pub fn forward(&self, x: &Tensor, epilogue: Epilogue) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        if shape.pop() != Some(self.inputs) {
            let (expected, found) = (format!("[.., {}]", self.inputs), x.dims().to_vec());
            return Err(KernelError::Shape { op: OP, argument: "x", expected, found }.into());
        }
        shape.push(self.outputs);
        let device = match &*self.layout {
            Layout::Plain(weight) => weight.device(),
            _ => &Device::Cpu,
        };
        if x.dtype() != self.dtype || !device.same_device(x.device()) {
            let describe = |dtype: DType, device: &Device| format!("{dtype:?} on {:?}", device.location());
            let (expected, found) = (describe(self.dtype, device), describe(x.dtype(), x.device()));
            return Err(KernelError::Value { op: OP, argument: "x", expected, found }.into());
        }
        if let Epilogue::Add(residual) = epilogue {
            check_shape(OP, "residual", residual, &shape)?;
            Path::of(OP, &[("x", x), ("residual", residual)])?;
        }
        let x = &x.contiguous()?;
        if let Layout::Plain(weight) = &*self.layout {
            let y = match &self.bias {
                Some(bias) => linear(x, weight, bias)?,
                None => linear_without_bias(x, weight)?,
            };
            return epilogue.apply(y);
        }
        if x.track_op() || matches!(epilogue, Epilogue::Add(residual) if residual.track_op()) {
            let (y, layer) = (self.packed(x, Epilogue::Nothing, &shape)?, self.clone());
            let y = differentiable(OP, [x], y, move |[x], gradient| {
                Ok([Some(times_weight(x, &layer.unpacked()?, gradient)?)])
            })?;
            return epilogue.apply(y);
        }
        Ok(self.packed(x, epilogue, &shape)?.detached())
    }

    fn packed(&self, x: &Tensor, epilogue: Epilogue, shape: &[usize]) -> Result<Fresh> {
        let stored = match &*self.layout {
            Layout::Packed(weights) => return self.by_panels(x, weights, epilogue, shape),
            Layout::Stored(stored) => stored,
            Layout::Plain(_) => unreachable!("has no panels"),
        };
        match stored.turn()? {
            Turn::Later(weights) => self.by_panels(x, weights, epilogue, shape),
            Turn::First(weights) => {
                let y = self.by_lines(x, &weights, stored.kept_in, epilogue, shape)?;
                check_unchanged(&weights)?;
                Ok(y)
            }
        }
    }

    fn by_panels(&self, x: &Tensor, weights: &Weights, epilogue: Epilogue, shape: &[usize]) -> Result<Fresh> {
        match weights {
            Weights::F32(panels) => {
                self.multiplied(x, Factor::Along(&read(x)?), Second::Packed(panels), None, epilogue, shape)
            }
            Weights::Bf16(panels) => {
                self.multiplied(x, Factor::Along(&read(x)?), Second::Packed(panels), None, epilogue, shape)
            }
            Weights::Int8(Quantised { panels, scales, sums }) => {
                let (bytes, rows) = quantised(&read(x)?, self.inputs);
                let scales = Scales { rows: &rows, columns: scales, sums };
                self.multiplied(x, Factor::Along(&bytes), Second::Packed(panels), Some(scales), epilogue, shape)
            }
        }
    }

    fn by_lines(
        &self,
        x: &Tensor,
        weights: &[StoredTensor],
        kept_in: PackedWeights,
        epilogue: Epilogue,
        shape: &[usize],
    ) -> Result<Fresh> {
        /// The largest layer whose memory is kept for the next: one of 1024 inputs and 4096 outputs, as Swin-B has them.
        const KEPT: usize = 1024 * 4096;
        thread_local! {
            static BYTES: Cell<Vec<i8>> = const { Cell::new(Vec::new()) };
        }
        match (self.dtype, kept_in) {
            (DType::BF16, _) => {
                let lines = Lines::<bf16>::of_stored(weights).expect(READABLE);
                self.multiplied(x, Factor::Along(&read(x)?), Second::Lines(&lines), None, epilogue, shape)
            }
            (_, PackedWeights::AsGiven) => {
                let lines = Lines::<f32>::of_stored(weights).expect(READABLE);
                self.multiplied(x, Factor::Along(&read(x)?), Second::Lines(&lines), None, epilogue, shape)
            }
            (_, PackedWeights::Int8) => {
                let rounded = Rounded::of(&Lines::of_stored(weights).expect(READABLE), BYTES.take());
                let (bytes, rows) = quantised(&read(x)?, self.inputs);
                let lines = Second::Lines(&Lines::of_numbers(&rounded.bytes, self.inputs));
                let scales = Scales { rows: &rows, columns: &rounded.scales, sums: &rounded.sums };
                let y = self.multiplied(x, Factor::Along(&bytes), lines, Some(scales), epilogue, shape);
                if rounded.bytes.len() <= KEPT {
                    BYTES.set(rounded.bytes);
                }
                y
            }
        }
    }

    fn multiplied<T: Native<Out: candle_core::WithDType>>(
        &self,
        x: &Tensor,
        a: Factor<T>,
        b: Second<T>,
        scales: Option<Scales>,
        epilogue: Epilogue,
        shape: &[usize],
    ) -> Result<Fresh> {
        let multiplier = Multiplier::find().expect("what packed it");
        let size = (x.elem_count() / self.inputs, self.outputs, self.inputs);
        let bias = self.bias.as_ref().map(read::<T::Out>).transpose()?;
        let residual = match epilogue {
            Epilogue::Add(residual) => Some(residual.contiguous()?),
            _ => None,
        };
        let residual = residual.as_ref().map(read::<T::Out>).transpose()?;
        let then = match (epilogue, &residual) {
            (Epilogue::Gelu, _) => Then::Activate(Curve::Gelu),
            (Epilogue::QuickGelu, _) => Then::Activate(Curve::QuickGelu),
            (_, Some(residual)) => Then::Add(residual),
            (_, None) => Then::Nothing,
        };
        let finish = Finish { scales, bias: bias.as_deref(), then };
        Ok(written(shape, |out| multiplier.multiply(Product { size, a, b, finish, out })))
    }

    /// The weights `[N, K]`, of the type of `x`.
    fn unpacked(&self) -> Result<Tensor> {
        let stored = match &*self.layout {
            Layout::Packed(weights) => return weights.unpacked(),
            Layout::Stored(stored) => stored,
            Layout::Plain(weight) => return Ok(weight.clone()),
        };
        match stored.without_use() {
            Turn::Later(weights) => weights.unpacked(),
            Turn::First(weights) => {
                let whole = match stored.kept_in {
                    PackedWeights::AsGiven => {
                        let read = weights.iter().map(|tensor| tensor.read(self.dtype, &Device::Cpu));
                        Tensor::cat(&read.collect::<Result<Vec<_>>>()?, 0)?
                    }
                    PackedWeights::Int8 => {
                        let rounded = Rounded::of(&Lines::of_stored(&weights).expect(READABLE), Vec::new());
                        Tensor::from_vec(rounded.widened(), (self.outputs, self.inputs), &Device::Cpu)?
                    }
                };
                check_unchanged(&weights)?;
                Ok(whole)
            }
        }
    }
}

/// Checks what a layer is made of, and returns its outputs and inputs.
fn check(weight: &Tensor, bias: Option<&Tensor>, weights: PackedWeights) -> Result<(usize, usize)> {
    let (outputs, inputs) = weight.dims2()?;
    if outputs == 0 || inputs == 0 {
        let (expected, found) = ("[N, K], both above 0".into(), weight.dims().to_vec());
        return Err(KernelError::Shape { op: OP, argument: "weight", expected, found }.into());
    }
    if let Some(bias) = bias {
        check_shape(OP, "bias", bias, &[outputs])?;
        Path::of(OP, &[("weight", weight), ("bias", bias)])?;
    }
    let dtype = weight.dtype();
    if weights == PackedWeights::Int8 && dtype != DType::F32 {
        let (expected, found) = ("F32, to be rounded to bytes".into(), format!("{dtype:?}"));
        return Err(KernelError::Value { op: OP, argument: "weight", expected, found }.into());
    }
    if weights == PackedWeights::Int8 && inputs > MOST_INPUTS {
        let (expected, found) = (format!("[N, K], K at most {MOST_INPUTS} for bytes"), weight.dims());
        return Err(KernelError::Value { op: OP, argument: "weight", expected, found: format!("{found:?}") }.into());
    }
    Ok((outputs, inputs))
}

/// Checks that no file of these was written to.
fn check_unchanged(stored: &[StoredTensor]) -> Result<()> {
    stored.iter().try_for_each(StoredTensor::check_unchanged)
}

/// What [`Stored::is_read`] has checked.
const READABLE: &str = "numbers that are read from files";

/// How many products are computed from where weights are stored: grounding one phrase takes two of the fusion layers.
const DIRECT: usize = 2;

/// Weights that stay where they are stored until they are used often.
struct Stored {
    /// Until they are packed.
    weights: Mutex<Option<Arc<[StoredTensor]>>>,
    /// What is computed in.
    dtype: DType,
    kept_in: PackedWeights,
    uses: AtomicUsize,
    packed: OnceLock<Weights>,
}

/// What a product is computed from.
enum Turn<'a> {
    First(Arc<[StoredTensor]>),
    Later(&'a Weights),
}

impl Stored {
    /// Whether such numbers are read from where they lie as they are multiplied.
    fn is_read(stored: &[StoredTensor], dtype: DType, kept_in: PackedWeights) -> bool {
        let is_multiplied = match (dtype, kept_in) {
            (DType::F32, PackedWeights::AsGiven) => Multiplier::<f32>::find().is_some(),
            (DType::F32, PackedWeights::Int8) => Multiplier::<i8>::find().is_some(),
            (DType::BF16, _) => Multiplier::<bf16>::find().is_some(),
            _ => false,
        };
        is_multiplied && stored.iter().all(|tensor| tensor.can_stay(dtype))
    }

    /// For the first uses what is stored; then panels are made. Whoever comes meanwhile does not wait for them. If that fails, it
    /// is tried again for the next use.
    fn turn(&self) -> Result<Turn<'_>> {
        /// Unless it is forgotten, after a panic too.
        struct Again<'a>(&'a AtomicUsize);
        impl Drop for Again<'_> {
            fn drop(&mut self) {
                self.0.store(DIRECT, Ordering::Relaxed);
            }
        }
        let stored = match self.without_use() {
            Turn::First(stored) => stored,
            later => return Ok(later),
        };
        if self.uses.fetch_add(1, Ordering::Relaxed) != DIRECT {
            return Ok(Turn::First(stored));
        }
        let again = Again(&self.uses);
        let packed = self.pack(&stored);
        check_unchanged(&stored)?;
        std::mem::forget(again);
        let packed = self.packed.get_or_init(|| packed);
        *self.weights.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(Turn::Later(packed))
    }

    fn without_use(&self) -> Turn<'_> {
        if let Some(packed) = self.packed.get() {
            return Turn::Later(packed);
        }
        let stored = self.weights.lock().unwrap_or_else(PoisonError::into_inner).clone();
        stored.map_or_else(|| Turn::Later(self.packed.get().expect("made before the rest is dropped")), Turn::First)
    }

    fn pack(&self, stored: &[StoredTensor]) -> Weights {
        fn panels<T: Readable + Native>(stored: &[StoredTensor]) -> Panels<T> {
            let lines = Lines::of_stored(stored).expect(READABLE);
            Multiplier::find().expect(READABLE).pack_lines(&lines, lines.size())
        }
        match (self.dtype, self.kept_in) {
            (DType::BF16, _) => Weights::Bf16(panels(stored)),
            (_, PackedWeights::AsGiven) => Weights::F32(panels(stored)),
            (_, PackedWeights::Int8) => {
                let rounded = Rounded::of(&Lines::of_stored(stored).expect(READABLE), Vec::new());
                Weights::Int8(Quantised::new(&Multiplier::find().expect(READABLE), rounded))
            }
        }
    }
}

impl Weights {
    /// What they are kept in, in words.
    fn describe(&self) -> &'static str {
        match self {
            Self::F32(_) => "panels of f32",
            Self::Bf16(_) => "panels of bf16",
            Self::Int8(_) => "panels of bytes",
        }
    }

    /// `[N, K]`, of the type of what they are multiplied with.
    fn unpacked(&self) -> Result<Tensor> {
        let device = &Device::Cpu;
        match self {
            Self::F32(panels) => Tensor::from_vec(panels.unpacked(), panels.size(), device),
            Self::Bf16(panels) => Tensor::from_vec(panels.unpacked(), panels.size(), device),
            Self::Int8(Quantised { panels, scales, .. }) => {
                let rounded = Rounded {
                    bytes: panels.unpacked(),
                    scales: scales.clone(),
                    sums: Vec::new(),
                    inputs: panels.size().1,
                };
                Tensor::from_vec(rounded.widened(), panels.size(), device)
            }
        }
    }
}

impl fmt::Debug for PackedLinear {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let layout = match &*self.layout {
            Layout::Packed(weights) => weights.describe(),
            Layout::Stored(stored) => stored.packed.get().map_or("stored", Weights::describe),
            Layout::Plain(_) => "plain",
        };
        write!(f, "PackedLinear({} -> {}, {layout})", self.inputs, self.outputs)
    }
}

impl Layout {
    fn of_f32(weight: &Tensor) -> Result<Self> {
        Ok(match Multiplier::<f32>::find() {
            Some(multiplier) => {
                Self::Packed(Weights::F32(multiplier.pack(Factor::Along(&read(weight)?), weight.dims2()?)))
            }
            None => Self::Plain(weight.clone()),
        })
    }
}

impl Epilogue<'_> {
    /// On results that are there.
    fn apply(self, y: Tensor) -> Result<Tensor> {
        match self {
            Self::Nothing => Ok(y),
            Self::Gelu => gelu(&y),
            Self::QuickGelu => quick_gelu(&y),
            Self::Add(residual) => add_branch(residual, &y, None),
        }
    }
}

/// Weights in panels of bytes.
struct Quantised {
    panels: Panels<i8>,
    scales: Vec<f32>,
    /// Of the bytes of each output.
    sums: Vec<i32>,
}

impl Quantised {
    fn new(multiplier: &Multiplier<i8>, Rounded { bytes, scales, sums, inputs }: Rounded) -> Self {
        Self { panels: multiplier.pack(Factor::Along(&bytes), (scales.len(), inputs)), scales, sums }
    }
}

/// Rows of numbers as bytes, and a scale for each row.
struct Rounded {
    bytes: Vec<i8>,
    scales: Vec<f32>,
    /// Of the bytes of each row.
    sums: Vec<i32>,
    inputs: usize,
}

impl Rounded {
    /// In 254 steps (255 values) from the negative of a row's greatest number to the number itself. A row with a number that
    /// is not finite has a scale of NaN. `memory` is what the bytes are written to.
    fn of(weight: &Lines<f32>, memory: Vec<i8>) -> Self {
        let (outputs, inputs) = weight.size();
        let (mut bytes, mut scales, mut sums) = (memory, vec![0.0; outputs], vec![0; outputs]);
        bytes.resize(outputs * inputs, 0);
        let rows = bytes.par_chunks_exact_mut(inputs).zip(&mut scales).zip(&mut sums).enumerate();
        rows.for_each_init(Vec::new, |read, (i, ((bytes, scale), sum))| {
            let row = weight.plain(i..i + 1).unwrap_or_else(|| {
                read.resize(inputs, 0.0);
                weight.read(i, 0, read);
                read
            });
            (*scale, *sum) = vectorized(
                #[inline(always)]
                || round(row, bytes),
            );
        });
        Self { bytes, scales, sums, inputs }
    }

    /// In `f32`.
    fn widened(&self) -> Vec<f32> {
        let rows = self.bytes.chunks_exact(self.inputs).zip(&self.scales);
        rows.flat_map(|(row, scale)| row.iter().map(move |q| f32::from(*q) * scale)).collect()
    }
}

/// Rounds a row of weights, and returns its scale and the sum of its bytes.
#[inline(always)]
fn round(row: &[f32], bytes: &mut [i8]) -> (f32, i32) {
    let Bounds { least, greatest } = Bounds::of(row);
    let scale = greatest.max(-least) / 127.0;
    // A row of zeros has any scale.
    let (scale, steps) = if scale == 0.0 { (1.0, 0.0) } else { (scale, 1.0 / scale) };
    for (byte, &w) in bytes.iter_mut().zip(row) {
        *byte = (w * steps).round_ties_even() as i32 as i8;
    }
    (scale, bytes.iter().copied().map(i32::from).sum())
}

/// Rows that a thread rounds at a time.
const ROWS: usize = 16;
/// Numbers that are compared side by side.
const ABREAST: usize = 64;

/// Rows as unsigned bytes (in signed ones), with scale and zero of each. A row with a number that is not finite has a scale of
/// NaN.
fn quantised(x: &[f32], width: usize) -> (Vec<i8>, Vec<(f32, i32)>) {
    let mut rows = vec![(0.0, 0); x.len() / width];
    let mut bytes = vec![0i8; x.len()];
    let parts = bytes.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).zip(rows.par_chunks_mut(ROWS));
    parts.for_each(|((bytes, x), rows)| {
        for ((bytes, x), row) in bytes.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(rows) {
            *row = vectorized(
                #[inline(always)]
                || quantise(x, bytes),
            );
        }
    });
    (bytes, rows)
}

#[inline(always)]
fn quantise(x: &[f32], bytes: &mut [i8]) -> (f32, i32) {
    let Bounds { least, greatest } = Bounds::of(x);
    let scale = (greatest - least) / 255.0;
    let steps = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let zero = (-least * steps).round_ties_even();
    for (byte, &x) in bytes.iter_mut().zip(x) {
        *byte = (x.mul_add(steps, zero).round_ties_even().clamp(0.0, 255.0) as i32 as u8).cast_signed();
    }
    (scale, zero as i32)
}

/// The least and the greatest of some numbers and 0; NaN if one of them is not finite.
struct Bounds {
    least: f32,
    greatest: f32,
}

impl Bounds {
    #[inline(always)]
    fn of(x: &[f32]) -> Self {
        let (mut least, mut greatest, mut nothing) = ([0f32; ABREAST], [0f32; ABREAST], [0f32; ABREAST]);
        let (blocks, rest) = x.as_chunks::<ABREAST>();
        let mut last = [0f32; ABREAST];
        last[..rest.len()].copy_from_slice(rest);
        for x in blocks.iter().chain([&last]) {
            for i in 0..ABREAST {
                least[i] = if x[i] < least[i] { x[i] } else { least[i] };
                greatest[i] = if x[i] > greatest[i] { x[i] } else { greatest[i] };
                nothing[i] += 0.0 * x[i];
            }
        }
        let nothing = nothing.iter().sum::<f32>();
        let least = least.iter().fold(0f32, |a, b| a.min(*b)) + nothing;
        Self { least, greatest: greatest.iter().fold(0f32, |a, b| a.max(*b)) + nothing }
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::mapped::MappedFile;
    use crate::numbers::StoredBytes;

    fn random(shape: &[usize], seed: u64) -> Tensor {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn greatest_difference(a: &Tensor, b: &Tensor) -> f32 {
        numbers(a).iter().zip(numbers(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    fn epilogues(residual: &Tensor) -> [Epilogue<'_>; 4] {
        [Epilogue::Nothing, Epilogue::Gelu, Epilogue::QuickGelu, Epilogue::Add(residual)]
    }

    fn compare(rows: usize, inputs: usize, outputs: usize, seed: u64) {
        let (x, weight) = (random(&[rows, inputs], seed), random(&[outputs, inputs], seed ^ 1));
        let (bias, residual) = (random(&[outputs], seed ^ 2), random(&[rows, outputs], seed ^ 3));
        for bias in [Some(&bias), None] {
            let plain = || match bias {
                Some(bias) => linear(&x, &weight, bias),
                None => linear_without_bias(&x, &weight),
            };
            let packed = PackedLinear::new(&weight, bias, PackedWeights::AsGiven).unwrap();
            for epilogue in epilogues(&residual) {
                // To the bit: the same sums and the same curves.
                let (found, wanted) =
                    (packed.forward(&x, epilogue).unwrap(), epilogue.apply(plain().unwrap()).unwrap());
                assert_eq!(numbers(&found), numbers(&wanted), "{rows} rows, {inputs} -> {outputs}");
            }
            let half = |x: &Tensor| x.to_dtype(DType::BF16).unwrap();
            let packed = PackedLinear::new(&half(&weight), bias.map(half).as_ref(), PackedWeights::AsGiven).unwrap();
            let residual = half(&residual);
            for epilogue in epilogues(&residual) {
                let found = packed.forward(&half(&x), epilogue).unwrap();
                let exact = |x: &Tensor| half(x).to_dtype(DType::F32).unwrap();
                let product = linear(&exact(&x), &exact(&weight), &bias.map_or_else(|| bias_of_zeros(outputs), exact));
                let wide = residual.to_dtype(DType::F32).unwrap();
                let epilogue = match epilogue {
                    Epilogue::Add(_) => Epilogue::Add(&wide),
                    other => other,
                };
                let wanted = epilogue.apply(product.unwrap()).unwrap();
                for (found, wanted) in numbers(&found).iter().zip(numbers(&wanted)) {
                    // One rounding of the result; two where the epilogue follows a result that was written.
                    let allowed = 2f32.powi(-7) * (wanted.abs() + 1.0);
                    assert!((found - wanted).abs() <= allowed, "{found} for {wanted}");
                }
            }
        }
    }

    fn bias_of_zeros(outputs: usize) -> Tensor {
        Tensor::zeros(outputs, DType::F32, &Device::Cpu).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn layers_of_any_size(rows in 0usize..40, inputs in 1usize..70, outputs in 1usize..70, seed: u64) {
            compare(rows, inputs, outputs, seed);
        }

        /// What rounding loses is half a step of a row of `x` for each weight, and half a step of a weight for each number.
        #[test]
        fn bytes_are_off_by_their_steps(rows in 0usize..40, inputs in 1usize..150, outputs in 1usize..70, seed: u64) {
            let (x, weight) = (random(&[rows, inputs], seed), random(&[outputs, inputs], seed ^ 1));
            let (bias, residual) = (random(&[outputs], seed ^ 2), random(&[rows, outputs], seed ^ 3));
            let packed = PackedLinear::new(&weight, Some(&bias), PackedWeights::Int8).unwrap();
            let weight = packed.unpacked().unwrap();
            let wanted = linear(&x, &weight, &bias).unwrap();
            let half_a_step = 0.5 * 2.0 / 255.0;
            let sums = numbers(&weight.abs().unwrap().sum(1).unwrap());
            for epilogue in epilogues(&residual) {
                let wanted = epilogue.apply(wanted.clone()).unwrap();
                let found = packed.forward(&x, epilogue).unwrap();
                for (i, (found, wanted)) in numbers(&found).iter().zip(numbers(&wanted)).enumerate() {
                    // No curve is steeper than 1.13.
                    let allowed = 1.13 * half_a_step * sums[i % outputs] + 1e-4;
                    assert!((found - wanted).abs() <= allowed, "{found} for {wanted}, {allowed} allowed");
                }
            }
        }
    }

    /// Rows of `outputs` lines each as they lie in a file, from an offset of bytes on, in memory that stays.
    fn in_memory(weight: &Tensor, outputs: &[usize], stored: DType, offset: usize) -> Vec<StoredTensor> {
        let (mut bytes, mut ranges) = (vec![0; offset], Vec::new());
        let mut line = 0;
        for count in outputs {
            let start = bytes.len();
            let part = weight.narrow(0, line, *count).unwrap().contiguous().unwrap();
            part.to_dtype(stored).unwrap().write_bytes(&mut bytes).unwrap();
            ranges.push((start..bytes.len(), [*count, weight.dim(1).unwrap()]));
            line += count;
        }
        let bytes = Arc::new(StoredBytes::Memory(Cow::Borrowed(bytes.leak())));
        let tensor = |(range, shape): (_, [usize; 2])| StoredTensor::new(Arc::clone(&bytes), range, stored, &shape);
        ranges.into_iter().map(|range| tensor(range).unwrap()).collect()
    }

    /// To the bit, in every use: before panels are made and after.
    fn compare_stored(
        (rows, inputs, outputs): (usize, usize, &[usize]),
        (stored, offset): (DType, usize),
        (dtype, kept_in): (DType, PackedWeights),
    ) {
        let count = outputs.iter().sum();
        let (x, weight) = (random(&[rows, inputs], 1), random(&[count, inputs], 2));
        let (bias, residual) = (random(&[count], 3), random(&[rows, count], 4));
        let parts = in_memory(&weight, outputs, stored, offset);
        let cast = |x: &Tensor| x.to_dtype(dtype).unwrap();
        let (x, bias, residual) = (cast(&x), cast(&bias), cast(&residual));
        let plain = cast(&weight.to_dtype(stored).unwrap());
        let wanted = PackedLinear::new(&plain, Some(&bias), kept_in).unwrap();
        let weight = numbers(&wanted.unpacked().unwrap());
        for epilogue in epilogues(&residual) {
            let layer = PackedLinear::stored(parts.clone(), Some(&bias), kept_in, dtype, &Device::Cpu).unwrap();
            let wanted = numbers(&wanted.forward(&x, epilogue).unwrap());
            for turn in 0..4 {
                let y = numbers(&layer.forward(&x, epilogue).unwrap());
                assert!(
                    y == wanted,
                    "{rows} rows, {inputs} -> {outputs:?}, {stored:?} + {offset}, {dtype:?}, {kept_in:?}, turn {turn}"
                );
                assert!(numbers(&layer.unpacked().unwrap()) == weight, "{inputs} -> {outputs:?}, turn {turn}");
            }
        }
    }

    #[test]
    fn stored_weights_give_what_packed_ones_do() {
        let sizes: [(usize, usize, &[usize]); 8] = [
            (1, 5, &[33]),
            (10, 768, &[64, 64, 32]),
            (130, 515, &[7, 20, 3]),
            (3, 1025, &[16, 48]),
            (150, 2049, &[130]),
            (1000, 67, &[64]),
            (9, 31, &[1, 1, 15, 40]),
            (0, 4, &[4]),
        ];
        for size in sizes {
            for stored in [(DType::F32, 0), (DType::F32, 2), (DType::BF16, 0), (DType::BF16, 1), (DType::F16, 4)] {
                for computed in [
                    (DType::F32, PackedWeights::AsGiven),
                    (DType::BF16, PackedWeights::AsGiven),
                    (DType::F32, PackedWeights::Int8),
                ] {
                    compare_stored(size, stored, computed);
                }
            }
        }
    }

    /// As many panels as are packed together, as deep as a block; and more rows than a block has.
    #[test]
    fn stored_weights_fill_the_memory_of_a_block() {
        let bf16 = (DType::BF16, PackedWeights::AsGiven);
        compare_stored((3, 768, &[2100]), (DType::F32, 0), (DType::F32, PackedWeights::AsGiven));
        compare_stored((3, 1536, &[2100]), (DType::F32, 0), bf16);
        compare_stored((200, 800, &[300]), (DType::BF16, 0), (DType::F32, PackedWeights::AsGiven));
    }

    #[test]
    fn stored_weights_in_memory_of_their_own_are_packed_at_once() {
        let (x, weight) = (random(&[3, 20], 1), random(&[9, 20], 2));
        let mut bytes = Vec::new();
        weight.write_bytes(&mut bytes).unwrap();
        let bytes = Arc::new(StoredBytes::Memory(bytes.into()));
        let part = StoredTensor::new(Arc::clone(&bytes), 0..bytes.len(), DType::F32, &[9, 20]).unwrap();
        let layer = PackedLinear::stored(vec![part], None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(Arc::strong_count(&bytes), 1, "{layer:?}");
        let wanted = PackedLinear::new(&weight, None, PackedWeights::AsGiven).unwrap();
        let forward = |layer: &PackedLinear| numbers(&layer.forward(&x, Epilogue::Nothing).unwrap());
        assert_eq!(forward(&layer), forward(&wanted));
    }

    #[test]
    fn stored_weights_of_other_types_are_read_at_once() {
        let (x, weight) = (random(&[3, 20], 1), random(&[9, 20], 2));
        let parts = in_memory(&weight, &[9], DType::F64, 0);
        let layer = PackedLinear::stored(parts, None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap();
        let wanted = PackedLinear::new(&weight, None, PackedWeights::AsGiven).unwrap();
        let forward = |layer: &PackedLinear| numbers(&layer.forward(&x, Epilogue::Nothing).unwrap());
        assert_eq!(forward(&layer), forward(&wanted));
        assert!(!format!("{layer:?}").contains("stored"), "{layer:?}");
    }

    #[test]
    fn threads_that_share_a_stored_layer_agree() {
        let (x, weight) = (random(&[20, 300], 1), random(&[200, 300], 2));
        let parts = in_memory(&weight, &[100, 100], DType::F32, 0);
        let layer = PackedLinear::stored(parts, None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap();
        let forward = |_| numbers(&layer.forward(&x, Epilogue::Nothing).unwrap());
        let found: Vec<_> = (0..32).into_par_iter().map(forward).collect();
        assert!(found.iter().all(|y| *y == found[0]));
    }

    #[test]
    fn a_file_that_is_written_to_is_told() {
        let path = std::env::temp_dir().join(format!("xvlm-stored-{}", std::process::id()));
        let weight = random(&[40, 33], 1);
        let mut bytes = Vec::new();
        weight.write_bytes(&mut bytes).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let layer = || {
            let file = Arc::new(StoredBytes::File(MappedFile::open(&path).unwrap()));
            let tensor = StoredTensor::new(file, 0..bytes.len(), DType::F32, &[40, 33]).unwrap();
            PackedLinear::stored(vec![tensor], None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap()
        };
        let x = random(&[2, 33], 2);
        let (settled, unsettled, unused) = (layer(), layer(), layer());
        let forward = |layer: &PackedLinear| layer.forward(&x, Epilogue::Nothing);
        let wanted = numbers(&forward(&settled).unwrap());
        (0..DIRECT).for_each(|_| assert_eq!(numbers(&forward(&settled).unwrap()), wanted));
        (0..DIRECT).for_each(|_| assert_eq!(numbers(&forward(&unsettled).unwrap()), wanted));
        let file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        std::io::Write::write_all(&mut &file, b"more").unwrap();
        // Where AVX-512 is missing, all have been read before.
        let is_read_late = format!("{unused:?}").contains("stored");
        for layer in [&unused, &unsettled, &unsettled] {
            match forward(layer) {
                Err(error) => {
                    let error = error.to_string();
                    assert!(is_read_late && error.contains(&path.display().to_string()), "{error}");
                }
                Ok(y) => assert!(!is_read_late && numbers(&y) == wanted),
            }
        }
        assert_eq!(numbers(&forward(&settled).unwrap()), wanted);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_layer_that_could_not_be_packed_is_packed_later() {
        let path = std::env::temp_dir().join(format!("xvlm-packed-later-{}", std::process::id()));
        let mut bytes = Vec::new();
        random(&[40, 33], 1).write_bytes(&mut bytes).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let mapped = Arc::new(StoredBytes::File(MappedFile::open(&path).unwrap()));
        let tensor = StoredTensor::new(mapped, 0..bytes.len(), DType::F32, &[40, 33]).unwrap();
        let layer = PackedLinear::stored(vec![tensor], None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap();
        let (x, is_read_late) = (random(&[2, 33], 2), format!("{layer:?}").contains("stored"));
        let forward = || layer.forward(&x, Epilogue::Nothing);
        (0..DIRECT).for_each(|_| drop(forward().unwrap()));
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        let time = file.metadata().unwrap().modified().unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(forward().is_err(), is_read_late);
        file.set_modified(time).unwrap();
        forward().unwrap();
        assert!(!format!("{layer:?}").contains("stored"), "{layer:?}");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn stored_weights_that_do_not_fit_are_named() {
        let (weight, device) = (random(&[6, 5], 1), &Device::Cpu);
        let stored = |parts: Vec<StoredTensor>, bias: Option<&Tensor>| {
            PackedLinear::stored(parts, bias, PackedWeights::AsGiven, DType::F32, device).unwrap_err().to_string()
        };
        let part =
            |lines: usize, inputs: usize| in_memory(&random(&[lines, inputs], 1), &[lines], DType::F32, 0).remove(0);
        let error = stored(vec![part(2, 5), part(3, 4)], None);
        assert!(error.contains("`weight` should have shape [N, 5]") && error.contains("[3, 4]"), "{error}");
        assert!(stored(Vec::new(), None).contains("both above 0"));
        let error = stored(in_memory(&weight, &[6], DType::F32, 0), Some(&random(&[5], 1)));
        assert!(error.contains("packed_linear: `bias`") && error.contains("[6]"), "{error}");
        let bytes = Arc::new(StoredBytes::Memory(vec![0; 100].into()));
        let tensor = |range| StoredTensor::new(Arc::clone(&bytes), range, DType::F32, &[5, 5]);
        assert!(tensor(0..100).is_ok());
        assert!(tensor(4..104).unwrap_err().to_string().contains("expected a range of 100, found 4..104"));
        assert!(tensor(0..96).unwrap_err().to_string().contains("found 96"));
    }

    #[test]
    fn layers_of_several_blocks() {
        for (rows, inputs, outputs) in [(2049, 5, 33), (3, 2048, 15), (130, 515, 7), (1, 1025, 5000), (3, 4099, 35)] {
            compare(rows, inputs, outputs, 7);
        }
    }

    /// Whole numbers that bytes hold exactly, in more than a block.
    #[test]
    fn sums_of_bytes_are_exact() {
        let (rows, inputs, outputs) = (17, 4103, 37);
        let whole = |count: usize, least: i32, steps: i32, salt: usize| {
            (0..count).map(|i| (least + ((i * 7919 + salt) % steps as usize) as i32) as f32).collect::<Vec<_>>()
        };
        let (mut x, mut weight) = (whole(rows * inputs, -100, 256, 1), whole(outputs * inputs, -127, 255, 5));
        x.chunks_mut(inputs).for_each(|row| (row[0], row[1]) = (-100.0, 155.0));
        weight.chunks_mut(inputs).for_each(|row| row[2] = 127.0);
        let x = Tensor::from_vec(x, (rows, inputs), &Device::Cpu).unwrap();
        let weight = Tensor::from_vec(weight, (outputs, inputs), &Device::Cpu).unwrap();
        let packed = PackedLinear::new(&weight, None, PackedWeights::Int8).unwrap();
        let found = packed.forward(&x, Epilogue::Nothing).unwrap();
        let exact = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
        let wanted = exact(&x).matmul(&exact(&weight).t().unwrap()).unwrap();
        let off = numbers(&found)
            .iter()
            .zip(numbers(&wanted))
            .map(|(a, b)| (a - b).abs() / (1.0 + b.abs()))
            .fold(0f32, f32::max);
        assert!(off < 1e-6, "{off}");
    }

    #[test]
    fn the_longest_sums_of_bytes_do_not_wrap() {
        let row = |x: f32, count: usize| Tensor::full(x, (1, count), &Device::Cpu).unwrap();
        for sign in [1.0, -1.0] {
            let packed = PackedLinear::new(&row(sign * 127.0, MOST_INPUTS), None, PackedWeights::Int8).unwrap();
            let found = numbers(&packed.forward(&row(255.0, MOST_INPUTS), Epilogue::Nothing).unwrap())[0];
            let wanted = sign * 255.0 * 127.0 * MOST_INPUTS as f32;
            assert!((found / wanted - 1.0).abs() < 0.01, "{found} for {wanted}");
        }
        let error = PackedLinear::new(&row(1.0, MOST_INPUTS + 1), None, PackedWeights::Int8).unwrap_err().to_string();
        assert!(error.contains("K at most 66311") && error.contains("66312"), "{error}");
        assert!(PackedLinear::new(&row(1.0, MOST_INPUTS + 1), None, PackedWeights::AsGiven).is_ok());
    }

    #[test]
    fn gradients_go_through() {
        let (x, weight, bias) = (random(&[9, 33], 1), random(&[40, 33], 2), random(&[40], 3));
        let (x, residual) = (candle_core::Var::from_tensor(&x).unwrap(), random(&[9, 40], 4));
        for weights in [PackedWeights::AsGiven, PackedWeights::Int8] {
            let packed = PackedLinear::new(&weight, Some(&bias), weights).unwrap();
            let weight = packed.unpacked().unwrap();
            for epilogue in epilogues(&residual) {
                let slope =
                    |y: Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap().get(&x).unwrap().clone();
                let found = slope(packed.forward(&x, epilogue).unwrap());
                let wanted = slope(epilogue.apply(linear(&x, &weight, &bias).unwrap()).unwrap());
                let allowed = if weights == PackedWeights::Int8 { 1.0 } else { 1e-4 };
                assert!(greatest_difference(&found, &wanted) < allowed, "{:?}", greatest_difference(&found, &wanted));
            }
        }
    }

    #[test]
    fn gradients_go_through_stored_weights() {
        let (x, weight) = (random(&[9, 33], 1), random(&[40, 33], 2));
        let x = candle_core::Var::from_tensor(&x).unwrap();
        let wanted = PackedLinear::new(&weight, None, PackedWeights::AsGiven).unwrap();
        let parts = in_memory(&weight, &[40], DType::F32, 0);
        let layer = PackedLinear::stored(parts, None, PackedWeights::AsGiven, DType::F32, &Device::Cpu).unwrap();
        let slope = |layer: &PackedLinear| {
            let y = layer.forward(&x, Epilogue::Gelu).unwrap();
            numbers(y.sqr().unwrap().sum_all().unwrap().backward().unwrap().get(&x).unwrap())
        };
        (0..4).for_each(|_| assert_eq!(slope(&layer), slope(&wanted)));
    }

    #[test]
    fn numbers_that_are_not_finite_are_not_lost() {
        let forward = |x: Tensor, weight: Tensor| {
            let packed = PackedLinear::new(&weight, None, PackedWeights::Int8).unwrap();
            numbers(&packed.forward(&x, Epilogue::Nothing).unwrap())
        };
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut poisoned = vec![0.5f32; 40];
            poisoned[27] = poison;
            let poisoned = Tensor::from_vec(poisoned, (2, 20), &Device::Cpu).unwrap();
            let y = forward(poisoned.clone(), random(&[3, 20], 1));
            assert!(y[..3].iter().all(|y| y.is_finite()) && y[3..].iter().all(|y| !y.is_finite()), "{y:?}");
            let y = forward(random(&[3, 20], 1), poisoned);
            assert!(y.iter().enumerate().all(|(i, y)| y.is_finite() == (i % 2 == 0)), "{y:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (weight, bias) = (random(&[4, 3], 1), random(&[4], 2));
        let named = |result: Result<Tensor>, parts: &[&str]| {
            let error = result.unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        let new = |weight: &Tensor, bias: &Tensor, weights| {
            PackedLinear::new(weight, Some(bias), weights).map(|_| bias.clone())
        };
        named(new(&weight, &random(&[3], 1), PackedWeights::AsGiven), &["packed_linear: `bias`", "[4]", "[3]"]);
        let half = |x: &Tensor| x.to_dtype(DType::BF16).unwrap();
        named(new(&weight, &half(&bias), PackedWeights::AsGiven), &["packed_linear: `bias`", "BF16"]);
        named(new(&half(&weight), &half(&bias), PackedWeights::Int8), &["packed_linear: `weight`", "F32", "BF16"]);
        let packed = PackedLinear::new(&weight, Some(&bias), PackedWeights::AsGiven).unwrap();
        let forward = |x: &Tensor, residual: &Tensor| packed.forward(x, Epilogue::Add(residual));
        named(forward(&random(&[2, 5], 1), &random(&[2, 4], 1)), &["packed_linear: `x`", "[.., 3]", "[2, 5]"]);
        named(forward(&half(&random(&[2, 3], 1)), &random(&[2, 4], 1)), &["packed_linear: `x`", "F32", "BF16"]);
        named(forward(&random(&[2, 3], 1), &random(&[2, 3], 1)), &["packed_linear: `residual`", "[2, 4]", "[2, 3]"]);
    }
}
