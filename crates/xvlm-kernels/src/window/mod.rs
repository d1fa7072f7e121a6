//! Shifted-window attention with relative-position bias (Swin).

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use candle_core::{D, DType, Result, Tensor};
use half::bf16;

use crate::attention::{Instructions, head_width};
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
    Tables { tables: Arc<Vec<f32>>, shape: [usize; 3] },
    /// By relative position, until it is used a second time.
    Rows(Arc<Rows>),
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
        Ok(Self(Layout::Tables { tables: Arc::new(tables), shape }))
    }

    /// Of what pairs of tokens have by their relative position: `rows [(2·window − 1)², heads]`, in which that of a pair is the one
    /// that [`relative_positions`] says.
    ///
    /// # Errors
    /// If `rows` are not of this shape, or there are no heads or no tokens.
    pub fn of_rows(rows: &Tensor, window: usize) -> Result<Self> {
        const OP: &str = "WindowBias::of_rows";
        let (found, heads) = rows.dims2()?;
        let side = (2 * window).saturating_sub(1);
        if window == 0 || heads == 0 || found != side * side {
            let expected = format!("[{}, heads], both above 0", side * side);
            return Err(KernelError::Shape { op: OP, argument: "rows", expected, found: rows.dims().to_vec() }.into());
        }
        let by_head = rows.detach().t()?.contiguous()?;
        match Path::for_tensor(&by_head) {
            Path::HostF32 | Path::HostBf16 => {
                let rows = Rows {
                    window,
                    heads,
                    by_head: by_head.to_dtype(DType::F32)?,
                    is_used: AtomicBool::new(false),
                    tables: OnceLock::new(),
                };
                Ok(Self(Layout::Rows(Arc::new(rows))))
            }
            _ => {
                let area = window * window;
                let index = Tensor::from_vec(relative_positions(window), area * area, rows.device())?;
                Self::new(&by_head.index_select(&index, 1)?.reshape((heads, area, area))?)
            }
        }
    }
}

/// For each query of a window, and for each key of it, the row of their relative position in a table of
/// `(2·window − 1)²` rows: that of query `(y, x)` and key `(v, u)` is `(y − v + window − 1) · (2·window − 1) + x − u + window − 1`
/// (Liu et al. 2021, §3.2). `window⁴` rows; `window` is above 0.
pub fn relative_positions(window: usize) -> Vec<u32> {
    let axis = |a: usize, b: usize| a + window - 1 - b;
    let tokens = || (0..window).flat_map(|y| (0..window).map(move |x| (y, x)));
    let row = |(y, x): (usize, usize), (v, u): (usize, usize)| axis(y, v) * (2 * window - 1) + axis(x, u);
    tokens().flat_map(|query| tokens().map(move |key| row(query, key) as u32)).collect()
}

/// Biases by relative position, of which tables are made for each of the first uses, and for good for later ones: memory that
/// was not used before costs more than what is written to it.
#[derive(Debug)]
struct Rows {
    window: usize,
    heads: usize,
    /// `[heads, (2·window − 1)²]` in `f32`.
    by_head: Tensor,
    is_used: AtomicBool,
    tables: OnceLock<Arc<Vec<f32>>>,
}

impl Rows {
    /// Attention with these biases.
    fn attend<T: Instructions>(&self, qkv: &Tensor, shape: WindowShape) -> Result<Tensor> {
        thread_local! {
            static TABLES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
        }
        if !qkv.track_op() && !self.is_used.swap(true, Ordering::Relaxed) {
            let tables = host::tables_of_rows(&self.by_head, self.window, TABLES.take())?;
            let result = host::once::<T>(qkv, &tables, self.heads, shape);
            TABLES.set(tables);
            return result;
        }
        let tables = match self.tables.get() {
            Some(tables) => tables,
            None => {
                let new = host::tables_of_rows(&self.by_head, self.window, Vec::new())?;
                self.tables.get_or_init(|| Arc::new(new))
            }
        };
        host::prepared::<T>(qkv, tables, self.heads, shape)
    }
}

/// [`window_attention`] with a bias that was laid out before, which gets no gradient.
///
/// # Errors
/// As [`window_attention`], or if the bias was laid out for another device or type.
pub fn window_attention_with(qkv: &Tensor, bias: &WindowBias, shape: WindowShape) -> Result<Tensor> {
    let (tables, of_bias) = match &bias.0 {
        Layout::Plain(bias) => return window_attention(qkv, bias, shape),
        Layout::Rows(rows) => {
            let area = rows.window * rows.window;
            check(qkv, &[rows.heads, area, area], shape)?;
            return match Path::for_tensor(qkv) {
                Path::HostF32 => rows.attend::<f32>(&qkv.contiguous()?, shape),
                Path::HostBf16 => rows.attend::<bf16>(&qkv.contiguous()?, shape),
                _ => Err(elsewhere(qkv)),
            };
        }
        Layout::Tables { tables, shape } => (tables, shape),
    };
    check(qkv, of_bias, shape)?;
    match Path::for_tensor(qkv) {
        Path::HostF32 => host::prepared::<f32>(&qkv.contiguous()?, tables, of_bias[0], shape),
        Path::HostBf16 => host::prepared::<bf16>(&qkv.contiguous()?, tables, of_bias[0], shape),
        _ => Err(elsewhere(qkv)),
    }
}

/// The error for what is not where a bias was laid out.
fn elsewhere(qkv: &Tensor) -> candle_core::Error {
    let found = format!("{:?} on {:?}", qkv.dtype(), qkv.device().location());
    let expected = "f32 or bf16 on the CPU, where the bias was laid out".into();
    KernelError::Value { op: OP, argument: "qkv", expected, found }.into()
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// To the bit, in every use, what the same biases are pair by pair.
    #[test]
    fn biases_by_relative_position_are_those_of_pairs() {
        for (window, heads, side, dtype) in
            [(1, 1, 2, DType::F32), (4, 2, 8, DType::F32), (7, 3, 14, DType::BF16), (3, 2, 6, DType::F64)]
        {
            let device = &Device::Cpu;
            let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, device).unwrap().to_dtype(dtype).unwrap();
            let (places, area) = ((2 * window - 1) * (2 * window - 1), window * window);
            let (rows, qkv) = (random(&[places, heads]), random(&[2, side * side, 3 * 8 * heads]));
            let axis = |a: usize, b: usize| a + window - 1 - b;
            let place =
                |q: usize, k: usize| axis(q / window, k / window) * (2 * window - 1) + axis(q % window, k % window);
            let index: Vec<u32> = (0..area * area).map(|pair| place(pair / area, pair % area) as u32).collect();
            let pairs = rows.index_select(&Tensor::new(index, device).unwrap(), 0).unwrap();
            let pairs = pairs.t().unwrap().contiguous().unwrap().reshape((heads, area, area)).unwrap();
            let shape = WindowShape { height: side, width: side, window, shift: window / 2 };
            let numbers = |x: Tensor| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let wanted = WindowBias::new(&pairs).unwrap();
            let wanted = numbers(window_attention_with(&qkv, &wanted, shape).unwrap());
            let bias = WindowBias::of_rows(&rows, window).unwrap();
            for _ in 0..3 {
                assert_eq!(numbers(window_attention_with(&qkv, &bias, shape).unwrap()), wanted);
            }
        }
    }

    #[test]
    fn rows_that_do_not_fit_a_window_are_named() {
        let rows = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        for (shape, window) in [((48, 3), 4), ((49, 0), 4), ((1, 1), 0)] {
            let error = WindowBias::of_rows(&rows(shape), window).unwrap_err().to_string();
            assert!(error.contains("WindowBias::of_rows: `rows`"), "{error}");
        }
        let bias = WindowBias::of_rows(&rows((49, 3)), 4).unwrap();
        let shape = WindowShape { height: 4, width: 4, window: 4, shift: 0 };
        let attend = |dtype| {
            let qkv = Tensor::zeros((1, 16, 72), dtype, &Device::Cpu).unwrap();
            window_attention_with(&qkv, &bias, shape).map(drop)
        };
        assert!(attend(DType::F32).is_ok());
        assert!(attend(DType::F64).unwrap_err().to_string().contains("where the bias was laid out"));
    }
}
