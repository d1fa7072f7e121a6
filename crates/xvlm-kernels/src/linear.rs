//! Linear layers.

use candle_core::{Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::activation::{gelu, gelu_gradient};
use crate::columns::column_sums;
use crate::error::{KernelError, check_shape};
use crate::graph::{Fresh, Kept, differentiable, differentiable_on_record, is_recording};
use crate::host::{read, written};
use crate::path::{Path, fused};
use crate::real::Real;
use crate::simd::native::{Factor, Finish, Multiplier, Native, Product as NativeProduct, Second};
use crate::simd::{Matrix, all_threads, multiply, vectorized};

/// `x · wᵀ + b`: `x [.., K]`, `weight [N, K]`, `bias [N]` → `[.., N]`. Sums are f32 for half types.
/// A CPU that has instructions for bf16 computes with them, and takes denormal bf16 numbers for 0.
///
/// # Errors
/// If the last dimension of `x` is not `K`, one of `K` and `N` is 0, or `bias` is not `[N]`.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    const OP: &str = "linear";
    let shape = check_weight(OP, x, weight)?;
    check_shape(OP, "bias", bias, &[weight.dim(0)?])?;
    if Path::of(OP, &[("x", x), ("weight", weight), ("bias", bias)])? == Path::Composed {
        return composed(x, weight, shape)?.broadcast_add(bias);
    }
    let [x, weight, bias] = &[x.contiguous()?, weight.contiguous()?, bias.contiguous()?];
    let y = forward(x, weight, Some(bias), &shape)?;
    differentiable(OP, [x, weight, bias], y, |[x, weight, bias], gradient| {
        let [dx, dweight] = backward(x, weight, gradient)?;
        Ok([dx, dweight, bias.track_op().then(|| column_sums(gradient)).transpose()?])
    })
}

/// `x · wᵀ`: [`linear`] for a layer that has no bias, or whose bias is left to what follows, such as
/// [`bias_gelu`](crate::bias_gelu).
///
/// # Errors
/// If the last dimension of `x` is not `K`, or one of `K` and `N` is 0.
pub fn linear_without_bias(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    const OP: &str = "linear_without_bias";
    let shape = check_weight(OP, x, weight)?;
    if !matches!(Path::of(OP, &[("x", x), ("weight", weight)])?, Path::HostF32 | Path::HostBf16) {
        return composed(x, weight, shape);
    }
    let [x, weight] = &[x.contiguous()?, weight.contiguous()?];
    let y = forward(x, weight, None, &shape)?;
    differentiable(OP, [x, weight], y, |[x, weight], gradient| backward(x, weight, gradient))
}

/// `gelu(x) · wᵀ + b`: the second half of a feed-forward layer, of which nothing is kept for the backward pass but `x`. Sizes as of
/// [`linear`].
///
/// # Errors
/// As [`linear`].
pub fn gelu_linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    const OP: &str = "gelu_linear";
    let shape = check_weight(OP, x, weight)?;
    check_shape(OP, "bias", bias, &[weight.dim(0)?])?;
    if !matches!(Path::of(OP, &[("x", x), ("weight", weight), ("bias", bias)])?, Path::HostF32 | Path::HostBf16) {
        return linear(&gelu(x)?, weight, bias);
    }
    let [x, weight, bias] = &[x.contiguous()?, weight.contiguous()?, bias.contiguous()?];
    let y = forward(&gelu(&x.detach())?, weight, Some(bias), &shape)?;
    differentiable(OP, [x, weight, bias], y, |[x, weight, bias], gradient| {
        // One after the other: the widest tensors of a block are not there together.
        let [_, dweight] = gradients(&gelu(&x.detach())?, weight, gradient, [false, weight.track_op()])?;
        let [dactive, _] = gradients(x, weight, gradient, [x.track_op(), false])?;
        let dx = dactive.map(|dactive| gelu_gradient(x, &dactive)).transpose()?;
        Ok([dx, dweight, bias.track_op().then(|| column_sums(gradient)).transpose()?])
    })
}

/// Layers with one input as one, their outputs side by side: `x [.., K]`, each weight `[N, K]`, each bias `[N]` →
/// `[.., ΣN]`, as [`linear`] with the weights stacked. On a [`Tape`](crate::Tape) the stack is not kept for the backward pass
/// but made again, and each parameter's gradient is a part of the stack's.
///
/// # Errors
/// As [`linear`], or if there are not as many biases as weights, or none.
pub fn stacked_linear(x: &Tensor, weights: &[&Tensor], biases: &[&Tensor]) -> Result<Tensor> {
    const OP: &str = "stacked_linear";
    if weights.len() != biases.len() {
        let (expected, found) = (format!("{}, one for each weight", weights.len()), biases.len().to_string());
        return Err(KernelError::Value { op: OP, argument: "biases", expected, found }.into());
    }
    for (weight, bias) in weights.iter().zip(biases) {
        check_weight(OP, x, weight)?;
        check_shape(OP, "bias", bias, &[weight.dim(0)?])?;
    }
    let stack = |parts: &[&Tensor]| match parts {
        [part] => part.contiguous(),
        _ => Tensor::cat(parts, 0),
    };
    let parameters = weights.iter().map(|weight| ("weight", *weight)).chain(biases.iter().map(|bias| ("bias", *bias)));
    let arguments: Vec<_> = std::iter::once(("x", x)).chain(parameters).collect();
    let path = Path::of(OP, &arguments)?;
    let inputs: Vec<&Tensor> = arguments.into_iter().map(|(_, input)| input).collect();
    if !(matches!(path, Path::HostF32 | Path::HostBf16) && is_recording(&inputs)) {
        return linear(x, &stack(weights)?, &stack(biases)?);
    }
    let detached = |parts: &[&Tensor]| parts.iter().map(|part| part.detach()).collect::<Vec<_>>();
    let (parts, biases) = (detached(weights), detached(biases));
    let (weight, bias) = (stack(&parts.iter().collect::<Vec<_>>())?, stack(&biases.iter().collect::<Vec<_>>())?);
    let result = forward(&x.contiguous()?, &weight, Some(&bias), &check_weight(OP, x, &weight)?)?;
    let tracks: Vec<bool> = inputs.iter().map(|input| input.track_op()).collect();
    let kept = Kept::of(&x.contiguous()?);
    let backward = move |gradient: &Tensor| {
        let weight = stack(&parts.iter().collect::<Vec<_>>())?;
        let (of_weights, of_biases) = tracks[1..].split_at(parts.len());
        let wanted = |of: &[bool]| of.iter().any(|tracks| *tracks);
        let [dx, dweight] = gradients(&kept.tensor()?, &weight, gradient, [tracks[0], wanted(of_weights)])?;
        let dbias = wanted(of_biases).then(|| column_sums(gradient)).transpose()?;
        let mut found = vec![dx];
        for (whole, of) in [(dweight, of_weights), (dbias, of_biases)] {
            let mut start = 0;
            for (part, tracks) in parts.iter().zip(of) {
                let outputs = part.dim(0)?;
                let cut = whole.as_ref().filter(|_| *tracks).map(|whole| whole.narrow(0, start, outputs));
                found.push(cut.transpose()?);
                start += outputs;
            }
        }
        Ok(found)
    };
    differentiable_on_record(&inputs, result, backward)
}

/// The shape of the result.
fn check_weight(op: &'static str, x: &Tensor, weight: &Tensor) -> Result<Vec<usize>> {
    let (outputs, _) = weight.dims2()?;
    let inputs = x.dims().last().copied().unwrap_or(0);
    check_shape(op, "weight", weight, &[outputs, inputs])?;
    if inputs == 0 || outputs == 0 {
        let (expected, found) = ("[N, K], both above 0".into(), weight.dims().to_vec());
        return Err(KernelError::Shape { op, argument: "weight", expected, found }.into());
    }
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(outputs);
    Ok(shape)
}

/// `[.., C]` as a matrix of rows.
fn rows_of(x: &Tensor) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1);
    x.reshape((x.elem_count() / width.max(1), width))
}

fn composed(x: &Tensor, weight: &Tensor, shape: Vec<usize>) -> Result<Tensor> {
    if x.elem_count() == 0 {
        // candle's product of nothing loses the gradients of its factors.
        return Tensor::zeros(shape, x.dtype(), x.device())?.broadcast_add(&x.sum_all()?);
    }
    rows_of(x)?.matmul(&weight.t()?)?.reshape(shape)
}

fn forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, shape: &[usize]) -> Result<Fresh> {
    fused!(x, T => {
        let sizes = Sizes::of(x, weight)?;
        let (x, weight, bias) = (read::<T>(x)?, read::<T>(weight)?, bias.map(read::<T>).transpose()?);
        Ok(written(shape, |out: &mut [T]| outputs(sizes, out, &x, &weight, bias.as_deref())))
    }; gpu::forward(x, weight, bias, shape))
}

/// The gradients of `x` and `weight`, where they are asked for.
fn backward(x: &Tensor, weight: &Tensor, gradient: &Tensor) -> Result<[Option<Tensor>; 2]> {
    gradients(x, weight, gradient, [x.track_op(), weight.track_op()])
}

/// The gradient of `x` alone.
pub(crate) fn times_weight(x: &Tensor, weight: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let [of_x, _] = gradients(x, weight, gradient, [true, false])?;
    Ok(of_x.expect("it was asked for"))
}

fn gradients(
    x: &Tensor,
    weight: &Tensor,
    gradient: &Tensor,
    [of_x, of_weight]: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    fused!(x, T => {
        let sizes = Sizes::of(x, weight)?;
        let (xs, ws, gradients) = (&*read::<T>(x)?, &*read::<T>(weight)?, &*read::<T>(gradient)?);
        let dx = || written(x.shape(), |out: &mut [T]| inputs(sizes, out, gradients, ws)).detached();
        let dweight = || written(weight.shape(), |out: &mut [T]| weights(sizes, out, gradients, xs)).detached();
        Ok([of_x.then(dx), of_weight.then(dweight)])
    }; {
        let rows = rows_of(gradient)?;
        let dx = || rows.matmul(&weight.detach())?.reshape(x.shape());
        let dweight = || rows.t()?.matmul(&rows_of(&x.detach())?);
        Ok([of_x.then(dx).transpose()?, of_weight.then(dweight).transpose()?])
    })
}

/// Of a linear layer and what goes through it.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    inputs: usize,
    outputs: usize,
}

impl Sizes {
    fn of(x: &Tensor, weight: &Tensor) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        Ok(Self { rows: x.elem_count() / inputs.max(1), inputs, outputs })
    }
}

/// `out = x · wᵀ + bias`
fn outputs<T: Product>(sizes: Sizes, out: &mut [T], x: &[T], weight: &[T], bias: Option<&[T]>) {
    let Some(multiplier) = Multiplier::find() else { return T::outputs(sizes, out, x, weight, bias) };
    let (size, a, b) =
        ((sizes.rows, sizes.outputs, sizes.inputs), Factor::Along(x), Second::Plain(Factor::Along(weight)));
    multiplier.multiply(NativeProduct { size, a, b, finish: Finish::bias(bias), out });
}

/// `out = gradient · w`
fn inputs<T: Product>(sizes: Sizes, out: &mut [T], gradient: &[T], weight: &[T]) {
    let Some(multiplier) = Multiplier::find() else { return T::inputs(sizes, out, gradient, weight) };
    let (size, a, b) =
        ((sizes.rows, sizes.inputs, sizes.outputs), Factor::Along(gradient), Second::Plain(Factor::Across(weight)));
    multiplier.multiply(NativeProduct { size, a, b, finish: Finish::bias(None), out });
}

/// `out = gradientᵀ · x`
fn weights<T: Product>(sizes: Sizes, out: &mut [T], gradient: &[T], x: &[T]) {
    let Some(multiplier) = Multiplier::find() else { return T::weights(sizes, out, gradient, x) };
    let (size, a, b) =
        ((sizes.outputs, sizes.inputs, sizes.rows), Factor::Across(gradient), Second::Plain(Factor::Across(x)));
    multiplier.multiply(NativeProduct { size, a, b, finish: Finish::bias(None), out });
}

/// The three products of a linear layer, over row-major matrices, where the CPU has no instructions for them: those of `bf16`
/// by `f32` arithmetic.
trait Product: Real + Native<Out = Self> {
    /// `out = x · wᵀ + bias`
    fn outputs(sizes: Sizes, out: &mut [Self], x: &[Self], weight: &[Self], bias: Option<&[Self]>);
    /// `out = gradient · w`
    fn inputs(sizes: Sizes, out: &mut [Self], gradient: &[Self], weight: &[Self]);
    /// `out = gradientᵀ · x`
    fn weights(sizes: Sizes, out: &mut [Self], gradient: &[Self], x: &[Self]);
}

/// `out [m, n] = a [m, k] · b [k, n]`, or added to what is there.
///
/// # Safety
/// `a` and `b` cover these sizes.
unsafe fn product((m, n, k): (usize, usize, usize), out: &mut [f32], accumulate: bool, a: Matrix, b: Matrix) {
    if k == 0 && !accumulate {
        out.fill(0.0);
    }
    // SAFETY: the caller's promise; `out` is borrowed mutably, so it overlaps neither.
    unsafe { multiply((m, n, k), &mut out[..m * n], n, accumulate, a, b, 1.0, all_threads()) }
}

impl Product for f32 {
    fn outputs(
        Sizes { rows, inputs, outputs }: Sizes,
        out: &mut [f32],
        x: &[f32],
        weight: &[f32],
        bias: Option<&[f32]>,
    ) {
        if let Some(bias) = bias {
            let some_rows = ((1 << 14) / outputs.max(1)).max(1) * outputs;
            out.par_chunks_mut(some_rows.max(1)).for_each(|out| {
                out.chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(bias));
            });
        }
        let (x, weight) = (Matrix::rows(x, inputs), Matrix::rows(weight, inputs).transposed());
        // SAFETY: the tensors have these sizes.
        unsafe { product((rows, outputs, inputs), out, bias.is_some(), x, weight) }
    }

    fn inputs(Sizes { rows, inputs, outputs }: Sizes, out: &mut [f32], gradient: &[f32], weight: &[f32]) {
        let (gradient, weight) = (Matrix::rows(gradient, outputs), Matrix::rows(weight, inputs));
        // SAFETY: the tensors have these sizes.
        unsafe { product((rows, inputs, outputs), out, false, gradient, weight) }
    }

    fn weights(Sizes { rows, inputs, outputs }: Sizes, out: &mut [f32], gradient: &[f32], x: &[f32]) {
        let (gradient, x) = (Matrix::rows(gradient, outputs).transposed(), Matrix::rows(x, inputs));
        // SAFETY: the tensors have these sizes.
        unsafe { product((outputs, inputs, rows), out, false, gradient, x) }
    }
}

/// Rows that are widened to `f32` at a time; fixed, so that the order of sums is.
const PANEL: usize = 512;

/// Numbers that a thread converts at a time.
const CHUNK: usize = 1 << 14;

/// In `f32`, into memory that is used again.
fn widen<'a>(values: &[bf16], space: &'a mut Vec<f32>) -> &'a [f32] {
    space.resize(values.len(), 0.0);
    space.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| {
        vectorized(
            #[inline(always)]
            || out.iter_mut().zip(values).for_each(|(out, x)| *out = x.widen()),
        );
    });
    space
}

/// Rounds `values`, rows of as many numbers as `bias` has, with the bias added.
fn narrow(values: &[f32], out: &mut [bf16], bias: Option<&[bf16]>) {
    let width = bias.map_or(CHUNK, <[bf16]>::len).max(1);
    let chunk = CHUNK.next_multiple_of(width);
    out.par_chunks_mut(chunk).zip(values.par_chunks(chunk)).for_each(|(out, values)| {
        vectorized(
            #[inline(always)]
            || match bias {
                Some(bias) => {
                    for (out, row) in out.chunks_exact_mut(width).zip(values.chunks_exact(width)) {
                        for ((out, x), bias) in out.iter_mut().zip(row).zip(bias) {
                            *out = Real::narrow(x + bias.widen());
                        }
                    }
                }
                None => out.iter_mut().zip(values).for_each(|(out, x)| *out = Real::narrow(*x)),
            },
        );
    });
}

/// `out [.., n] = a [.., k] · b [k, n] + bias`, panel by panel.
///
/// # Safety
/// `b` covers these sizes.
unsafe fn by_panels((n, k): (usize, usize), out: &mut [bf16], a: &[bf16], b: Matrix, bias: Option<&[bf16]>) {
    let (mut wide, mut sums) = (Vec::new(), Vec::new());
    for (out, a) in out.chunks_mut((PANEL * n).max(1)).zip(a.chunks((PANEL * k).max(1))) {
        let a = Matrix::rows(widen(a, &mut wide), k);
        sums.resize(out.len(), 0.0);
        // SAFETY: `a` has a row for each of `out`; the caller's promise.
        unsafe { product((out.len() / n, n, k), &mut sums, false, a, b) };
        narrow(&sums, out, bias);
    }
}

impl Product for bf16 {
    fn outputs(
        Sizes { inputs, outputs, .. }: Sizes,
        out: &mut [bf16],
        x: &[bf16],
        weight: &[bf16],
        bias: Option<&[bf16]>,
    ) {
        let mut space = Vec::new();
        let weight = Matrix::rows(widen(weight, &mut space), inputs).transposed();
        // SAFETY: the tensors have these sizes.
        unsafe { by_panels((outputs, inputs), out, x, weight, bias) }
    }

    fn inputs(Sizes { inputs, outputs, .. }: Sizes, out: &mut [bf16], gradient: &[bf16], weight: &[bf16]) {
        let mut space = Vec::new();
        let weight = Matrix::rows(widen(weight, &mut space), inputs);
        // SAFETY: the tensors have these sizes.
        unsafe { by_panels((inputs, outputs), out, gradient, weight, None) }
    }

    fn weights(Sizes { inputs, outputs, .. }: Sizes, out: &mut [bf16], gradient: &[bf16], x: &[bf16]) {
        let mut sums = vec![0f32; out.len()];
        let (mut wide_gradient, mut wide_x) = (Vec::new(), Vec::new());
        let panels = gradient.chunks((PANEL * outputs).max(1)).zip(x.chunks((PANEL * inputs).max(1)));
        for (i, (gradient, x)) in panels.enumerate() {
            let gradient = widen(gradient, &mut wide_gradient);
            let (rows, gradient) = (gradient.len() / outputs, Matrix::rows(gradient, outputs).transposed());
            let x = Matrix::rows(widen(x, &mut wide_x), inputs);
            // SAFETY: the panels have the same number of rows.
            unsafe { product((outputs, inputs, rows), &mut sums, i > 0, gradient, x) }
        }
        narrow(&sums, out, None);
    }
}

#[cfg(gpu)]
mod gpu {
    use candle_core::{Result, Tensor, bail};

    use super::rows_of;
    use crate::gpu::{Arg, Buffer, Kernel, Team, launch};
    use crate::graph::Fresh;

    /// The product is candle's, which leaves it to cuBLAS.
    pub(super) fn forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, shape: &[usize]) -> Result<Fresh> {
        let Some(bias) = bias else { bail!("without a bias the product is candle's own operation") };
        let products = rows_of(&x.detach())?.matmul(&weight.detach().t()?)?;
        let (rows, width) = products.dims2()?;
        let team = Team::of(rows, width, x.dtype());
        let mut out = Buffer::like(x, shape)?;
        let arguments = &mut [
            Arg::In(&products),
            Arg::In(bias),
            Arg::Out(&mut out),
            Arg::size(rows)?,
            Arg::size(width)?,
            Arg::U32(team.lanes),
        ];
        launch(Kernel { file: "linear", name: "add_bias" }, x, x.dtype(), team.grid, arguments)?;
        Ok(out.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// One product of a layer, with both ways to compute it.
    struct Case<'a, T> {
        /// Rows, columns, and the summed dimension.
        size: (usize, usize, usize),
        a: Factor<'a, T>,
        b: Factor<'a, T>,
        bias: Option<&'a [T]>,
        fallback: &'a dyn Fn(&mut [T]),
        chosen: &'a dyn Fn(&mut [T]),
    }

    impl<T: Product> Case<'_, T> {
        fn check(&self, what: &str) {
            let (m, n, k) = self.size;
            let compute = |work: &dyn Fn(&mut [T])| {
                let mut out = vec![T::narrow(f32::NAN); m * n];
                work(&mut out);
                out
            };
            let (fallback, chosen) = (compute(self.fallback), compute(self.chosen));
            let at = |factor: Factor<T>, lines: usize, line: usize, depth: usize| match factor {
                Factor::Along(values) => values[line * k + depth].widen(),
                Factor::Across(values) => values[depth * lines + line].widen(),
            };
            // The second number of a word is the first to be summed.
            let word = size_of::<f32>() / size_of::<T>();
            let rounding = if word == 2 { 2f64.powi(-8) } else { 2f64.powi(-24) };
            for i in 0..m * n {
                let (row, column) = (i / n, i % n);
                let pair = |depth| (at(self.a, m, row, depth), at(self.b, n, column, depth));
                let products = || (0..k).map(pair).map(|(a, b)| f64::from(a) * f64::from(b));
                let bias = self.bias.map_or(0.0, |bias| bias[column].widen());
                let wanted = products().sum::<f64>() + f64::from(bias);
                // Bias and products are summed in an order that is the way's own.
                let summed = products().map(f64::abs).sum::<f64>() + f64::from(bias).abs();
                let of_sums = (k + 2) as f64 * 2f64.powi(-24) * summed;
                for (way, found) in [("fallback", &fallback), ("chosen", &chosen)] {
                    let found = f64::from(found[i].widen());
                    let allowed = of_sums + rounding * wanted.abs() * 1.001;
                    let size = self.size;
                    assert!(
                        (found - wanted).abs() <= allowed,
                        "{what} {size:?} {way}: {found} at {row}, {column}, wanted {wanted}",
                    );
                }
                if Multiplier::<T>::find().is_some() {
                    let order = (0..k).step_by(word).flat_map(|first| (first..k.min(first + word)).rev());
                    let sum = order.map(pair).fold(0f32, |sum, (a, b)| a.mul_add(b, sum));
                    assert_eq!(
                        chosen[i].widen(),
                        T::narrow(sum + bias).widen(),
                        "{what} {:?} at {row}, {column}",
                        self.size
                    );
                }
            }
        }
    }

    /// All products of a layer of these sizes.
    fn check<T: Product>(rows: usize, n_inputs: usize, n_outputs: usize, seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random = |len: usize| -> Vec<T> { (0..len).map(|_| T::narrow(rng.random_range(-1.0..1.0))).collect() };
        let (x, weight, bias, gradient) =
            (random(rows * n_inputs), random(n_outputs * n_inputs), random(n_outputs), random(rows * n_outputs));
        let (x, weight, gradient) = (&*x, &*weight, &*gradient);
        let sizes = Sizes { rows, inputs: n_inputs, outputs: n_outputs };
        for bias in [None, Some(&*bias)] {
            Case {
                size: (rows, n_outputs, n_inputs),
                a: Factor::Along(x),
                b: Factor::Along(weight),
                bias,
                fallback: &|out| T::outputs(sizes, out, x, weight, bias),
                chosen: &|out| outputs(sizes, out, x, weight, bias),
            }
            .check("outputs");
        }
        Case {
            size: (rows, n_inputs, n_outputs),
            a: Factor::Along(gradient),
            b: Factor::Across(weight),
            bias: None,
            fallback: &|out| T::inputs(sizes, out, gradient, weight),
            chosen: &|out| inputs(sizes, out, gradient, weight),
        }
        .check("inputs");
        Case {
            size: (n_outputs, n_inputs, rows),
            a: Factor::Across(gradient),
            b: Factor::Across(x),
            bias: None,
            fallback: &|out| T::weights(sizes, out, gradient, x),
            chosen: &|out| weights(sizes, out, gradient, x),
        }
        .check("weights");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn layers_of_any_size(rows in 0usize..70, inputs in 1usize..70, outputs in 1usize..70, seed: u64) {
            check::<f32>(rows, inputs, outputs, seed);
            check::<bf16>(rows, inputs, outputs, seed);
        }
    }

    #[test]
    fn layers_of_several_blocks() {
        // Deeper, wider and higher than a block, whole and with a rest, in each of the three products.
        for (rows, inputs, outputs) in [(2049, 5, 33), (3, 2048, 15), (17, 3, 1537), (130, 515, 7), (1, 1025, 5000)] {
            check::<f32>(rows, inputs, outputs, 3);
            check::<bf16>(rows, inputs, outputs, 3);
        }
    }
}
