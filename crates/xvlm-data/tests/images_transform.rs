//! Crops are drawn as torchvision draws them, and what is drawn into a picture lands where its transformed box says.

use std::io::Cursor;

use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm_data::{DecodeOptions, Encoded, Picture, RandomResizedCrop, Rect, Transform, View};

/// A dark noisy picture with a bright rectangle in it.
fn picture(width: u32, height: u32, [x, y, w, h]: [u32; 4], rng: &mut impl Rng) -> Picture {
    let mut rgb = Vec::new();
    for (row, column) in (0..height).flat_map(|row| (0..width).map(move |column| (row, column))) {
        let inside = (x..x + w).contains(&column) && (y..y + h).contains(&row);
        rgb.extend(if inside { [250, 240, 10] } else { [rng.random_range(0..40), 20, 230] });
    }
    Picture::from_rgb(width, height, rgb).unwrap()
}

/// Left, upper, right and lower edge of what is brighter than the middle between the two colours.
fn bright_edges(picture: &Picture) -> Option<[f64; 4]> {
    let side = picture.width() as usize;
    let green = |x: usize, y: usize| picture.rgb()[(y * side + x) * 3 + 1];
    let bright: Vec<(usize, usize)> =
        (0..side * side).map(|i| (i % side, i / side)).filter(|&(x, y)| green(x, y) > 130).collect();
    let columns = || bright.iter().map(|&(x, _)| x);
    let rows = || bright.iter().map(|&(_, y)| y);
    let edges = [columns().min()?, rows().min()?, columns().max()? + 1, rows().max()? + 1];
    Some(edges.map(|edge| edge as f64))
}

fn jpeg(picture: &Picture) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 97);
    encoder.encode(picture.rgb(), picture.width(), picture.height(), image::ExtendedColorType::Rgb8).unwrap();
    bytes.into_inner()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn boxes_land_where_pictures_do(
        size in (40u32..200, 40u32..200),
        place in any::<[u16; 4]>(),
        seed in any::<u64>(),
        region in any::<bool>(),
        flip in any::<bool>(),
    ) {
        let ((width, height), mut rng) = (size, ChaCha8Rng::seed_from_u64(seed));
        let along = |side: u32, from: u16, size: u16| {
            let size = 12 + u32::from(size) % (side / 2);
            (u32::from(from) % (side - size), size)
        };
        let ((x, w), (y, h)) = (along(width, place[0], place[2]), along(height, place[1], place[3]));
        let picture = picture(width, height, [x, y, w, h], &mut rng);
        let bbox = [x, y, w, h].map(|v| v as f32);
        let transform = Transform { crop: None, random_crop: true, hflip: true, careful_hflip: true };
        let crop = if region {
            transform.crop_around(bbox, width, height, &mut rng)
        } else {
            RandomResizedCrop::pretraining().draw(width, height, &mut rng)
        };
        prop_assert!(crop.is_inside(width, height));
        let view = View { crop, flip };
        let placed = view.place(bbox, 0.0);
        if region {
            // All of the box is kept.
            let kept = placed.unwrap().centered();
            let area = f64::from(kept[2]) * f64::from(kept[3]) * f64::from(crop.width) * f64::from(crop.height);
            prop_assert!((area / f64::from(w * h) - 1.0).abs() < 1e-3);
        }
        const SIDE: usize = 96;
        // From files of which only the crop is decoded, and of which all is.
        let views = [jpeg(&picture), picture.to_png().unwrap()].map(|stored| {
            view.decode(&Encoded::new(stored, &"x", DecodeOptions::default()).unwrap(), SIDE).unwrap()
        });
        for found in views {
            prop_assert_eq!((found.width(), found.height()), (SIDE as u32, SIDE as u32));
            let Some(placed) = placed else {
                prop_assert_eq!(bright_edges(&found), None);
                continue;
            };
            let [cx, cy, w, h] = placed.centered().map(|v| f64::from(v) * SIDE as f64);
            // What is narrower than a pixel or two may drown.
            prop_assume!(w > 3.0 && h > 3.0);
            let expected = [cx - w / 2.0, cy - h / 2.0, cx + w / 2.0, cy + h / 2.0];
            let edges = bright_edges(&found).unwrap();
            // A pixel of the source, or two of the view.
            let slack = [crop.width, crop.height].map(|side| (SIDE as f64 / f64::from(side)).max(2.0));
            for (i, (edge, expected)) in edges.iter().zip(expected).enumerate() {
                prop_assert!((edge - expected).abs() <= slack[i % 2], "{:?} instead of {:?}", edges, expected);
            }
        }
    }

    #[test]
    fn crops_are_of_the_asked_size_and_shape(size in (1u32..600, 1u32..600), seed in any::<u64>()) {
        let ((width, height), mut rng) = (size, ChaCha8Rng::seed_from_u64(seed));
        let crop = RandomResizedCrop::pretraining().draw(width, height, &mut rng);
        prop_assert!(crop.is_inside(width, height), "{:?}", crop);
        let [w, h] = [crop.width, crop.height].map(f64::from);
        // Sides are rounded to pixels.
        let (least, largest) = ((w - 0.5) / (h + 0.5), (w + 0.5) / (h - 0.5));
        prop_assert!(largest >= 0.75 && least <= 4.0 / 3.0, "{:?}", crop);
    }
}

#[test]
fn crops_are_uniform_in_area_and_place() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    // Of a square, each square fits.
    let config = RandomResizedCrop { scale: [0.2, 1.0], ratio: [1.0, 1.0] };
    let crops: Vec<Rect> = (0..4000).map(|_| config.draw(1000, 1000, &mut rng)).collect();
    let mean = |value: &dyn Fn(&Rect) -> f64| crops.iter().map(value).sum::<f64>() / crops.len() as f64;
    let area = |crop: &Rect| f64::from(crop.width) * f64::from(crop.height) / 1e6;
    assert!((mean(&area) - 0.6).abs() < 0.02, "{}", mean(&area));
    assert!((mean(&|crop| f64::from(u8::from(area(crop) < 0.4))) - 0.25).abs() < 0.03);
    let room = |crop: &Rect| f64::from(1000 - crop.width).max(1.0);
    assert!((mean(&|crop| f64::from(crop.x) / room(crop)) - 0.5).abs() < 0.02);
    assert!((mean(&|crop| f64::from(crop.y) / room(crop)) - 0.5).abs() < 0.02);
}

#[test]
fn what_cannot_be_drawn_is_central() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    // Nothing of a third of a ribbon's area has such a ratio.
    let config = RandomResizedCrop { scale: [0.3, 1.0], ..RandomResizedCrop::pretraining() };
    assert_eq!(config.draw(1000, 30, &mut rng), Rect { x: 480, y: 0, width: 40, height: 30 });
    assert_eq!(config.draw(30, 1000, &mut rng), Rect { x: 0, y: 480, width: 30, height: 40 });
    assert_eq!(config.draw(1, 1, &mut rng), Rect::whole(1, 1));
}

#[test]
fn crops_are_checked() {
    let read = serde_json::from_str::<RandomResizedCrop>;
    let config = read(r#"{"scale": [0.5, 1.0]}"#).unwrap();
    assert_eq!(config, RandomResizedCrop::finetuning());
    assert!(config.check().is_ok() && RandomResizedCrop::pretraining().check().is_ok());
    assert!(read(r#"{"scale": [0.5, 1.0], "size": 3}"#).is_err());
    for (scale, ratio, field) in [
        ([0.0, 1.0], [0.5, 2.0], "crop.scale"),
        ([0.5, 1.1], [0.5, 2.0], "crop.scale"),
        ([0.5, f64::NAN], [0.5, 2.0], "crop.scale"),
        ([0.5, 1.0], [2.0, 0.5], "crop.ratio"),
    ] {
        let error = RandomResizedCrop { scale, ratio }.check().unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}

#[test]
fn mirroring_twice_is_nothing() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let original = picture(7, 5, [1, 1, 2, 3], &mut rng);
    let mut mirrored = original.clone();
    mirrored.mirror();
    assert!(mirrored != original && mirrored.rgb()[18..21] == original.rgb()[..3]);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    original.normalise_onto(true, &mut a);
    mirrored.normalise_onto(false, &mut b);
    assert_eq!(a, b);
    mirrored.mirror();
    assert!(mirrored == original);
}

#[test]
fn any_text_of_a_record_forbids_mirroring() {
    use xvlm_data::transform::tells_sides;
    let read = |text: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        std::fs::write(&path, text).unwrap();
        xvlm_data::read_jsonl(path).unwrap().remove(0)
    };
    let elem = |caption: &str, attributes: &str| {
        format!(r#"{{"bb": [0, 0, 1, 1], "caption": ["a cup", "{caption}"], "attributes": "{attributes}"}}"#)
    };
    let record = |caption: &str, elem: String| {
        read(&format!(r#"{{"image": "aGVsbG8=", "caption": ["a", "{caption}"], "elems": [{elem}]}}"#))
    };
    assert!(!record("a table", elem("cup", "red")).texts().any(tells_sides));
    assert!(record("to the Left", elem("cup", "red")).texts().any(tells_sides));
    assert!(record("a table", elem("the right cup", "red")).texts().any(tells_sides));
    assert!(record("a table", elem("cup", "leftmost")).texts().any(tells_sides));
}
