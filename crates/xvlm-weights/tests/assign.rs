//! Assignment of tensors to parameters: strict, in one piece, and reported by name.

use std::collections::BTreeMap;
use std::error::Error;

use candle_core::{DType, Device, Tensor, Var};
use xvlm_weights::{LoadReport, LoadRules, WeightsError, assign};

type Outcome = Result<(), Box<dyn Error>>;

fn tensors(entries: &[(&str, &[f32])]) -> candle_core::Result<BTreeMap<String, Tensor>> {
    entries.iter().map(|(name, values)| Ok(((*name).to_owned(), Tensor::new(*values, &Device::Cpu)?))).collect()
}

fn parameters(entries: &[(&str, usize)]) -> candle_core::Result<Vec<(String, Var)>> {
    entries.iter().map(|(name, len)| Ok(((*name).to_owned(), Var::zeros(*len, DType::F32, &Device::Cpu)?))).collect()
}

fn values(parameters: &[(String, Var)]) -> candle_core::Result<Vec<Vec<f32>>> {
    parameters.iter().map(|(_, var)| var.to_dtype(DType::F32)?.to_vec1()).collect()
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn every_parameter_gets_the_tensor_of_its_name() -> Outcome {
    let parameters = parameters(&[("b", 1), ("a", 2)])?;
    let report = assign("f", &tensors(&[("a", &[1., 2.]), ("b", &[3.])])?, &parameters, &LoadRules::default())?;
    assert_eq!(values(&parameters)?, [vec![3.], vec![1., 2.]]);
    assert_eq!(report, LoadReport { loaded: owned(&["b", "a"]), ..LoadReport::default() });
    assert_eq!(report.to_string(), "2 tensors loaded");
    Ok(())
}

#[test]
fn parameters_keep_their_dtype() -> Outcome {
    let parameters = vec![("a".to_owned(), Var::zeros(2, DType::BF16, &Device::Cpu)?)];
    assign("f", &tensors(&[("a", &[1., 2.5])])?, &parameters, &LoadRules::default())?;
    assert_eq!(parameters[0].1.dtype(), DType::BF16);
    assert_eq!(values(&parameters)?, [[1., 2.5]]);
    Ok(())
}

#[test]
fn missing_unexpected_and_reshaped_are_each_named() -> Outcome {
    let none = LoadRules::default();
    let one = tensors(&[("a", &[1., 2.])])?;
    let cases = [
        (parameters(&[("a", 2), ("b", 3)])?, "f: expected tensors b [3], found none of these names"),
        (parameters(&[])?, "f: expected no other tensors than the model's parameters, found a [2]"),
        (parameters(&[("a", 3)])?, "f: a: expected shape [3], found [2]"),
    ];
    for (parameters, expected) in cases {
        assert_eq!(assign("f", &one, &parameters, &none).unwrap_err().to_string(), expected);
        assert!(values(&parameters)?.concat().iter().all(|&x| x == 0.), "nothing may be assigned");
    }
    Ok(())
}

#[test]
fn everything_wrong_is_told_at_once_and_nothing_is_assigned() -> Outcome {
    let parameters = parameters(&[("fine", 1), ("lost", 2), ("lost too", 1), ("reshaped", 3)])?;
    let tensors = tensors(&[("fine", &[1.]), ("extra", &[1.]), ("reshaped", &[1.])])?;
    match assign("f", &tensors, &parameters, &LoadRules::default()) {
        Err(error @ WeightsError::Several(_)) => assert_eq!(
            error.to_string(),
            "f: expected tensors lost [2], lost too [1], found none of these names\n\
             f: expected no other tensors than the model's parameters, found extra [1]\n\
             f: reshaped: expected shape [3], found [1]"
        ),
        other => panic!("{other:?}"),
    }
    assert!(values(&parameters)?.concat().iter().all(|&x| x == 0.));
    Ok(())
}

#[test]
fn equal_numbers_of_elements_are_not_equal_shapes() -> Outcome {
    let parameters = vec![("a".to_owned(), Var::zeros((2, 3), DType::F32, &Device::Cpu)?)];
    let tensors = BTreeMap::from([("a".to_owned(), Tensor::ones((3, 2), DType::F32, &Device::Cpu)?)]);
    let error = assign("f", &tensors, &parameters, &LoadRules::default()).unwrap_err();
    assert!(matches!(error, WeightsError::Shape { .. }), "{error}");
    Ok(())
}

#[test]
fn what_the_caller_listed_is_reported_instead() -> Outcome {
    let parameters = parameters(&[("a", 1), ("head.weight", 1), ("head.bias", 1)])?;
    let tensors = tensors(&[("a", &[5.]), ("layers.0.index", &[1.])])?;
    let rules = LoadRules { allow_missing: owned(&["head."]), allow_unexpected: owned(&["*.index"]) };
    let report = assign("f", &tensors, &parameters, &rules)?;
    assert_eq!(report.missing, ["head.weight", "head.bias"]);
    assert_eq!(report.unexpected, ["layers.0.index"]);
    assert_eq!(values(&parameters)?, [[5.], [0.], [0.]]);
    assert_eq!(
        report.to_string(),
        "1 tensors loaded\n2 left as initialised: head.weight, head.bias\n1 not used: layers.0.index"
    );
    Ok(())
}

#[test]
fn rules_cannot_allow_another_shape() -> Outcome {
    let rules = LoadRules { allow_missing: owned(&["*"]), allow_unexpected: owned(&["*"]) };
    let error = assign("f", &tensors(&[("a", &[1.])])?, &parameters(&[("a", 2)])?, &rules).unwrap_err();
    assert!(matches!(error, WeightsError::Shape { .. }), "{error}");
    Ok(())
}

#[test]
fn parameters_may_be_swapped_with_each_other() -> Outcome {
    let parameters = parameters(&[("a", 1), ("b", 1)])?;
    assign("f", &tensors(&[("a", &[1.]), ("b", &[2.])])?, &parameters, &LoadRules::default())?;
    // Tensors that are the parameters' own memory.
    let swapped = BTreeMap::from([
        ("a".to_owned(), parameters[1].1.as_detached_tensor()),
        ("b".to_owned(), parameters[0].1.as_tensor().clone()),
    ]);
    assign("f", &swapped, &parameters, &LoadRules::default())?;
    assert_eq!(values(&parameters)?, [[2.], [1.]]);
    Ok(())
}
