//! CIDEr and CIDEr-D: how much of what people say of an image, and of no other, a caption says (Vedantam et al. 2015).
//!
//! The "CIDEr" of `pycocoevalcap` is the robust variant that the paper calls CIDEr-D: counts are clipped and lengths
//! compared. The two names differ in where the document frequencies come from: those of the references at hand
//! (CIDEr of the COCO evaluation), or of a table made beforehand, as training by reward takes it (CIDEr-D).

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use rayon::prelude::*;

use super::{CHUNK, check, words};
use crate::error::{MetricsError, some};

/// Longest run of words that is compared.
const LONGEST: usize = 4;

/// Standard deviation, in words, of the penalty on lengths that differ (`sigma` of the reference implementation).
const SIGMA: f64 = 6.0;

/// One to four words by their numbers, which start at 1: the first in the lowest 32 bits, 0 where there is none.
/// In this order all single words come before all pairs, and so on.
type Ngram = u128;

/// Number of words.
fn order(ngram: Ngram) -> usize {
    (u128::BITS - ngram.leading_zeros()).div_ceil(u32::BITS) as usize
}

/// Mixes the numbers of words, which are small and regular; no defence against chosen keys is needed, since a caption
/// has few.
#[derive(Clone, Copy, Default)]
struct NgramHasher(u64);

impl Hasher for NgramHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u128(u128::from(byte)));
    }

    fn write_u128(&mut self, ngram: u128) {
        // Multiplied by odd constants without structure (digits of the golden ratio and of pi) and folded.
        let fold = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            (product >> 64) as u64 ^ product as u64
        };
        let low = fold(ngram as u64 ^ self.0, 0x9e37_79b9_7f4a_7c15);
        self.0 = fold(low ^ (ngram >> 64) as u64, 0x243f_6a88_85a3_08d3);
    }
}

type Counts = HashMap<Ngram, f64, BuildHasherDefault<NgramHasher>>;

/// In how many documents each run of one to four words occurs; a document is the set of references of one image.
#[derive(Clone, Debug, Default)]
pub struct DocumentFrequencies {
    documents: f64,
    words: HashMap<Box<str>, u32>,
    counts: Counts,
}

impl DocumentFrequencies {
    /// Counts references: of each image, its captions as words separated by white space.
    ///
    /// # Errors
    /// If there is no image, or an image has no caption.
    pub fn of_references<R: AsRef<str> + Sync>(references: &[Vec<R>]) -> Result<Self, MetricsError> {
        some("images", references.len())?;
        let mut table = Self { documents: references.len() as f64, ..Self::default() };
        let mut document = Vec::new();
        for captions in references {
            some("references of a caption", captions.len())?;
            document.clear();
            for caption in captions {
                let numbers: Vec<_> = words(caption).map(|word| table.number(word)).collect();
                ngrams(&numbers, &mut document);
            }
            document.sort_unstable();
            document.dedup();
            document.iter().for_each(|&ngram| *table.counts.entry(ngram).or_default() += 1.0);
        }
        Ok(table)
    }

    /// A table counted elsewhere: the number of documents (`ref_len` of the files of this kind) and the count of each
    /// run of words (`document_frequency`).
    ///
    /// # Errors
    /// If `documents` or a count is not a positive number, or a run has no word or more than four.
    pub fn from_counts<N, W>(documents: f64, counts: impl IntoIterator<Item = (N, f64)>) -> Result<Self, MetricsError>
    where
        N: AsRef<[W]>,
        W: AsRef<str>,
    {
        positive("number of documents", documents, String::new)?;
        let mut table = Self { documents, ..Self::default() };
        for (ngram, count) in counts {
            let ngram = ngram.as_ref();
            let name = || ngram.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" ");
            if ngram.is_empty() || ngram.len() > LONGEST {
                return Err(MetricsError::Ngram { ngram: name(), found: ngram.len() });
            }
            positive("document frequency", count, name)?;
            let key = pack(ngram.iter().map(|word| table.number(word.as_ref())));
            table.counts.insert(key, count);
        }
        Ok(table)
    }

    /// Number of documents.
    pub fn documents(&self) -> f64 {
        self.documents
    }

    /// Number of different runs of words.
    pub fn len(&self) -> usize {
        self.counts.len()
    }

    /// Whether no run of words was counted.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// Each run of words and its count, in an order that depends on the table only.
    pub fn iter(&self) -> impl Iterator<Item = (Vec<&str>, f64)> {
        let mut names = vec![""; self.words.len() + 1];
        self.words.iter().for_each(|(word, &number)| names[number as usize] = word);
        let mut counts: Vec<_> = self.counts.iter().map(|(&ngram, &count)| (ngram, count)).collect();
        counts.sort_unstable_by_key(|&(ngram, _)| ngram);
        counts.into_iter().map(move |(ngram, count)| {
            let numbers = (0..order(ngram)).map(|at| (ngram >> (32 * at)) as u32);
            (numbers.map(|number| names[number as usize]).collect(), count)
        })
    }

    /// The number of a word, a new one if it was not known.
    fn number(&mut self, word: &str) -> u32 {
        if let Some(&number) = self.words.get(word) {
            return number;
        }
        let number = self.words.len() as u32 + 1;
        self.words.insert(word.into(), number);
        number
    }
}

/// CIDEr-D of single captions, with given document frequencies: the reward of self-critical training.
///
/// The references of an image are prepared once, then any number of captions is scored against them:
///
/// ```
/// # fn main() -> Result<(), xvlm_metrics::MetricsError> {
/// use xvlm_metrics::captions::cider::{CiderD, DocumentFrequencies};
///
/// let references = [vec!["a dog runs", "a brown dog runs on grass"], vec!["a cat sleeps"], vec!["two birds"]];
/// let cider = CiderD::new(DocumentFrequencies::of_references(&references)?);
/// let dog = cider.references(&references[0])?;
/// assert!(cider.score("a dog runs", &dog) > cider.score("a dog sleeps", &dog));
/// # Ok(())
/// # }
/// ```
///
/// Scoring needs no exclusive access: threads may share one.
#[derive(Clone, Debug)]
pub struct CiderD {
    frequencies: DocumentFrequencies,
    /// Logarithm of the number of documents: what an unknown run of words weighs.
    unknown: f64,
}

/// The references of one image, as [`CiderD::references`] prepares them.
#[derive(Clone, Debug)]
pub struct CiderReferences {
    captions: Vec<Weights>,
    /// What each run of words in them weighs, ascending.
    rarities: Vec<(Ngram, f64)>,
    /// Words that the table does not have.
    others: HashMap<Box<str>, u32>,
}

/// A caption as four vectors, a component for each of its runs of one, two, three and four words.
#[derive(Clone, Debug, Default)]
struct Weights {
    /// Ascending.
    components: Vec<(Ngram, f64)>,
    norms: [f64; LONGEST],
    /// The length that is compared: the number of pairs of words.
    pairs: f64,
}

impl CiderD {
    /// With these document frequencies.
    pub fn new(frequencies: DocumentFrequencies) -> Self {
        let unknown = frequencies.documents.ln();
        Self { frequencies, unknown }
    }

    /// The document frequencies.
    pub fn frequencies(&self) -> &DocumentFrequencies {
        &self.frequencies
    }

    /// Prepares the references of one image: words separated by white space.
    ///
    /// # Errors
    /// If there are none.
    pub fn references<R: AsRef<str>>(&self, references: &[R]) -> Result<CiderReferences, MetricsError> {
        some("references of a caption", references.len())?;
        let mut others = HashMap::new();
        let mut captions = vec![Weights::default(); references.len()];
        // Each run of words, and the caption it is in.
        let mut all: Vec<(Ngram, usize)> = Vec::new();
        let mut own = Vec::new();
        for (at, reference) in references.iter().enumerate() {
            let number = |word: &str| {
                let next = (self.frequencies.words.len() + others.len()) as u32 + 1;
                let known = self.frequencies.words.get(word).copied();
                known.unwrap_or_else(|| *others.entry(word.into()).or_insert(next))
            };
            let numbers: Vec<u32> = words(reference).map(number).collect();
            captions[at].pairs = numbers.len().saturating_sub(1) as f64;
            own.clear();
            ngrams(&numbers, &mut own);
            all.extend(own.iter().map(|&ngram| (ngram, at)));
        }
        all.sort_unstable();
        // Looking up takes most of the time, which is that of waiting for memory: nothing else stands in this loop, so that
        // the processor looks up several at a time.
        let mut rarities: Vec<(Ngram, f64)> = all.chunk_by(|a, b| a.0 == b.0).map(|same| (same[0].0, 0.0)).collect();
        rarities
            .iter_mut()
            .for_each(|(ngram, count)| *count = self.frequencies.counts.get(ngram).copied().unwrap_or(0.0));
        for (same, (ngram, rarity)) in all.chunk_by(|a, b| a.0 == b.0).zip(&mut rarities) {
            *rarity = self.unknown - rarity.max(1.0).ln();
            for same in same.chunk_by(|a, b| a.1 == b.1) {
                captions[same[0].1].add(*ngram, same.len(), *rarity);
            }
        }
        captions.iter_mut().for_each(|caption| caption.norms = caption.norms.map(f64::sqrt));
        Ok(CiderReferences { captions, rarities, others })
    }

    /// CIDEr-D, 0 to 10, of a caption: words separated by white space.
    ///
    /// For each length of runs (1 to 4 words) the cosine of the vectors of caption and reference, whose components are
    /// counts times inverse document frequency, those of the caption clipped to those of the reference; times
    /// exp(−δ²/2·6²), δ being the difference of the lengths; ten times the mean over lengths of runs and references.
    pub fn score(&self, caption: impl AsRef<str>, references: &CiderReferences) -> f64 {
        let mut unseen: Vec<&str> = Vec::new();
        let base = self.frequencies.words.len() + references.others.len();
        let numbers: Vec<u32> = words(&caption)
            .map(|word| {
                let known = self.frequencies.words.get(word).or_else(|| references.others.get(word));
                known.copied().unwrap_or_else(|| {
                    let at = unseen.iter().position(|other| *other == word).unwrap_or_else(|| {
                        unseen.push(word);
                        unseen.len() - 1
                    });
                    (base + at) as u32 + 1
                })
            })
            .collect();
        let mut all = Vec::with_capacity(LONGEST * numbers.len());
        ngrams(&numbers, &mut all);
        all.sort_unstable();
        let mut caption = Weights { pairs: numbers.len().saturating_sub(1) as f64, ..Weights::default() };
        let mut known = references.rarities.as_slice();
        for same in all.chunk_by(|a, b| a == b) {
            let ngram = same[0];
            known = from(known, ngram);
            let rarity = match known.first() {
                Some(&(other, rarity)) if other == ngram => rarity,
                _ => self.rarity(ngram),
            };
            caption.add(ngram, same.len(), rarity);
        }
        caption.norms = caption.norms.map(f64::sqrt);
        let sum: f64 = references.captions.iter().map(|reference| similarity(&caption, reference)).sum();
        10.0 * sum / (LONGEST * references.captions.len()) as f64
    }

    /// Inverse document frequency.
    fn rarity(&self, ngram: Ngram) -> f64 {
        let count = self.frequencies.counts.get(&ngram);
        count.map_or(self.unknown, |count| self.unknown - count.max(1.0).ln())
    }
}

impl Weights {
    /// Adds a component; squares of the norms, for now.
    fn add(&mut self, ngram: Ngram, count: usize, rarity: f64) {
        let weight = count as f64 * rarity;
        self.components.push((ngram, weight));
        self.norms[order(ngram) - 1] += weight * weight;
    }
}

/// What follows the entries before an n-gram.
fn from(entries: &[(Ngram, f64)], ngram: Ngram) -> &[(Ngram, f64)] {
    let before = entries.iter().take_while(|(other, _)| *other < ngram).count();
    &entries[before..]
}

/// Sum, over the lengths of runs, of the clipped cosine, with the penalty on lengths that differ.
fn similarity(caption: &Weights, reference: &Weights) -> f64 {
    let mut cosines = [0.0; LONGEST];
    let mut theirs = reference.components.as_slice();
    for &(ngram, weight) in &caption.components {
        theirs = from(theirs, ngram);
        if let Some(&(other, own)) = theirs.first()
            && other == ngram
        {
            cosines[order(ngram) - 1] += weight.min(own) * own;
        }
    }
    for (cosine, (a, b)) in cosines.iter_mut().zip(caption.norms.iter().zip(&reference.norms)) {
        if *a != 0.0 && *b != 0.0 {
            *cosine /= a * b;
        }
    }
    let delta = caption.pairs - reference.pairs;
    cosines.iter().sum::<f64>() * (-delta * delta / (2.0 * SIGMA * SIGMA)).exp()
}

/// CIDEr of each caption, 0 to 10, as the COCO evaluation defines it: document frequencies are those of `references`,
/// a document being the references of one image. The score of the whole is the mean.
///
/// With one image every run of words occurs in all documents, weighs nothing, and the score is 0.
///
/// # Errors
/// If there is no caption, a caption has no reference, or the lists differ in length.
pub fn cider<C, R>(captions: &[C], references: &[Vec<R>]) -> Result<Vec<f64>, MetricsError>
where
    C: AsRef<str> + Sync,
    R: AsRef<str> + Sync,
{
    check(captions, references)?;
    cider_d(captions, references, &CiderD::new(DocumentFrequencies::of_references(references)?))
}

/// CIDEr-D of each caption, 0 to 10, with the document frequencies of `cider`. The score of the whole is the mean.
///
/// # Errors
/// If there is no caption, a caption has no reference, or the lists differ in length.
pub fn cider_d<C, R>(captions: &[C], references: &[Vec<R>], cider: &CiderD) -> Result<Vec<f64>, MetricsError>
where
    C: AsRef<str> + Sync,
    R: AsRef<str> + Sync,
{
    check(captions, references)?;
    let pairs = captions.par_iter().zip(references).with_min_len(CHUNK);
    pairs.map(|(caption, references)| Ok(cider.score(caption, &cider.references(references)?))).collect()
}

/// A caption in the form of the tables that self-critical training takes its document frequencies from: without a
/// period at the end, and with the word `<eos>` after it, so that where a caption ends counts, too.
pub fn with_end(caption: &str) -> String {
    let caption = caption.trim();
    format!("{} <eos>", caption.strip_suffix('.').unwrap_or(caption))
}

/// Adds the runs of one to four words.
fn ngrams(numbers: &[u32], into: &mut Vec<Ngram>) {
    for length in 1..=LONGEST {
        into.extend(numbers.windows(length).map(|run| pack(run.iter().copied())));
    }
}

fn pack(numbers: impl DoubleEndedIterator<Item = u32> + ExactSizeIterator) -> Ngram {
    numbers.rev().fold(0, |ngram, number| ngram << 32 | Ngram::from(number))
}

fn positive(what: &'static str, found: f64, of: impl FnOnce() -> String) -> Result<(), MetricsError> {
    if found > 0.0 && found.is_finite() { Ok(()) } else { Err(MetricsError::NotPositive { what, of: of(), found }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-10, "expected {expected}, found {found}");
    }

    #[test]
    fn ngrams_know_their_length() {
        let mut all = Vec::new();
        ngrams(&[1, u32::MAX, 3, 4, 5], &mut all);
        assert_eq!(
            all.iter().map(|&ngram| order(ngram)).collect::<Vec<_>>(),
            [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4]
        );
        assert!(all.is_sorted_by_key(|&ngram| order(ngram)));
    }

    #[test]
    fn a_table_is_what_it_was_made_of() -> Result<(), MetricsError> {
        let references = [vec!["a dog", "a dog runs"], vec!["a cat"]];
        let table = DocumentFrequencies::of_references(&references)?;
        let listed: Vec<_> = table.iter().map(|(ngram, count)| (ngram.join(" "), count)).collect();
        let again = DocumentFrequencies::from_counts(2.0, table.iter())?;
        assert_eq!(again.iter().map(|(ngram, count)| (ngram.join(" "), count)).collect::<Vec<_>>(), listed);
        assert!(listed.contains(&("a".to_owned(), 2.0)) && listed.contains(&("a dog".to_owned(), 1.0)), "{listed:?}");
        assert_eq!((table.len(), table.documents()), (8, 2.0));
        Ok(())
    }

    #[test]
    fn a_table_and_its_references_score_alike() -> Result<(), MetricsError> {
        let references = [vec!["a dog runs", "the dog runs fast"], vec!["a cat sleeps"], vec!["two birds sing"]];
        let captions = ["a dog runs", "a cat sings", "zebras zebras"];
        let scores = cider(&captions, &references)?;
        let table = DocumentFrequencies::of_references(&references)?;
        let given = CiderD::new(DocumentFrequencies::from_counts(3.0, table.iter())?);
        assert_eq!(cider_d(&captions, &references, &given)?, scores);
        assert_eq!(scores[2], 0.0);
        Ok(())
    }

    /// By hand: the table is empty, so each run weighs ln 8; caption and reference share 1 of 2 words and no pair.
    #[test]
    fn unknown_words_weigh_most() -> Result<(), MetricsError> {
        let none: [(Vec<&str>, f64); 0] = [];
        let cider = CiderD::new(DocumentFrequencies::from_counts(8.0, none)?);
        let references = cider.references(&["x y"])?;
        close(cider.score("x z", &references), 10.0 * 0.5 / 4.0);
        close(cider.score("x y", &references), 10.0 * 2.0 / 4.0);
        // Clipped to one x (the vector is (3, 0) against (1, 1)); two pairs against one.
        let expected = 10.0 * (1.0 / (3.0 * 2f64.sqrt())) * (-1.0 / 72f64).exp() / 4.0;
        close(cider.score("x x x", &references), expected);
        assert_eq!(cider.score("", &references), 0.0);
        Ok(())
    }

    #[test]
    fn the_end_of_a_caption_is_a_word() {
        assert_eq!(with_end(" a dog. "), "a dog <eos>");
        assert_eq!(with_end("a dog"), "a dog <eos>");
    }

    #[test]
    fn wrong_tables_are_refused() {
        let refused = |documents, ngram: &[&str], count| {
            DocumentFrequencies::from_counts(documents, [(ngram, count)]).unwrap_err().to_string()
        };
        assert_eq!(refused(0.0, &["a"], 1.0), "number of documents: expected a positive number, found 0");
        assert_eq!(
            refused(1.0, &["a", "b"], f64::NAN),
            "document frequency of \"a b\": expected a positive number, found NaN"
        );
        assert_eq!(refused(1.0, &[], 1.0), "n-gram \"\": expected 1 to 4 words, found 0");
        assert_eq!(refused(1.0, &["a"; 5], 1.0), "n-gram \"a a a a a\": expected 1 to 4 words, found 5");
    }
}
