//! Texts come out as in the original, whatever is in them (see `golden/README.md`).

use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use tempfile::TempDir;
use xvlm_data::{DataError, MaskingGenerator, TextTokenizer, pre_caption, pre_question};

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn strings(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn odd_texts_are_cleaned_as_in_the_original() {
    let rows = golden("text_cleaning.json");
    for row in rows.as_array().unwrap() {
        let text = row["text"].as_str().unwrap();
        for (words, max_words) in [("3", 3), ("40", 40)] {
            let found = pre_caption(text, max_words);
            match &row["caption"][words] {
                Value::Null => assert!(matches!(found, Err(DataError::EmptyText { .. })), "{text:?}: {found:?}"),
                expected => assert_eq!(found.unwrap(), *expected, "{text:?}"),
            }
            assert_eq!(pre_question(text, max_words), row["question"][words], "{text:?}");
        }
    }
}

/// The files that the original's tokenizers are read from.
fn files() -> (Value, TempDir) {
    let (golden, dir) = (golden("tokenizers.json"), tempfile::tempdir().unwrap());
    let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
    let bpe = strings(&golden["bpe"]);
    let numbers: serde_json::Map<String, Value> = bpe.into_iter().zip(0..).map(|(t, i)| (t, Value::from(i))).collect();
    write("vocab.txt", strings(&golden["wordpiece"]).join("\n") + "\n");
    write("vocab.json", Value::from(numbers).to_string());
    write("merges.txt", format!("#version: 0.2\n{}\n", strings(&golden["merges"]).join("\n")));
    (golden, dir)
}

#[test]
fn both_tokenizers_are_the_originals() {
    let (golden, dir) = files();
    let file = |name: &str| TextTokenizer::from_file(dir.path().join(name)).unwrap();
    let saved = |tokenizer: &TextTokenizer| TextTokenizer::from_bytes("saved", &tokenizer.to_bytes()).unwrap();
    let (bert, roberta) = (file("vocab.txt"), file("vocab.json"));
    let same = [("bert", saved(&bert)), ("bert", bert), ("roberta", saved(&roberta)), ("roberta", file("merges.txt"))];
    for (name, tokenizer) in same {
        for row in golden["rows"].as_array().unwrap() {
            let text = row["text"].as_str().unwrap();
            let expected: Vec<u32> = serde_json::from_value(row[name].clone()).unwrap();
            let pieces = |ids: &[u32]| ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap()).collect::<Vec<_>>();
            let found = tokenizer.tokens(text).unwrap();
            assert_eq!(pieces(&found), pieces(&expected), "{name} of {text:?}");
            assert_eq!(found, expected, "{name} of {text:?}");
        }
    }
}

#[test]
fn files_of_tokenizers_are_found_and_checked() {
    let (_, dir) = files();
    let at = |name: &str| dir.path().join(name);
    let from = |path: PathBuf| TextTokenizer::from_file(path).map(|tokenizer| tokenizer.vocab_size());
    let refused = |path: PathBuf| from(path).unwrap_err().to_string();
    let (pieces, bytes) = (from(at("vocab.txt")).unwrap(), from(at("vocab.json")).unwrap());
    assert_eq!(from(dir.path().to_owned()).unwrap(), pieces, "vocab.txt goes before vocab.json");
    std::fs::remove_file(at("vocab.txt")).unwrap();
    assert_eq!(from(dir.path().to_owned()).unwrap(), bytes);
    std::fs::write(at("tokenizer.json"), TextTokenizer::from_vocabulary(&[]).unwrap().to_bytes()).unwrap();
    assert_eq!(from(dir.path().to_owned()).unwrap(), TextTokenizer::from_vocabulary(&[]).unwrap().vocab_size());
    for name in ["vocab.json", "merges.txt"] {
        std::fs::rename(at(name), at(&format!("roberta-base-{name}"))).unwrap();
    }
    assert_eq!(from(at("roberta-base-vocab.json")).unwrap(), bytes);
    std::fs::copy(at("tokenizer.json"), at("my-vocab.json")).unwrap();
    assert_eq!(from(at("my-vocab.json")).unwrap(), from(at("tokenizer.json")).unwrap());

    let error = refused(at("merges.txt"));
    assert!(error.contains("vocab.json") && error.contains("No such file"), "{error}");
    let write = |vocabulary: &str, merges: &str| {
        std::fs::write(at("vocab.json"), vocabulary).unwrap();
        std::fs::write(at("merges.txt"), merges).unwrap();
    };
    let specials = r#""<s>":0,"<pad>":1,"</s>":2,"<unk>":3,"<mask>":4"#;
    for (vocabulary, merges, expected) in [
        ("[]", "", "a vocab.json"),
        (r#"{"a": "b"}"#, "", r#""a": "b""#),
        (r#"{"a": -1}"#, "", r#""a": -1"#),
        (&format!("{{{specials}}}"), "#version: 0.2\na b c\n", r#""a b c" in line 2"#),
        (&format!("{{{specials}}}"), "abc\n", r#""abc" in line 1"#),
        (&format!("{{{specials}}}"), "a b\n", "tokenizer.json"),
        (&format!("{{{specials},\"a\":4000000000}}"), "", "identifiers below 16777216"),
        (r#"{"a": 0}"#, "", "<mask>"),
    ] {
        write(vocabulary, merges);
        let error = refused(at("vocab.json"));
        assert!(error.contains(expected) && error.contains("vocab.json"), "{error}");
    }
    let empty = tempfile::tempdir().unwrap();
    let error = refused(empty.path().to_owned());
    assert!(error.contains("vocab.txt") && error.contains("none of them"), "{error}");
}

#[test]
fn byte_level_words_begin_with_a_space() {
    let (_, dir) = files();
    let tokenizer = TextTokenizer::from_file(dir.path().join("vocab.json")).unwrap();
    let ids = tokenizer.encode("unbelievably laughing in the park", 40, true).unwrap();
    let pieces: Vec<String> = ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap()).collect();
    for (piece, &id) in pieces.iter().zip(&ids) {
        let begins = piece.starts_with('Ġ') || ["<s>", "</s>"].contains(&piece.as_str());
        assert_eq!(tokenizer.continues_word(id), !begins, "{piece}");
    }
    assert_eq!(tokenizer.decode(&ids), "unbelievably laughing in the park");
    assert_eq!(tokenizer.token_ids("<s> Ġthe the nothing"), {
        let id = |token| tokenizer.token_to_id(token).unwrap();
        [id("<s>"), id("Ġthe"), id("the"), tokenizer.unk_id()]
    });
    assert!(tokenizer.token_ids(" \n").is_empty());
}

/// A tokenizer with a piece that begins a word and one that goes on with it, and what a text of words of these numbers of pieces
/// is.
fn blanks(roberta: bool, words: &[u64]) -> (TextTokenizer, Vec<u32>) {
    let fill = (0..500).map(|i| format!("word{i}"));
    let tokenizer = if roberta {
        let specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "q", "Ġq"].map(str::to_owned).into_iter();
        let numbers: serde_json::Map<String, Value> =
            specials.chain(fill).zip(0..).map(|(token, id)| (token, Value::from(id))).collect();
        TextTokenizer::from_merges("blanks", Value::from(numbers).to_string().as_bytes(), b"").unwrap()
    } else {
        TextTokenizer::from_vocabulary(&fill.collect::<Vec<_>>()).unwrap()
    };
    let id = |token| tokenizer.token_to_id(token).unwrap();
    let (begins, goes_on) = if roberta { (id("Ġq"), id("q")) } else { (id("q"), id("##q")) };
    let mut ids = vec![tokenizer.cls_id()];
    for (i, &pieces) in words.iter().enumerate() {
        // Nothing stands before the first word, so byte-level pieces do not tell that it begins.
        ids.push(if i == 0 && roberta { goes_on } else { begins });
        ids.extend((1..pieces).map(|_| goes_on));
    }
    (tokenizer, ids)
}

#[test]
fn blanks_are_where_the_original_has_them() {
    const TEXTS: u32 = 20_000;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for case in golden("masking.json").as_array().unwrap() {
        let counts = |field: &str| -> Vec<f64> { serde_json::from_value(case[field].clone()).unwrap() };
        let words: Vec<u64> = serde_json::from_value(case["words"].clone()).unwrap();
        let mask_whole_word = case["whole_word"].as_bool().unwrap();
        let (tokenizer, ids) = blanks(case["roberta"].as_bool().unwrap(), &words);
        let generator = MaskingGenerator { mask_whole_word, ..MaskingGenerator::default() };
        let (mut positions, mut sizes, mut kinds) = (vec![0.0; ids.len()], vec![0.0; 9], [0.0; 3]);
        let mut neighbours = 0.0;
        for _ in 0..TEXTS {
            let masked = generator.mask(&ids, &tokenizer, &mut rng);
            sizes[masked.positions.len()] += 1.0;
            neighbours += masked.positions.windows(2).filter(|two| two[0] + 1 == two[1]).count() as f64;
            for &position in &masked.positions {
                positions[position as usize] += 1.0;
                let (before, after) = (ids[position as usize], masked.ids[position as usize]);
                kinds[if after == tokenizer.mask_id() { 0 } else { 1 + usize::from(before == after) }] += 1.0;
            }
        }
        let texts = case["texts"].as_f64().unwrap();
        // Two samples of a share, compared at five standard deviations.
        let agree = |what: &str, found: f64, of: f64, expected: f64, of_expected: f64| {
            let (a, b) = (found / of, expected / of_expected);
            let share = (found + expected) / (of + of_expected);
            let deviation = (share * (1.0 - share).max(0.0) * (1.0 / of + 1.0 / of_expected)).sqrt();
            assert!((a - b).abs() <= 5.0 * deviation + 1e-12, "{what} of {words:?}: {a} for {b}, ± {deviation}");
        };
        let all = f64::from(TEXTS);
        for (i, expected) in counts("positions").into_iter().enumerate() {
            agree(&format!("position {i}"), positions[i], all, expected, texts);
        }
        for (i, expected) in counts("counts").into_iter().enumerate() {
            agree(&format!("{i} blanks"), sizes[i], all, expected, texts);
        }
        let (found, expected): (f64, f64) = (positions.iter().sum(), counts("positions").iter().sum());
        agree("neighbours", neighbours, found, case["neighbours"].as_f64().unwrap(), expected);
        for (i, count) in counts("kinds").into_iter().enumerate() {
            agree(&format!("kind {i}"), kinds[i], found, count, expected);
        }
    }
}
