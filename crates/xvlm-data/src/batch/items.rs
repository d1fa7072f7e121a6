//! Batches over lists of annotated items, for fine-tuning and evaluation: one builder for all kinds of them.

use std::collections::VecDeque;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::pixels::{Framer, Shown};
use super::texts::TextMaker;
use crate::augment::RandAugment;
use crate::broken::{Broken, BrokenRecord};
use crate::config::check_views;
use crate::error::{DataError, Place};
use crate::image::ImageCache;
use crate::order::generator;
use crate::records::{ImageSource, Origin};
use crate::tokens::TextTokenizer;
use crate::transform::{RandomResizedCrop, Transform};

/// The stream of orders and samples of training; pre-training has those below.
const TRAINING: u64 = 16;

/// What batches of annotated items are made of. Defaults are those of X-VLM's fine-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ItemConfig {
    /// Seed of all randomness. Default 42.
    pub seed: u64,
    /// Side of the square images, in pixels. Default 384; not in files, since it is the model's.
    #[serde(skip)]
    pub resolution: usize,
    /// Items in a batch of one process. Default 32.
    pub batch_size: usize,
    /// Most words of a text. Default 30.
    pub max_words: usize,
    /// Most tokens of a text, special tokens included. Default 40.
    pub max_tokens: usize,
    /// Whether `[SEP]` ends texts that a decoder does not write (what it writes always has it). Default false.
    pub append_sep: bool,
    /// The part that training sees of an image. Null: all of it, always. Default [`RandomResizedCrop::finetuning`].
    pub crop: Option<RandomResizedCrop>,
    /// What changes the pictures in training. Null: nothing. Default [`RandAugment::pretraining`], as the original.
    pub augment: Option<RandAugment>,
    /// What changes them in training for grounding; it must leave things where they are. Null: nothing. Default
    /// [`RandAugment::boxes`].
    pub region_augment: Option<RandAugment>,
    /// Whether training for grounding sees a random part of each image, around the box. Default true.
    pub random_crop: bool,
    /// Whether training mirrors half of the images. Default true.
    pub hflip: bool,
    /// Whether images whose texts say left or right are not mirrored. Default true.
    pub careful_hflip: bool,
    /// Share of broken items past which the run stops. Default 0.01.
    pub max_bad_fraction: f64,
}

impl Default for ItemConfig {
    fn default() -> Self {
        Self {
            seed: 42,
            resolution: 384,
            batch_size: 32,
            max_words: 30,
            max_tokens: 40,
            append_sep: false,
            crop: Some(RandomResizedCrop::finetuning()),
            augment: Some(RandAugment::pretraining()),
            region_augment: Some(RandAugment::boxes()),
            random_crop: true,
            hflip: true,
            careful_hflip: true,
            max_bad_fraction: 0.01,
        }
    }
}

impl ItemConfig {
    /// Checks that every value makes sense.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] about the first that does not.
    pub fn check(&self) -> Result<(), DataError> {
        let wrong = |field, expected: String, found: String| Err(DataError::Config { field, expected, found });
        for (field, value, least) in [
            ("resolution", self.resolution, 1),
            ("batch_size", self.batch_size, 1),
            ("max_words", self.max_words, 1),
            ("max_tokens", self.max_tokens, 3),
        ] {
            if value < least {
                return wrong(field, format!("at least {least}"), value.to_string());
            }
        }
        if !(0.0..=1.0).contains(&self.max_bad_fraction) {
            return wrong("max_bad_fraction", "a share from 0 to 1".to_owned(), self.max_bad_fraction.to_string());
        }
        check_views(self.crop.as_ref(), self.augment.as_ref(), self.region_augment.as_ref())
    }
}

/// What is made of items: a task's input.
pub trait ItemKind: Send + Sync {
    /// One annotated item.
    type Item: Send + Sync;
    /// What becomes of it before it is put together with others.
    type Sample: Send;
    /// A batch of them.
    type Batch;

    /// Opens the item's images and prepares its texts. `maker` says whether it is for training or for evaluation.
    ///
    /// # Errors
    ///
    /// What is wrong with the item; it is then left out.
    fn sample(&self, item: &Self::Item, maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Self::Sample, DataError>;

    /// Puts samples together.
    fn collate(&self, samples: Vec<Self::Sample>, maker: &Maker) -> Self::Batch;
}

/// What the kinds of batches make their samples with.
#[derive(Debug)]
pub struct Maker<'a> {
    pub(super) framer: Framer<'a>,
    pub(super) texts: TextMaker<'a>,
    /// Whether what is random is drawn; otherwise images are seen as they are.
    pub(super) training: bool,
}

impl Maker<'_> {
    /// The whole image; for training perhaps mirrored, if `texts` allow it.
    pub(super) fn whole<'a>(
        &self,
        source: &ImageSource,
        texts: impl IntoIterator<Item = &'a str>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Shown, DataError> {
        let name = name(source);
        if self.training {
            self.framer.whole(source, &name, texts, rng)
        } else {
            Ok(self.framer.as_is(source, &name)?.0)
        }
    }
}

/// What an image is called in messages.
pub(super) fn name(source: &ImageSource) -> String {
    match source {
        ImageSource::Path(path) => path.display().to_string(),
        ImageSource::Bytes(bytes) => format!("of {} bytes in memory", bytes.len()),
    }
}

/// An item that was left out, and why.
#[derive(Debug, Clone)]
pub struct BrokenItem {
    /// Its place in the list, from 0.
    pub item: usize,
    /// What is wrong with it.
    pub error: Arc<DataError>,
}

/// What stands for the list of items where a file would be named.
const LIST: &str = "the list's";

impl BrokenItem {
    fn of(broken: &BrokenRecord) -> Option<Self> {
        match broken.origin.place {
            Place::Item(item) => Some(Self { item, error: Arc::clone(&broken.error) }),
            _ => None,
        }
    }
}

impl fmt::Display for BrokenItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "item {}: {}", self.item, self.error)
    }
}

/// Makes batches of a list of items: for training in an order that is shuffled in each epoch, for evaluation in the order of
/// the list.
///
/// Processes share the list without overlap, and its length need not be divisible by anything: for training the shuffled
/// orders of all epochs are one endless order, of which process `r` of `n` takes the positions `r`, `r + n`, …; for evaluation
/// it takes these items of the list once.
#[derive(Debug)]
pub struct ItemBatches<K: ItemKind> {
    kind: K,
    items: Arc<Vec<K::Item>>,
    tokenizer: Arc<TextTokenizer>,
    config: ItemConfig,
    cache: Arc<ImageCache>,
    rank: usize,
    ranks: usize,
    /// The orders of recent epochs: batches reach over the end, and workers are not in step.
    orders: Mutex<VecDeque<(u64, Arc<[u32]>)>>,
    broken: Mutex<Broken>,
}

impl<K: ItemKind> ItemBatches<K> {
    /// A builder for one process.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] naming a value that makes no sense, or when there is no item.
    pub fn new(
        kind: K,
        items: Arc<Vec<K::Item>>,
        tokenizer: Arc<TextTokenizer>,
        config: ItemConfig,
        cache: Arc<ImageCache>,
    ) -> Result<Self, DataError> {
        config.check()?;
        if items.is_empty() || u32::try_from(items.len()).is_err() {
            let (expected, found) = ("from 1 to 2³² items".to_owned(), items.len().to_string());
            return Err(DataError::Config { field: "items", expected, found });
        }
        let (orders, broken) = (Mutex::default(), Mutex::default());
        Ok(Self { kind, items, tokenizer, config, cache, rank: 0, ranks: 1, orders, broken })
    }

    /// The same for process `rank` of `ranks`.
    #[must_use]
    pub fn for_rank(self, rank: usize, ranks: usize) -> Self {
        Self { rank, ranks: ranks.max(1), ..self }
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ItemConfig {
        &self.config
    }

    /// The items.
    #[must_use]
    pub fn items(&self) -> &Arc<Vec<K::Item>> {
        &self.items
    }

    /// Training batches of each process that make an epoch, rounded up.
    #[must_use]
    pub fn steps(&self) -> u64 {
        (self.items.len() as u64).div_ceil(self.config.batch_size as u64 * self.ranks as u64)
    }

    /// Evaluation batches of this process.
    #[must_use]
    pub fn evaluation_steps(&self) -> u64 {
        let own = self.items.len().saturating_sub(self.rank).div_ceil(self.ranks);
        own.div_ceil(self.config.batch_size) as u64
    }

    /// Broken items met so far, in the order of the list: the first few of each reason.
    #[must_use]
    pub fn broken(&self) -> Vec<BrokenItem> {
        let mut items: Vec<_> = self.lock_broken().tally.examples().iter().filter_map(BrokenItem::of).collect();
        items.sort_by_key(|broken| broken.item);
        items
    }

    /// How often an item was taken so far, and how often it was broken.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let broken = self.lock_broken();
        (broken.seen, broken.tally.total())
    }

    /// The training batch of a step: `batch_size` items. A broken item is noted and the next takes its place.
    ///
    /// # Errors
    ///
    /// [`DataError::TooManyBroken`].
    pub fn training(&self, step: u64) -> Result<K::Batch, DataError> {
        let (size, ranks) = (self.config.batch_size, self.ranks as u64);
        let first = step.wrapping_mul(size as u64);
        let maker = self.maker(true);
        let mut samples = Vec::with_capacity(size);
        let mut failures = 0;
        for attempt in 0u64.. {
            if samples.len() >= size {
                break;
            }
            let position = first.wrapping_add(attempt).wrapping_mul(ranks).wrapping_add(self.rank as u64);
            let item = self.item(position);
            // Attempts of different steps meet only where an item was broken; then it is seen in another way.
            let mut rng = generator(self.config.seed, TRAINING + 1, position, step);
            match self.take(item, &maker, &mut rng) {
                Ok(sample) => {
                    samples.push(sample);
                    failures = 0;
                }
                Err(error) => {
                    failures += 1;
                    // Twice as many failures in a row as there are items: nothing works at all.
                    self.note(item, error, failures >= 2 * self.items.len())?;
                }
            }
        }
        Ok(self.kind.collate(samples, &maker))
    }

    /// The evaluation batch of a step: which items of the list, in its order, and what was made of them. Over all steps up to
    /// [`Self::evaluation_steps`] of all processes every item comes once, but for broken ones, which are noted and left out.
    ///
    /// # Errors
    ///
    /// [`DataError::TooManyBroken`].
    pub fn evaluation(&self, step: u64) -> Result<(Vec<usize>, K::Batch), DataError> {
        let size = self.config.batch_size;
        let first = usize::try_from(step).unwrap_or(usize::MAX).saturating_mul(size);
        let own = (self.rank..self.items.len()).step_by(self.ranks).skip(first).take(size);
        let maker = self.maker(false);
        let (mut items, mut samples) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for item in own {
            // Of the item alone, so that it is the same whatever else is evaluated.
            let mut rng = generator(self.config.seed, TRAINING + 2, item as u64, 0);
            match self.take(item, &maker, &mut rng) {
                Ok(sample) => {
                    items.push(item);
                    samples.push(sample);
                }
                Err(error) => self.note(item, error, false)?,
            }
        }
        Ok((items, self.kind.collate(samples, &maker)))
    }

    fn take(&self, item: usize, maker: &Maker, rng: &mut ChaCha8Rng) -> Result<K::Sample, DataError> {
        let sample = self.kind.sample(&self.items[item], maker, rng)?;
        self.lock_broken().seen += 1;
        Ok(sample)
    }

    fn note(&self, item: usize, error: DataError, hopeless: bool) -> Result<(), DataError> {
        let origin = Origin { file: Path::new(LIST).into(), place: Place::Item(item) };
        self.lock_broken().note(Some(&origin), error, self.config.max_bad_fraction, hopeless)
    }

    /// The item at a position of the endless order.
    fn item(&self, position: u64) -> usize {
        const KEPT: usize = 2;
        let count = self.items.len() as u64;
        let (epoch, place) = (position / count, (position % count) as usize);
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = orders.iter().find(|(kept, _)| *kept == epoch) {
            return order[place] as usize;
        }
        let mut order: Vec<u32> = (0..count as u32).collect();
        order.shuffle(&mut generator(self.config.seed, TRAINING, epoch, 0));
        let item = order[place] as usize;
        orders.truncate(KEPT - 1);
        orders.push_front((epoch, order.into()));
        item
    }

    fn lock_broken(&self) -> MutexGuard<'_, Broken> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn maker(&self, training: bool) -> Maker<'_> {
        let Self { config, tokenizer, cache, .. } = self;
        let ItemConfig { crop, random_crop, hflip, careful_hflip, .. } = *config;
        Maker {
            framer: Framer {
                cache,
                transform: Transform { crop, random_crop, hflip, careful_hflip },
                augment: config.augment.as_ref(),
                region_augment: config.region_augment.as_ref(),
                resolution: config.resolution,
            },
            texts: TextMaker {
                tokenizer,
                max_words: config.max_words,
                max_tokens: config.max_tokens,
                append_sep: config.append_sep,
                tokenized: false,
                masking: None,
            },
            training,
        }
    }
}
