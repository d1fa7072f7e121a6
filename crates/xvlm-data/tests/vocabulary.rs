//! Vocabularies learnt from texts: the same whatever the order, no larger than told, and able to say what they were learnt from.

use proptest::prelude::*;
use xvlm_data::vocabulary::{Pieces, Vocabulary, VocabularyConfig, VocabularyLearner};
use xvlm_data::{DataError, TextTokenizer};

fn learn(config: VocabularyConfig, texts: &[String]) -> Result<Vocabulary, DataError> {
    let mut learner = VocabularyLearner::new(config);
    texts.iter().try_for_each(|text| learner.add(text))?;
    learner.learn()
}

fn texts() -> Vec<String> {
    let (colours, things) = (["red", "green", "blue", "yellow", "Ochre"], ["circle", "square", "triangle", "bicycle"]);
    let text = |i: usize| {
        let (colour, thing) = (colours[i % 5], things[i * i % 4]);
        format!("a {colour} {thing} beside the {} {}, {i} times", colours[i * 7 % 5], things[i / 5 % 4])
    };
    (0..200).map(text).collect()
}

fn config(pieces: Pieces, size: usize) -> VocabularyConfig {
    VocabularyConfig { pieces, size, ..VocabularyConfig::default() }
}

#[test]
fn words_grow_out_of_characters() {
    let word_piece = learn(config(Pieces::WordPiece, 180), &texts()).unwrap();
    assert_eq!(word_piece.pieces[..5], ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]);
    let size = word_piece.pieces.len();
    assert!((100..=180).contains(&size) && word_piece.tokenizer.vocab_size() == size, "{size}");
    assert_eq!((word_piece.texts, word_piece.words), (200, 4 + 5 + 4 + 1 + 200));
    let byte_level = learn(config(Pieces::ByteLevel, 320), &texts()).unwrap();
    assert_eq!(byte_level.pieces[..5], ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]);
    assert_eq!(byte_level.tokenizer.vocab_size(), 320);
    for (vocabulary, sentence, pieces) in [
        (&word_piece, "A red Triangle beside the ochre bicycle", 7),
        (&byte_level, "a red triangle beside the Ochre bicycle", 7),
    ] {
        let ids = vocabulary.tokenizer.tokens(sentence).unwrap();
        assert_eq!(ids.len(), pieces, "frequent words are one piece: {ids:?}");
        let pieces: Vec<_> = ids.iter().map(|&id| vocabulary.tokenizer.id_to_token(id)).collect();
        assert_eq!(vocabulary.tokenizer.decode(&ids).to_lowercase(), sentence.to_lowercase(), "{pieces:?}");
        for text in texts() {
            let ids = vocabulary.tokenizer.tokens(&text).unwrap();
            assert!(!ids.contains(&vocabulary.tokenizer.unk_id()), "{text}");
        }
    }
    // Bytes say everything.
    let ids = byte_level.tokenizer.tokens("never seen: 日本 🙂").unwrap();
    assert_eq!(byte_level.tokenizer.decode(&ids), "never seen: 日本 🙂");
}

#[test]
fn it_survives_its_files() {
    let folder = tempfile::tempdir().unwrap();
    for (pieces, size, files) in [(Pieces::WordPiece, 150, 2), (Pieces::ByteLevel, 300, 1)] {
        let into = folder.path().join(format!("{pieces:?}/new"));
        let learnt = learn(config(pieces, size), &texts()).unwrap();
        learnt.write(&into).unwrap();
        learnt.write(&into).unwrap();
        assert_eq!(std::fs::read_dir(&into).unwrap().count(), files, "nothing else is left behind");
        let expected: Vec<_> = texts().iter().map(|text| learnt.tokenizer.tokens(text).unwrap()).collect();
        for name in ["tokenizer.json", "vocab.txt"].iter().take(files) {
            let read = TextTokenizer::from_file(into.join(name)).unwrap();
            assert_eq!(texts().iter().map(|text| read.tokens(text).unwrap()).collect::<Vec<_>>(), expected, "{name}");
        }
    }
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = learn(config(Pieces::WordPiece, 150), &texts()).unwrap().write(&file).unwrap_err();
    assert!(matches!(&error, DataError::Io { path, .. } if *path == file), "{error}");
}

#[test]
fn rare_characters_and_rare_pairs_are_left_out() {
    let mut texts = texts();
    texts.extend(["zebra ж".to_owned(), "ω".to_owned()]);
    let small = VocabularyConfig { max_alphabet: 30, ..config(Pieces::WordPiece, 200) };
    let learnt = learn(small, &texts).unwrap();
    assert!(!learnt.pieces.iter().any(|piece| piece.contains(['ж', 'ω'])), "{:?}", learnt.pieces);
    let singles = learnt.pieces.iter().skip(5).filter(|piece| piece.chars().count() == 1).count();
    assert_eq!(singles, 30);
    let often = VocabularyConfig { min_frequency: 1_000_000, ..config(Pieces::WordPiece, 200) };
    let letters = learn(often, &texts).unwrap();
    assert!(letters.pieces.iter().skip(5).all(|piece| piece.trim_start_matches('#').chars().count() <= 1));

    let error = learn(config(Pieces::WordPiece, 20), &texts).unwrap_err().to_string();
    assert!(error.contains("size: expected at least") && error.contains("found 20"), "{error}");
    let error = learn(config(Pieces::ByteLevel, 260), &texts).unwrap_err().to_string();
    assert!(error.contains("at least 261"), "{error}");
    let error = learn(config(Pieces::ByteLevel, 300), &[String::new()]).unwrap_err().to_string();
    assert!(error.contains("1 texts without any"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn it_does_not_depend_on_order_or_chance(
        texts in prop::collection::vec("[a-eéß🙂 ]{0,12}", 1..40),
        rotation in 0usize..40,
        bytes: bool,
    ) {
        let pieces = if bytes { Pieces::ByteLevel } else { Pieces::WordPiece };
        let config = VocabularyConfig { min_frequency: 1, ..config(pieces, if bytes { 320 } else { 60 }) };
        let mut turned = texts.clone();
        turned.rotate_left(rotation % texts.len());
        // Each learner's tables are hashed anew.
        match (learn(config.clone(), &texts), learn(config, &turned)) {
            (Ok(one), Ok(other)) => {
                prop_assert_eq!(&one.pieces, &other.pieces);
                prop_assert_eq!(one.tokenizer.to_bytes(), other.tokenizer.to_bytes());
                for text in &texts {
                    prop_assert!(!one.tokenizer.tokens(text).unwrap().contains(&one.tokenizer.unk_id()));
                }
            }
            (Err(one), Err(other)) => prop_assert_eq!(one.to_string(), other.to_string()),
            _ => prop_assert!(false, "only one of two orders can be learnt from"),
        }
    }
}
