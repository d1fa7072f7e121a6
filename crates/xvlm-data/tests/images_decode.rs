//! Files decode to what Pillow makes of them (see `golden/README.md`), in parts as a whole, and damaged ones to what is left.

use std::collections::HashMap;
use std::sync::LazyLock;

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use xvlm_data::{DataError, DecodeOptions, Encoded, Picture, Rect};

static GOLDEN: LazyLock<HashMap<String, Tensor>> = LazyLock::new(|| {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/decode.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
});

fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn file(name: &str) -> Vec<u8> {
    bytes(&GOLDEN[&format!("file.{name}")])
}

fn names() -> Vec<&'static str> {
    let mut names: Vec<&str> = GOLDEN.keys().filter_map(|key| key.strip_prefix("file.")).collect();
    names.sort_unstable();
    names
}

fn picture(tensor: &Tensor) -> Picture {
    let (height, width, _) = tensor.dims3().unwrap();
    Picture::from_rgb(width as u32, height as u32, bytes(tensor)).unwrap()
}

fn encoded(name: &str, options: DecodeOptions) -> Encoded<'static> {
    Encoded::new(file(name), &name, options).unwrap()
}

/// The largest and the mean difference of the first `rows` rows.
fn difference(a: &Picture, b: &Picture, rows: usize) -> (u8, f64) {
    assert_eq!((a.width(), a.height()), (b.width(), b.height()));
    let pairs = a.rgb().iter().zip(b.rgb()).take(rows * 3 * a.width() as usize);
    let differences: Vec<u8> = pairs.map(|(a, b)| a.abs_diff(*b)).collect();
    let sum: u64 = differences.iter().map(|&d| u64::from(d)).sum();
    (differences.iter().copied().max().unwrap_or(0), sum as f64 / differences.len().max(1) as f64)
}

/// How far a kind of file may be from Pillow: the largest and the mean difference, and the rows compared.
///
/// JPEG: inverse transforms that differ by one give colours that differ by up to three, chroma being scaled by 1.772. The general decoder
/// (progressive files, those with inks) rounds earlier when it upsamples.
fn tolerance(name: &str) -> (u8, f64, usize) {
    match name {
        "jpeg-truncated" => (3, 0.25, 46),
        "jpeg-one" => (2, 1.0, 1000),
        // Coarser than the complete file, of which Pillow shows nothing at all.
        "jpeg-progressive-truncated" => (255, 12.0, 1000),
        // As far as the rows that are damaged; see `what_follows_damage_is_decoded_from_the_next_restart`.
        "jpeg-restarts-damaged" => (3, 0.25, 15),
        "png-truncated" | "png-l16-truncated" | "png-rgb16-truncated" | "gif-truncated" => (0, 0.0, 20),
        "jpeg-progressive" => (3, 0.5, 1000),
        _ if name.starts_with("jpeg") => (3, 0.25, 1000),
        "webp-lossy" => (1, 0.1, 1000),
        _ => (0, 0.0, 1000),
    }
}

#[test]
fn files_decode_as_with_pillow() {
    let mut wrong = Vec::new();
    for name in names() {
        let expected = picture(&GOLDEN[&format!("rgb.{name}")]);
        let found = encoded(name, DecodeOptions::default()).decode().unwrap();
        let (largest, mean, rows) = tolerance(name);
        let difference = difference(&found, &expected, rows);
        println!("{name}: {difference:?}");
        if difference.0 > largest || difference.1 > mean {
            wrong.push((name, difference));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn what_follows_damage_is_decoded_from_the_next_restart() {
    // The second of its rows of units is damaged, and each is a restart interval.
    let expected = picture(&GOLDEN["rgb.jpeg-restarts-damaged"]);
    let found = encoded("jpeg-restarts-damaged", DecodeOptions::default()).decode().unwrap();
    let behind = Rect { x: 0, y: 33, width: found.width(), height: found.height() - 33 };
    let (largest, mean) = difference(&found.part(behind), &expected.part(behind), 1000);
    assert!(largest <= 3 && mean <= 0.25, "{largest}, {mean}");
}

#[test]
fn people_see_their_pictures_upright() {
    for orientation in 1..=8 {
        let name = format!("jpeg-exif{orientation}");
        let expected = picture(&GOLDEN[&format!("upright.{name}")]);
        let encoded = encoded(&name, DecodeOptions::upright());
        assert_eq!((encoded.width(), encoded.height()), (expected.width(), expected.height()), "{name}");
        let (largest, _) = difference(&encoded.decode().unwrap(), &expected, 1000);
        assert!(largest <= 3, "{name}: {largest}");
        let part = Rect { x: 3, y: 2, width: 7, height: 9 };
        assert!(encoded.decode_part(part).unwrap() == encoded.decode().unwrap().part(part), "{name}");
    }
}

#[test]
fn headers_tell_the_size() {
    for name in names() {
        let expected = picture(&GOLDEN[&format!("rgb.{name}")]);
        let encoded = encoded(name, DecodeOptions::default());
        assert_eq!((encoded.width(), encoded.height()), (expected.width(), expected.height()), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn parts_are_parts_of_the_whole(name in proptest::sample::select(names()), place in any::<[u16; 4]>()) {
        let encoded = encoded(name, DecodeOptions::default());
        let whole = encoded.decode().unwrap();
        let along = |side: u32, from: u16, size: u16| {
            let from = u32::from(from) % side;
            (from, 1 + u32::from(size) % (side - from))
        };
        let (x, width) = along(whole.width(), place[0], place[2]);
        let (y, height) = along(whole.height(), place[1], place[3]);
        let part = Rect { x, y, width, height };
        prop_assert!(encoded.decode_part(part).unwrap() == whole.part(part), "{} {:?}", name, part);
    }

    #[test]
    fn damage_is_survived(
        name in proptest::sample::select(names()),
        changes in proptest::collection::vec(any::<(u16, u8)>(), 0..6),
        keep in 0.0f64..1.5,
    ) {
        let mut bytes = file(name);
        for (place, value) in changes {
            let place = usize::from(place) % bytes.len();
            bytes[place] = value;
        }
        bytes.truncate((bytes.len() as f64 * keep) as usize);
        let options = DecodeOptions { max_pixels: 1 << 16, upright: keep > 1.0 };
        // Whatever comes out, there is no panic, and sizes agree.
        if let Ok(encoded) = Encoded::new(bytes, &name, options)
            && let Ok(picture) = encoded.decode()
        {
            prop_assert_eq!((picture.width(), picture.height()), (encoded.width(), encoded.height()));
        }
    }
}

#[test]
fn large_images_are_refused_by_their_headers() {
    let size_of = |bytes: Vec<u8>, max_pixels| {
        let options = DecodeOptions { max_pixels, ..DecodeOptions::default() };
        Encoded::new(bytes, &"shard.jsonl:7", options).unwrap_err().to_string()
    };
    let error = size_of(file("png-rgb"), 390);
    assert_eq!(error, "image shard.jsonl:7: expected 1 to 390 pixels, found 23x17");
    // A header that claims 65,000 × 65,000 pixels.
    let mut bytes = file("jpeg-420");
    let frame = bytes.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    bytes[frame + 5..frame + 9].copy_from_slice(&[0xFD, 0xE8, 0xFD, 0xE8]);
    let error = size_of(bytes, xvlm_data::image::MAX_PIXELS);
    assert_eq!(error, "image shard.jsonl:7: expected 1 to 178956970 pixels, found 65000x65000");
    // One that claims 13,000 × 13,000, with data for a few hundred.
    let mut bytes = file("jpeg-420");
    bytes[frame + 5..frame + 9].copy_from_slice(&[0x32, 0xC8, 0x32, 0xC8]);
    let error = Picture::from_bytes(&bytes, &"x").unwrap_err().to_string();
    assert!(error.contains("for 13000x13000 pixels"), "{error}");
    let mut bytes = file("jpeg-420");
    bytes[frame + 5..frame + 7].fill(0);
    assert!(matches!(
        Encoded::new(bytes, &"x", DecodeOptions::default()),
        Err(DataError::ImageSize { width: 45, height: 0, .. })
    ));
}

#[test]
fn frames_larger_than_their_image_are_refused() {
    let mut bytes = file("gif");
    // The descriptor of a frame: its place (0, 0) and its size.
    let size = [23, 0, 17, 0];
    let frame = bytes.windows(9).position(|window| window[..5] == [0x2C, 0, 0, 0, 0] && window[5..] == size).unwrap();
    bytes[frame + 5..frame + 9].fill(0xFF);
    let error = Picture::from_bytes(&bytes, &"x").unwrap_err().to_string();
    assert!(error.starts_with("image x: "), "{error}");
}

#[test]
fn what_shows_nothing_is_an_error() {
    let error = |bytes: &[u8]| Picture::from_bytes(bytes, &"x").unwrap_err().to_string();
    for name in names() {
        let bytes = file(name);
        let error = error(&bytes[..20]);
        assert!(error.starts_with("image x: expected a JPEG, PNG, WebP or GIF, found"), "{name}: {error}");
    }
    assert!(error(b"").contains("image x"));
    assert!(error(b"<html>404</html>").contains("image x"));
    // Headers without any pixels behind them.
    for name in ["jpeg-420", "jpeg-progressive", "jpeg-grey"] {
        let bytes = file(name);
        let scan = bytes.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
        let length = usize::from(bytes[scan + 3]);
        assert!(Picture::from_bytes(&bytes[..scan + 2 + length], &"x").is_err(), "{name}");
    }
    let png = file("png-rgb");
    let data = png.windows(4).position(|tag| tag == b"IDAT").unwrap();
    assert!(error(&png[..data + 4]).contains("image x"));
    let missing = Picture::open("no/such.jpg".as_ref()).unwrap_err().to_string();
    assert!(missing.starts_with("image no/such.jpg: "), "{missing}");
}
