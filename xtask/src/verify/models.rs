//! Models with the parameters of a case.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use serde_json::Value;
use xvlm::encoders::{Parameters, Task, Xvlm, XvlmConfig};
use xvlm::tasks::{ModelConfig, Texts, official};

use super::case::{Case, Outcome, Tensors, read};

/// A network with its parameters.
pub(super) struct Built<M> {
    pub(super) model: M,
    pub(super) parameters: Vec<(String, Var)>,
}

/// The files that make up the parameters, later ones before earlier ones.
pub(super) fn parameter_files(json: &Value) -> Vec<String> {
    serde_json::from_value(json["params_files"].clone()).unwrap_or_default()
}

impl Case<'_> {
    /// The configuration: the case's own, that of a case with the same parameters, or that of the folder.
    pub(super) fn config(&self) -> Outcome<&Value> {
        let files = parameter_files(&self.json);
        let same = self.shared.configs.iter().find(|(others, _)| *others == files).map(|(_, config)| config);
        let own = self.json.get("config").or(same).or(self.shared.config.as_ref());
        own.ok_or_else(|| "config: expected in the case or in the folder, found none".into())
    }

    /// What `config.json` of a model folder would say.
    pub(super) fn model_config(&self, task: Task) -> Outcome<ModelConfig> {
        Ok(official::from_official(self.config()?, &self.path, task)?)
    }

    /// The model of a task.
    pub(super) fn xvlm(&self, task: Task) -> Outcome<Built<Xvlm>> {
        let config: XvlmConfig = self.model_config(task)?.model;
        self.build("", |vb| Xvlm::new(&config, vb))
    }

    /// Builds a network and gives it the case's parameters whose names begin with `prefix`. Every parameter must be there,
    /// and every tensor must be a parameter, or something that follows from one.
    pub(super) fn build<M>(
        &self,
        prefix: &str,
        build: impl FnOnce(VarBuilder) -> candle_core::Result<M>,
    ) -> Outcome<Built<M>> {
        let mut state = Tensors::new();
        for file in parameter_files(&self.json) {
            state.extend(read(&self.shared.folder.join(file))?);
        }
        // A list of patterns, or one before words about it.
        let ignored = match &self.json["ignore_keys"] {
            Value::Array(patterns) => patterns.iter().filter_map(Value::as_str).collect(),
            Value::String(text) => text.split(' ').take(1).collect(),
            _ => Vec::new(),
        };
        for pattern in ignored {
            let beginning = pattern.strip_suffix('*');
            state.retain(|name, _| name != pattern && beginning.is_none_or(|beginning| !name.starts_with(beginning)));
        }
        let mut state: Tensors = state
            .into_iter()
            .map(|(name, tensor)| (name.strip_prefix(prefix).map(str::to_owned).unwrap_or(name), tensor))
            .collect();
        let parameters = Parameters::zeros();
        let model = build(parameters.builder(DType::F32, &Device::Cpu))?;
        let parameters = parameters.named();
        for (name, var) in &parameters {
            let value = state.get(name).ok_or_else(|| format!("parameter {name}: expected in the case, found none"))?;
            if value.dims() != var.dims() {
                return Err(format!("{name}: expected shape {:?}, found {:?}", var.dims(), value.dims()).into());
            }
            var.set(value)?;
        }
        let copies = state.clone();
        state.retain(|name, tensor| {
            let is_parameter = parameters.iter().any(|(parameter, _)| parameter == name);
            !is_parameter && !follows(name, tensor, &copies)
        });
        match state.keys().next() {
            Some(name) => Err(format!("{name}: expected a parameter of the model, found none of that name").into()),
            None => Ok(Built { model, parameters }),
        }
    }

    /// Texts of the case by what their tensors end with: `in.text` for `in.text_ids` and `in.text_atts`.
    pub(super) fn texts(&self, name: &str) -> Outcome<Texts> {
        Ok(Texts { ids: self.ids(&format!("{name}_ids"))?, mask: self.mask(&format!("{name}_atts"))? })
    }
}

/// Whether a tensor of the original is no parameter of its own: a buffer, or a copy of one it is tied to.
fn follows(name: &str, tensor: &Tensor, state: &Tensors) -> bool {
    xvlm::weights::is_buffer(name)
        || xvlm::weights::tied_to(name).is_some_and(|other| {
            state.get(&other).is_some_and(|other| {
                let numbers = |x: &Tensor| x.flatten_all().and_then(|x| x.to_vec1::<f32>());
                matches!((numbers(tensor), numbers(other)), (Ok(a), Ok(b)) if a == b)
            })
        })
}
