use proptest::prelude::*;
use xvlm_kernels as kernels;

use crate::check::{Array, check};

/// Keys' cubic kernel with a = −0.75.
fn kernel(x: f64) -> f64 {
    const A: f64 = -0.75;
    match x.abs() {
        x if x < 1.0 => (A + 2.0) * x.powi(3) - (A + 3.0) * x.powi(2) + 1.0,
        x if x < 2.0 => A * (x.powi(3) - 5.0 * x.powi(2) + 8.0 * x - 4.0),
        _ => 0.0,
    }
}

/// Each place as a sum over the 4 × 4 places around its source.
fn bicubic(x: &Array, height: usize, width: usize) -> Array {
    let &[h, w, c] = x.shape.as_slice() else { panic!("three dimensions") };
    let taps = |place: usize, from: usize, to: usize| {
        let source = (place as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        (-1..3).map(move |offset| {
            let at = source.floor() + f64::from(offset);
            (at.clamp(0.0, (from - 1) as f64) as usize, kernel(source - at))
        })
    };
    let mut values = Vec::new();
    for (y, x0) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
        for channel in 0..c {
            let row =
                |row: usize| taps(x0, w, width).map(|(at, k)| k * x.values[(row * w + at) * c + channel]).sum::<f64>();
            values.push(taps(y, h, height).map(|(at, k)| k * row(at)).sum());
        }
    }
    Array::new(&[height, width, c], values)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn resizing(from in (1usize..7, 1usize..7), to in (1usize..9, 1usize..9), channels in 1usize..4, seed: u64) {
        let ((h, w), (height, width)) = (from, to);
        let plain = |[x]: &[Array; 1]| bicubic(x, height, width);
        check([Array::random(&[h, w, channels], seed)], plain, |_, [x]| kernels::resize_bicubic(x, height, width));
    }
}
