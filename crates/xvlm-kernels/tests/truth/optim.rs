use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use xvlm_kernels::{AdamW, Update, adamw_step, joined, round_into, split_into};

use crate::check::{Array, At, assert_close};
use crate::device::Computer;

const SETTINGS: AdamW = AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-8, max_norm: None };

/// A parameter with its moments, as variables.
struct Slot([Var; 3]);

impl Slot {
    fn new(start: &Array, at: &At) -> Self {
        let zeros = start.map(|_| 0.0);
        Self([start, &zeros, &zeros].map(|x| Var::from_tensor(&x.tensor(&parameters(at), false)).unwrap()))
    }

    fn update<'a>(&'a self, gradient: &'a Tensor, i: usize, step: u64) -> Update<'a> {
        let Self([parameter, first_moment, second_moment]) = self;
        let weight_decay = if i.is_multiple_of(2) { 0.1 } else { 0.0 };
        Update { parameter, rest: None, first_moment, second_moment, gradient, lr: lr(i), weight_decay, step }
    }

    fn arrays(&self) -> [Array; 3] {
        self.0.each_ref().map(|x| Array::from(x.as_tensor()))
    }
}

fn lr(i: usize) -> f64 {
    0.01 * (1 + i % 3) as f64
}

/// Gradients may be of two bytes; parameters are not.
fn parameters(at: &At) -> At {
    let dtype = if at.dtype == DType::F64 { DType::F64 } else { DType::F32 };
    At { dtype, ..at.clone() }
}

/// Algorithm 2 of Loshchilov and Hutter 2019 as transformers 4.12 has it, after the clipping of PyTorch.
fn plain(slots: &mut [[Array; 3]], gradients: &[Array], max_norm: Option<f64>, step: u64) -> f64 {
    let norm = gradients.iter().flat_map(|g| &g.values).map(|g| g * g).sum::<f64>().sqrt();
    let scale = max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0));
    let AdamW { beta1, beta2, eps, .. } = SETTINGS;
    for (i, ([p, m, v], g)) in slots.iter_mut().zip(gradients).enumerate() {
        let decay = if i % 2 == 0 { 0.1 } else { 0.0 };
        for (((p, m), v), g) in p.values.iter_mut().zip(&mut m.values).zip(&mut v.values).zip(&g.values) {
            let g = g * scale;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            let size = lr(i) * (1.0 - beta2.powi(step as i32)).sqrt() / (1.0 - beta1.powi(step as i32));
            *p -= size * *m / (v.sqrt() + eps);
            *p -= lr(i) * decay * *p;
        }
    }
    norm
}

fn run(at: &At, shapes: &[Vec<usize>], max_norm: Option<f64>, seed: u64) -> (Vec<f64>, Vec<[Array; 3]>) {
    at.computer.run(|| {
        let what = format!("{:?} {:?} {max_norm:?}", at.computer, at.dtype);
        let starts = shapes.iter().zip(seed..).map(|(shape, seed)| Array::random(shape, seed));
        let slots: Vec<Slot> = starts.map(|start| Slot::new(&start, at)).collect();
        let mut wanted: Vec<[Array; 3]> = slots.iter().map(Slot::arrays).collect();
        let mut norms = Vec::new();
        for step in 1..=3 {
            let gradient = |(i, shape): (usize, &Vec<usize>)| {
                let of = Array::random(shape, seed ^ (step << 8) ^ i as u64).map(|x| 0.3 * x);
                of.tensor(at, i % 2 == 1)
            };
            let gradients: Vec<Tensor> = shapes.iter().enumerate().map(gradient).collect();
            let updates = slots.iter().zip(&gradients).enumerate();
            let updates: Vec<Update> = updates.map(|(i, (slot, gradient))| slot.update(gradient, i, step)).collect();
            let norm = adamw_step(&AdamW { max_norm, ..SETTINGS }, &updates).unwrap();
            let gradients: Vec<Array> = gradients.iter().map(Array::from).collect();
            let wanted_norm = plain(&mut wanted, &gradients, max_norm, step);
            assert!((norm - wanted_norm).abs() <= 1e-6 * wanted_norm, "{what}: norm {norm}, wanted {wanted_norm}");
            norms.push(norm);
        }
        let found: Vec<[Array; 3]> = slots.iter().map(Slot::arrays).collect();
        for (found, wanted) in found.iter().zip(&wanted) {
            for ((found, wanted), name) in found.iter().zip(wanted).zip(["parameter", "first moment", "second moment"])
            {
                assert_close(found, wanted, 2e-6, &format!("{what}: {name}"));
            }
        }
        (norms, found)
    })
}

fn bits((norms, slots): (Vec<f64>, Vec<[Array; 3]>)) -> Vec<u64> {
    let numbers = slots.into_iter().flatten().flat_map(|x| x.values);
    norms.into_iter().chain(numbers).map(f64::to_bits).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn steps(shapes in prop::collection::vec(prop::collection::vec(0usize..12, 1..4), 1..6), clip: bool, seed: u32) {
        for at in At::all() {
            let max_norm = clip.then_some(0.5);
            let once = run(&at, &shapes, max_norm, u64::from(seed));
            let again = run(&at, &shapes, max_norm, u64::from(seed));
            assert_eq!(bits(once), bits(again), "{:?}: other bits in a second run", at.computer);
        }
    }
}

#[test]
fn more_than_a_chunk() {
    for at in At::all() {
        run(&at, &[vec![3, 7001], vec![16_384], vec![5], vec![16_385]], Some(1.0), 9);
    }
}

/// Views into a larger tensor whose start no pack of numbers has.
#[test]
fn gradients_at_odd_addresses() {
    for at in At::all() {
        at.computer.run(|| {
            let gradient = Array::random(&[5], 4);
            let padded = Array::new(&[8], [&[9.0; 3], gradient.values.as_slice()].concat()).tensor(&at, false);
            let view = padded.narrow(0, 3, 5).unwrap();
            let [found, wanted] = [view.clone(), view.copy().unwrap()].map(|gradient| {
                let slot = Slot::new(&Array::random(&[5], 5), &at);
                let norm = adamw_step(&SETTINGS, &[slot.update(&gradient, 0, 1)]).unwrap();
                (norm, slot.arrays().map(|x| x.values))
            });
            assert_eq!(found, wanted, "{:?}", at.computer);
        });
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let at = At { computer: &Computer::all()[0], device: Device::Cpu, dtype: DType::F32 };
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| bits(run(&at, &[vec![300, 301], vec![70_000], vec![3]], Some(1.0), 11)))
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    for at in At::all() {
        at.computer.run(|| {
            let (good, bad) = (Array::random(&[4], 1), Array::new(&[3], vec![0.0, f64::INFINITY, 1.0]));
            let slots = [&good, &bad].map(|x| Slot::new(&Array::random(&x.shape, 2), &at));
            let before = slots.each_ref().map(|slot| slot.arrays().map(|x| x.values));
            let gradients = [good.tensor(&at, false), bad.tensor(&at, false)];
            let updates = [slots[0].update(&gradients[0], 0, 1), slots[1].update(&gradients[1], 1, 1)];
            let norm = adamw_step(&AdamW { max_norm: Some(1.0), ..SETTINGS }, &updates).unwrap();
            assert!(!norm.is_finite(), "{:?}: {norm}", at.computer);
            assert_eq!(slots.each_ref().map(|slot| slot.arrays().map(|x| x.values)), before, "{:?}", at.computer);
        });
    }
}

#[test]
fn no_update_has_a_norm_of_zero() {
    assert_eq!(adamw_step(&SETTINGS, &[]).unwrap(), 0.0);
}

#[test]
fn wrong_arguments_are_named_and_change_nothing() {
    for at in At::all() {
        at.computer.run(|| {
            let slots = [1, 2].map(|seed| Slot::new(&Array::random(&[4], seed), &at));
            let before = slots.each_ref().map(|slot| slot.arrays().map(|x| x.values));
            let (gradient, short) =
                (Array::random(&[4], 3).tensor(&at, false), Array::random(&[3], 3).tensor(&at, false));
            let error = |updates: &[Update]| adamw_step(&SETTINGS, updates).unwrap_err().to_string();
            let good = slots[0].update(&gradient, 0, 1);

            let found = error(&[good, slots[1].update(&short, 1, 1)]);
            assert!(found.contains("`gradient`") && found.contains("[4]") && found.contains("[3]"), "{found}");
            let found = error(&[good, slots[0].update(&gradient, 1, 1)]);
            assert!(found.contains("`parameter`") && found.contains("of its own"), "{found}");
            let found = error(&[good, Update { second_moment: &slots[1].0[1], ..slots[1].update(&gradient, 1, 1) }]);
            assert!(found.contains("`second_moment`") && found.contains("of its own"), "{found}");
            let found = error(&[good, slots[1].update(&slots[0].0[0].detach(), 1, 1)]);
            assert!(found.contains("`gradient`") && found.contains("update 1"), "{found}");
            let whole = Var::from_tensor(&Tensor::zeros(4, DType::U32, &at.device).unwrap()).unwrap();
            let found = error(&[good, slots[1].update(&whole, 1, 1)]);
            assert!(found.contains("`gradient`") && found.contains("U32"), "{found}");
            let found = error(&[Update { first_moment: &whole, ..good }]);
            assert!(found.contains("`first_moment`") && found.contains("U32"), "{found}");
            assert_eq!(slots.each_ref().map(|slot| slot.arrays().map(|x| x.values)), before);
        });
    }
}

#[test]
fn a_parameter_is_its_master_rounded() {
    let numbers = Array::random(&[3, 9001], 1);
    for at in At::all() {
        at.computer.run(|| {
            let wide = At { dtype: DType::F32, ..at.clone() };
            let [master, parameter] = [&wide, &at].map(|at| Var::from_tensor(&numbers.tensor(at, false)).unwrap());
            parameter.set(&parameter.zeros_like().unwrap()).unwrap();
            round_into(&parameter, &master).unwrap();
            let wanted = master.as_tensor().to_dtype(at.dtype).unwrap();
            assert_eq!(Array::from(parameter.as_tensor()).values, Array::from(&wanted).values, "{at:?}");
        });
    }
    let [a, b] = [2, 3].map(|count| Var::zeros(count, DType::F32, &Device::Cpu).unwrap());
    assert!(round_into(&a, &b).is_err());
}

/// Numbers of every size, with those that lie in the middle between two of bf16.
fn numbers_of_all_kinds() -> Tensor {
    let bits = (0..40_000u32).map(|i| i.wrapping_mul(0x9e37_79b9)).chain((0..200).map(|i| 0x3f80_8000 + (i << 16)));
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45];
    let finite = bits.map(f32::from_bits).filter(|x| x.is_finite()).chain(special).collect::<Vec<_>>();
    let count = finite.len();
    Tensor::from_vec(finite, count, &Device::Cpu).unwrap()
}

fn bits_of(x: &Tensor) -> Vec<u32> {
    x.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn halves_hold_every_bit_and_the_upper_is_the_nearest() {
    let wide = numbers_of_all_kinds();
    let halves = |count: usize| [DType::BF16, DType::I16].map(|dtype| Var::zeros(count, dtype, &Device::Cpu).unwrap());
    let [upper, lower] = halves(wide.elem_count());
    split_into(&upper, &lower, &wide).unwrap();
    assert_eq!(bits_of(&joined(&upper, &lower).unwrap()), bits_of(&wide));
    let nearest = wide.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    let found = upper.to_dtype(DType::F32).unwrap();
    let all = wide.to_vec1::<f32>().unwrap().into_iter().zip(bits_of(&found)).zip(bits_of(&nearest));
    for ((x, found), nearest) in all {
        let is_in_the_middle = x.to_bits() & 0xffff == 0x8000;
        assert!(found == nearest || is_in_the_middle && found == nearest + (1 << 16), "{x}");
    }
    // In both types, of every pattern.
    let bits = [0x7f80_0001, 0x7f80_8000, 0x7fc0_0000, 0x7fff_7fff, 0x7fff_8000, 0x7fff_ffff];
    let patterns: Vec<f32> =
        bits.into_iter().flat_map(|bits: u32| [bits, bits | 1 << 31]).map(f32::from_bits).collect();
    let [upper, lower] = halves(patterns.len());
    let not_numbers = Tensor::from_vec(patterns.clone(), patterns.len(), &Device::Cpu).unwrap();
    split_into(&upper, &lower, &not_numbers).unwrap();
    for found in [upper.to_dtype(DType::F32).unwrap(), joined(&upper, &lower).unwrap()] {
        let found = found.to_vec1::<f32>().unwrap();
        assert!(found.iter().zip(&patterns).all(|(x, of)| x.is_nan() && x.is_sign_negative() == of.is_sign_negative()));
    }
    let [upper, lower] = halves(3);
    assert!(split_into(&upper, &lower, &wide).is_err() && joined(&lower, &upper).is_err());
    assert!(joined(&upper, &halves(2)[1]).is_err());
}

#[test]
fn steps_of_halves_are_those_of_whole_numbers() {
    let start = Array::random(&[3, 9001], 1);
    let at = At { computer: &Computer::all()[0], device: Device::Cpu, dtype: DType::F32 };
    let (whole, of_halves) = (Slot::new(&start, &at), Slot::new(&start, &at));
    let parameter = Var::zeros(start.shape.as_slice(), DType::BF16, &Device::Cpu).unwrap();
    let rest = Var::zeros(start.shape.as_slice(), DType::I16, &Device::Cpu).unwrap();
    split_into(&parameter, &rest, &start.tensor(&at, false)).unwrap();
    for step in 1..=3 {
        let gradient = Array::random(&start.shape, step).tensor(&At { dtype: DType::BF16, ..at.clone() }, false);
        let settings = AdamW { max_norm: Some(1.0), ..SETTINGS };
        let plain = whole.update(&gradient, 0, step);
        let norms =
            [plain, Update { parameter: &parameter, rest: Some(&rest), ..of_halves.update(&gradient, 0, step) }]
                .map(|update| adamw_step(&settings, &[update]).unwrap());
        assert_eq!(norms[0], norms[1]);
        let found = joined(&parameter, &rest).unwrap().flatten_all().unwrap();
        assert_eq!(bits_of(&found), bits_of(&whole.0[0].flatten_all().unwrap()));
    }
    let gradient = start.tensor(&at, false);
    let wrong = Update { rest: Some(&rest), ..whole.update(&gradient, 0, 1) };
    let found = adamw_step(&SETTINGS, &[wrong]).unwrap_err().to_string();
    assert!(found.contains("`parameter`") && found.contains("BF16"), "{found}");
    let wide = Slot::new(&Array::random(&[5], 1), &At { dtype: DType::F64, ..at });
    let (right, of_wide) = (Update { parameter: &parameter, ..wrong }, Array::random(&[5], 2));
    let of_wide = Tensor::from_vec(of_wide.values, 5, &Device::Cpu).unwrap();
    let found = adamw_step(&SETTINGS, &[right, wide.update(&of_wide, 0, 1)]).unwrap_err().to_string();
    assert!(found.contains("`parameter`") && found.contains("F64 of shape [5]"), "{found}");
}
