use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use xvlm_kernels as kernels;

use crate::check::{Array, check};

/// Each patch, row by row, as `[C, patch, patch]`.
fn plain_split(pixels: &Array, patch: usize) -> Array {
    let [n, channels, height, width] = pixels.shape[..] else { panic!("four dimensions") };
    let mut out = Vec::with_capacity(pixels.values.len());
    for image in 0..n {
        for top in (0..height).step_by(patch) {
            for left in (0..width).step_by(patch) {
                for channel in 0..channels {
                    for y in top..top + patch {
                        let row = ((image * channels + channel) * height + y) * width;
                        out.extend(&pixels.values[row + left..][..patch]);
                    }
                }
            }
        }
    }
    Array::new(&[n, height / patch * (width / patch), channels * patch * patch], out)
}

/// Upper left, lower left, upper right, lower right of each 2 × 2.
fn plain_merged(x: &Array, height: usize, width: usize) -> Array {
    let [n, tokens, c] = x.shape[..] else { panic!("three dimensions") };
    let mut out = Vec::with_capacity(x.values.len());
    for image in 0..n {
        for y in (0..height).step_by(2) {
            for left in (0..width).step_by(2) {
                for (down, right) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
                    let token = (image * tokens) + (y + down) * width + left + right;
                    out.extend(&x.values[token * c..][..c]);
                }
            }
        }
    }
    Array::new(&[n, tokens / 4, 4 * c], out)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn split_patches(
        n in 0usize..3, channels in 1usize..4, down in 0usize..4, across in 0usize..4, patch in 1usize..6, seed: u64,
    ) {
        check(
            [Array::random(&[n, channels, down * patch, across * patch], seed)],
            |[pixels]| plain_split(pixels, patch),
            |_, [pixels]| kernels::split_patches(pixels, patch),
        );
    }

    #[test]
    fn merge_patches(n in 0usize..3, down in 0usize..4, across in 0usize..4, c in 1usize..20, seed: u64) {
        let (height, width) = (2 * down, 2 * across);
        check(
            [Array::random(&[n, height * width, c], seed)],
            |[x]| plain_merged(x, height, width),
            |_, [x]| kernels::merge_patches(x, height, width),
        );
    }
}

#[test]
fn wrong_grids_are_named() {
    let x = Tensor::zeros((1, 12, 2), DType::F32, &Device::Cpu).unwrap();
    let error = |height, width| kernels::merge_patches(&x, height, width).unwrap_err().to_string();
    let found = error(4, 2);
    assert!(found.contains("merge_patches") && found.contains("[1, 8, 2]"), "{found}");
    let found = error(4, 3);
    assert!(found.contains("even") && found.contains("4 × 3"), "{found}");
    let pixels = Tensor::zeros((1, 3, 8, 6), DType::F32, &Device::Cpu).unwrap();
    for patch in [0, 4] {
        let found = kernels::split_patches(&pixels, patch).unwrap_err().to_string();
        assert!(found.contains("split_patches") && found.contains("8 and 6"), "{found}");
    }
}
