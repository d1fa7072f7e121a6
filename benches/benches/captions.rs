//! Words and scores of 100 000 captions with five references each, as `xvlm score captions` computes them.

use std::error::Error;
use std::hint::black_box;

use criterion::{Criterion, Throughput};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xvlm::metrics::captions::cider::{CiderD, DocumentFrequencies, cider};
use xvlm::metrics::captions::{bleu, ptb, rouge_l};
use xvlm_benches::criterion;

const IMAGES: usize = 100_000;
const REFERENCES: usize = 5;

/// Candidates of an image in self-critical training: five samples and a greedy one, for 64 images.
const SAMPLES: usize = 6 * 64;

/// Words of captions: some that are frequent, and made-up ones as there are rare words.
fn vocabulary(rng: &mut ChaCha8Rng) -> Vec<String> {
    let frequent =
        "a on of the in with and is man to sitting an two at standing people are next white woman street table";
    let mut words: Vec<String> = frequent.split(' ').map(str::to_owned).collect();
    let letters: Vec<char> = ('a'..='z').collect();
    let word = |rng: &mut ChaCha8Rng| (0..rng.random_range(3..9)).filter_map(|_| letters.choose(rng)).collect();
    words.extend((0..20_000).map(|_| word(rng)));
    words
}

/// A caption of 8 to 14 words: half of them those of its image, a quarter frequent ones.
fn caption(rng: &mut ChaCha8Rng, words: &[String], image: &[usize]) -> String {
    let length = rng.random_range(8..15);
    let word = |rng: &mut ChaCha8Rng| match rng.random_range(0..4) {
        0 => rng.random_range(0..22),
        1 => rng.random_range(0..words.len()),
        _ => image[rng.random_range(0..image.len())],
    };
    let mut caption = (0..length).map(|_| words[word(rng)].as_str()).collect::<Vec<_>>().join(" ");
    caption.push('.');
    caption
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let words = vocabulary(&mut rng);
    let (mut captions, mut references) = (Vec::new(), Vec::new());
    for _ in 0..IMAGES {
        let image: Vec<usize> = (0..8).map(|_| rng.random_range(0..words.len())).collect();
        captions.push(caption(&mut rng, &words, &image));
        references.push((0..REFERENCES).map(|_| caption(&mut rng, &words, &image)).collect::<Vec<_>>());
    }
    let flat: Vec<&str> = captions.iter().chain(references.iter().flatten()).map(String::as_str).collect();
    let mut tokenised = ptb::tokenize_all(&flat).into_iter();
    let captions: Vec<String> = tokenised.by_ref().take(IMAGES).collect();
    let references: Vec<Vec<String>> = (0..IMAGES).map(|_| tokenised.by_ref().take(REFERENCES).collect()).collect();

    let mut criterion: Criterion = criterion();
    let mut group = criterion.benchmark_group("100 000 captions with 5 references");
    group.sample_size(10).throughput(Throughput::Elements(IMAGES as u64));
    group.bench_function("words", |bencher| bencher.iter(|| black_box(ptb::tokenize_all(&flat))));
    group.bench_function("BLEU", |bencher| bencher.iter(|| black_box(bleu(&captions, &references).expect("a score"))));
    group.bench_function("ROUGE-L", |bencher| {
        bencher.iter(|| black_box(rouge_l(&captions, &references).expect("a score")));
    });
    group.bench_function("CIDEr", |bencher| bencher.iter(|| black_box(cider(&captions, &references).expect("scores"))));
    group.finish();

    let cider = CiderD::new(DocumentFrequencies::of_references(&references)?);
    let prepared = references.iter().take(64).map(|references| cider.references(references));
    let prepared = prepared.collect::<Result<Vec<_>, _>>()?;
    let mut group = criterion.benchmark_group("CIDEr-D as a reward, one thread");
    group.throughput(Throughput::Elements(SAMPLES as u64));
    group.bench_function("64 images, 6 captions each", |bencher| {
        let score = |at: usize| cider.score(&captions[at], &prepared[at % 64]);
        bencher.iter(|| black_box((0..SAMPLES).map(score).sum::<f64>()));
    });
    group.finish();
    criterion.final_summary();
    Ok(())
}
