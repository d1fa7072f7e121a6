//! Words and scores of captions against what `pycocoevalcap` 1.2 (with Stanford CoreNLP 3.4.1) makes of them.
//!
//! `golden/ptb.json`: captions in the order in which they were tokenised together, each with its words.
//! `golden/captions.json`: captions, references, and the scores of each and of all; `cider_d` with the document
//! frequencies of the references of the first 25 images, each with `<eos>` at its end.

use std::error::Error;

use serde::Deserialize;
use xvlm_metrics::captions::cider::{CiderD, DocumentFrequencies, cider, cider_d, with_end};
use xvlm_metrics::captions::{bleu, ptb, rouge_l, rouge_l_each};

#[derive(Deserialize)]
struct Golden {
    bleu: [f64; 4],
    rouge_l: f64,
    cider: f64,
    cider_d: f64,
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    caption: String,
    references: Vec<String>,
    bleu: [f64; 4],
    rouge_l: f64,
    cider: f64,
    cider_d: f64,
}

fn close(what: &str, found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-9, "{what}: expected {expected}, found {found}");
}

#[test]
fn words_are_the_official_ones() -> Result<(), Box<dyn Error>> {
    let golden: Vec<(String, String)> = serde_json::from_str(include_str!("golden/ptb.json"))?;
    let captions: Vec<&str> = golden.iter().map(|(caption, _)| caption.as_str()).collect();
    let found = ptb::tokenize_all(&captions);
    assert_eq!(found.len(), golden.len());
    for ((caption, expected), found) in golden.iter().zip(&found) {
        assert_eq!(found, expected, "{caption:?}");
    }
    // Alone, only captions whose neighbour matters have other words.
    let other: Vec<_> = golden.iter().filter(|(caption, words)| ptb::tokenize(caption) != *words).collect();
    assert!(other.iter().any(|(caption, _)| caption == "Vitamin C."), "{other:?}");
    assert!(other.len() <= 3, "{other:?}");
    Ok(())
}

#[test]
fn scores_are_the_official_ones() -> Result<(), Box<dyn Error>> {
    let golden: Golden = serde_json::from_str(include_str!("golden/captions.json"))?;
    let captions: Vec<_> = golden.items.iter().map(|item| item.caption.as_str()).collect();
    let captions = ptb::tokenize_all(&captions);
    let raw: Vec<_> = golden.items.iter().flat_map(|item| &item.references).collect();
    let mut words = ptb::tokenize_all(&raw).into_iter();
    let references: Vec<Vec<String>> =
        golden.items.iter().map(|item| words.by_ref().take(item.references.len()).collect()).collect();

    let found = bleu(&captions, &references)?;
    for n in 0..4 {
        close("BLEU", found[n], golden.bleu[n]);
    }
    close("ROUGE-L", rouge_l(&captions, &references)?, golden.rouge_l);
    let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
    let ciders = cider(&captions, &references)?;
    close("CIDEr", mean(&ciders), golden.cider);

    let ended: Vec<String> = captions.iter().map(|caption| with_end(caption)).collect();
    let end = |captions: &Vec<String>| captions.iter().map(|caption| with_end(caption)).collect();
    let ended_references: Vec<Vec<String>> = references.iter().map(end).collect();
    let table = CiderD::new(DocumentFrequencies::of_references(&ended_references[..25])?);
    let given = cider_d(&ended, &ended_references, &table)?;
    close("CIDEr-D", mean(&given), golden.cider_d);

    let rouges = rouge_l_each(&captions, &references)?;
    for (at, item) in golden.items.iter().enumerate() {
        let what = &item.caption;
        close(what, rouges[at], item.rouge_l);
        close(what, ciders[at], item.cider);
        close(what, given[at], item.cider_d);
        let prepared = table.references(&ended_references[at])?;
        close(what, table.score(&ended[at], &prepared), item.cider_d);
        let found = bleu(&captions[at..=at], &references[at..=at])?;
        for n in 0..4 {
            close(what, found[n], item.bleu[n]);
        }
    }
    Ok(())
}
