use candle_core::{DType, Tensor, Var};
use proptest::prelude::*;
use xvlm_kernels::{self as kernels, BoxFormat};

use crate::check::{Array, At, assert_close, check};
use crate::device::Computer;

type Bounds = [f64; 4];

fn quads(boxes: &Array) -> Vec<Bounds> {
    boxes.values.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]).collect()
}

fn corners(b: Bounds, format: BoxFormat) -> Bounds {
    match format {
        BoxFormat::Cxcywh => [b[0] - b[2] / 2.0, b[1] - b[3] / 2.0, b[0] + b[2] / 2.0, b[1] + b[3] / 2.0],
        BoxFormat::Xyxy => b,
    }
}

/// Rezatofighi et al. 2019, algorithm 1.
fn giou(a: Bounds, b: Bounds, format: BoxFormat) -> f64 {
    let (a, b) = (corners(a, format), corners(b, format));
    let area = |x0: f64, y0: f64, x1: f64, y1: f64| (x1 - x0).max(0.0) * (y1 - y0).max(0.0);
    let intersection = area(a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3]));
    let union = area(a[0], a[1], a[2], a[3]) + area(b[0], b[1], b[2], b[3]) - intersection;
    let hull = area(a[0].min(b[0]), a[1].min(b[1]), a[2].max(b[2]), a[3].max(b[3]));
    let ratio = |above: f64, below: f64| if below > 1e-12 { above / below } else { 0.0 };
    ratio(intersection, union) - ratio(hull - union, hull)
}

fn losses(a: Bounds, b: Bounds) -> [f64; 2] {
    let distance = a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum();
    [distance, 1.0 - giou(a, b, BoxFormat::Cxcywh)]
}

const FORMATS: [BoxFormat; 2] = [BoxFormat::Cxcywh, BoxFormat::Xyxy];

/// `count` boxes whose numbers are multiples of 1/64, so that every float type holds them, with the corners of the ones
/// `odd` at odd and of the others at even ones: no edge of the ones is near one of the others. One in six has a negative
/// side.
fn boxes(count: usize, odd: bool, format: BoxFormat, seed: u64) -> Array {
    let unit = Array::random(&[count, 4], seed).map(|x| (x + 1.0) / 2.0).values;
    let shift = f64::from(u8::from(odd));
    let bounds = |(i, u): (usize, &[f64])| {
        let axis = |place: f64, size: f64| {
            let low = 2.0 * (place * 20.0).floor() + shift;
            let high = low + 4.0 + 2.0 * (size * 10.0).floor() * 2.0;
            if i % 6 == 5 { (high, low) } else { (low, high) }
        };
        let ((x0, x1), (y0, y1)) = (axis(u[0], u[1]), axis(u[2], u[3]));
        match format {
            BoxFormat::Xyxy => [x0, y0, x1, y1],
            BoxFormat::Cxcywh => [(x0 + x1) / 2.0, (y0 + y1) / 2.0, x1 - x0, y1 - y0],
        }
        .map(|x| x / 64.0)
    };
    Array::new(&[count, 4], unit.chunks_exact(4).enumerate().flat_map(bounds).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn gious(n in 0usize..40, m in 0usize..40, seed: u64) {
        for format in FORMATS {
            let (a, b) = (boxes(n, false, format, seed), boxes(n, true, format, seed ^ 1));
            let plain = |[a, b]: &[Array; 2]| {
                let values = quads(a).into_iter().zip(quads(b)).map(|(a, b)| giou(a, b, format)).collect();
                Array::new(&a.shape[..1], values)
            };
            check([a.clone(), b], plain, |_, [a, b]| kernels::giou(a, b, format));
            let plain = |[a, b]: &[Array; 2]| {
                let columns = quads(b);
                let row = |a: Bounds| columns.iter().map(move |b| giou(a, *b, format)).collect::<Vec<_>>();
                Array::new(&[a.shape[0], b.shape[0]], quads(a).into_iter().flat_map(row).collect())
            };
            let b = boxes(m, true, format, seed ^ 2);
            check([a, b], plain, |_, [a, b]| kernels::pairwise_giou(a, b, format));
        }
    }

    #[test]
    fn box_losses(n in 0usize..70, seed: u64) {
        let (p, t) = (boxes(n, false, BoxFormat::Cxcywh, seed), boxes(n, true, BoxFormat::Cxcywh, seed ^ 1));
        // Off the others' centres and sides, too, where the distance has a kink.
        let p = p.map(|x| x + 1.0 / 256.0);
        let plain = |[p, t]: &[Array; 2]| {
            let values = quads(p).into_iter().zip(quads(t)).flat_map(|(p, t)| losses(p, t)).collect();
            Array::new(&[p.shape[0], 2], values)
        };
        check([p, t], plain, |_, [p, t]| kernels::box_losses(p, t));
    }

    /// Any boxes at all: values in [−1, 1] and gradients that are numbers.
    #[test]
    fn all_boxes_have_values(seed: u64) {
        const NUMBERS: [f64; 8] = [0.0, 0.0, 0.5, 0.5, -0.25, 1e-7, 3e-30, 1e4];
        let pick = |seed: u64| Array::random(&[40, 4], seed).map(|x| NUMBERS[((x + 1.0) * 4.0) as usize % 8]);
        for at in At::all() {
            // Numbers as small as these have slopes beyond the largest number of this type.
            if at.dtype == DType::F16 {
                continue;
            }
            for format in FORMATS {
                at.computer.run(|| {
                    let [a, b] = [seed, seed ^ 1].map(|seed| Var::from_tensor(&pick(seed).tensor(&at, false)).unwrap());
                    let paired = kernels::giou(&a, &b, format).unwrap();
                    let all = kernels::pairwise_giou(&a, &b, format).unwrap();
                    let losses = kernels::box_losses(&a, &b).unwrap();
                    for values in [&paired, &all, &losses] {
                        let gradients = values.sum_all().unwrap().backward().unwrap();
                        for boxes in [&a, &b] {
                            let gradient = Array::from(gradients.get(boxes).unwrap());
                            assert!(gradient.values.iter().all(|x| x.is_finite()), "{:?} {:?}", at, gradient.values);
                        }
                    }
                    for value in [paired, all].iter().flat_map(|values| Array::from(values).values) {
                        assert!(value.abs() <= 1.0 + 1e-5, "{at:?}: a GIoU of {value}");
                    }
                });
            }
        }
    }
}

/// What PyTorch's `max`, `min`, `clamp` and `abs` make of ties, by hand.
#[test]
fn ties_are_shared() {
    let rows = |rows: &[Bounds]| Array::new(&[rows.len(), 4], rows.concat());
    // Equal boxes; two side by side; one without height in the middle of another; equal points.
    let a = rows(&[[0., 0., 2., 2.], [0., 0., 1., 2.], [0., 1., 2., 1.], [1., 1., 1., 1.]]);
    let b = rows(&[[0., 0., 2., 2.], [1., 0., 2., 2.], [0., 0., 2., 2.], [1., 1., 1., 1.]]);
    let values = Array::new(&[4], vec![1.0, 0.0, 0.0, 0.0]);
    // By an edge: (∂I · (1/U + I/U² − 1/C) + ∂A · (1/C − I/U²) − ∂C · U/C²), each a length or half of one at a tie.
    //
    // Equal, I = U = C = 4: ∂I = ∂A/2 = ∂C/2 = ±1 and ∂A = ±2, so ±(1/4 + 0 − 1/4).
    // Side by side, I = 0, U = C = 4. The outer edge x0: 0, −2/4, +2/4. The shared x1: the overlap of exactly 0 opens with
    // half of 2 · (1/4 − 1/4); +2/4; the hull's high edge is the other's. y: ∂I = 0, ±1/4, ∓½ · 2/4.
    // Without height, I = 0, U = C = 4: x: ∂I, ∂A, ∂C are 0, 0, ½ · 2: ∓1/4. y0: ∂I = −2 · (1/4 − 1/4), −2/4, and not of the
    // hull; y1 the same upwards.
    let by_a = rows(&[[0., 0., 0., 0.], [0., 0., 0.5, 0.], [0.25, -0.5, -0.25, 0.5], [0., 0., 0., 0.]]);
    for at in At::all() {
        at.computer.run(|| {
            let [first, second] = [&a, &b].map(|boxes| Var::from_tensor(&boxes.tensor(&at, false)).unwrap());
            let found = kernels::giou(&first, &second, BoxFormat::Xyxy).unwrap();
            let gradients = found.sum_all().unwrap().backward().unwrap();
            let what = format!("{:?} {:?}", at.computer, at.dtype);
            assert_close(&Array::from(&found), &values, at.tolerance(), &what);
            assert_close(&Array::from(gradients.get(&first).unwrap()), &by_a, at.tolerance(), &what);

            // A distance of 0 has no slope.
            let found = kernels::box_losses(&second, &second.detach()).unwrap().narrow(1, 0, 1).unwrap();
            let gradients = found.sum_all().unwrap().backward().unwrap();
            let gradient = Array::from(gradients.get(&second).unwrap());
            assert!(gradient.values.iter().all(|x| *x == 0.0), "{what}: {:?}", gradient.values);
        });
    }
}

#[test]
fn only_what_is_trained_gets_a_gradient() {
    for at in At::all() {
        at.computer.run(|| {
            let numbers = boxes(5, false, BoxFormat::Cxcywh, 3);
            let other = boxes(5, true, BoxFormat::Cxcywh, 4);
            let trained = Var::from_tensor(&numbers.tensor(&at, false)).unwrap();
            let fixed = other.tensor(&at, false);
            let both = Var::from_tensor(&fixed).unwrap();
            for (a, b) in [(trained.as_tensor(), &fixed), (&fixed, trained.as_tensor())] {
                let (c, d) = if a.is_variable() { (a, both.as_tensor()) } else { (both.as_tensor(), b) };
                for format in FORMATS {
                    let of = |values: candle_core::Result<Tensor>| {
                        let gradients = values.unwrap().sum_all().unwrap().backward().unwrap();
                        Array::from(gradients.get(&trained).unwrap()).values
                    };
                    assert_eq!(of(kernels::giou(a, b, format)), of(kernels::giou(c, d, format)));
                    assert_eq!(of(kernels::pairwise_giou(a, b, format)), of(kernels::pairwise_giou(c, d, format)));
                    assert_eq!(of(kernels::box_losses(a, b)), of(kernels::box_losses(c, d)));
                }
            }
        });
    }
}

#[test]
fn conversions_and_iou() {
    let a = boxes(20, false, BoxFormat::Cxcywh, 1);
    let of = |boxes: &Array, f: fn(Bounds) -> Bounds| {
        Array::new(&boxes.shape, quads(boxes).into_iter().flat_map(f).collect())
    };
    let to_corners = |b: Bounds| corners(b, BoxFormat::Cxcywh);
    let to_centres = |b: Bounds| [(b[0] + b[2]) / 2.0, (b[1] + b[3]) / 2.0, b[2] - b[0], b[3] - b[1]];
    check([a.clone()], |[a]| of(a, to_corners), |_, [a]| kernels::cxcywh_to_xyxy(a));
    check([of(&a, to_corners)], |[a]| of(a, to_centres), |_, [a]| kernels::xyxy_to_cxcywh(a));
    let corners = [boxes(20, false, BoxFormat::Xyxy, 1), boxes(20, true, BoxFormat::Xyxy, 2)];
    let areas = |[a, b]: &[Array; 2]| -> Vec<(f64, f64)> {
        let area = |b: Bounds| (b[2] - b[0]).max(0.0) * (b[3] - b[1]).max(0.0);
        let pair = |(a, b): (Bounds, Bounds)| {
            let both = area([a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])]);
            let union = area(a) + area(b) - both;
            (if union > 0.0 { both / union } else { 0.0 }, union)
        };
        quads(a).into_iter().zip(quads(b)).map(pair).collect()
    };
    let first = |boxes: &[Array; 2]| Array::new(&[20], areas(boxes).iter().map(|(iou, _)| *iou).collect());
    let second = |boxes: &[Array; 2]| Array::new(&[20], areas(boxes).iter().map(|(_, union)| *union).collect());
    check(corners.clone(), first, |_, [a, b]| Ok(kernels::iou(a, b)?.0));
    check(corners, second, |_, [a, b]| Ok(kernels::iou(a, b)?.1));
}

#[test]
fn wrong_shapes_are_named() {
    for computer in Computer::all() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &computer.device()).unwrap();
        let (three, four, five) = (zeros(&[3, 4]), zeros(&[4, 4]), zeros(&[3, 5]));
        let giou = |a, b| computer.run(|| kernels::giou(a, b, BoxFormat::Xyxy)).unwrap_err().to_string();
        let found = giou(&three, &four);
        assert!(found.contains("giou: `b`") && found.contains("[3, 4]") && found.contains("[4, 4]"), "{found}");
        let found = giou(&five, &three);
        assert!(found.contains("giou: `a`") && found.contains("[N, 4]") && found.contains("[3, 5]"), "{found}");
        let found = kernels::pairwise_giou(&three, &five, BoxFormat::Xyxy).unwrap_err().to_string();
        assert!(found.contains("pairwise_giou: `b`"), "{found}");
        let found = kernels::box_losses(&three, &four).unwrap_err().to_string();
        assert!(found.contains("box_losses: `target`"), "{found}");
        let found = kernels::box_losses(&three, &three.to_dtype(DType::F64).unwrap()).unwrap_err().to_string();
        assert!(found.contains("`target`") && found.contains("F64"), "{found}");
    }
}
