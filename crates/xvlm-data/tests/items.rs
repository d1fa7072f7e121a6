//! Batches for fine-tuning and evaluation: every item once, what is in a batch, and boxes that stay on what they are about.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use tempfile::TempDir;
use xvlm_data::annotations::{CaptionItem, RetrievalItem, VqaItem, VqaSource};
use xvlm_data::batch::{
    Asked, Described, Grounding, IGNORE, ImageText, Images, ItemKind, Nlvr, Pairs, Phrase, References, Statement, Vqa,
};
use xvlm_data::{
    DataError, ImageCache, ImageSource, ItemBatches, ItemConfig, Loader, LoaderConfig, Picture, TextTokenizer,
};

const WORDS: [&str; 15] = [
    "a", "white", "box", "on", "black", "left", "right", "what", "colour", "is", "it", "picture", "of", "two", "boxes",
];
const SIDE: usize = 32;

fn tokenizer() -> Arc<TextTokenizer> {
    Arc::new(TextTokenizer::from_vocabulary(&WORDS.map(str::to_owned)).unwrap())
}

fn batches<K: ItemKind>(kind: K, items: Vec<K::Item>, config: ItemConfig) -> ItemBatches<K> {
    let cache = Arc::new(ImageCache::new(1 << 24));
    ItemBatches::new(kind, Arc::new(items), tokenizer(), config, cache).unwrap()
}

fn config() -> ItemConfig {
    let plain = ItemConfig { crop: None, augment: None, region_augment: None, ..ItemConfig::default() };
    ItemConfig { resolution: SIDE, batch_size: 4, ..plain }
}

/// A grey picture whose brightness tells its number; its left half is darker.
fn write_picture(dir: &Path, number: u8) -> ImageSource {
    let rgb = (0..20 * 16).flat_map(|i| [100 + 3 * number - if i % 20 < 10 { 100 } else { 0 }; 3]).collect();
    let path = dir.join(format!("{number}.png"));
    fs::write(&path, Picture::from_rgb(20, 16, rgb).unwrap().to_png().unwrap()).unwrap();
    ImageSource::Path(path)
}

fn pictures(dir: &TempDir, count: u8) -> Vec<ImageSource> {
    (0..count).map(|number| write_picture(dir.path(), number)).collect()
}

/// The numbers of the pictures, and whether each is mirrored.
fn seen(pixels: &[f32]) -> Vec<(u8, bool)> {
    let of = |pixels: &[f32]| {
        let bytes = Picture::from_normalised(pixels, SIDE as u32, SIDE as u32).unwrap();
        let (first, last) = (bytes.rgb()[0], bytes.rgb()[3 * SIDE - 3]);
        ((first.max(last) - 100) / 3, first > last)
    };
    pixels.chunks_exact(3 * SIDE * SIDE).map(of).collect()
}

#[test]
fn every_item_is_evaluated_once_by_one_of_the_processes() {
    let dir = tempfile::tempdir().unwrap();
    for (count, ranks, size) in [(13u8, 1, 4), (13, 3, 2), (7, 4, 4), (2, 3, 1), (12, 3, 4)] {
        let items = pictures(&dir, count);
        let mut found = Vec::new();
        for rank in 0..ranks {
            let config = ItemConfig { batch_size: size, ..config() };
            let batches = batches(Images, items.clone(), config).for_rank(rank, ranks);
            for step in 0..batches.evaluation_steps() {
                let (items, batch) = batches.evaluation(step).unwrap();
                assert!(!items.is_empty() && items.len() <= size && items.len() == batch.images);
                let numbers: Vec<(u8, bool)> = items.iter().map(|&item| (item as u8, false)).collect();
                assert_eq!(seen(&batch.pixels), numbers, "nothing is random, and items belong to their pictures");
                found.extend(items);
            }
            assert!(batches.evaluation(batches.evaluation_steps()).unwrap().0.is_empty());
        }
        found.sort_unstable();
        assert_eq!(found, (0..usize::from(count)).collect::<Vec<_>>(), "{count} items of {ranks} processes");
    }
}

#[test]
fn each_epoch_of_all_processes_has_every_item_once() {
    let dir = tempfile::tempdir().unwrap();
    let items = pictures(&dir, 13);
    for ranks in [1usize, 2, 3] {
        let of = |seed, rank| {
            let config = ItemConfig { batch_size: 2, seed, hflip: false, ..config() };
            batches(Images, items.clone(), config).for_rank(rank, ranks)
        };
        let all: Vec<_> = (0..ranks).map(|rank| of(1, rank)).collect();
        // Positions of the endless order: those of a step lie side by side, process by process.
        let steps = 4 * 13u64.div_ceil(2 * ranks as u64);
        let mut order = Vec::new();
        for step in 0..steps {
            let own: Vec<_> = all.iter().map(|one| seen(&one.training(step).unwrap().pixels)).collect();
            order.extend((0..2).flat_map(|i| own.iter().map(move |own| own[i].0)));
        }
        let epochs: Vec<&[u8]> = order.chunks_exact(13).collect();
        for epoch in &epochs {
            let mut numbers = epoch.to_vec();
            numbers.sort_unstable();
            assert_eq!(numbers, (0..13).collect::<Vec<_>>(), "{ranks} processes");
        }
        assert!(epochs.windows(2).all(|two| two[0] != two[1]), "epochs are shuffled anew");
        assert_eq!(of(1, 0).training(5).unwrap(), all[0].training(5).unwrap(), "from seed and step alone");
        assert_ne!(of(2, 0).training(5).unwrap(), all[0].training(5).unwrap());
    }
}

#[test]
fn workers_build_the_same_batches() {
    let dir = tempfile::tempdir().unwrap();
    let of = || batches(Images, pictures(&dir, 9), config());
    let (alone, shared) = (of(), of());
    let loader = LoaderConfig { workers: 3, ahead: 5 };
    let mut loader = Loader::starting_at(2, loader, move |step| shared.training(step)).unwrap();
    for step in 2..12 {
        assert_eq!(loader.next().unwrap(), alone.training(step).unwrap(), "step {step}");
    }
}

#[test]
fn answers_are_weighted_by_their_share() {
    let dir = tempfile::tempdir().unwrap();
    let images = pictures(&dir, 3);
    let ImageSource::Path(image) = images[0].clone() else { unreachable!() };
    let answers = ["white", "a box", "white", "white", "Black"].map(str::to_owned).to_vec();
    let question = "What colour is it?".to_owned();
    let item = VqaItem {
        question_id: "7".to_owned(),
        image,
        question,
        answers,
        kind: String::new(),
        question_type: String::new(),
        source: VqaSource::Vqa,
    };
    let other = |image: &ImageSource, question: &str, answer: &str| {
        let ImageSource::Path(image) = image.clone() else { unreachable!() };
        let (question, answers) = (question.to_owned(), vec![answer.to_owned()]);
        VqaItem {
            question_id: "8".to_owned(),
            image,
            question,
            answers,
            kind: String::new(),
            question_type: String::new(),
            source: VqaSource::Vqa,
        }
    };
    let listed = [
        item,
        other(&images[1], "is it left?", "a white box on black"),
        other(&images[2], "is it left?", "it"),
        other(&images[0], "how many?", "one"),
        other(&images[0], "is there one?", "yes"),
    ];
    let asked = |most: usize| {
        let items = Asked::by_image(&listed, most);
        items.iter().map(|item| item.questions.len()).collect::<Vec<_>>()
    };
    assert_eq!((asked(1), asked(2), asked(9)), (vec![1; 5], vec![2, 1, 1, 1], vec![3, 1, 1]));
    let items = Asked::by_image(&listed[..3], 1);
    let first = &items[0].questions[0];
    let weights = [("white", 0.6), ("a box", 0.2), ("Black", 0.2)];
    assert_eq!(first.answers.iter().map(|(answer, _)| answer.as_str()).collect::<Vec<_>>(), weights.map(|(a, _)| a));
    assert!(first.answers.iter().zip(weights).all(|((_, found), (_, expected))| (found - expected).abs() < 1e-6));
    let training = batches(Vqa, items.clone(), ItemConfig { batch_size: 3, ..config() });
    let (tokenizer, mut mirrored) = (tokenizer(), [0; 3]);
    for step in 0..30 {
        let batch = training.training(step).unwrap();
        let numbers: Vec<u8> = seen(&batch.pixels).iter().map(|(number, _)| *number).collect();
        seen(&batch.pixels).iter().for_each(|(number, flip)| mirrored[usize::from(*number)] += usize::from(*flip));
        let answers = batch.answers.unwrap();
        assert_eq!(answers.text.rows, 5);
        let counts: Vec<usize> = numbers.iter().map(|&number| [3, 1, 1][usize::from(number)]).collect();
        assert_eq!(answers.counts, counts);
        for (row, &question) in answers.question_index.iter().enumerate() {
            let item = &items[usize::from(numbers[question as usize])];
            let (answer, weight) =
                item.questions[0].answers.iter().find(|(a, _)| *a == answers.text.texts[row]).unwrap();
            assert_eq!(answers.weights[row], *weight);
            let ids = &answers.text.ids[row * answers.text.len..][..answers.text.len];
            assert_eq!(ids[0], tokenizer.cls_id());
            let end = 1 + tokenizer.tokens(answer).unwrap().len();
            assert_eq!(ids[1..end], tokenizer.tokens(answer).unwrap());
            assert_eq!(ids[end], tokenizer.sep_id());
            assert!(ids[end + 1..].iter().all(|&id| id == tokenizer.pad_id()));
        }
        for (row, number) in numbers.iter().enumerate() {
            assert_eq!(
                batch.questions.texts[row],
                ["what colour is it", "is it left", "is it left"][usize::from(*number)]
            );
        }
    }
    assert!((4..=26).contains(&mirrored[0]) && mirrored[1..] == [0, 0], "only where nothing says left: {mirrored:?}");

    let grouped = batches(Vqa, Asked::by_image(&listed, 9), config()).evaluation(0).unwrap().1;
    assert_eq!((grouped.images, grouped.image_index), (3, vec![0, 0, 0, 1, 2]));
    assert_eq!(grouped.questions.texts[1..3], ["how many", "is there one"]);

    let mut unanswered = items[..1].to_vec();
    unanswered[0].questions[0].answers.clear();
    let (items, batch) = batches(Vqa, unanswered.clone(), config()).evaluation(0).unwrap();
    assert!(items == [0] && batch.answers.is_none() && batch.questions.rows == 1);
    let error = batches(Vqa, unanswered, config()).training(0).unwrap_err().to_string();
    assert!(error.contains("expected an answer") && error.contains("0.png"), "{error}");
}

#[test]
fn captions_of_an_image_belong_together() {
    let dir = tempfile::tempdir().unwrap();
    let image = |number| match write_picture(dir.path(), number) {
        ImageSource::Path(path) => path,
        ImageSource::Bytes(_) => unreachable!(),
    };
    let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
    let items = [(image(0), "17", texts(&["A box.", "a white box"])), (image(1), "18", texts(&["a box"]))];
    let items = (0u32..).zip(items).map(|(image_index, (image, id, captions))| RetrievalItem {
        image,
        image_id: id.to_owned(),
        image_index,
        captions,
        split: None,
    });
    let items: Vec<_> = items.collect();
    let pairs: Vec<ImageText> = items.iter().flat_map(ImageText::of_retrieval).collect();
    let batch = batches(Pairs::default(), pairs, config()).evaluation(0).unwrap().1;
    assert_eq!(batch.text.texts, ["a box", "a white box", "a box"]);
    let keys = &batch.text.keys;
    assert!(keys[0] == keys[1] && keys[1] != keys[2], "equal for the same image, not for the same text: {keys:?}");
    assert!(batch.generation.is_none() && batch.text.masked_positions.is_empty());

    let item = CaptionItem {
        id: "17".to_owned(),
        image: image(0),
        image_index: 0,
        split: None,
        captions: texts(&["Two boxes, on black!", "a box", "a white box", "it", "boxes", "a picture"]),
    };
    let pairs: Vec<ImageText> = ImageText::of_captions(&item).collect();
    let captioning = batches(Pairs { prompt: Some("a picture of ".to_owned()) }, pairs, config());
    let rows = captioning.evaluation(0).unwrap().1.generation.unwrap();
    let tokenizer = tokenizer();
    assert_eq!(rows.ids[..rows.len], tokenizer.encode("a picture of two boxes on black", 40, true).unwrap());
    // From the last word of the prompt on, the next word is to be told; nothing after `[SEP]`.
    let labels: Vec<i64> = tokenizer.tokens("two boxes on black").unwrap().into_iter().map(i64::from).collect();
    assert_eq!(rows.labels[..3], [IGNORE; 3]);
    assert_eq!(rows.labels[3..7], labels);
    assert_eq!(rows.labels[7..9], [i64::from(tokenizer.sep_id()), IGNORE]);

    let scst = batches(References::default(), vec![Described::from(&item)], ItemConfig { batch_size: 1, ..config() });
    let mut drawn = std::collections::BTreeSet::new();
    for step in 0..40 {
        let references = &scst.training(step).unwrap().references[0];
        assert_eq!(references.len(), 5);
        let different: std::collections::BTreeSet<&String> = references.iter().collect();
        assert_eq!(different.len(), 5, "{references:?}");
        drawn.extend(references.iter().cloned());
    }
    assert!(drawn.len() == 6 && drawn.contains("two boxes on black"), "{drawn:?}");
    let few = Described { captions: texts(&["a box", "it"]), ..Described::from(&item) };
    let few = batches(References::default(), vec![few], ItemConfig { batch_size: 1, ..config() });
    assert_eq!(few.training(0).unwrap().references[0].len(), 2);
}

#[test]
fn statements_have_their_first_images_before_their_second() {
    let dir = tempfile::tempdir().unwrap();
    let images = pictures(&dir, 10);
    let statement = |i: usize| Statement {
        images: [images[2 * i].clone(), images[2 * i + 1].clone()],
        text: if i == 4 { "the left one is a box".to_owned() } else { format!("{i} boxes") },
        is_true: i.is_multiple_of(2),
    };
    let nlvr = batches(Nlvr, (0..5).map(statement).collect(), ItemConfig { batch_size: 5, ..config() });
    let batch = nlvr.evaluation(0).unwrap().1;
    let numbers: Vec<u8> = seen(&batch.pixels).iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]);
    assert_eq!(
        (batch.is_true.as_slice(), batch.text.texts[1].as_str()),
        (&[true, false, true, false, true][..], "1 boxes")
    );
    let tensors = batch.to_tensors(&Device::Cpu).unwrap();
    assert_eq!(tensors.pixels.dims(), [10, 3, SIDE, SIDE]);
    let (mut mirrored, mut apart) = (0, 0);
    for step in 0..30 {
        let batch = nlvr.training(step).unwrap();
        let seen = seen(&batch.pixels);
        for i in 0..5 {
            let ((first, flip), (second, other)) = (seen[i], seen[5 + i]);
            assert_eq!(first + 1, second);
            assert_eq!(batch.is_true[i], (first / 2).is_multiple_of(2));
            assert!(first != 8 || !(flip || other), "it says left");
            mirrored += usize::from(flip);
            apart += usize::from(flip != other);
        }
    }
    assert!((30..90).contains(&mirrored) && (30..90).contains(&apart), "{mirrored} {apart}");
}

#[test]
fn boxes_of_phrases_stay_on_what_they_are_about() {
    let dir = tempfile::tempdir().unwrap();
    let bbox = [40u32, 12, 18, 30];
    let [x, y, w, h] = bbox;
    let inside = |i: u32| (x..x + w).contains(&(i % 90)) && (y..y + h).contains(&(i / 90));
    let rgb = (0..90 * 60).flat_map(|i| [if inside(i) { 255 } else { 0 }; 3]).collect();
    let image = dir.path().join("box.png");
    fs::write(&image, Picture::from_rgb(90, 60, rgb).unwrap().to_png().unwrap()).unwrap();
    let image = ImageSource::Path(image);
    let phrase = |text: &str| Phrase { image: image.clone(), text: text.to_owned(), bbox: bbox.map(|v| v as f32) };
    // The weighted centre and the area of what is white, in fractions.
    let white = |pixels: &[f32]| {
        let bytes = Picture::from_normalised(pixels, SIDE as u32, SIDE as u32).unwrap();
        let (mut sum, mut cx, mut cy) = (0.0, 0.0, 0.0);
        for (i, pixel) in bytes.rgb().chunks_exact(3).enumerate() {
            let weight = f32::from(pixel[0]) / 255.0;
            sum += weight;
            cx += weight * ((i % SIDE) as f32 + 0.5);
            cy += weight * ((i / SIDE) as f32 + 0.5);
        }
        let side = SIDE as f32;
        (cx / sum / side, cy / sum / side, sum / side / side)
    };
    let agree = |bounds: [f32; 4], pixels: &[f32]| {
        let ([cx, cy, w, h], (x, y, area)) = (bounds, white(pixels));
        assert!(
            (cx - x).abs() < 0.02 && (cy - y).abs() < 0.02 && (w * h - area).abs() < 0.03,
            "{bounds:?} {x} {y} {area}"
        );
    };
    let both = batches(Grounding, vec![phrase("a white box"), phrase("the box right of it")], config());
    let size = 3 * SIDE * SIDE;
    let mut different = std::collections::BTreeSet::new();
    let mut mirrored = 0;
    for step in 0..40 {
        let batch = both.training(step).unwrap();
        for (row, &bounds) in batch.boxes.iter().enumerate() {
            agree(bounds, &batch.pixels[row * size..][..size]);
            different.insert(bounds.map(f32::to_bits));
        }
    }
    // Without crops the box is at 49/90 of the width, mirrored at 41/90.
    let uncropped = batches(Grounding, both.items().to_vec(), ItemConfig { random_crop: false, ..config() });
    for step in 0..40 {
        let batch = uncropped.training(step).unwrap();
        for (row, [cx, ..]) in batch.boxes.iter().enumerate() {
            let flip = *cx < 0.5;
            assert!(!(flip && batch.text.texts[row].contains("right")));
            mirrored += usize::from(flip);
        }
    }
    assert!(different.len() > 100 && (20..60).contains(&mirrored), "{} {mirrored}", different.len());
    let (items, batch) = both.evaluation(0).unwrap();
    assert_eq!((items, batch.images), (vec![0, 1], 2));
    let expected = [49.0 / 90.0, 27.0 / 60.0, 18.0 / 90.0, 30.0 / 60.0];
    assert!(batch.boxes.iter().flatten().zip(expected.iter().cycle()).all(|(a, b)| (a - b).abs() < 1e-6));
    assert_eq!(batch.to_tensors(&Device::Cpu).unwrap().boxes.dims(), [2, 4]);

    for bad in [[40.0, 12.0, 60.0, 30.0], [f32::NAN, 0.0, 5.0, 5.0], [3.0, 3.0, 0.0, 5.0]] {
        let error =
            batches(Grounding, vec![Phrase { bbox: bad, ..phrase("a box") }], config()).training(0).unwrap_err();
        assert!(matches!(&error, DataError::TooManyBroken { .. }), "{error}");
        assert!(error.to_string().contains("box.png") && error.to_string().contains("90x60"), "{error}");
    }
}

#[test]
fn broken_items_are_named_and_replaced_until_there_are_too_many() {
    let dir = tempfile::tempdir().unwrap();
    let mut items = pictures(&dir, 12);
    fs::write(dir.path().join("3.png"), "no picture").unwrap();
    items.push(ImageSource::Bytes(Arc::from(&b"nor this"[..])));
    let lenient = batches(Images, items.clone(), ItemConfig { max_bad_fraction: 0.5, ..config() });
    for step in 0..8 {
        assert_eq!(lenient.training(step).unwrap().images, 4);
    }
    let broken: Vec<String> = lenient.broken().iter().map(ToString::to_string).collect();
    assert!(broken.len() == 2 && broken[0].starts_with("item 3: ") && broken[0].contains("3.png"), "{broken:?}");
    assert!(broken[1].starts_with("item 12: ") && broken[1].contains("8 bytes"), "{broken:?}");
    let (seen, met) = lenient.counts();
    assert!(met >= 2 && seen == 32 + met, "{seen} {met}");

    let evaluation = batches(Images, items.clone(), ItemConfig { max_bad_fraction: 0.5, ..config() });
    let found: Vec<usize> = (0..4).flat_map(|step| evaluation.evaluation(step).unwrap().0).collect();
    assert_eq!(found, [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]);

    let strict = batches(Images, items, config());
    let error = (0..40).find_map(|step| strict.training(step).err()).expect("two in thirteen are too many");
    assert!(matches!(&error, DataError::TooManyBroken { .. }) && error.to_string().contains("item 3"), "{error}");
    let hopeless = vec![ImageSource::Path(dir.path().join("none.png"))];
    let hopeless = batches(Images, hopeless, ItemConfig { max_bad_fraction: 1.0, ..config() });
    assert!(matches!(hopeless.training(0), Err(DataError::TooManyBroken { .. })));
}

#[test]
fn values_that_make_no_sense_are_refused() {
    let cache = || Arc::new(ImageCache::new(0));
    let one = Arc::new(vec![ImageSource::Path("a.png".into())]);
    for (field, wrong) in [
        ("batch_size", ItemConfig { batch_size: 0, ..config() }),
        ("resolution", ItemConfig { resolution: 0, ..config() }),
        ("max_tokens", ItemConfig { max_tokens: 2, ..config() }),
        ("max_bad_fraction", ItemConfig { max_bad_fraction: f64::NAN, ..config() }),
    ] {
        let error = ItemBatches::new(Images, Arc::clone(&one), tokenizer(), wrong, cache()).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
    let error = ItemBatches::new(Images, Arc::default(), tokenizer(), config(), cache()).unwrap_err().to_string();
    assert!(error.contains("items"), "{error}");
}
