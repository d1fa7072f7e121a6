//! Shifted-window attention with relative-position bias (Swin).

use std::sync::Arc;

use candle_core::{D, Result, Tensor};
use half::bf16;

use crate::attention::head_width;
use crate::error::{KernelError, check_shape};
use crate::path::Path;
use crate::softmax::softmax;

#[cfg(gpu)]
mod gpu;
mod host;

/// The geometry of a window attention: a grid of `height × width` tokens cut into `window × window` windows after a
/// cyclic shift by `shift` towards the origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowShape {
    /// Rows of tokens.
    pub height: usize,
    /// Columns of tokens.
    pub width: usize,
    /// Side of a window; divides both.
    pub window: usize,
    /// Cyclic shift; 0 or less than `window`.
    pub shift: usize,
}

const OP: &str = "window_attention";

/// What separates tokens that meet in a window only because of the cyclic shift.
const APART: f32 = -100.0;

impl WindowShape {
    fn check(&self) -> Result<()> {
        let Self { height, width, window, shift } = *self;
        let divides = window > 0 && height.is_multiple_of(window) && width.is_multiple_of(window) && shift < window;
        if divides {
            return Ok(());
        }
        Err(KernelError::Value {
            op: OP,
            argument: "shape",
            expected: "a window that divides the grid, and a shift below the window".into(),
            found: format!("{self:?}"),
        }
        .into())
    }

    fn area(&self) -> usize {
        self.window * self.window
    }

    fn windows(&self) -> usize {
        self.height * self.width / self.area()
    }

    /// Tokens (row-major, image order) of each window, `windows × area`.
    fn tokens(&self) -> Vec<u32> {
        let Self { height, width, window, shift } = *self;
        let mut order = Vec::with_capacity(height * width);
        for top in (0..height).step_by(window) {
            for left in (0..width).step_by(window) {
                for y in top..top + window {
                    for x in left..left + window {
                        order.push((((y + shift) % height) * width + (x + shift) % width) as u32);
                    }
                }
            }
        }
        order
    }

    /// `[windows, area, area]`: 0 between tokens of one region, [`APART`] between tokens of different regions.
    fn mask(&self) -> Vec<f32> {
        let Self { height, width, window, shift } = *self;
        let band = |i: usize, size: usize| usize::from(i + window >= size) + usize::from(i + shift >= size);
        let mut mask = Vec::with_capacity(height * width * self.area());
        for top in (0..height).step_by(window) {
            for left in (0..width).step_by(window) {
                let region = |i: usize| (band(top + i / window, height), band(left + i % window, width));
                for a in 0..self.area() {
                    mask.extend((0..self.area()).map(|b| if region(a) == region(b) { 0.0 } else { APART }));
                }
            }
        }
        mask
    }
}

/// Multi-head attention inside windows, over tokens in image order.
///
/// `qkv [N, H·W, 3·C]` as in [`crate::self_attention`]; `bias [heads, window², window²]` is added to the scores of every
/// window. With a shift, tokens that the cyclic shift brings together do not see each other (Liu et al. 2021, §3.2).
/// Returns `[N, H·W, C]`.
///
/// # Errors
/// On a wrong shape, a window that does not divide the grid, or, on a GPU, if a head has more than 128 numbers or a window more
/// than 256 tokens.
pub fn window_attention(qkv: &Tensor, bias: &Tensor, shape: WindowShape) -> Result<Tensor> {
    check(qkv, bias.dims(), shape)?;
    let path = Path::of(OP, &[("qkv", qkv), ("bias", bias)])?;
    if path == Path::Composed {
        return composed(qkv, bias, shape);
    }
    let (qkv, bias) = (&qkv.contiguous()?, &bias.contiguous()?);
    match path {
        #[cfg(gpu)]
        Path::Gpu => gpu::window_attention(qkv, bias, shape),
        Path::HostBf16 => host::window_attention::<bf16>(qkv, bias, shape),
        _ => host::window_attention::<f32>(qkv, bias, shape),
    }
}

/// The bias of a window attention, laid out once for many passes of inference.
#[derive(Clone, Debug)]
pub struct WindowBias(Layout);

#[derive(Clone, Debug)]
enum Layout {
    /// Key by key in `f32`, as the CPU adds it, with the sizes it came in.
    Tables { tables: Arc<[f32]>, shape: [usize; 3] },
    /// `[heads, window², window²]`
    Plain(Tensor),
}

impl WindowBias {
    /// Of `bias [heads, window², window²]`, as for [`window_attention`]. Later changes of the tensor may not show.
    ///
    /// # Errors
    /// If `bias` has not three dimensions above 0, of which the last two are equal.
    pub fn new(bias: &Tensor) -> Result<Self> {
        const OP: &str = "WindowBias::new";
        let (heads, area, _) = bias.dims3()?;
        let shape = [heads, area, area];
        check_shape(OP, "bias", bias, &shape)?;
        if bias.elem_count() == 0 {
            let (expected, found) = ("[heads, window², window²], all above 0".into(), bias.dims().to_vec());
            return Err(KernelError::Shape { op: OP, argument: "bias", expected, found }.into());
        }
        let bias = bias.detach().contiguous()?;
        let tables = match Path::for_tensor(&bias) {
            Path::HostF32 => host::tables::<f32>(&bias)?,
            Path::HostBf16 => host::tables::<bf16>(&bias)?,
            _ => return Ok(Self(Layout::Plain(bias))),
        };
        Ok(Self(Layout::Tables { tables: tables.into(), shape }))
    }
}

/// [`window_attention`] with a bias that was laid out before, which gets no gradient.
///
/// # Errors
/// As [`window_attention`], or if the bias was laid out for another device or type.
pub fn window_attention_with(qkv: &Tensor, bias: &WindowBias, shape: WindowShape) -> Result<Tensor> {
    let (tables, of_bias) = match &bias.0 {
        Layout::Plain(bias) => return window_attention(qkv, bias, shape),
        Layout::Tables { tables, shape } => (tables, shape),
    };
    check(qkv, of_bias, shape)?;
    match Path::for_tensor(qkv) {
        Path::HostF32 => host::prepared::<f32>(&qkv.contiguous()?, tables, of_bias[0], shape),
        Path::HostBf16 => host::prepared::<bf16>(&qkv.contiguous()?, tables, of_bias[0], shape),
        _ => {
            let found = format!("{:?} on {:?}", qkv.dtype(), qkv.device().location());
            let expected = "f32 or bf16 on the CPU, where the bias was laid out".into();
            Err(KernelError::Value { op: OP, argument: "qkv", expected, found }.into())
        }
    }
}

/// Fails unless the shapes fit, that of the bias among them.
fn check(qkv: &Tensor, bias: &[usize], shape: WindowShape) -> Result<()> {
    shape.check()?;
    let (n, _, packed) = qkv.dims3()?;
    let [heads, area] = [bias.first().copied().unwrap_or(0), shape.area()];
    if bias != [heads, area, area] {
        let expected = format!("{:?}", [heads, area, area]);
        return Err(KernelError::Shape { op: OP, argument: "bias", expected, found: bias.to_vec() }.into());
    }
    check_shape(OP, "qkv", qkv, &[n, shape.height * shape.width, packed])?;
    head_width(OP, packed, 3, heads)?;
    Ok(())
}

fn composed(qkv: &Tensor, bias: &Tensor, shape: WindowShape) -> Result<Tensor> {
    let (heads, area, _) = bias.dims3()?;
    let (n, tokens, packed) = qkv.dims3()?;
    if n == 0 {
        // candle takes no maximum of nothing.
        return qkv.narrow(2, 0, packed / 3);
    }
    let (device, dtype) = (qkv.device(), qkv.dtype());
    let (windows, c) = (shape.windows(), packed / 3);
    let order = shape.tokens();
    let mut place = vec![0u32; order.len()];
    for (i, &token) in order.iter().enumerate() {
        place[token as usize] = i as u32;
    }
    let split = qkv
        .contiguous()?
        .index_select(&Tensor::new(order, device)?, 1)?
        .reshape((n * windows, area, 3, heads, c / heads))?
        .permute((2, 0, 3, 1, 4))?;
    let (q, k, v) = (split.get(0)?.contiguous()?, split.get(1)?.contiguous()?, split.get(2)?.contiguous()?);
    let scale = ((c / heads) as f64).powf(-0.5);
    let mut scores = (q.matmul(&k.t()?.contiguous()?)? * scale)?.broadcast_add(&bias.unsqueeze(0)?)?;
    if shape.shift > 0 {
        let mask = Tensor::from_vec(shape.mask(), (1, windows, 1, area, area), device)?.to_dtype(dtype)?;
        scores = scores.reshape((n, windows, heads, area, area))?.broadcast_add(&mask)?;
        scores = scores.reshape((n * windows, heads, area, area))?;
    }
    let mixed = softmax(&scores, D::Minus1)?.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((n, tokens, c))?;
    mixed.index_select(&Tensor::new(place, device)?, 1)
}
