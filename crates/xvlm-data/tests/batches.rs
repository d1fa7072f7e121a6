//! Batches: what is in them follows from records, configuration, seed and step; and boxes stay on what they are about.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm_data::{
    BatchBuilder, BatchConfig, DataError, Dataset, DatasetConfig, FlipTexts, GenerationConfig, ImageCache, Padding,
    Picture, Place, Record, RegionBatch, SourceConfig, StorageOptions, Target, TextTokenizer, read_jsonl,
};

const WORDS: [&str; 14] =
    ["a", "white", "box", "on", "black", "left", "right", "what", "colour", "is", "it", "thing", "picture", "of"];

/// A black picture with a white box.
fn picture(width: u32, height: u32, [x, y, w, h]: [u32; 4]) -> Vec<u8> {
    let inside = |i: u32| (x..x + w).contains(&(i % width)) && (y..y + h).contains(&(i / width));
    let rgb = (0..width * height).flat_map(|i| [if inside(i) { 255 } else { 0 }; 3]).collect();
    Picture::from_rgb(width, height, rgb).unwrap().to_png().unwrap()
}

/// Records of pictures with one white box each, of different sizes.
fn write_records(dir: &Path, texts: &[&str]) -> Vec<Record> {
    let mut lines = String::new();
    for i in 0..12u32 {
        let (width, height) = (90 + 7 * i, 150 - 5 * i);
        let bbox = [3 + 2 * i, 60 - 4 * i, 30 + i, 40];
        fs::write(dir.join(format!("{i}.png")), picture(width, height, bbox)).unwrap();
        let record = json!({
            "image_rpath": format!("{i}.png"),
            "caption": [format!("a white box on black {i}"), "a picture of a box"],
            "elems": [{ "bb": bbox, "caption": texts, "attributes": "white", "label": ["thing", "box"] }],
            "questions": [["what colour is it?", "white"]],
        });
        lines += &format!("{record}\n");
    }
    let path = dir.join("records.jsonl");
    fs::write(&path, lines).unwrap();
    read_jsonl(path).unwrap()
}

fn tokenizer() -> Arc<TextTokenizer> {
    let words: Vec<String> = WORDS.iter().map(ToString::to_string).chain((0..12).map(|i: u32| i.to_string())).collect();
    Arc::new(TextTokenizer::from_vocabulary(&words).unwrap())
}

fn builder(records: Vec<Record>, config: BatchConfig) -> BatchBuilder {
    BatchBuilder::new(Arc::new(Dataset::from_records(records)), tokenizer(), config, Arc::new(ImageCache::new(1 << 26)))
        .unwrap()
}

fn config() -> BatchConfig {
    let sizes =
        BatchConfig { resolution: 64, final_stride: 16, batch_size: 5, max_images: 6, ..BatchConfig::default() };
    let plain = BatchConfig { crop: None, augment: None, region_augment: None, ..sizes };
    BatchConfig { padding: Padding::None, max_bad_fraction: 0.05, ..plain }
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_batch_follows_from_seed_and_step() {
    let dir = folder();
    let build = |seed| builder(write_records(dir.path(), &["a box"]), BatchConfig { seed, ..config() });
    let (one, same, other) = (build(1), build(1), build(2));
    // Steps in another order, and steps that were built before.
    same.captions(7).unwrap();
    for step in [0, 3, 1] {
        assert_eq!(one.captions(step).unwrap(), same.captions(step).unwrap());
        assert_eq!(one.regions(step).unwrap(), same.regions(step).unwrap());
    }
    assert_ne!(one.captions(0).unwrap().text, one.captions(1).unwrap().text);
    assert_ne!(one.captions(0).unwrap().text, other.captions(0).unwrap().text);
}

#[test]
fn an_epoch_has_every_record_once() {
    let dir = folder();
    let config = BatchConfig { batch_size: 4, ..config() };
    let records = write_records(dir.path(), &["a box"]);
    let whole = builder(records.clone(), config.clone());
    assert_eq!(whole.caption_steps(), 3);
    let halves =
        [0, 1].map(|rank| builder(records.clone(), BatchConfig { batch_size: 2, ..config.clone() }).for_rank(rank, 2));
    for epoch in 0..2 {
        let steps = 3 * epoch..3 * (epoch + 1);
        let mut seen: Vec<Vec<f32>> =
            steps.clone().flat_map(|step| images(&whole.captions(step).unwrap().pixels)).collect();
        let mut shared: Vec<Vec<f32>> = steps
            .flat_map(|step| halves.iter().map(move |half| half.captions(step).unwrap()))
            .flat_map(|batch| images(&batch.pixels))
            .collect();
        for images in [&mut seen, &mut shared] {
            images.sort_by(|a, b| a.partial_cmp(b).unwrap());
            images.dedup();
            assert_eq!(images.len(), 12);
        }
    }
}

/// Sums of the columns' halves do not tell mirrored pictures apart, which is wanted here.
fn images(pixels: &[f32]) -> Vec<Vec<f32>> {
    pixels.chunks(3 * 64 * 64).map(|image| vec![image.iter().map(|x| (x * 1e3).round()).sum()]).collect()
}

#[test]
fn boxes_stay_on_what_they_are_about() {
    let dir = folder();
    for random_crop in [false, true] {
        let builder = builder(write_records(dir.path(), &["a box"]), BatchConfig { random_crop, ..config() });
        let mut mirrored = 0;
        for step in 0..40 {
            let batch = builder.regions(step).unwrap();
            for (row, bounds) in batch.boxes.iter().enumerate().filter(|(row, _)| !batch.is_image[*row]) {
                let image = batch.image_index[row] as usize;
                let pixels = &batch.pixels[image * 3 * 64 * 64..][..64 * 64];
                let (dark, light) = pixels.iter().fold((f32::MAX, f32::MIN), |m, &x| (m.0.min(x), m.1.max(x)));
                let [cx, cy, w, h] = bounds.map(|v| 64.0 * v);
                let (left, right, top, bottom) = (cx - w / 2.0, cx + w / 2.0, cy - h / 2.0, cy + h / 2.0);
                mirrored += usize::from(left > 64.0 - right);
                for (i, &pixel) in pixels.iter().enumerate() {
                    let (x, y) = ((i % 64) as f32 + 0.5, (i / 64) as f32 + 0.5);
                    let within = |by: f32| x > left + by && x < right - by && y > top + by && y < bottom - by;
                    let brightness = (pixel - dark) / (light - dark);
                    // Two pixels of doubt along the edges, where bicubic resizing mixes.
                    assert!(!within(2.0) || brightness > 0.8, "step {step}, row {row}, ({x}, {y}): {brightness}");
                    assert!(within(-2.0) || brightness < 0.2, "step {step}, row {row}, ({x}, {y}): {brightness}");
                    // A patch that the box touches is visible, and no other.
                    let patch = (y / 16.0) as usize * 4 + (x / 16.0) as usize;
                    let seen = batch.region_mask[row * 17 + 1 + patch];
                    assert!(!within(0.5) || seen == 1.0, "step {step}, row {row}: patch {patch}");
                }
                assert_eq!(batch.region_mask[row * 17], 1.0);
            }
        }
        assert!(mirrored > 20, "{mirrored}");
    }
}

#[test]
fn texts_that_say_left_are_not_mirrored() {
    let dir = folder();
    let builder = builder(
        write_records(dir.path(), &["box left"]),
        BatchConfig { random_crop: false, whole_image_text: false, ..config() },
    );
    for step in 0..20 {
        // All boxes are in the left half.
        assert!(builder.regions(step).unwrap().boxes.iter().all(|[cx, ..]| *cx < 0.5));
    }
}

#[test]
fn elements_may_be_called_by_their_labels() {
    let dir = folder();
    let records = write_records(dir.path(), &["a box"]);
    let texts_of = |config: BatchConfig, step| {
        let mut texts = builder(records.clone(), config).regions(step).unwrap().text.texts;
        texts.sort();
        texts.dedup();
        texts
    };
    let texts = |config| texts_of(config, 0);
    let plain = BatchConfig { attribute_probability: 0.0, whole_image_text: false, ..config() };
    assert_eq!(texts(plain.clone()), ["a box"]);
    let labels = |step| texts_of(BatchConfig { label_share: 1.0, ..plain.clone() }, step);
    let mut labels: Vec<Vec<String>> = (0..12).map(labels).collect();
    labels.sort();
    labels.dedup();
    assert_eq!(labels, [["box"], ["thing"]], "one way of classing in each batch, both over the batches");
    assert_eq!(texts(BatchConfig { attribute_probability: 1.0, ..plain }), ["white a box"]);
}

#[test]
fn a_region_batch_is_no_larger_than_told() {
    let dir = folder();
    let records = write_records(dir.path(), &["a box"]);
    let small = builder(records, BatchConfig { max_regions: 5, ..config() }).regions(0).unwrap();
    // A caption and an element each.
    assert_eq!((small.text.rows, small.images), (5, 3));
    assert_eq!(small.is_image, [true, false, true, false, true]);
    assert_eq!(small.boxes[0], [0.5, 0.5, 1.0, 1.0]);
    assert!(small.region_mask[..17].iter().all(|&seen| seen == 1.0));
    assert!(
        small.text.masked_positions.len() == small.text.masked_labels.len() && !small.text.masked_labels.is_empty()
    );
    for (&position, &label) in small.text.masked_positions.iter().zip(&small.text.masked_labels) {
        assert_eq!(i64::from(small.text.ids[position as usize]), label);
    }
}

/// Records of one picture each with several boxes.
fn write_crowds(dir: &Path, records: usize, elems: usize) -> Vec<Record> {
    fs::write(dir.join("crowd.png"), picture(96, 96, [30, 30, 20, 20])).unwrap();
    let elem = |i: usize| json!({ "bb": [4 * i, 3 * i, 20, 20], "caption": format!("thing {i}") });
    let lines = (0..records).map(|record| {
        let elems: Vec<Value> = (0..elems).map(elem).collect();
        json!({ "image_rpath": "crowd.png", "caption": format!("picture {record}"), "elems": elems }).to_string()
    });
    let path = dir.join("crowds.jsonl");
    fs::write(&path, lines.collect::<Vec<_>>().join("\n")).unwrap();
    read_jsonl(path).unwrap()
}

/// What a row is about: its image, its text and its box.
fn row(batch: &RegionBatch, row: usize) -> (u32, &str, [f32; 4], &[f32]) {
    let columns = 1 + batch.patches;
    let mask = &batch.region_mask[row * columns..][..columns];
    (batch.image_index[row], &batch.text.texts[row], batch.boxes[row], mask)
}

#[test]
fn a_region_batch_of_fixed_size_leaves_texts_out_or_repeats_some() {
    let dir = folder();
    // Without crops all boxes stay, so each of 6 images has a caption and 3 boxes: 4 is the most that is allowed.
    let records = write_crowds(dir.path(), 6, 7);
    let plain = BatchConfig { regions_per_image: 4, random_crop: false, hflip: false, ..config() };
    let whole = builder(records.clone(), BatchConfig { max_regions: 100, ..plain.clone() }).regions(3).unwrap();
    assert_eq!((whole.images, whole.text.rows), (6, 24));
    assert_eq!(whole.is_image.iter().filter(|is_image| **is_image).count(), 6);
    assert_eq!(whole.row_weights, [1.0; 24]);
    for (max_regions, padding) in [
        (9, Padding::Repeats),
        (24, Padding::Repeats),
        (31, Padding::Repeats),
        (31, Padding::Masked),
        (48, Padding::Masked),
        (70, Padding::Repeats),
        (70, Padding::Masked),
    ] {
        let config = BatchConfig { max_regions, padding, ..plain.clone() };
        let batch = builder(records.clone(), config.clone()).regions(3).unwrap();
        assert_eq!(batch, builder(records.clone(), config).regions(3).unwrap());
        let case = format!("{max_regions} {padding:?}");
        assert_eq!((batch.images, batch.text.rows, batch.boxes.len()), (6, max_regions, max_regions), "{case}");
        assert_eq!(batch.text.ids.len(), batch.text.rows * batch.text.len, "{case}");
        assert_eq!(batch.pixels, whole.pixels, "{case}: all images are read, whatever is left out");
        // Every row is one of those that there are; those that come first are different.
        let known: Vec<_> = (0..24).map(|i| row(&whole, i)).collect();
        let which: Vec<usize> =
            (0..max_regions).map(|i| known.iter().position(|k| *k == row(&batch, i)).unwrap()).collect();
        let real = max_regions.min(24);
        assert!(which[..real].is_sorted_by(|a, b| a < b), "{case}: {which:?}");
        let repeats = max_regions - real;
        let most = which[real..].iter().map(|w| which[real..].iter().filter(|other| *other == w).count()).max();
        assert_eq!(most.unwrap_or(0), repeats.div_ceil(24), "{case}: no row is repeated again before all the others");
        let weight = if padding == Padding::Masked { 0.0 } else { 1.0 };
        assert_eq!(batch.row_weights[..real], vec![1.0; real], "{case}");
        assert_eq!(batch.row_weights[real..], vec![weight; repeats], "{case}");
    }
    // Which texts are left out differs from step to step, and no text is preferred.
    let small = builder(records, BatchConfig { max_regions: 9, padding: Padding::Repeats, ..plain });
    let captions: usize =
        (0..60).map(|step| small.regions(step).unwrap().is_image.iter().filter(|is_image| **is_image).count()).sum();
    // A quarter of 540 texts; hypergeometric, with a variance of 60 · 9 · 1/4 · 3/4 · 15/23.
    assert!((captions as f64 - 135.0).abs() < 4.0 * 66f64.sqrt(), "{captions}");
}

#[test]
fn any_text_of_a_record_that_says_left_keeps_its_image() {
    let dir = folder();
    let path = dir.path().join("records.jsonl");
    fs::write(dir.path().join("box.png"), picture(100, 80, [10, 20, 30, 40])).unwrap();
    let elem = json!({ "bb": [10, 20, 30, 40], "caption": "a box" });
    let mirrored_by = |hflip_texts: FlipTexts, record: Value| {
        fs::write(&path, record.to_string()).unwrap();
        let config = BatchConfig { random_crop: false, batch_size: 1, max_images: 1, hflip_texts, ..config() };
        let builder = builder(read_jsonl(&path).unwrap(), config);
        let upright = builder.captions(0).unwrap().pixels;
        let captions = (0..40).any(|step| builder.captions(step).unwrap().pixels != upright);
        let regions = (0..40).any(|step| builder.regions(step).unwrap().boxes.iter().any(|[cx, ..]| *cx > 0.6));
        assert_eq!(captions, regions, "{record}");
        captions
    };
    let mirrored = |record: Value| mirrored_by(FlipTexts::Record, record);
    let record = |captions: Value, elem: &Value, questions: Value| {
        let elems = [json!({ "bb": [10, 20, 30, 40], "caption": "a box" }), elem.clone()];
        json!({ "image_rpath": "box.png", "caption": captions, "elems": elems, "questions": questions })
    };
    assert!(mirrored(record(json!("a box"), &elem, json!([["what is it", "a box"]]))));
    // Only one of many captions, one text of an element, an attribute, a question or its answer.
    assert!(!mirrored(record(json!(["a box", "a box", "a box", "a thing on the Left"]), &elem, json!([]))));
    let texts = json!({ "bb": [10, 20, 30, 40], "caption": ["a box", "a box", "the rightmost box"] });
    assert!(!mirrored(record(json!("a box"), &texts, json!([]))));
    let attribute = json!({ "bb": [10, 20, 30, 40], "caption": "a box", "attributes": ["white", "left"] });
    assert!(!mirrored(record(json!("a box"), &attribute, json!([]))));
    assert!(!mirrored(record(json!("a box"), &elem, json!([["what is on the left", "a box"]]))));
    assert!(!mirrored(record(json!("a box"), &elem, json!([["where is it", "right"]]))));
    // With those in the batch alone: questions are not, a caption always is.
    assert!(mirrored_by(FlipTexts::Batch, record(json!("a box"), &elem, json!([["where is it", "right"]]))));
    assert!(!mirrored_by(FlipTexts::Batch, record(json!("a box right here"), &elem, json!([]))));
}

#[test]
fn texts_may_be_tokens_already() {
    let dir = folder();
    let path = dir.path().join("records.jsonl");
    fs::write(dir.path().join("box.png"), picture(100, 80, [10, 20, 30, 40])).unwrap();
    let elem = json!({ "bb": [0, 0, 50, 40], "caption": "a white ##x" });
    let record = json!({ "image_rpath": "box.png", "caption": " a white ##x,  [MASK] Box\n", "elems": [elem] });
    fs::write(&path, record.to_string()).unwrap();
    let both = |tokenized, regions_tokenized| {
        let whole_image_text = false;
        let (batch_size, max_images) = (1, 1);
        let config = BatchConfig { tokenized, regions_tokenized, whole_image_text, batch_size, max_images, ..config() };
        let builder = builder(read_jsonl(&path).unwrap(), BatchConfig { append_sep: true, max_tokens: 8, ..config });
        (builder.captions(0).unwrap().text, builder.regions(0).unwrap().text)
    };
    let of = |tokenized| both(tokenized, None).0;
    let tokenizer = tokenizer();
    let ids = |tokens: &str| tokens.split(' ').map(|t| tokenizer.token_to_id(t).unwrap()).collect::<Vec<_>>();
    // Nothing is cleaned: a comma and a capital make it unknown, and so does nothing between two spaces.
    assert_eq!(of(true).ids, ids("[CLS] a white [UNK] [UNK] [MASK] [UNK] [SEP]"));
    assert_eq!(of(true).texts, ["a white ##x,  [MASK] Box"]);
    assert_eq!(of(false).ids, ids("[CLS] a white x [ m ##a [SEP]"));
    // Each stream may have its own.
    let of_region = |tokenized, regions_tokenized| both(tokenized, regions_tokenized).1.texts[0].clone();
    assert_eq!(of_region(false, Some(true)), "a white ##x");
    assert_eq!(of_region(true, None), "a white ##x");
    assert_eq!(of_region(true, Some(false)), "a white x");
    assert_eq!(both(false, Some(true)).0, of(false));
}

#[test]
fn generation_rows_predict_the_caption_and_the_answer() {
    let dir = folder();
    let generation =
        GenerationConfig { prompt: "a picture of".to_owned(), questions_per_image: 1, target: Target::First };
    let builder =
        builder(write_records(dir.path(), &["a box"]), BatchConfig { generation: Some(generation), ..config() });
    let batch = builder.captions(0).unwrap().generation.unwrap();
    assert_eq!((batch.rows, &batch.image_index[..4]), (10, &[0, 0, 1, 1][..]));
    let tokenizer = tokenizer();
    let said = |row: usize| -> Vec<String> {
        let labels = &batch.labels[row * batch.len..][..batch.len];
        labels.iter().filter(|&&label| label >= 0).map(|&id| tokenizer.id_to_token(id as u32).unwrap()).collect()
    };
    assert_eq!(said(0)[..5], ["a", "white", "box", "on", "black"]);
    assert_eq!(said(0)[6], "[SEP]");
    assert_eq!(said(1), ["white", "[SEP]"]);
    // A label is the token after its position.
    for (i, &label) in batch.labels.iter().enumerate().filter(|(_, label)| **label >= 0) {
        assert_eq!(label, i64::from(batch.ids[i + 1]));
    }
}

#[test]
fn broken_records_are_named_and_replaced_until_there_are_too_many() {
    let dir = folder();
    let records = write_records(dir.path(), &["a box"]);
    fs::write(dir.path().join("3.png"), "no picture").unwrap();
    let lenient = builder(records.clone(), BatchConfig { batch_size: 12, max_bad_fraction: 0.5, ..config() });
    assert_eq!(lenient.captions(0).unwrap().images, 12);
    let broken = lenient.broken();
    assert!(broken.len() == 1 && broken[0].to_string().contains("3.png"), "{broken:?}");
    assert_eq!(broken[0].origin.place, Place::Line(4));
    let (seen, met) = lenient.counts();
    assert!(met >= 1 && seen == 12 + met, "{seen} {met}");

    let strict = builder(records.clone(), BatchConfig { batch_size: 12, max_bad_fraction: 0.01, ..config() });
    let error = (0..40).find_map(|step| strict.captions(step).err()).expect("one in twelve is too many");
    assert!(matches!(&error, DataError::TooManyBroken { .. }) && error.to_string().contains("3.png"), "{error}");

    (0..12).for_each(|i| fs::remove_file(dir.path().join(format!("{i}.png"))).unwrap());
    let hopeless = builder(records, BatchConfig { max_bad_fraction: 1.0, ..config() });
    assert!(matches!(hopeless.captions(0), Err(DataError::TooManyBroken { .. })));
}

#[test]
fn values_that_make_no_sense_are_refused() {
    let wrong: [(&str, Value); 8] = [
        ("regions_per_image", json!(0)),
        ("batch_size", json!(0)),
        ("max_tokens", json!(1)),
        ("attribute_probability", json!(1.5)),
        ("label_share", json!(2)),
        ("min_perc_in_image", json!(1.0)),
        ("max_bad_fraction", json!(-0.1)),
        ("generation", json!({ "prompt": " " })),
    ];
    for (field, value) in wrong {
        let mut json = serde_json::to_value(config()).unwrap();
        json[field] = value;
        let config = serde_json::from_value(json).unwrap();
        let built = BatchBuilder::new(
            Arc::new(Dataset::from_records(Vec::new())),
            tokenizer(),
            config,
            Arc::new(ImageCache::new(0)),
        );
        let error = built.unwrap_err().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
    let error = BatchConfig { resolution: 70, ..config() }.check().unwrap_err().to_string();
    assert!(error.contains("resolution") && error.contains("16"), "{error}");
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut out, text).unwrap();
    out.finish().unwrap()
}

#[test]
fn what_is_broken_in_shards_that_are_opened_later_counts() {
    let dir = folder();
    write_records(dir.path(), &["a box"]);
    let good = fs::read_to_string(dir.path().join("records.jsonl")).unwrap();
    let packed = dir.path().join("packed");
    fs::create_dir(&packed).unwrap();
    let build = |max_bad_fraction| {
        let source =
            SourceConfig { image_root: Some(dir.path().to_owned()), ..SourceConfig::files([packed.to_str().unwrap()]) };
        let dataset = Dataset::open(&[source], &DatasetConfig::default(), &StorageOptions::default()).unwrap();
        dataset.check_broken(max_bad_fraction).unwrap();
        let config = BatchConfig { max_bad_fraction, ..config() };
        BatchBuilder::new(Arc::new(dataset), tokenizer(), config, Arc::new(ImageCache::new(1 << 26))).unwrap()
    };
    // Nine lines in ten are no JSON.
    fs::write(packed.join("0.jsonl.gz"), gzip(format!("{}{good}", "no JSON\n".repeat(108)).as_bytes())).unwrap();
    let error = build(0.5).captions(0).map(drop).unwrap_err();
    assert!(matches!(&error, DataError::TooManyBroken { broken: 108, seen: 120, .. }), "{error}");
    assert!(error.to_string().contains("0.jsonl.gz:1"), "{error}");
    let lenient = build(0.95);
    lenient.captions(0).unwrap();
    lenient.captions(1).unwrap();
    assert_eq!(lenient.counts(), (10 + 108, 108));
    assert!(lenient.broken()[0].to_string().contains("0.jsonl.gz:1"));

    // Three shards in four cannot be opened, and count as many records each as the fourth has.
    fs::write(packed.join("0.jsonl.gz"), gzip(good.as_bytes())).unwrap();
    let unreadable = gzip(&gzip(good.as_bytes()));
    (1..4).for_each(|shard| fs::write(packed.join(format!("{shard}.jsonl.gz")), &unreadable).unwrap());
    let error = build(0.5).captions(0).map(drop).unwrap_err();
    assert!(matches!(&error, DataError::TooManyBroken { broken: 36, seen: 48, .. }), "{error}");
}
