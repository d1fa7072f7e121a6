//! The comparison of an operation with what it should compute.

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::device::Computer;

/// Numbers in `f64` with their shape.
#[derive(Clone, Debug)]
pub(crate) struct Array {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f64>,
}

impl Array {
    pub(crate) fn new(shape: &[usize], values: Vec<f64>) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        Self { shape: shape.to_vec(), values }
    }

    /// Uniform in −1..1, the same for the same seed.
    pub(crate) fn random(shape: &[usize], seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
        Self::new(shape, values)
    }

    pub(crate) fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self::new(&self.shape, self.values.iter().map(|&x| f(x)).collect())
    }

    /// What the float type keeps of the numbers.
    fn rounded(&self, dtype: DType) -> Self {
        let tensor = Tensor::from_slice(&self.values, self.shape.as_slice(), &Device::Cpu).unwrap();
        Self::from(&tensor.to_dtype(dtype).unwrap())
    }

    /// As a tensor; with `strided` as a view into a larger one, neither contiguous nor at its start.
    pub(crate) fn tensor(&self, at: &At, strided: bool) -> Tensor {
        let tensor = Tensor::from_slice(&self.values, self.shape.as_slice(), &Device::Cpu).unwrap();
        let tensor = tensor.to_dtype(at.dtype).unwrap().to_device(&at.device).unwrap();
        if !strided || self.shape.is_empty() || self.values.is_empty() {
            return tensor;
        }
        let last = self.shape.len() - 1;
        let padding = tensor.narrow(last, 0, 1).unwrap().ones_like().unwrap();
        let padded = Tensor::cat(&[&padding, &tensor, &padding], last).unwrap();
        padded.narrow(last, 1, self.shape[last]).unwrap()
    }
}

impl From<&Tensor> for Array {
    fn from(tensor: &Tensor) -> Self {
        let flat = tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().flatten_all().unwrap();
        Self::new(tensor.dims(), flat.to_vec1().unwrap())
    }
}

/// Where an operation is computed, and in which float type.
#[derive(Clone, Debug)]
pub(crate) struct At {
    pub(crate) computer: &'static Computer,
    pub(crate) device: Device,
    pub(crate) dtype: DType,
}

impl At {
    /// All devices in all their float types.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Computer::all().iter().flat_map(|computer| {
            let at = move |&dtype| Self { computer, device: computer.device(), dtype };
            computer.dtypes().iter().map(at)
        })
    }

    /// Relative error that rounding may cost: a few units in the last place of what is stored, sums taken in `f32`.
    pub(crate) fn tolerance(&self) -> f64 {
        match self.dtype {
            // candle's erf is no better than this, nor are weights of resizing, which are f32.
            DType::F64 => 1e-6,
            DType::F16 => 2e-3,
            DType::BF16 => 1.6e-2,
            _ => 4e-6,
        }
    }
}

/// Fails unless each number is within `tolerance` of what is wanted, relative to it and to the largest one beside it.
pub(crate) fn assert_close(found: &Array, wanted: &Array, tolerance: f64, what: &str) {
    assert_eq!(found.shape, wanted.shape, "{what}: shape");
    let largest = wanted.values.iter().fold(0f64, |top, x| top.max(x.abs()));
    for (i, (a, b)) in found.values.iter().zip(&wanted.values).enumerate() {
        let allowed = tolerance * (b.abs() + largest + 0.05);
        assert!((a - b).abs() <= allowed, "{what}: number {i} of {:?} is {a}, wanted {b}", found.shape);
    }
}

/// Compares `operation` with `plain` over everything there is to compute it on: values, gradients of all `inputs`, and that a
/// second run gives the same bits.
pub(crate) fn check<const N: usize>(
    inputs: [Array; N],
    plain: impl Fn(&[Array; N]) -> Array,
    operation: impl Fn(&At, [&Tensor; N]) -> Result<Tensor>,
) {
    for at in At::all() {
        for view in [View::Whole, View::Strided, View::Offset] {
            at.computer.run(|| check_at(&at, view, &inputs, &plain, &operation));
        }
    }
}

/// How an input lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    /// By itself.
    Whole,
    /// With other numbers between its rows.
    Strided,
    /// All of a piece, but not where a memory begins.
    Offset,
}

fn check_at<const N: usize>(
    at: &At,
    view: View,
    inputs: &[Array; N],
    plain: &impl Fn(&[Array; N]) -> Array,
    operation: &impl Fn(&At, [&Tensor; N]) -> Result<Tensor>,
) {
    let what = format!("{:?} {:?} {view:?}", at.computer, at.dtype);
    if !at.device.is_cpu() && inputs.iter().any(|input| input.values.is_empty()) {
        // candle itself does not compute with nothing there.
        return;
    }
    let inputs = inputs.each_ref().map(|input| input.rounded(at.dtype));
    let wanted = plain(&inputs);
    let weights = Array::random(&wanted.shape, 1).rounded(at.dtype);
    let run = || {
        let variables = inputs.each_ref().map(|input| Var::from_tensor(&input.tensor(at, false)).unwrap());
        // A view of a variable is what an operation is handed in a model.
        let views: [Tensor; N] = std::array::from_fn(|i| match view {
            View::Whole => variables[i].as_tensor().clone(),
            View::Strided => padded_view(&variables[i]),
            View::Offset => offset_view(&variables[i]),
        });
        let result = operation(at, views.each_ref()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let loss = (&result * weights.tensor(at, false).to_dtype(result.dtype()).unwrap()).unwrap();
        let gradients = loss.sum_all().unwrap().backward().unwrap();
        let gradients = variables.each_ref().map(|variable| {
            match gradients.get(variable) {
                Some(gradient) => {
                    assert_eq!(gradient.dtype(), at.dtype, "{what}: type of a gradient");
                    Array::from(gradient)
                }
                // candle's own operations may leave out a gradient without numbers.
                None if variable.elem_count() == 0 || result.elem_count() == 0 => {
                    Array::from(&variable.zeros_like().unwrap())
                }
                None => panic!("{what}: an input gets no gradient"),
            }
        });
        (Array::from(&result), gradients)
    };
    let (found, gradients) = run();
    assert_close(&found, &wanted, at.tolerance(), &what);
    for (i, gradient) in gradients.iter().enumerate() {
        check_gradient(gradient, i, &inputs, plain, &weights, at.tolerance(), &what);
    }
    let (again, gradients_again) = run();
    let bits = |array: &Array| array.values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found), bits(&again), "{what}: another result in a second run");
    for (a, b) in gradients.iter().zip(&gradients_again) {
        assert_eq!(bits(a), bits(b), "{what}: another gradient in a second run");
    }
}

/// The same numbers, as a differentiable view that is not contiguous.
fn padded_view(variable: &Var) -> Tensor {
    let tensor = variable.as_tensor();
    if tensor.rank() == 0 || tensor.elem_count() == 0 {
        return tensor.clone();
    }
    let last = tensor.rank() - 1;
    let padding = tensor.narrow(last, 0, 1).unwrap().detach().ones_like().unwrap();
    let padded = Tensor::cat(&[&padding, tensor, &padding], last).unwrap();
    padded.narrow(last, 1, tensor.dims()[last]).unwrap()
}

/// The same numbers, as a differentiable view that begins one number into a memory.
fn offset_view(variable: &Var) -> Tensor {
    let tensor = variable.as_tensor();
    if tensor.elem_count() == 0 {
        return tensor.clone();
    }
    let flat = tensor.flatten_all().unwrap();
    let before = flat.narrow(0, 0, 1).unwrap().detach().ones_like().unwrap();
    let behind = Tensor::cat(&[&before, &flat], 0).unwrap().narrow(0, 1, tensor.elem_count()).unwrap();
    behind.reshape(tensor.dims()).unwrap()
}

/// Compares a gradient with central differences of `plain`: number by number for a few, and for all of them along one
/// direction.
fn check_gradient<const N: usize>(
    gradient: &Array,
    input: usize,
    inputs: &[Array; N],
    plain: &impl Fn(&[Array; N]) -> Array,
    weights: &Array,
    tolerance: f64,
    what: &str,
) {
    const STEP: f64 = 1e-5;
    const PROBES: usize = 12;
    assert_eq!(gradient.shape, inputs[input].shape, "{what}: shape of the gradient of input {input}");
    let count = gradient.values.len();
    if count == 0 {
        return;
    }
    let loss = |direction: &dyn Fn(usize) -> f64, step: f64| -> f64 {
        let mut inputs = inputs.clone();
        inputs[input].values.iter_mut().enumerate().for_each(|(i, x)| *x += step * direction(i));
        plain(&inputs).values.iter().zip(&weights.values).map(|(y, w)| y * w).sum()
    };
    let difference = |direction: &dyn Fn(usize) -> f64| (loss(direction, STEP) - loss(direction, -STEP)) / (2.0 * STEP);
    let largest = gradient.values.iter().fold(0f64, |top, x| top.max(x.abs()));
    // Rounding of the difference itself is below 1e-7 for losses of this size.
    let allowed = |wanted: f64, spread: f64| 4.0 * tolerance * (wanted.abs() + spread) + 1e-6;
    for probe in 0..PROBES.min(count) {
        let at = if count <= PROBES { probe } else { probe * (count - 1) / (PROBES - 1) };
        let wanted = difference(&|i| f64::from(u8::from(i == at)));
        let found = gradient.values[at];
        let close = (found - wanted).abs() <= allowed(wanted, largest);
        assert!(close, "{what}: gradient of number {at} of input {input} is {found}, wanted {wanted}");
    }
    let direction = Array::random(&gradient.shape, 2).values;
    let wanted = difference(&|i| direction[i]);
    let found: f64 = gradient.values.iter().zip(&direction).map(|(g, d)| g * d).sum();
    let close = (found - wanted).abs() <= allowed(wanted, largest * (count as f64).sqrt());
    assert!(close, "{what}: gradient of input {input} along a direction is {found}, wanted {wanted}");
}
