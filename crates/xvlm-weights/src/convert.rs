//! Published checkpoints to models: which tensor becomes which parameter, and what is done to it on the way.
//!
//! What the original does in `load_pretrained` of each of its models is planned here from names and shapes alone, before a
//! number is read; then each parameter is read when it is its turn.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use candle_core::{DType, Tensor};
use serde::Serialize;

use crate::assign::{LoadRules, allowed, refuse};
use crate::checkpoint::{Checkpoint, TensorInfo, first_non_finite};
use crate::error::{NamedShape, Reshaped, WeightsError};
use crate::interpolate::{resize_positions, resize_relative_positions};
use crate::names::{Fate, Origin, TextLayers, fate, tied_to};

/// What about a model decides where tensors go.
#[derive(Clone, Debug)]
pub struct Layout {
    /// What becomes of the text layers.
    pub text: TextLayers,
    /// Index of the first text layer with cross attention.
    pub fusion_layer: usize,
    /// Number of text layers.
    pub num_hidden_layers: usize,
    /// Whether the fusion layers come from every other of the last layers of a deeper BERT (`load_bertL_by_sep`).
    pub every_other_layer: bool,
    /// Shapes of the parameters by name.
    pub parameters: BTreeMap<String, Vec<usize>>,
}

/// A name, and why it is where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Because {
    /// A parameter or a tensor.
    pub name: String,
    /// The reason.
    pub why: String,
    /// The file that a tensor is of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

/// What a conversion does, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ConversionReport {
    /// Parameters that are a tensor as it is.
    pub loaded: Vec<String>,
    /// Parameters that are a tensor made to fit.
    pub reshaped: Vec<Reshaped>,
    /// Parameters that no tensor is for, and why that is right.
    pub initialised: Vec<Because>,
    /// Tensors that are for no parameter, and why that is right.
    pub unused: Vec<Because>,
}

impl fmt::Display for ConversionReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} parameters loaded: {}", self.loaded.len(), self.loaded.join(", "))?;
        writeln!(f, "{} parameters reshaped", self.reshaped.len())?;
        for Reshaped { name, expected, found } in &self.reshaped {
            writeln!(f, "  {name}: {found:?} to {expected:?}")?;
        }
        for (what, named) in [("parameters initialised", &self.initialised), ("tensors unused", &self.unused)] {
            writeln!(f, "{} {what}", named.len())?;
            let mut by_reason: BTreeMap<(&str, Option<&str>), Vec<&str>> = BTreeMap::new();
            for Because { name, why, file } in named {
                by_reason.entry((why, file.as_deref())).or_default().push(name);
            }
            for ((why, file), names) in by_reason {
                let of = file.map(|file| format!(" of {file}")).unwrap_or_default();
                writeln!(f, "  {}{of}, each because it {why}: {}", names.len(), names.join(", "))?;
            }
        }
        Ok(())
    }
}

/// How a parameter is made of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    None,
    /// Absolute positions for another grid, of that many patches along a side.
    Positions(usize),
    /// Relative positions for another window, of that many offsets along a side.
    RelativePositions(usize),
}

#[derive(Clone, Debug)]
struct Recipe {
    source: usize,
    tensor: String,
    change: Change,
}

/// A planned conversion.
pub struct Conversion<'a> {
    sources: &'a [(Origin, Checkpoint)],
    parameters: BTreeMap<String, Vec<usize>>,
    recipes: BTreeMap<String, Recipe>,
    report: ConversionReport,
}

impl<'a> Conversion<'a> {
    /// Plans which tensor of which source becomes which parameter; a later source goes before an earlier one.
    ///
    /// # Errors
    /// [`WeightsError::Missing`] with all parameters that should have a tensor and have none, [`WeightsError::Unexpected`]
    /// with all tensors that are nothing this crate knows, [`WeightsError::Shape`] with all that do not fit, or
    /// [`WeightsError::Several`]; `rules` allow what is to be put up with. [`WeightsError::Dtype`] for weights that are no
    /// floating-point numbers.
    pub fn plan(sources: &'a [(Origin, Checkpoint)], layout: &Layout, rules: &LoadRules) -> Result<Self, WeightsError> {
        let mut plan = Plan {
            sources,
            layout,
            rules,
            placed: Vec::new(),
            recipes: BTreeMap::new(),
            report: ConversionReport::default(),
            missing: Vec::new(),
            unexpected: Vec::new(),
            misshapen: Vec::new(),
        };
        for (source, (origin, checkpoint)) in sources.iter().enumerate() {
            for (tensor, info) in checkpoint.tensors() {
                match fate(*origin, tensor, layout, checkpoint.tensors()) {
                    Fate::Becomes(names) => plan.place(source, tensor, info, names)?,
                    Fate::Unused(why) => plan.leave(checkpoint, tensor, why),
                    Fate::Copy if plan.is_copy(checkpoint, tensor)? => {
                        plan.leave(checkpoint, tensor, "is a copy of another tensor");
                    }
                    Fate::Unknown | Fate::Copy if allowed(&rules.allow_unexpected, tensor) => {
                        plan.leave(checkpoint, tensor, "is allowed to be");
                    }
                    Fate::Unknown | Fate::Copy => {
                        plan.unexpected.push(NamedShape { name: tensor.clone(), shape: info.shape().to_vec() });
                    }
                }
            }
        }
        plan.finish()
    }

    /// What is done, by name.
    pub fn report(&self) -> &ConversionReport {
        &self.report
    }

    /// A parameter in f32, or nothing if no source has it.
    ///
    /// # Errors
    /// If the file cannot be read, or [`WeightsError::NotFinite`] if a number in it is none.
    pub fn read(&self, name: &str) -> Result<Option<Tensor>, WeightsError> {
        let Some(Recipe { source, tensor, change }) = self.recipes.get(name) else { return Ok(None) };
        let checkpoint = &self.sources[*source].1;
        let value = checkpoint.read(tensor)?;
        let failed = |error| WeightsError::tensor(checkpoint.name(), tensor, error);
        if let Some(at) = first_non_finite(&value).map_err(failed)? {
            return Err(WeightsError::NotFinite { file: checkpoint.name().to_owned(), tensor: tensor.clone(), at });
        }
        let value = value.to_dtype(DType::F32).and_then(|value| match *change {
            Change::None => value.reshape(self.parameters[name].as_slice()),
            Change::Positions(side) => resize_positions(&value, side),
            Change::RelativePositions(side) => resize_relative_positions(&value, side),
        });
        value.map(Some).map_err(failed)
    }
}

/// A conversion that is being planned.
struct Plan<'a, 'b> {
    sources: &'a [(Origin, Checkpoint)],
    layout: &'b Layout,
    rules: &'b LoadRules,
    /// Tensors that were to become parameters, whether they did or not.
    placed: Vec<(usize, &'a str)>,
    recipes: BTreeMap<String, Recipe>,
    report: ConversionReport,
    /// What has no explanation.
    missing: Vec<NamedShape>,
    unexpected: Vec<NamedShape>,
    misshapen: Vec<Reshaped>,
}

impl<'a> Plan<'a, '_> {
    /// A tensor that becomes parameters.
    fn place(
        &mut self,
        source: usize,
        tensor: &'a str,
        info: &TensorInfo,
        names: Vec<String>,
    ) -> Result<(), WeightsError> {
        self.placed.push((source, tensor));
        let checkpoint = &self.sources[source].1;
        if !matches!(info.dtype(), Some(DType::F32 | DType::F16 | DType::BF16 | DType::F64)) {
            let (file, found) = (checkpoint.name().to_owned(), info.type_name().to_owned());
            let expected = "F32, F16, BF16 or F64";
            return Err(WeightsError::Dtype { file, tensor: tensor.to_owned(), expected, found });
        }
        for name in names {
            // Keys and values of a decoder may read narrower or wider tokens than those of the layer it is made of.
            let weight = tensor.strip_suffix("bias").map(|stem| format!("{stem}weight"));
            let reads = weight.and_then(|weight| checkpoint.tensors().get(&weight)).unwrap_or(info).shape();
            if self.starts_anew(&name) && self.layout.weight_of(&name) != Some(reads) {
                continue;
            }
            let shape = &self.layout.parameters[&name];
            match change(&name, info.shape(), shape) {
                Some(change) => {
                    self.recipes.insert(name, Recipe { source, tensor: tensor.to_owned(), change });
                }
                None => self.misshapen.push(Reshaped {
                    name: tensor.to_owned(),
                    expected: shape.clone(),
                    found: info.shape().to_vec(),
                }),
            }
        }
        Ok(())
    }

    /// A tensor that becomes nothing.
    fn leave(&mut self, checkpoint: &Checkpoint, tensor: &str, why: &str) {
        let file = Some(checkpoint.name().to_owned());
        self.report.unused.push(Because { name: tensor.to_owned(), why: why.to_owned(), file });
    }

    /// Whether a tensor is what it should be a copy of. The original would take the numbers of whichever comes last.
    fn is_copy(&self, checkpoint: &Checkpoint, tensor: &str) -> Result<bool, WeightsError> {
        let tensors = checkpoint.tensors();
        let Some(other) = tied_to(tensor).filter(|other| tensors.contains_key(other)) else {
            return Ok(false);
        };
        let numbers = |name: &str| {
            let numbers = checkpoint.read(name)?.flatten_all().and_then(|x| x.to_dtype(DType::F32)?.to_vec1::<f32>());
            numbers.map_err(|error| WeightsError::tensor(checkpoint.name(), name, error))
        };
        if tensors[tensor].shape() == tensors[&other].shape() && numbers(tensor)? == numbers(&other)? {
            return Ok(true);
        }
        Err(WeightsError::Malformed {
            file: checkpoint.name().to_owned(),
            part: format!("tensor {tensor}"),
            expected: format!("the numbers of {other}, which it is tied to"),
            found: "others".to_owned(),
        })
    }

    /// Accounts for every parameter, and for every tensor that was to become one and did not.
    fn finish(mut self) -> Result<Conversion<'a>, WeightsError> {
        for (name, shape) in &self.layout.parameters {
            if let Some(Recipe { source, tensor, change }) = self.recipes.get(name) {
                let found = self.sources[*source].1.tensors()[tensor].shape().to_vec();
                match change {
                    Change::None => self.report.loaded.push(name.clone()),
                    _ => self.report.reshaped.push(Reshaped { name: name.clone(), expected: shape.clone(), found }),
                }
                continue;
            }
            let why = if self.starts_anew(name) {
                "is new in this task"
            } else if !self.sources.iter().any(|(origin, _)| origin.has(name)) {
                "is in no checkpoint of these kinds"
            } else if allowed(&self.rules.allow_missing, name) {
                "is allowed to be"
            } else {
                self.missing.push(NamedShape { name: name.clone(), shape: shape.clone() });
                continue;
            };
            self.report.initialised.push(Because { name: name.clone(), why: why.to_owned(), file: None });
        }
        let used: BTreeSet<(usize, &str)> =
            self.recipes.values().map(|recipe| (recipe.source, recipe.tensor.as_str())).collect();
        let is_unused = |(source, tensor): &&(usize, &str)| !used.contains(&(*source, *tensor));
        let replaced: Vec<(usize, &str)> = self.placed.iter().filter(is_unused).copied().collect();
        for (source, tensor) in replaced {
            self.leave(&self.sources[source].1, tensor, "is made anew, by a later checkpoint or for the task");
        }
        let file = self.sources.iter().map(|(_, checkpoint)| checkpoint.name()).collect::<Vec<_>>().join(", ");
        refuse(&file, self.missing, self.unexpected, self.misshapen)?;
        let parameters = self.layout.parameters.clone();
        Ok(Conversion { sources: self.sources, parameters, recipes: self.recipes, report: self.report })
    }

    /// Whether a parameter is one that fine-tuning starts from nothing.
    fn starts_anew(&self, name: &str) -> bool {
        let sources_have = |prefix: &str| {
            let mut tensors = self.sources.iter().flat_map(|(_, checkpoint)| checkpoint.tensors().keys());
            tensors.any(|tensor| tensor.starts_with(prefix))
        };
        if let Some(head) = NEW_HEADS.iter().find(|head| name.starts_with(**head)) {
            return !sources_have(head);
        }
        // The decoder of answers reads the states of questions where the fusion layer it is made of reads an image.
        let reads = ["crossattention.self.key.", "crossattention.self.value."].iter().any(|part| name.contains(part));
        let decoder = "text_decoder.";
        self.layout.text == TextLayers::EncoderAndDecoder
            && reads
            && name.starts_with(decoder)
            && !sources_have(decoder)
    }
}

/// Parts that fine-tuning starts from nothing (`init_params` of the original's models), as long as no source has any of them.
const NEW_HEADS: [&str; 2] = ["cls_head.", "ta_head."];

impl Layout {
    /// The shape of the weight that a parameter is, or is the bias of.
    fn weight_of(&self, name: &str) -> Option<&[usize]> {
        let weight = name.strip_suffix("bias").map_or_else(|| name.to_owned(), |stem| format!("{stem}weight"));
        self.parameters.get(&weight).map(Vec::as_slice)
    }
}

/// What makes a tensor of one shape a parameter of another; nothing can in most cases.
fn change(name: &str, from: &[usize], to: &[usize]) -> Option<Change> {
    let sides = |shape: &[usize]| shape.iter().copied().filter(|&side| side != 1).collect::<Vec<_>>();
    if from == to || sides(from) == sides(to) {
        return Some(Change::None);
    }
    let (&rows, &width) = (to.get(to.len().checked_sub(2)?)?, to.last()?);
    if from.last() != Some(&width) || from.len() != to.len() {
        return None;
    }
    let before = from[from.len() - 2];
    let is_square = |rows: usize| rows > 0 && rows.isqrt().pow(2) == rows;
    if name.ends_with("relative_position_bias_table") {
        let is_table = |rows: usize| is_square(rows) && rows % 2 == 1;
        return (is_table(before) && is_table(rows)).then(|| Change::RelativePositions(rows.isqrt()));
    }
    let is_grid = |rows: usize| rows.checked_sub(1).is_some_and(is_square);
    let is_position = ["vision_encoder.pos_embed", "vision_encoder.pos_embed.weight"].contains(&name);
    (is_position && is_grid(before) && is_grid(rows)).then(|| Change::Positions((rows - 1).isqrt()))
}
