//! Batches on the host: which records, which texts of them, and how they are put together.
//!
//! A batch is a function of (records, configuration, seed, step): workers may build batches in any
//! order, and a run resumed at a step sees the same data. Pre-training has two streams: *captions* go with
//! whole images, *regions* with boxes inside them (X-VLM trains on both in turn). Fine-tuning and
//! evaluation go through lists of annotated items, see [`ItemBatches`].
//!
//! All kinds share one way for texts (`texts`) and one for pixels (`pixels`).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand_chacha::ChaCha8Rng;

use crate::broken::{Broken, BrokenRecord};
use crate::config::BatchConfig;
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::image::ImageCache;
use crate::loader::panic_message;
use crate::order::{Order, generator};
use crate::records::Record;
use crate::shards::Need;
use crate::tokens::TextTokenizer;

mod captions;
mod grounding;
mod images;
mod items;
mod nlvr;
mod pixels;
mod regions;
mod texts;
mod vqa;

pub use captions::CaptionBatch;
pub use grounding::{Grounding, Phrase, PhraseBatch};
pub use images::{Described, ImageBatch, ImageText, Images, Pairs, ReferenceBatch, References};
pub use items::{BrokenItem, ItemBatches, ItemConfig, ItemKind, Maker};
pub use nlvr::{Nlvr, Statement, StatementBatch};
pub use regions::RegionBatch;
pub use texts::{GenerationBatch, IGNORE, TextBatch};
pub use vqa::{AnswerBatch, Asked, Question, QuestionBatch, Vqa};

use pixels::Framer;
use texts::TextMaker;

/// Makes batches of records.
#[derive(Debug)]
pub struct BatchBuilder {
    tokenizer: Arc<TextTokenizer>,
    config: BatchConfig,
    cache: Arc<ImageCache>,
    captions: Order,
    regions: Order,
    broken: Mutex<Broken>,
    /// The state in which the data sets of captions and of regions were last found to be good enough.
    checked: [AtomicU64; 2],
    rank: u64,
    ranks: u64,
}

impl BatchBuilder {
    /// A builder for one process. Records without captions take no part in [`Self::captions`], those
    /// without elements none in [`Self::regions`].
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] naming a value that makes no sense.
    pub fn new(
        dataset: Arc<Dataset>,
        tokenizer: Arc<TextTokenizer>,
        config: BatchConfig,
        cache: Arc<ImageCache>,
    ) -> Result<Self, DataError> {
        config.check()?;
        Ok(Self {
            captions: Order::new(Arc::clone(&dataset), Need::Captions, config.seed)?,
            regions: Order::new(dataset, Need::Elems, config.seed)?,
            tokenizer,
            config,
            cache,
            broken: Mutex::default(),
            checked: unchecked(),
            rank: 0,
            ranks: 1,
        })
    }

    /// The same with the region stream's records from another data set.
    ///
    /// # Errors
    ///
    /// As [`Order::new`].
    pub fn with_regions_of(self, dataset: Arc<Dataset>) -> Result<Self, DataError> {
        let regions = Order::new(dataset, Need::Elems, self.config.seed)?;
        let regions = regions.for_rank(self.rank as usize, self.ranks as usize);
        Ok(Self { regions, checked: unchecked(), ..self })
    }

    /// The same for process `rank` of `ranks`, each with other records ([`Order`]). Together they go through those of captions once
    /// an epoch. So they do for regions if every step has a region batch; the records of a step that has none are passed over.
    #[must_use]
    pub fn for_rank(self, rank: usize, ranks: usize) -> Self {
        let (captions, regions) = (self.captions.for_rank(rank, ranks), self.regions.for_rank(rank, ranks));
        Self { rank: rank as u64, ranks: ranks.max(1) as u64, captions, regions, ..self }
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &BatchConfig {
        &self.config
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Arc<TextTokenizer> {
        &self.tokenizer
    }

    /// Caption batches of all processes that make an epoch, rounded up; 0 as long as that is not known.
    #[must_use]
    pub fn caption_steps(&self) -> u64 {
        let step = self.config.batch_size as u64 * self.ranks;
        self.captions.len().unwrap_or(0).div_ceil(step)
    }

    /// The records that caption batches and region batches are drawn from, as far as their number is known, and the shards
    /// that these lie in.
    #[must_use]
    pub fn sizes(&self) -> [(Option<u64>, usize); 2] {
        [&self.captions, &self.regions].map(|order| (order.len(), order.dataset().shards()))
    }

    /// Broken records met so far, among those that were drawn and in shards that were opened for it: the first few of each
    /// reason.
    #[must_use]
    pub fn broken(&self) -> Vec<BrokenRecord> {
        let mut tally = self.lock_broken().tally.clone();
        self.datasets().for_each(|dataset| tally.merge(&dataset.broken_later()));
        tally.examples().to_vec()
    }

    /// How often a record was taken so far, and how often it was broken. Those count too that were found to be broken, and so
    /// not drawn, in shards that were opened since the data set was; and those of shards that cannot be opened any more.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let later: u64 = self.datasets().map(|dataset| dataset.broken_later().total()).sum();
        let broken = self.lock_broken();
        (broken.seen.saturating_add(later), broken.tally.total().saturating_add(later))
    }

    /// The data sets that are drawn from, each once.
    fn datasets(&self) -> impl Iterator<Item = &Arc<Dataset>> {
        let (captions, regions) = (self.captions.dataset(), self.regions.dataset());
        std::iter::once(captions).chain((!Arc::ptr_eq(captions, regions)).then_some(regions))
    }

    /// Number of this process' batch of a step among those of all processes and steps.
    fn batch(&self, step: u64) -> u64 {
        step.wrapping_mul(self.ranks).wrapping_add(self.rank)
    }

    /// Takes records in the order of `order` until there are `count` samples or they are `full`; a
    /// broken record is noted and the next takes its place.
    fn draw<S>(
        &self,
        order: &Order,
        step: u64,
        count: usize,
        full: impl Fn(&[S]) -> bool,
        sample: impl Fn(&Record, &mut ChaCha8Rng, &[S]) -> Result<S, DataError>,
    ) -> Result<Vec<S>, DataError> {
        let batch = self.batch(step);
        let first = step.wrapping_mul(count as u64);
        let mut samples = Vec::with_capacity(count);
        let mut failures = 0;
        for attempt in 0u64.. {
            if samples.len() >= count || full(&samples) {
                break;
            }
            let mut rng = generator(self.config.seed, order.need().stream(), batch, attempt + 1);
            let record = match order.record(first.wrapping_add(attempt)) {
                Err(error @ (DataError::Config { .. } | DataError::Spool { .. })) => return Err(error),
                record => record,
            };
            self.check_found(order.dataset())?;
            let origin = record.as_ref().ok().map(|record| record.origin.clone());
            let made = record.and_then(|record| {
                let make = AssertUnwindSafe(|| sample(&record, &mut rng, &samples));
                catch_unwind(make).unwrap_or_else(|panic| {
                    Err(DataError::RecordPanic { origin: record.origin.to_string(), message: panic_message(&*panic) })
                })
            });
            match made {
                Ok(sample) => {
                    self.lock_broken().seen += 1;
                    samples.push(sample);
                    failures = 0;
                }
                // A mistake of this program, not of the record: nothing tells what else is wrong.
                Err(error @ DataError::RecordPanic { .. }) => return Err(error),
                Err(error) => {
                    failures += 1;
                    // Twice as many failures in a row as there are records: nothing works at all.
                    let hopeless = order.len().is_some_and(|len| failures >= 2 * len);
                    let limit = self.config.max_bad_fraction;
                    // The data set counts the shard.
                    if hopeless || !matches!(error, DataError::Unopened(_)) {
                        self.lock_broken().note(origin.as_ref(), error, limit, hopeless)?;
                    }
                }
            }
        }
        Ok(samples)
    }

    /// Refuses a data set of which too much turns out to be broken in shards that are opened while it is drawn from.
    fn check_found(&self, dataset: &Arc<Dataset>) -> Result<(), DataError> {
        let at = usize::from(!Arc::ptr_eq(dataset, self.captions.dataset()));
        let changes = dataset.changes();
        if self.checked[at].load(SeqCst) == changes {
            return Ok(());
        }
        dataset.check_broken(self.config.max_bad_fraction)?;
        self.checked[at].store(changes, SeqCst);
        Ok(())
    }

    fn lock_broken(&self) -> MutexGuard<'_, Broken> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn framer(&self) -> Framer<'_> {
        Framer {
            cache: &self.cache,
            transform: self.config.transform(),
            augment: self.config.augment.as_ref(),
            region_augment: self.config.region_augment.as_ref(),
            resolution: self.config.resolution,
        }
    }

    /// For the texts of captions.
    fn texts(&self) -> TextMaker<'_> {
        TextMaker {
            tokenizer: &self.tokenizer,
            max_words: self.config.max_words,
            max_tokens: self.config.max_tokens,
            append_sep: self.config.append_sep,
            tokenized: self.config.tokenized,
            masking: Some(&self.config.masking),
        }
    }

    /// For the texts of regions.
    fn region_texts(&self) -> TextMaker<'_> {
        let texts = self.texts();
        TextMaker { tokenized: self.config.regions_tokenized.unwrap_or(texts.tokenized), ..texts }
    }
}

/// No state of either data set.
fn unchecked() -> [AtomicU64; 2] {
    [const { AtomicU64::new(u64::MAX) }; 2]
}

fn missing(record: &Record, expected: &'static str) -> DataError {
    let origin = record.origin.to_string();
    DataError::MissingText { origin, expected }
}
