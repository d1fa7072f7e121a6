//! Where trainable numbers live.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The parameters of a model by name, each drawn when first asked for.
///
/// What a parameter starts as depends on the seed, its name and its shape alone, not on the order of construction.
#[derive(Clone)]
pub struct Parameters {
    seed: Option<u64>,
    frozen: Arc<[String]>,
    vars: Arc<Mutex<BTreeMap<String, Var>>>,
}

impl Parameters {
    /// No parameters yet.
    pub fn new(seed: u64) -> Self {
        Self { seed: Some(seed), frozen: Arc::default(), vars: Arc::default() }
    }

    /// Parameters that start as zeros: to be filled from a file.
    pub fn zeros() -> Self {
        Self { seed: None, frozen: Arc::default(), vars: Arc::default() }
    }

    /// What models are built from whose numbers are there already: hands out `tensors` as they are, to compute with in `dtype`.
    pub fn given(tensors: BTreeMap<String, Tensor>, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Given(tensors)), dtype, device.clone())
    }

    /// The same, of which those whose name contains one of these parts have no gradient.
    #[must_use]
    pub fn freezing(self, names: &[String]) -> Self {
        Self { frozen: names.into(), ..self }
    }

    /// What models are built from: hands out parameters and keeps them here. Scalars, such as a temperature, are `f32` whatever
    /// the type: there are few of them, and each counts.
    pub fn builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone())
    }

    /// All parameters in the order of their names.
    pub fn named(&self) -> Vec<(String, Var)> {
        let vars = self.vars.lock().unwrap_or_else(PoisonError::into_inner);
        vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    /// Number of trainable numbers.
    pub fn count(&self) -> usize {
        self.named().iter().map(|(_, var)| var.elem_count()).sum()
    }

    /// What the model computes with.
    fn handed_out(&self, name: &str, var: &Var) -> Tensor {
        let frozen = self.frozen.iter().any(|part| name.contains(part));
        if frozen { var.as_detached_tensor() } else { var.as_tensor().clone() }
    }

    fn draw(&self, shape: &Shape, name: &str, init: Init) -> Vec<f32> {
        self.seed.map_or_else(|| vec![0.0; shape.elem_count()], |seed| draw(seed, shape, name, init))
    }
}

/// Parameters without gradients.
struct Given(BTreeMap<String, Tensor>);

impl SimpleBackend for Given {
    fn get(&self, shape: Shape, name: &str, _init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if *tensor.shape() != shape {
            candle_core::bail!("parameter {name}: expected shape {shape:?}, found {:?}", tensor.shape());
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _dtype: DType, _device: &Device) -> Result<Tensor> {
        match self.0.get(name) {
            Some(tensor) => Ok(tensor.clone()),
            None => candle_core::bail!("parameter {name}: expected one of the model's, found none of that name"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

/// The parameters a model has, without their numbers: names, shapes, and what each is drawn from.
#[derive(Clone, Default)]
pub struct Blueprint(Arc<Mutex<BTreeMap<String, (Shape, Init)>>>);

impl Blueprint {
    /// Of a model that `build` makes of the builder it is given, and that is then forgotten.
    ///
    /// # Errors
    /// What building says.
    pub fn of<M>(build: impl FnOnce(VarBuilder) -> Result<M>) -> Result<Self> {
        let blueprint = Self::default();
        build(VarBuilder::from_backend(Box::new(blueprint.clone()), DType::F32, Device::Cpu))?;
        Ok(blueprint)
    }

    /// Shapes by name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let parameters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parameters.iter().map(|(name, (shape, _))| (name.clone(), shape.dims().to_vec())).collect()
    }

    /// A parameter as [`Parameters`] of the same seed have it; none of that name if there is none.
    pub fn draw(&self, name: &str, seed: u64) -> Option<Tensor> {
        let parameters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (shape, init) = parameters.get(name)?;
        Tensor::from_vec(draw(seed, shape, name, *init), shape, &Device::Cpu).ok()
    }
}

impl SimpleBackend for Blueprint {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut parameters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, _)) = parameters.get(name).filter(|(known, _)| *known != shape) {
            candle_core::bail!("parameter {name}: expected shape {known:?}, found {shape:?}");
        }
        // One number, seen as many.
        let number = Tensor::zeros((), dtype, device)?.broadcast_as(&shape)?;
        parameters.insert(name.to_owned(), (shape, init));
        Ok(number)
    }

    fn get_unchecked(&self, name: &str, _dtype: DType, _device: &Device) -> Result<Tensor> {
        candle_core::bail!("parameter {name}: expected to be asked for with its shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(name)
    }
}

fn draw(seed: u64, shape: &Shape, name: &str, init: Init) -> Vec<f32> {
    let count = shape.elem_count();
    // FNV-1a: stable over platforms and releases, which `std`'s hasher does not promise.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ hash);
    match init {
        Init::Const(value) => vec![value as f32; count],
        Init::Uniform { lo, up } => (0..count).map(|_| (lo + (up - lo) * rng.random::<f64>()) as f32).collect(),
        Init::Randn { mean, stdev } => (0..count).map(|_| (mean + stdev * normal(&mut rng)) as f32).collect(),
        Init::Kaiming { .. } => {
            let fan_in: usize = shape.dims().iter().skip(1).product();
            let bound = (fan_in.max(1) as f64).powf(-0.5);
            (0..count).map(|_| (bound * (2.0 * rng.random::<f64>() - 1.0)) as f32).collect()
        }
    }
}

/// A standard normal number (Box and Muller 1958).
fn normal(rng: &mut impl Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
}

impl SimpleBackend for Parameters {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut vars = self.vars.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(var) = vars.get(name) {
            if *var.shape() != shape {
                candle_core::bail!("parameter {name}: expected shape {shape:?}, found {:?}", var.shape());
            }
            return Ok(self.handed_out(name, var));
        }
        let dtype = if shape.rank() == 0 { DType::F32 } else { dtype };
        let values = Tensor::from_vec(self.draw(&shape, name, init), shape, device)?.to_dtype(dtype)?;
        let var = Var::from_tensor(&values)?;
        let tensor = self.handed_out(name, &var);
        vars.insert(name.to_owned(), var);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _dtype: DType, _device: &Device) -> Result<Tensor> {
        let vars = self.vars.lock().unwrap_or_else(PoisonError::into_inner);
        match vars.get(name) {
            Some(var) => Ok(self.handed_out(name, var)),
            None => candle_core::bail!("parameter {name}: expected one of the model's, found none of that name"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.vars.lock().unwrap_or_else(PoisonError::into_inner).contains_key(name)
    }
}
