//! Blanks: what always holds, and how often what happens.

use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm_data::{Masked, MaskingGenerator, TextTokenizer};

fn tokenizer() -> TextTokenizer {
    let words: Vec<String> = (0..2000).map(|i| format!("word{i}")).collect();
    TextTokenizer::from_vocabulary(&words).unwrap()
}

/// A text of `[CLS]` and words of the given numbers of pieces.
fn text(tokenizer: &TextTokenizer, words: &[usize]) -> Vec<u32> {
    let begin = tokenizer.token_to_id("word7").unwrap();
    let go_on = tokenizer.token_to_id("##x").unwrap();
    let mut ids = vec![tokenizer.cls_id()];
    for &pieces in words {
        ids.push(begin);
        ids.extend(std::iter::repeat_n(go_on, pieces - 1));
    }
    ids
}

fn check(ids: &[u32], masked: &Masked) {
    assert_eq!(masked.ids.len(), ids.len());
    assert_eq!(masked.positions.len(), masked.labels.len());
    assert!(masked.positions.is_sorted_by(|a, b| a < b));
    assert!(!masked.positions.contains(&0), "[CLS] is never predicted");
    for (position, &label) in masked.positions.iter().zip(&masked.labels) {
        assert_eq!(ids[*position as usize], label);
    }
    for (i, (before, after)) in ids.iter().zip(&masked.ids).enumerate() {
        assert!(before == after || masked.positions.contains(&(i as u32)));
    }
}

proptest! {
    #[test]
    fn blanks_are_consistent(
        words in prop::collection::vec(1usize..5, 1..20),
        seed: u64,
        mask_whole_word: bool,
        max_masks in 1usize..10,
    ) {
        let tokenizer = tokenizer();
        let ids = text(&tokenizer, &words);
        let config = MaskingGenerator { max_masks, mask_whole_word, ..MaskingGenerator::default() };
        let masked = config.mask(&ids, &tokenizer, &mut ChaCha8Rng::seed_from_u64(seed));
        check(&ids, &masked);
        let wanted = ((ids.len() as f64 * 0.25).round_ties_even() as usize).clamp(1, max_masks);
        prop_assert_eq!(masked.positions.len(), wanted.min(ids.len() - 1));
        let again = config.mask(&ids, &tokenizer, &mut ChaCha8Rng::seed_from_u64(seed));
        prop_assert_eq!(masked, again);
    }
}

#[test]
fn degenerate_texts_and_settings_do_no_harm() {
    let (tokenizer, mut rng) = (tokenizer(), ChaCha8Rng::seed_from_u64(1));
    let config = MaskingGenerator::default();
    assert_eq!(config.mask(&[], &tokenizer, &mut rng), Masked::default());
    let alone = config.mask(&[tokenizer.cls_id()], &tokenizer, &mut rng);
    assert_eq!((alone.ids.as_slice(), alone.positions.len()), ([tokenizer.cls_id()].as_slice(), 0));
    let none = MaskingGenerator { max_masks: 0, ..config };
    assert!(none.mask(&text(&tokenizer, &[1, 1]), &tokenizer, &mut rng).positions.is_empty());
}

#[test]
fn words_are_blanked_whole() {
    let (tokenizer, mut rng) = (tokenizer(), ChaCha8Rng::seed_from_u64(2));
    // Each word is exactly what there is room for, so nothing is ever cut at the limit.
    let ids = text(&tokenizer, &[3; 4]);
    let config = MaskingGenerator { skipgram_prb: 0.0, ..MaskingGenerator::default() };
    for _ in 0..500 {
        let masked = config.mask(&ids, &tokenizer, &mut rng);
        check(&ids, &masked);
        let first = masked.positions[0];
        assert_eq!(first % 3, 1);
        assert_eq!(masked.positions, [first, first + 1, first + 2]);
    }
}

#[test]
fn shares_are_those_of_the_original() {
    let (tokenizer, mut rng) = (tokenizer(), ChaCha8Rng::seed_from_u64(3));
    let config = MaskingGenerator::default();
    let (mut masks, mut others, mut kept, mut runs, mut texts) = (0, 0, 0, 0, 0);
    for _ in 0..20_000 {
        // One blank in a text of three words: a run shows as none of its neighbours being alone.
        let words = vec![1; rng.random_range(3..30)];
        let ids = text(&tokenizer, &words);
        let masked = config.mask(&ids, &tokenizer, &mut rng);
        for (&position, &label) in masked.positions.iter().zip(&masked.labels) {
            match masked.ids[position as usize] {
                id if id == tokenizer.mask_id() => masks += 1,
                id if id == label => kept += 1,
                _ => others += 1,
            }
        }
        if masked.positions.len() == 2 {
            texts += 1;
            runs += usize::from(masked.positions[0] + 1 == masked.positions[1]);
        }
    }
    let all = f64::from(masks + others + kept);
    for (count, share) in [(masks, 0.8), (others, 0.1), (kept, 0.1)] {
        let found = f64::from(count) / all;
        assert!((found - share).abs() < 0.01, "{found} instead of {share}");
    }
    // Two blanks in 6 to 9 words: neighbours by chance in about 2/n of the texts, and nearly always
    // with a run (probability 0.2).
    let neighbours = runs as f64 / f64::from(texts);
    assert!((0.3..0.55).contains(&neighbours), "{neighbours}");
}
