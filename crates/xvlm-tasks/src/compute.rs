//! Where a model computes, and with what numbers.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use xvlm_kernels::PackedWeights;

use crate::error::{ConfigProblem, TaskError};

/// The numbers that a model computes with when it is used, whatever its file stores. What leaves it (probabilities, boxes,
/// embeddings, the scores of texts) is `f32` always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits: what the scores of the documentation are measured with.
    #[default]
    F32,
    /// Weights and activations of 16 bits, with sums of 32: half the memory, and faster where processors have instructions for it.
    Bf16,
    /// Weights of linear layers of 8 bits, a scale a row; activations are rounded to 8 bits for each product, everything else is of
    /// 32 bits. On CPUs only.
    Int8,
}

impl Precision {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];

    /// Its name in configurations and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// What the weights of its layers are kept in.
    pub fn packed(self) -> PackedWeights {
        match self {
            Self::F32 | Self::Bf16 => PackedWeights::AsGiven,
            Self::Int8 => PackedWeights::Int8,
        }
    }

    /// The type of activations, and of parameters before their layers are packed. Scalars are `f32`.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 | Self::Int8 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::ALL.into_iter().find(|precision| precision.name() == text);
        named.ok_or_else(|| format!("expected f32, bf16 or int8, found {text}"))
    }
}

/// Where a model computes, and with what numbers. A device alone stands for `f32` there.
///
/// ```
/// use candle_core::Device;
/// use xvlm_tasks::{Compute, Precision};
///
/// let compute = Compute::on(&Device::Cpu).with(Precision::Bf16);
/// assert_eq!(compute.precision, Precision::Bf16);
/// ```
#[derive(Clone, Debug)]
pub struct Compute {
    /// Where.
    pub device: Device,
    /// With what numbers.
    pub precision: Precision,
}

impl Compute {
    /// In `f32` on a device.
    pub fn on(device: &Device) -> Self {
        Self { device: device.clone(), precision: Precision::default() }
    }

    /// The same with other numbers.
    #[must_use]
    pub fn with(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Refuses what there is no way to compute.
    pub(crate) fn check(&self) -> Result<(), TaskError> {
        if self.precision == Precision::Int8 && !self.device.is_cpu() {
            let message = format!("int8: expected the CPU, found {:?}", self.device.location());
            return Err(ConfigProblem { file: "precision".to_owned(), message }.into());
        }
        Ok(())
    }
}

impl From<&Device> for Compute {
    fn from(device: &Device) -> Self {
        Self::on(device)
    }
}
