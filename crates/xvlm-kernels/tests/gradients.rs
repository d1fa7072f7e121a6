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
fn linear() {
    for (rows, k, n) in [(1, 1, 1), (5, 7, 3), (33, 16, 40)] {
        let r = &mut rng();
        check(&[random(r, &[1, rows, k]), random(r, &[n, k]), random(r, &[n])], |x| {
            kernels::linear(&x[0], &x[1], &x[2])
        });
    }
}

#[test]
fn linear_takes_strided_input() {
    let r = &mut rng();
    check(&[random(r, &[6, 5, 4]), random(r, &[3, 6]), random(r, &[3])], |x| {
        kernels::linear(&x[0].transpose(0, 2)?, &x[1], &x[2])
    });
}

#[test]
fn gelu() {
    check(&[(random(&mut rng(), &[3, 71]) * 6.0).unwrap()], |x| kernels::gelu(&x[0]));
}

#[test]
fn quick_gelu() {
    check(&[(random(&mut rng(), &[3, 71]) * 6.0).unwrap()], |x| kernels::quick_gelu(&x[0]));
}

#[test]
fn layer_norm() {
    for (rows, width) in [(1, 2), (7, 5), (131, 48)] {
        let r = &mut rng();
        check(&[random(r, &[rows, width]), random(r, &[width]), random(r, &[width])], |x| {
            kernels::layer_norm(&x[0], &x[1], &x[2], 1e-5)
        });
    }
}

fn key_bias(rows: usize, keys: usize, like: &Tensor) -> Result<Tensor> {
    let values: Vec<f64> = (0..rows * keys).map(|i| if i % keys % 3 == 1 { -10_000.0 } else { 0.0 }).collect();
    Tensor::from_vec(values, (rows, keys), &Device::Cpu)?.to_dtype(like.dtype())
}

#[test]
fn self_attention() {
    for (b, t, c, heads) in [(1, 1, 4, 1), (2, 5, 6, 3), (3, 17, 32, 2)] {
        for causal in [false, true] {
            check(&[random(&mut rng(), &[b, t, 3 * c])], |x| {
                kernels::self_attention(&x[0], &key_bias(b, t, &x[0])?, heads, causal, None)
            });
        }
    }
}

#[test]
fn cross_attention() {
    for (index, n, t, l, c, heads) in [(vec![0], 1, 1, 1, 2, 1), (vec![2, 0, 2, 2], 3, 4, 7, 6, 2)] {
        let r = &mut rng();
        check(&[random(r, &[index.len(), t, c]), random(r, &[n, l, 2 * c])], |x| {
            kernels::cross_attention(&x[0], &x[1], &index, &key_bias(index.len(), l, &x[0])?, heads, None)
        });
    }
}

#[test]
fn window_attention() {
    for (height, width, window, shift, heads, c) in [(2, 2, 2, 0, 1, 2), (4, 4, 2, 1, 2, 4), (6, 9, 3, 1, 2, 8)] {
        let r = &mut rng();
        let shape = kernels::WindowShape { height, width, window, shift };
        let area = window * window;
        check(&[random(r, &[2, height * width, 3 * c]), random(r, &[heads, area, area])], |x| {
            kernels::window_attention(&x[0], &x[1], shape)
        });
    }
}

#[test]
fn cross_entropy() {
    for smoothing in [0.0, 0.1] {
        check(&[(random(&mut rng(), &[4, 9]) * 3.0).unwrap()], |x| {
            kernels::cross_entropy(&x[0], &[3, kernels::IGNORE, 0, 8], smoothing)
        });
    }
}

#[test]
fn cross_entropy_of_nothing_is_zero() {
    let logits = random(&mut rng(), &[2, 3]);
    let loss = kernels::cross_entropy(&logits, &[kernels::IGNORE; 2], 0.0).unwrap();
    assert_eq!(loss.to_scalar::<f64>().unwrap(), 0.0);
}

#[test]
fn softmax() {
    check(&[random(&mut rng(), &[3, 5])], |x| kernels::softmax(&x[0], 1));
    check(&[random(&mut rng(), &[3, 5])], |x| kernels::log_softmax(&x[0], 0));
}

#[test]
fn embedding() {
    let ids = Tensor::new(&[[1u32, 1, 0], [3, 1, 0]], &Device::Cpu).unwrap();
    check(&[random(&mut rng(), &[4, 5])], |x| kernels::embedding(&x[0], &ids, None));
    let table = Var::from_tensor(&random(&mut rng(), &[4, 5])).unwrap();
    let found = kernels::embedding(&table, &ids, Some(1)).unwrap();
    assert_eq!(
        found.to_vec3::<f64>().unwrap(),
        kernels::embedding(&table, &ids, None).unwrap().to_vec3::<f64>().unwrap()
    );
    let gradients = found.sum_all().unwrap().backward().unwrap();
    let counts = gradients.get(&table).unwrap().to_vec2::<f64>().unwrap().into_iter().map(|row| row[0]);
    assert_eq!(counts.collect::<Vec<_>>(), [2.0, 0.0, 0.0, 1.0], "the padding row is not trained");
}

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
fn smoothing_spreads_over_the_other_classes() {
    let logits = random(&mut rng(), &[3, 4]);
    let found = kernels::cross_entropy(&logits, &[2, kernels::IGNORE, 0], 0.1).unwrap().to_scalar::<f64>().unwrap();
    let log_probabilities = kernels::log_softmax(&logits, 1).unwrap().to_vec2::<f64>().unwrap();
    let target = |label: usize| (0..4).map(move |class| if class == label { 0.9 } else { 0.025 });
    let row = |row: usize, label: usize| -> f64 {
        log_probabilities[row].iter().zip(target(label)).map(|(log, share)| -log * share).sum()
    };
    assert!((found - (row(0, 2) + row(2, 0)) / 2.0).abs() < 1e-7);
}

#[test]
fn wrong_shapes_are_named() {
    let r = &mut rng();
    let error = kernels::linear(&random(r, &[2, 3]), &random(r, &[4, 5]), &random(r, &[4])).unwrap_err().to_string();
    assert!(error.contains("linear") && error.contains("[4, 3]") && error.contains("[4, 5]"), "{error}");
    let shape = kernels::WindowShape { height: 5, width: 4, window: 2, shift: 0 };
    let error = kernels::window_attention(&random(r, &[1, 20, 6]), &random(r, &[1, 4, 4]), shape).unwrap_err();
    assert!(error.to_string().contains("window that divides"), "{error}");
    let error = kernels::cross_entropy(&random(r, &[1, 3]), &[3], 0.0).unwrap_err().to_string();
    assert!(error.contains("label 3"), "{error}");
}
