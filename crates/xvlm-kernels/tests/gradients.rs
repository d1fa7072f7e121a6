//! Every operation: its f64 path against finite differences, and its fused f32 path against the f64 path.

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm_kernels as kernels;

fn random(rng: &mut ChaCha8Rng, shape: &[usize]) -> Tensor {
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The sum of `f`'s output weighted by fixed numbers, so that every output element matters.
fn weighted(output: &Tensor) -> Result<Tensor> {
    let n = output.elem_count();
    let weights: Vec<f64> = (0..n).map(|i| ((i * 37 % 19) as f64 - 9.0) / 7.0).collect();
    let weights = Tensor::from_vec(weights, output.shape(), output.device())?.to_dtype(output.dtype())?;
    (output * weights)?.sum_all()
}

fn numbers(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn check(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let run = |dtype: DType| {
        let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(&t.to_dtype(dtype).unwrap()).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let output = f(&tensors).unwrap();
        let grads = weighted(&output).unwrap().backward().unwrap();
        let grads: Vec<Vec<f64>> =
            vars.iter().map(|v| numbers(grads.get(v).expect("every input gets a gradient"))).collect();
        (numbers(&output), grads)
    };
    let (exact, exact_grads) = run(DType::F64);
    let (fused, fused_grads) = run(DType::F32);
    let (again, again_grads) = run(DType::F32);
    assert!(fused == again && fused_grads == again_grads, "not bit-identical from run to run");
    let close = |what: &str, a: &[f64], b: &[f64], tolerance: f64| {
        let size = b.iter().fold(1.0f64, |m, x| m.max(x.abs()));
        for (i, (x, y)) in a.iter().zip(b).enumerate() {
            assert!((x - y).abs() <= tolerance * size, "{what}[{i}]: {x} against {y}");
        }
    };
    close("value", &fused, &exact, 5e-6);
    let loss = |inputs: &[Tensor]| weighted(&f(inputs).unwrap()).unwrap().to_scalar::<f64>().unwrap();
    for (which, (fused, exact)) in fused_grads.iter().zip(&exact_grads).enumerate() {
        close(&format!("gradient of input {which}"), fused, exact, 2e-5);
        let values = numbers(&inputs[which]);
        let step = 1e-5;
        for i in (0..values.len()).step_by(1 + values.len() / 40) {
            let moved = |by: f64| {
                let mut values = values.clone();
                values[i] += by;
                let mut inputs = inputs.to_vec();
                inputs[which] = Tensor::from_vec(values, inputs[which].shape(), &Device::Cpu).unwrap();
                loss(&inputs)
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * step);
            assert!((slope - exact[i]).abs() < 1e-6 * (1.0 + slope.abs()), "input {which}[{i}]: {} {slope}", exact[i]);
        }
    }
}

fn rng() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(7)
}

#[test]
#[test]
#[test]
#[test]
#[test]
#[test]
#[test]
#[test]
#[test]
#[test]
fn quick_gelu_stays_finite() {
    let x = Var::new(&[-1000f32, -60.0, 0.0, 60.0, 1000.0], &Device::Cpu).unwrap();
    let y = kernels::quick_gelu(&x).unwrap();
    let close = |found: Vec<f32>, wanted: [f32; 5]| {
        assert!(found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-30), "{found:?}, wanted {wanted:?}");
    };
    close(y.to_vec1().unwrap(), [0.0, 0.0, 0.0, 60.0, 1000.0]);
    let gradients = y.sum_all().unwrap().backward().unwrap();
    close(gradients.get(&x).unwrap().to_vec1().unwrap(), [0.0, 0.0, 0.5, 1.0, 1.0]);
}

#[test]
fn resizing() {
    check(&[random(&mut rng(), &[3, 4, 2])], |x| kernels::resize_bicubic(&x[0], 5, 3));
}

#[test]
#[test]
fn wrong_shapes_are_named() {
    let r = &mut rng();
    let error = kernels::linear(&random(r, &[2, 3]), &random(r, &[4, 5]), &random(r, &[4])).unwrap_err().to_string();
    assert!(error.contains("linear") && error.contains("[4, 3]") && error.contains("[4, 5]"), "{error}");
    let error = kernels::cross_entropy(&random(r, &[1, 3]), &[3], 0.0).unwrap_err().to_string();
    assert!(error.contains("label 3"), "{error}");
}
