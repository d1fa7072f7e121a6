use candle_core::{DType, Tensor};
use proptest::prelude::*;
use xvlm_kernels::{self as kernels, Cover};

use crate::check::{Array, At, check};
use crate::device::Computer;

/// The mean of the patches where `covers(region, patch)`, then all patches of the image.
fn pool(patches: &Array, index: &[u32], covers: impl Fn(usize, usize) -> bool) -> Array {
    let [_, l, c] = patches.shape[..] else { panic!("patches of shape {:?}", patches.shape) };
    let mut out = Vec::new();
    for (region, &image) in index.iter().enumerate() {
        let image = &patches.values[image as usize * l * c..][..l * c];
        let covered: Vec<usize> = (0..l).filter(|&patch| covers(region, patch)).collect();
        for channel in 0..c {
            let sum: f64 = covered.iter().map(|patch| image[patch * c + channel]).sum();
            out.push(sum / covered.len().max(1) as f64);
        }
        out.extend(image);
    }
    Array::new(&[index.len(), 1 + l, c], out)
}

/// A few numbers below `bound` by a seed.
fn numbers(count: usize, bound: usize, seed: u64) -> Vec<u32> {
    let unit = Array::random(&[count], seed).values.into_iter().map(|x| (x + 1.0) / 2.0);
    unit.map(|x| ((x * bound as f64) as u32).min(bound as u32 - 1)).collect()
}

/// Boxes in `f32`: most inside the image, some beyond its border, some without area.
fn boxes(count: usize, seed: u64) -> Vec<[f32; 4]> {
    let unit = Array::random(&[count, 4], seed).map(|x| (x + 1.0) / 2.0).values;
    let bounds = |(i, b): (usize, &[f64])| {
        let [cx, cy, w, h] = [b[0], b[1], b[2], b[3]].map(|x| x as f32);
        match i % 5 {
            0 => [1.2 * cx, 1.2 * cy - 0.2, w, h],
            1 => [cx, cy, 0.0, h],
            2 => [(8.0 * cx).round() / 8.0, (4.0 * cy).round() / 4.0, 0.25, 0.5],
            _ => [cx, cy, w, h],
        }
    };
    unit.chunks_exact(4).enumerate().map(bounds).collect()
}

fn upload(boxes: &[[f32; 4]], at: &At) -> Tensor {
    Tensor::from_slice(boxes.as_flattened(), (boxes.len(), 4), &at.device).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn by_masks(images in 1usize..4, regions in 0usize..7, l in 1usize..40, c in 1usize..40, packed: bool, seed: u64) {
        let c = if packed { 8 * c } else { c };
        let (patches, index) = (Array::random(&[images, l, c], seed), numbers(regions, images, seed ^ 1));
        // A third of the patches; nothing in every fourth region.
        let covers = |region: usize, patch: usize| {
            region % 4 != 3 && (region * 7 + patch * 5 + seed as usize % 11).is_multiple_of(3)
        };
        let mask = (0..regions * l).map(|i| f64::from(u8::from(covers(i / l, i % l)))).collect();
        let mask = Array::new(&[regions, l], mask);
        check([patches], |[patches]| pool(patches, &index, covers), |at, [patches]| {
            kernels::patch_pool(patches, &index, Cover::Mask(&mask.tensor(at, true)))
        });
    }

    #[test]
    fn by_boxes(images in 1usize..4, regions in 0usize..8, side in 1usize..7, c in 1usize..40, seed: u64) {
        let l = side * side;
        let (patches, index) = (Array::random(&[images, l, c], seed), numbers(regions, images, seed ^ 1));
        let boxes = boxes(regions, seed ^ 2);
        // The edges in f32, as the original computes them.
        let covers = |region: usize, patch: usize| {
            let inside = |axis: usize, at: usize| {
                let (centre, half) = (boxes[region][axis], boxes[region][axis + 2] / 2.0);
                let low = ((centre - half) * side as f32).floor().clamp(0.0, side as f32 - 1.0);
                let high = ((centre + half) * side as f32).ceil().clamp(low + 1.0, side as f32);
                (low as usize..high as usize).contains(&at)
            };
            inside(0, patch % side) && inside(1, patch / side)
        };
        check([patches], |[patches]| pool(patches, &index, covers), |at, [patches]| {
            kernels::patch_pool(patches, &index, Cover::Boxes(&upload(&boxes, at)))
        });
    }
}

/// What a box covers is the same by a mask and by the box, whatever it is.
#[test]
fn strange_boxes_cover_what_their_masks_do() {
    const STRANGE: [f32; 12] =
        [0.0, -0.0, 1.0, 0.25, 1e-20, -3.0, 1e9, -1e30, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX];
    let pick = |i: usize| STRANGE[i % STRANGE.len()];
    for side in [1, 3, 8] {
        let boxes: Vec<[f32; 4]> = (0..300).map(|i| [pick(i), pick(i / 7), pick(i / 3), pick(i / 5)]).collect();
        let masks: Vec<f32> = boxes.iter().flat_map(|&bounds| kernels::patch_rectangle_mask(bounds, side)).collect();
        for row in masks.chunks_exact(side * side) {
            assert!(row.contains(&1.0), "a box covers at least one patch");
        }
        for at in At::all() {
            let patches = Array::random(&[2, side * side, 3], 5).tensor(&at, false);
            let index = numbers(boxes.len(), 2, 6);
            let masks = Tensor::from_slice(&masks, (boxes.len(), side * side), &at.device).unwrap();
            let [by_mask, by_box] = [Cover::Mask(&masks), Cover::Boxes(&upload(&boxes, &at))]
                .map(|cover| at.computer.run(|| kernels::patch_pool(&patches, &index, cover)).unwrap())
                .map(|pooled| Array::from(&pooled).values);
            assert_eq!(by_mask, by_box, "{:?}", at.computer);
        }
    }
}

#[test]
fn what_is_not_covered_does_not_count() {
    for at in At::all() {
        let patches = Array::new(&[1, 2, 1], vec![f64::NAN, 2.0]).tensor(&at, false);
        let mask = Tensor::new(&[[0u8, 1]], &at.device).unwrap();
        let pooled = at.computer.run(|| kernels::patch_pool(&patches, &[0], Cover::Mask(&mask))).unwrap();
        let first = Array::from(&pooled).values[0];
        assert!(first == 2.0 || at.dtype == DType::F64, "{:?}: {first}", at.computer);
    }
}

#[test]
fn wrong_arguments_are_named() {
    for computer in Computer::all() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &computer.device()).unwrap();
        let error = |patches: &[usize], index: &[u32], cover: Cover| {
            computer.run(|| kernels::patch_pool(&zeros(patches), index, cover)).unwrap_err().to_string()
        };
        let found = error(&[2, 4, 3], &[0], Cover::Mask(&zeros(&[1, 5])));
        assert!(
            found.contains("patch_pool: `mask`") && found.contains("[1, 4]") && found.contains("[1, 5]"),
            "{found}"
        );
        let found = error(&[2, 4, 3], &[0, 2], Cover::Mask(&zeros(&[2, 4])));
        assert!(found.contains("`index`") && found.contains("below 2"), "{found}");
        let found = error(&[2, 4, 3], &[0], Cover::Boxes(&zeros(&[1, 5])));
        assert!(found.contains("`boxes`") && found.contains("[1, 4]"), "{found}");
        let found = error(&[2, 6, 3], &[0], Cover::Boxes(&zeros(&[1, 4])));
        assert!(found.contains("square grid"), "{found}");
        let found = error(&[2, 4, 3], &[0], Cover::Boxes(&zeros(&[1, 4]).to_dtype(DType::F64).unwrap()));
        assert!(found.contains("F32") && found.contains("F64"), "{found}");
        let found = error(&[2, 4], &[0], Cover::Mask(&zeros(&[1, 4])));
        assert!(found.contains("`patches`"), "{found}");
    }
}
