//! Layers that several encoders share.

use candle_core::{DType, Result, Shape, Tensor, TensorId};
use candle_nn::{Init, VarBuilder};
use xvlm_kernels::{self as kernels, Epilogue, PackedLinear, PackedWeights, StoredTensor};

use crate::config::Activation;
use crate::pass::Pass;

/// `x · Wᵀ + b`.
#[derive(Clone, Debug)]
pub struct Linear(Weights);

#[derive(Clone, Debug)]
enum Weights {
    /// As they are trained: one layer, or several with one input whose outputs lie side by side.
    Parts(Vec<Part>),
    /// As the CPU multiplies by them, for inference.
    Packed(PackedLinear),
}

#[derive(Clone, Debug)]
struct Part {
    /// Where the weight is from: its name among the parameters, or their names.
    name: String,
    /// `[output, input]`.
    weight: Tensor,
    /// `[output]`; zeros for a layer without.
    bias: Tensor,
}

impl Linear {
    fn of(weight: Tensor, bias: Tensor, vb: &VarBuilder) -> Self {
        let name = vb.pp("weight").prefix();
        Self(Weights::Parts(vec![Part { name, weight, bias }]))
    }

    /// Weights drawn from a normal distribution of the standard deviation given, biases 0: what Swin and BERT start from.
    ///
    /// # Errors
    /// If the builder has a parameter of that name and another shape.
    pub fn normal(input: usize, output: usize, deviation: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((output, input), "weight", Init::Randn { mean: 0.0, stdev: deviation })?;
        Ok(Self::of(weight, vb.get_with_hints(output, "bias", Init::Const(0.0))?, &vb))
    }

    /// Like [`Self::normal`], without biases.
    ///
    /// # Errors
    /// As [`Self::normal`].
    pub fn without_bias(input: usize, output: usize, deviation: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((output, input), "weight", Init::Randn { mean: 0.0, stdev: deviation })?;
        let bias = Tensor::zeros(output, weight.dtype(), weight.device())?;
        Ok(Self::of(weight, bias, &vb))
    }

    /// PyTorch's default: weights and biases uniform in ±1/√input. Projections and heads start from it.
    ///
    /// # Errors
    /// As [`Self::normal`].
    pub fn uniform(input: usize, output: usize, vb: VarBuilder) -> Result<Self> {
        let bound = (input as f64).powf(-0.5);
        let init = Init::Uniform { lo: -bound, up: bound };
        let weight = vb.get_with_hints((output, input), "weight", init)?;
        Ok(Self::of(weight, vb.get_with_hints(output, "bias", init)?, &vb))
    }

    /// Several layers with one input as one, their outputs side by side.
    pub(crate) fn stacked(layers: impl IntoIterator<Item = Self>) -> Self {
        let parts = layers.into_iter().flat_map(|layer| match layer.0 {
            Weights::Parts(parts) => parts,
            Weights::Packed(_) => unreachable!("layers are stacked when they are built, and packed later"),
        });
        Self(Weights::Parts(parts.collect()))
    }

    /// The same in one piece and without gradients, for many passes of inference.
    pub(crate) fn for_inference(&self) -> Result<Self> {
        let Weights::Parts(parts) = &self.0 else { return Ok(self.clone()) };
        let (weight, bias) = whole(parts)?;
        let name = parts.iter().map(|part| part.name.as_str()).collect::<Vec<_>>().join(", ");
        Ok(Self(Weights::Parts(vec![Part { name, weight: weight.detach(), bias: bias.detach() }])))
    }

    /// `x [.., input]` → `[.., output]`.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Weights::Packed(layer) => layer.forward(x, Epilogue::Nothing),
            Weights::Parts(parts) => match parts.as_slice() {
                [Part { weight, bias, .. }] => kernels::linear(x, weight, bias),
                parts => {
                    let (weights, biases) = weights_and_biases(parts);
                    kernels::stacked_linear(x, &weights, &biases)
                }
            },
        }
    }

    /// The activation of [`Self::forward`].
    pub(crate) fn forward_active(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match (&self.0, activation) {
            (Weights::Packed(layer), Activation::Gelu) => layer.forward(x, Epilogue::Gelu),
            (Weights::Packed(layer), Activation::QuickGelu) => layer.forward(x, Epilogue::QuickGelu),
            (Weights::Parts(_), Activation::Gelu) => kernels::gelu(&self.forward(x)?),
            (Weights::Parts(_), Activation::QuickGelu) => kernels::quick_gelu(&self.forward(x)?),
        }
    }

    /// `residual` + [`Self::forward`], of which `pass` may drop samples.
    pub(crate) fn forward_branch(&self, x: &Tensor, residual: &Tensor, drop_path: f64, pass: &Pass) -> Result<Tensor> {
        match &self.0 {
            Weights::Packed(layer) if !pass.is_training() => layer.forward(x, Epilogue::Add(residual)),
            _ => pass.add_branch(residual, &self.forward(x)?, drop_path),
        }
    }

    /// Lays out the weights for inference, those that `source` has instead of the layer's own.
    pub(crate) fn pack(&mut self, weights: PackedWeights, source: WeightSource) -> Result<()> {
        let Weights::Parts(parts) = &mut self.0 else { return Ok(()) };
        let given = |part: &Part| stored(source, &part.name, part.weight.shape());
        let given = parts.iter().map(given).collect::<Result<Vec<_>>>()?;
        let like = parts[0].weight.clone();
        let layer = if given.iter().all(Option::is_some) {
            let (_, biases) = weights_and_biases(parts);
            let bias = Tensor::cat(&biases, 0)?;
            let given = given.into_iter().flatten().collect();
            PackedLinear::stored(given, Some(&bias), weights, like.dtype(), like.device())?
        } else {
            for (part, given) in parts.iter_mut().zip(given) {
                if let Some(given) = given {
                    part.weight = given.read(like.dtype(), like.device())?;
                }
            }
            let (weight, bias) = whole(parts)?;
            PackedLinear::new(&weight, Some(&bias), weights)?
        };
        self.0 = Weights::Packed(layer);
        Ok(())
    }

    /// The names of its weights among the parameters, before they are packed.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        let parts: &[Part] = match &self.0 {
            Weights::Parts(parts) => parts,
            Weights::Packed(_) => &[],
        };
        parts.iter().map(|part| part.name.as_str())
    }
}

/// Weights by name, for layers that are built without theirs.
pub(crate) type WeightSource<'a> = &'a (dyn Fn(&str) -> Result<Option<StoredTensor>> + Sync);

/// What a source has of a name, which must be of a shape.
fn stored(source: WeightSource, name: &str, shape: &Shape) -> Result<Option<StoredTensor>> {
    let given = source(name)?;
    match &given {
        Some(given) if given.dims() != shape.dims() => {
            candle_core::bail!("{name}: expected shape {shape:?}, found {:?}", given.dims())
        }
        _ => Ok(given),
    }
}

/// Word embeddings `[V, H]`.
#[derive(Clone, Debug)]
pub struct Words {
    name: String,
    /// Of words that are stored it has shape, type and device, and no numbers.
    table: Tensor,
    /// Where they are, if rows are read from there, of which a text or batch needs a few.
    stored: Option<StoredTensor>,
}

impl Words {
    pub(crate) fn new(words: usize, width: usize, deviation: f64, vb: VarBuilder) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: deviation };
        let table = vb.get_with_hints((words, width), "weight", init)?;
        Ok(Self { name: vb.pp("weight").prefix(), table, stored: None })
    }

    /// Ids `[..]` → their rows `[.., H]`; that of `padding` has no gradient.
    pub(crate) fn rows(&self, ids: &Tensor, padding: u32) -> Result<Tensor> {
        match &self.stored {
            Some(stored) => kernels::stored_embedding(stored, self.table.dtype(), ids),
            None => kernels::embedding(&self.table, ids, Some(padding)),
        }
    }

    fn read(&self, stored: &StoredTensor) -> Result<Tensor> {
        let table = stored.read(self.table.dtype(), self.table.device())?;
        stored.check_unchanged()?;
        Ok(table)
    }

    /// The table, read from where it is stored.
    pub(crate) fn tensor(&self) -> Result<Tensor> {
        self.stored.as_ref().map_or_else(|| Ok(self.table.clone()), |stored| self.read(stored))
    }

    pub(crate) fn id(&self) -> TensorId {
        self.table.id()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Takes what `source` has instead of its own. On the CPU it stays where it is, if it can.
    pub(crate) fn pack(&mut self, source: WeightSource) -> Result<()> {
        let Some(stored) = stored(source, &self.name, self.table.shape())? else { return Ok(()) };
        if self.table.device().is_cpu() && stored.can_stay(self.table.dtype()) {
            self.stored = Some(stored);
        } else {
            self.table = self.read(&stored)?;
        }
        Ok(())
    }

    /// The layer that has them as weights.
    pub(crate) fn as_layer(&self, bias: &Tensor, weights: PackedWeights) -> Result<PackedLinear> {
        let (table, dtype, device) = (&self.table, self.table.dtype(), self.table.device());
        match &self.stored {
            Some(stored) => PackedLinear::stored(vec![stored.clone()], Some(bias), weights, dtype, device),
            None => PackedLinear::new(table, Some(bias), weights),
        }
    }
}

/// Weight and bias of all parts together.
fn whole(parts: &[Part]) -> Result<(Tensor, Tensor)> {
    if let [Part { weight, bias, .. }] = parts {
        return Ok((weight.clone(), bias.clone()));
    }
    let (weights, biases) = weights_and_biases(parts);
    Ok((Tensor::cat(&weights, 0)?, Tensor::cat(&biases, 0)?))
}

fn weights_and_biases(parts: &[Part]) -> (Vec<&Tensor>, Vec<&Tensor>) {
    parts.iter().map(|Part { weight, bias, .. }| (weight, bias)).unzip()
}

/// Layer normalisation over the last dimension.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Weights 1, biases 0.
    ///
    /// # Errors
    /// If the builder has a parameter of that name and another shape.
    pub fn new(width: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(width, "weight", Init::Const(1.0))?,
            bias: vb.get_with_hints(width, "bias", Init::Const(0.0))?,
            eps,
        })
    }

    /// `x [.., width]` → the same shape.
    ///
    /// # Errors
    /// On a wrong shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::layer_norm(x, &self.weight, &self.bias, self.eps)
    }

    /// Of `x + residual`, both `[.., width]`.
    pub(crate) fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        kernels::add_layer_norm(x, residual, &self.weight, &self.bias, self.eps)
    }
}

/// Linear, non-linearity, linear: the feed-forward half of a transformer block.
#[derive(Clone, Debug)]
pub(crate) struct FeedForward {
    pub(crate) inner: Linear,
    pub(crate) activation: Activation,
    pub(crate) outer: Linear,
}

impl FeedForward {
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match (&self.outer.0, self.activation) {
            // For training: of the activation nothing is kept.
            (Weights::Parts(parts), Activation::Gelu) => {
                let (weight, bias) = whole(parts)?;
                kernels::gelu_linear(&self.inner.forward(x)?, &weight, &bias)
            }
            _ => self.outer.forward(&self.inner.forward_active(x, self.activation)?),
        }
    }

    /// `residual` + [`Self::forward`], of which `pass` may drop samples.
    pub(crate) fn forward_branch(&self, x: &Tensor, residual: &Tensor, drop_path: f64, pass: &Pass) -> Result<Tensor> {
        match &self.outer.0 {
            Weights::Parts(_) => pass.add_branch(residual, &self.forward(x)?, drop_path),
            Weights::Packed(_) => {
                let active = self.inner.forward_active(x, self.activation)?;
                self.outer.forward_branch(&active, residual, drop_path, pass)
            }
        }
    }

    pub(crate) fn linears(&mut self) -> [&mut Linear; 2] {
        [&mut self.inner, &mut self.outer]
    }
}

/// Images to tokens: a convolution whose kernels do not overlap is a linear map of patches.
#[derive(Clone, Debug)]
pub(crate) struct PatchEmbedding {
    weight: Tensor,
    bias: Tensor,
    image_res: usize,
    patch: usize,
}

impl PatchEmbedding {
    pub(crate) fn new(image_res: usize, patch: usize, width: usize, has_bias: bool, vb: VarBuilder) -> Result<Self> {
        let bound = ((3 * patch * patch) as f64).powf(-0.5);
        let init = Init::Uniform { lo: -bound, up: bound };
        let weight = vb.get_with_hints((width, 3, patch, patch), "weight", init)?;
        let bias = match has_bias {
            true => vb.get_with_hints(width, "bias", init)?,
            false => Tensor::zeros(width, weight.dtype(), weight.device())?,
        };
        Ok(Self { weight, bias, image_res, patch })
    }

    /// Pixels `[N, 3, R, R]` → `[N, (R / patch)², width]` in image order.
    pub(crate) fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (_, channels, height, width) = pixels.dims4()?;
        let (res, patch) = (self.image_res, self.patch);
        if (channels, height, width) != (3, res, res) {
            candle_core::bail!("pixels: expected shape [_, 3, {res}, {res}], found {:?}", pixels.dims());
        }
        let patches = kernels::split_patches(&pixels.to_dtype(self.weight.dtype())?, patch)?;
        kernels::linear(&patches, &self.weight.flatten_from(1)?, &self.bias)
    }
}

/// What is added to the attention scores of a position that is not to be seen (as in the original).
pub(crate) const HIDDEN: f32 = -10_000.0;

/// What is added to attention scores: 0 where the mask is 1, [`HIDDEN`] where it is 0.
pub(crate) fn hide(mask: &Tensor) -> Result<Tensor> {
    mask.to_dtype(DType::F32)?.affine(-f64::from(HIDDEN), f64::from(HIDDEN))
}
