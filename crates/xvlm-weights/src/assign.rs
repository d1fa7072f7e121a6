//! Tensors to parameters, strictly.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use candle_core::{Tensor, Var};

use crate::error::{NamedShape, Reshaped, WeightsError};

/// Which differences between a file and a model are no mistake. The default allows none.
///
/// A pattern is the beginning of a name (`text_decoder.`); with a `*` in it, which stands for any characters, it is
/// the whole name (`*.relative_position_index`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadRules {
    /// Parameters that may stay as initialised.
    pub allow_missing: Vec<String>,
    /// Tensors that may be left out.
    pub allow_unexpected: Vec<String>,
}

/// What an assignment did, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Parameters that have been given their tensor.
    pub loaded: Vec<String>,
    /// Parameters without a tensor, left as initialised.
    pub missing: Vec<String>,
    /// Tensors without a parameter, left out.
    pub unexpected: Vec<String>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors loaded", self.loaded.len())?;
        for (what, names) in [("left as initialised", &self.missing), ("not used", &self.unexpected)] {
            if !names.is_empty() {
                write!(f, "\n{} {what}: {}", names.len(), names.join(", "))?;
            }
        }
        Ok(())
    }
}

/// Compares the names and shapes of tensors with those of parameters, as [`assign`] does first: what it reports as loaded is what
/// would be.
///
/// # Errors
/// [`WeightsError::Missing`], [`WeightsError::Unexpected`] and [`WeightsError::Shape`], each with all tensors
/// concerned, or [`WeightsError::Several`] of them; what `rules` allow is reported instead. A wrong shape cannot be
/// allowed.
pub fn compare<'a>(
    name: &str,
    tensors: &BTreeMap<&str, &[usize]>,
    targets: impl Iterator<Item = (&'a str, &'a [usize])>,
    rules: &LoadRules,
) -> Result<LoadReport, WeightsError> {
    let mut report = LoadReport::default();
    let (mut missing, mut reshaped, mut known) = (Vec::new(), Vec::new(), HashSet::new());
    for (target, shape) in targets {
        known.insert(target);
        match tensors.get(target) {
            Some(found) if *found == shape => report.loaded.push(target.to_owned()),
            Some(found) => {
                reshaped.push(Reshaped { name: target.to_owned(), expected: shape.to_vec(), found: found.to_vec() })
            }
            None if allowed(&rules.allow_missing, target) => report.missing.push(target.to_owned()),
            None => missing.push(NamedShape { name: target.to_owned(), shape: shape.to_vec() }),
        }
    }
    let mut unexpected = Vec::new();
    for (tensor, shape) in tensors.iter().filter(|(tensor, _)| !known.contains(*tensor)) {
        if allowed(&rules.allow_unexpected, tensor) {
            report.unexpected.push((*tensor).to_owned());
        } else {
            unexpected.push(NamedShape { name: (*tensor).to_owned(), shape: shape.to_vec() });
        }
    }
    refuse(name, missing, unexpected, reshaped)?;
    Ok(report)
}

/// Gives each parameter the tensor of its name, in the parameter's dtype and on its device.
///
/// `name` is what errors call the source of the tensors. Every difference is found before anything is changed: on
/// an error about names, shapes or conversion all parameters are as they were.
///
/// # Errors
/// As [`compare`], and if a tensor cannot be converted.
pub fn assign(
    name: &str,
    tensors: &BTreeMap<String, Tensor>,
    targets: &[(String, Var)],
    rules: &LoadRules,
) -> Result<LoadReport, WeightsError> {
    let shapes = targets.iter().map(|(target, var)| (target.as_str(), var.dims()));
    let found = tensors.iter().map(|(tensor, value)| (tensor.as_str(), value.dims())).collect();
    let report = compare(name, &found, shapes, rules)?;
    let failed = |tensor: &str, source| WeightsError::tensor(name, tensor, source);
    let own: HashSet<usize> = targets.iter().map(|(_, var)| storage(var)).collect();
    let pairs = targets.iter().filter_map(|(target, var)| Some((target, var, tensors.get(target)?)));
    let ready = pairs
        .map(|(target, var, tensor)| {
            let value = tensor.detach().to_device(var.device()).and_then(|value| value.to_dtype(var.dtype()));
            // A parameter cannot be set from its own memory, and must not be from that of one just overwritten.
            let value = value.and_then(|value| if own.contains(&storage(&value)) { value.copy() } else { Ok(value) });
            Ok((target, var, value.map_err(|source| failed(target, source))?))
        })
        .collect::<Result<Vec<_>, _>>()?;
    for (target, var, value) in ready {
        var.set(&value).map_err(|source| failed(target, source))?;
    }
    Ok(report)
}

/// The error for what differs, if anything does.
pub(crate) fn refuse(
    name: &str,
    missing: Vec<NamedShape>,
    unexpected: Vec<NamedShape>,
    reshaped: Vec<Reshaped>,
) -> Result<(), WeightsError> {
    let mut errors = Vec::new();
    if !missing.is_empty() {
        errors.push(WeightsError::Missing { file: name.into(), tensors: missing });
    }
    if !unexpected.is_empty() {
        errors.push(WeightsError::Unexpected { file: name.into(), tensors: unexpected });
    }
    if !reshaped.is_empty() {
        errors.push(WeightsError::Shape { file: name.into(), tensors: reshaped });
    }
    match errors.len() {
        0 => Ok(()),
        1 => Err(errors.swap_remove(0)),
        _ => Err(WeightsError::Several(errors)),
    }
}

/// Where a tensor's numbers are: equal for tensors that share them.
fn storage(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref(&*storage) as usize
}

pub(crate) fn allowed(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern, name))
}

/// See [`LoadRules`].
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = name.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return true;
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_are_beginnings_or_globs() {
        for (pattern, name, expected) in [
            ("text_decoder.", "text_decoder.bert.weight", true),
            ("text_decoder.", "text_encoder.text_decoder.", false),
            ("*.relative_position_index", "layers.0.relative_position_index", true),
            ("*.relative_position_index", "layers.0.relative_position_index.x", false),
            ("layers.*.bias", "layers.1.norm.bias", true),
            ("layers.*.bias", "layers.bias", false),
            ("a*b*c", "a--b--b--c", true),
            ("a*b*c", "a--c", false),
            ("a*a", "a", false),
            ("*", "anything", true),
            ("", "anything", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
