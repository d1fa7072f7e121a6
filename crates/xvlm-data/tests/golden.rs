//! Images and texts come out as in the original (see `golden/README.md`).

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::Value;
use xvlm_data::{Picture, TextTokenizer, View, pre_caption, pre_question, text_key};

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn tensors() -> HashMap<String, Tensor> {
    let path = golden("image_preprocess.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn picture(tensor: &Tensor) -> Picture {
    let (height, width, _) = tensor.dims3().unwrap();
    let bytes = tensor.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    Picture::from_rgb(width as u32, height as u32, bytes).unwrap()
}

fn texts() -> Value {
    serde_json::from_slice(&std::fs::read(golden("text_preprocess.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn tokenizer(golden: &Value) -> TextTokenizer {
    let pieces = golden["vocab"].as_array().unwrap().iter();
    let pieces: Vec<&str> = pieces.map(|piece| piece.as_str().unwrap()).collect();
    TextTokenizer::from_pieces("golden", &pieces).unwrap()
}

#[test]
fn resizing_is_pillows() {
    let tensors = tensors();
    for case in ["down", "up", "mixed"] {
        let image = picture(&tensors[&format!("in.{case}")]);
        let (found, expected) = (image.resized_square(64), picture(&tensors[&format!("out.{case}.resized")]));
        assert!(found == expected, "{case}");
        let decoded = Picture::from_bytes(&image.to_png().unwrap(), &case).unwrap();
        assert!(decoded == image, "{case} after a PNG");
    }
}

#[test]
fn normalising_is_the_originals() {
    let tensors = tensors();
    let found = picture(&tensors["in.up"]).resized_square(64).normalised();
    let expected = tensors["out.up.tensor"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= 1e-6, "{found} instead of {expected}");
    }
    let back = Picture::from_normalised(&found, 64, 64).unwrap();
    assert!(back == picture(&tensors["out.up.resized"]));
}

#[test]
fn texts_are_cleaned_as_in_the_original() {
    for row in texts()["rows"].as_array().unwrap() {
        let text = row["text"].as_str().unwrap();
        for max_words in [5, 30] {
            let caption = pre_caption(text, max_words).unwrap();
            assert_eq!(caption, row[format!("pre_caption_{max_words}")], "{text:?}");
            let question = pre_question(text, max_words);
            assert_eq!(question, row[format!("pre_question_{max_words}")], "{text:?}");
        }
        assert_eq!(text_key(text), text_key(&pre_caption(text, 100).unwrap()));
    }
    let error = pre_caption(" ?!. ", 30).unwrap_err().to_string();
    assert_eq!(error, r#"expected a text with at least one word, found " ?!. ""#);
}

#[test]
fn word_pieces_are_the_originals() {
    let golden = texts();
    let tokenizer = tokenizer(&golden);
    for row in golden["rows"].as_array().unwrap() {
        let text = row["text"].as_str().unwrap();
        let cleaned = row["pre_caption_30"].as_str().unwrap();
        let found = tokenizer.tokens(cleaned).unwrap();
        let pieces = found.iter().map(|&id| tokenizer.id_to_token(id).unwrap());
        assert_eq!(pieces.collect::<Vec<_>>(), *row["tokens"].as_array().unwrap(), "{text:?}");
        assert_eq!(tokenizer.decode(&found), row["decode_hf"], "{text:?}");

        let encode = |text, most, sep| tokenizer.encode(text, most, sep).unwrap();
        assert_eq!(encode(cleaned, 100, false), ids(&row["ids_ref"]), "{text:?}");
        assert_eq!(encode(cleaned, 8, false), ids(&row["ids_ref_max8"]), "{text:?}");
        assert_eq!(encode(cleaned, 100, true), ids(&row["ids_hf"]), "{text:?}");
        assert_eq!(encode(cleaned, 8, true), ids(&row["ids_hf_max8"]), "{text:?}");
        assert_eq!(encode(text, 100, false), ids(&row["raw_ids_ref"]), "{text:?}");
        assert_eq!(encode(text, 100, true), ids(&row["raw_ids_hf"]), "{text:?}");
        let ended = format!("{cleaned} [SEP]");
        assert_eq!(encode(&ended, 100, false), ids(&row["sep_appended_ids_ref"]), "{text:?}");
    }
}

#[test]
fn patch_masks_are_the_originals() {
    for case in texts()["image_attns"].as_array().unwrap() {
        let bbox: Vec<f32> = serde_json::from_value(case["box"].clone()).unwrap();
        let expected: Vec<f32> = serde_json::from_value(case["atts"].clone()).unwrap();
        let bbox: [f32; 4] = bbox.try_into().unwrap();
        match View::whole(128, 128).place(bbox, 0.0) {
            Some(placed) => assert_eq!(placed.region_mask(4), expected, "{bbox:?}"),
            // The original takes the nearest patch for it; here an element without area is left out.
            None => assert_eq!(bbox[2..], [0.0, 0.0]),
        }
    }
}

#[test]
fn a_tokenizer_survives_its_file() {
    let words = ["red", "circle", "playground", "Left", "red"].map(str::to_owned);
    let built = TextTokenizer::from_vocabulary(&words).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, built.to_bytes()).unwrap();
    let read = TextTokenizer::from_file(&path).unwrap();
    assert_eq!(built.to_bytes(), read.to_bytes());
    assert_eq!(built.vocab_size(), read.vocab_size());
    let specials = [built.pad_id(), built.unk_id(), built.cls_id(), built.sep_id(), built.mask_id()];
    assert_eq!(specials, [0, 1, 2, 3, 4]);
    for (i, word) in ["red", "circle", "playground", "left"].into_iter().enumerate() {
        assert_eq!(read.tokens(word).unwrap(), [5 + i as u32]);
    }
    // Unknown words fall to letters, and come back from them.
    let text = "a purple zeppelin left of playgrounds, 42 [red] circles";
    for tokenizer in [&built, &read] {
        let ids = tokenizer.encode(text, 100, true).unwrap();
        assert!(!ids.contains(&tokenizer.unk_id()));
        assert_eq!(tokenizer.decode(&ids).replace(' ', ""), text.replace(' ', ""));
        assert!(ids.iter().all(|&id| tokenizer.id_to_token(id).is_some()));
    }
}

#[test]
fn tokenizer_errors_say_what_is_missing() {
    let error = TextTokenizer::from_bytes("x/tokenizer.json", b"{}").unwrap_err().to_string();
    assert!(error.starts_with("tokenizer x/tokenizer.json: expected the content of"), "{error}");
    let error = TextTokenizer::from_pieces("few", &["[PAD]", "[UNK]", "a"]).unwrap_err();
    assert!(error.to_string().contains("[CLS]"), "{error}");
    let error = TextTokenizer::from_pieces("twice", &["a", "b", "a"]).unwrap_err();
    assert!(error.to_string().contains(r#"found "a" again at 2"#), "{error}");
    let error = TextTokenizer::from_file("no/such/file.json").unwrap_err();
    assert!(error.to_string().starts_with("no/such/file.json: "), "{error}");
}
