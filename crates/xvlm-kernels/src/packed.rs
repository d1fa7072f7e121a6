//! Linear layers for inference: weights laid out once as the CPU multiplies by them, and what follows a layer computed on its
//! results while they are near.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use half::bf16;

use self::rounded::{Quantised, Rounded, quantised};
use self::stored::{READABLE, Stored, Turn, check_unchanged};
use crate::activation::{Curve, gelu, quick_gelu};
use crate::dropout::add_branch;
use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, differentiable};
use crate::host::{read, written};
use crate::linear::{linear, linear_without_bias, times_weight};
use crate::numbers::{Lines, StoredTensor};
use crate::path::Path;
use crate::simd::native::{Factor, Finish, Multiplier, Native, Panels, Product, Scales, Second, Then};

mod rounded;
mod stored;

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
            let layout = Layout::Stored(Stored::new(stored, dtype, weights));
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

#[cfg(test)]
mod tests;
