//! RandAugment is the original's (see `golden/README.md`).

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use xvlm_data::{Operation, Picture, RandAugment};

fn picture(tensor: &Tensor) -> Picture {
    let (height, width, _) = tensor.dims3().unwrap();
    let bytes = tensor.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    Picture::from_rgb(width as u32, height as u32, bytes).unwrap()
}

fn largest_difference(a: &Picture, b: &Picture) -> u8 {
    a.rgb().iter().zip(b.rgb()).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

fn operation(name: &str) -> Operation {
    serde_json::from_value(serde_json::Value::from(name)).unwrap()
}

#[test]
fn operations_are_the_originals() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/augment.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let mut seen = std::collections::HashMap::<Operation, u8>::new();
    for (name, expected) in &tensors {
        let parts: Vec<&str> = name.split('.').collect();
        let [operation_name, level, sign, index] = parts[..] else { continue };
        let mut found = picture(&tensors[&format!("in.{index}")]);
        let operation = operation(operation_name);
        operation.apply(&mut found, level.parse().unwrap(), sign == "-", true);
        let difference = largest_difference(&found, &picture(expected));
        let worst = seen.entry(operation).or_default();
        *worst = difference.max(*worst);
    }
    assert_eq!(seen.len(), 14);
    assert!(seen.values().all(|&worst| worst <= 1), "{seen:?}");
    let exact = seen.values().filter(|&&worst| worst == 0).count();
    assert!(exact >= 13, "{seen:?}");
}

#[test]
fn by_default_nothing_wraps_around() {
    // A dark channel, a bright one, and one with an edge at the brightest.
    let pixels = (0..64u32).flat_map(|i| {
        let x = i % 8;
        [40 + x as u8, 200 + x as u8, if x < 4 { 100 } else { 255 }]
    });
    let original = Picture::from_rgb(8, 8, pixels.collect()).unwrap();
    for (operation, magnitude) in [(Operation::AutoContrast, 7.0), (Operation::Sharpness, 10.0)] {
        let apply = |wrapping| {
            let mut picture = original.clone();
            operation.apply(&mut picture, magnitude, false, wrapping);
            picture
        };
        let (mended, wrapped) = (apply(false), apply(true));
        assert!(largest_difference(&mended, &wrapped) > 128, "{operation:?}");
        let along =
            |picture: &Picture, c: usize| (0..8).map(|x| picture.rgb()[(3 * 8 + x) * 3 + c]).collect::<Vec<_>>();
        for c in 0..3 {
            let row = along(&mended, c);
            let [dark, bright] =
                [&row[..4], &row[4..]].map(|half| half.iter().map(|&byte| u32::from(byte)).sum::<u32>());
            assert!(dark < bright, "{operation:?} of channel {c}: {row:?}");
        }
    }
}

#[test]
fn drawing_is_a_function_of_the_generator() {
    let pixels = (0..32 * 32 * 3u32).map(|i| (i * 7 % 251) as u8).collect();
    let original = Picture::from_rgb(32, 32, pixels).unwrap();
    let draw = |config: &RandAugment, seed| {
        let mut picture = original.clone();
        config.apply(&mut picture, &mut ChaCha8Rng::seed_from_u64(seed));
        picture
    };
    let config = RandAugment::pretraining();
    let all: Vec<Picture> = (0..200).map(|seed| draw(&config, seed)).collect();
    assert!((0..200).all(|seed| draw(&config, seed) == all[seed as usize]));
    // Nothing happens if no operation is taken (¼), or those taken are Identity: (½ + ½ · 1/10)² = 0.30.
    let same = all.iter().filter(|picture| **picture == original).count();
    assert!((40..=85).contains(&same), "{same} of 200 are as they were");
    let none = RandAugment { count: 0, ..RandAugment::all(0, 10.0) };
    assert!(draw(&none, 1) == original);
}

#[test]
fn configurations_are_checked() {
    let read = serde_json::from_str::<RandAugment>;
    let config = read(r#"{"count": 2, "magnitude": 7, "operations": ["Rotate", "ShearX"]}"#).unwrap();
    assert!(!config.keeps_places() && config.check().is_ok() && !config.wrapping);
    assert!(RandAugment::boxes().keeps_places() && !RandAugment::pretraining().keeps_places());
    assert_eq!(RandAugment::pretraining().operations.len(), 10);
    assert!(read(r#"{"count": 2, "magnitude": 7, "operations": ["Rotat"]}"#).is_err());
    assert!(read(r#"{"count": 2, "magnitude": 7, "operations": [], "n": 1}"#).is_err());
    let nothing = RandAugment { operations: vec![], ..config.clone() };
    assert!(nothing.check().unwrap_err().to_string().contains("augment.operations"));
    for magnitude in [-1.0, 11.0, f64::NAN] {
        let wrong = RandAugment { magnitude, ..config.clone() };
        assert!(wrong.check().unwrap_err().to_string().contains("augment.magnitude"), "{magnitude}");
    }
}
