//! Batches on the host: which records, which texts of them, and how they are put together.
//!
//! A batch is a function of (records, configuration, seed, step): workers may build batches in any
//! order, and a run resumed at a step sees the same data. There are two streams. *Captions* go with
//! whole images; *regions* go with boxes inside them (X-VLM trains on both in turn).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::broken::{Broken, BrokenRecord};
use crate::config::{BatchConfig, GenerationConfig, Target};
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::image::{Decoded, ImageCache};
use crate::masking::Masked;
use crate::order::{Order, generator};
use crate::records::{Element, Record};
use crate::shards::Need;
use crate::tokens::{TextTokenizer, pre_caption, pre_question, text_key};
use crate::transform::{Placed, View, clip_box};

/// The stream that ways of classing are drawn from; 0 and 1 are those of the orders of captions and regions.
const WAYS: u64 = 2;

/// Label of a position at which nothing is to be predicted.
pub const IGNORE: i64 = -100;

/// Texts of a batch, padded to the longest of them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TextBatch {
    /// The cleaned texts.
    pub texts: Vec<String>,
    /// Number of texts, `B`.
    pub rows: usize,
    /// Tokens of the longest, `T`.
    pub len: usize,
    /// `[B·T]`: `[CLS] pieces`, then padding.
    pub ids: Vec<u32>,
    /// `[B·T]`: 1 at tokens, 0 at padding.
    pub mask: Vec<f32>,
    /// `[B·T]`: [`Self::ids`] with blanks.
    pub masked_ids: Vec<u32>,
    /// `[K]`: where something is to be predicted, as `row · T + column`.
    pub masked_positions: Vec<u32>,
    /// `[K]`: the original token there.
    pub masked_labels: Vec<i64>,
    /// `[B]`: equal for equal texts ([`text_key`]).
    pub keys: Vec<i64>,
}

/// Rows for a text decoder, padded to the longest of them: `[CLS] prompt caption [SEP]`, or
/// `[CLS] question answer [SEP]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationBatch {
    /// Number of rows, `B`.
    pub rows: usize,
    /// Tokens of the longest, `T`.
    pub len: usize,
    /// `[B·T]`.
    pub ids: Vec<u32>,
    /// `[B·T]`: 1 at tokens, 0 at padding.
    pub mask: Vec<f32>,
    /// `[B·T]`: the token that should follow each position; [`IGNORE`] inside the prompt or question,
    /// at `[SEP]` and at padding.
    pub labels: Vec<i64>,
    /// `[B]`: the image of each row.
    pub image_index: Vec<u32>,
}

/// Whole images, each with a text.
#[derive(Debug, Clone, PartialEq)]
pub struct CaptionBatch {
    /// `[N·3·R·R]`, normalised.
    pub pixels: Vec<f32>,
    /// Number of images, `N`.
    pub images: usize,
    /// One text an image.
    pub text: TextBatch,
    /// Rows for a decoder, if asked for.
    pub generation: Option<GenerationBatch>,
}

/// Images with texts of parts of them.
#[derive(Debug, Clone, PartialEq)]
pub struct RegionBatch {
    /// `[N·3·R·R]`, normalised.
    pub pixels: Vec<f32>,
    /// Number of images, `N`.
    pub images: usize,
    /// `B` texts.
    pub text: TextBatch,
    /// `[B]`: the image of each text.
    pub image_index: Vec<u32>,
    /// `[B]`: `(cx, cy, w, h)` in fractions of the image.
    pub boxes: Vec<[f32; 4]>,
    /// `[B·(1+L)]`: which patches each box touches; column 0 is 1.
    pub region_mask: Vec<f32>,
    /// Number of patches, `L`.
    pub patches: usize,
    /// `[B]`: whether the text tells the whole image.
    pub is_image: Vec<bool>,
}

/// Makes batches of records.
#[derive(Debug)]
pub struct BatchBuilder {
    tokenizer: Arc<TextTokenizer>,
    config: BatchConfig,
    cache: Arc<ImageCache>,
    captions: Order,
    regions: Order,
    broken: Mutex<Broken>,
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
            rank: 0,
            ranks: 1,
        })
    }

    /// The same for process `rank` of `ranks`: together they go through the records once an epoch ([`Order`]).
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

    /// Broken records met so far: the first few of each reason.
    #[must_use]
    pub fn broken(&self) -> Vec<BrokenRecord> {
        self.lock_broken().tally.examples().to_vec()
    }

    /// How often a record was taken so far, and how often it was broken.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let broken = self.lock_broken();
        (broken.seen, broken.tally.total())
    }

    /// Whole images with a caption each: `batch_size` records of a pass over all of them that is
    /// shuffled anew in each epoch.
    ///
    /// # Errors
    ///
    /// [`DataError::TooManyBroken`]; [`DataError::Config`] when no record has a caption.
    pub fn captions(&self, step: u64) -> Result<CaptionBatch, DataError> {
        let count = self.config.batch_size;
        let sample = |record: &Record, rng: &mut ChaCha8Rng, _: &[Captioned]| self.captioned(record, rng);
        let samples = self.draw(&self.captions, step, count, |_| false, sample)?;

        let side = self.config.resolution;
        let mut pixels = vec![0.0; samples.len() * 3 * side * side];
        for (sample, pixels) in samples.iter().zip(pixels.chunks_exact_mut(3 * side * side)) {
            sample.view.render(&sample.image, side, pixels);
        }
        let generation = self.config.generation.as_ref().map(|_| {
            let rows = samples.iter().enumerate();
            let rows = rows.flat_map(|(i, sample)| sample.rows.iter().map(move |row| (i as u32, row)));
            collate_generation(&rows.collect::<Vec<_>>(), self.tokenizer.pad_id())
        });
        Ok(CaptionBatch {
            pixels,
            images: samples.len(),
            text: self.collate(samples.into_iter().map(|sample| sample.text).collect()),
            generation,
        })
    }

    /// Images with texts of parts of them: up to `max_images` records of a shuffled pass, until
    /// `max_regions` texts are together.
    ///
    /// # Errors
    ///
    /// [`DataError::TooManyBroken`]; [`DataError::Config`] when no record has elements.
    pub fn regions(&self, step: u64) -> Result<RegionBatch, DataError> {
        let (most, grid, side) = (self.config.max_regions, self.config.grid(), self.config.resolution);
        let texts = |samples: &[Regions]| samples.iter().map(|s| s.concepts.len()).sum::<usize>();
        let full = |samples: &[Regions]| texts(samples) >= most;
        // Of the whole step: all processes class alike.
        let mut ways = generator(self.config.seed, WAYS, step, 0);
        let way = ways.random_bool(self.config.label_share).then(|| ways.random::<u32>());
        let sample = |record: &Record, rng: &mut ChaCha8Rng, before: &[Regions]| {
            self.regions_of(record, most - texts(before), way, rng)
        };
        let samples = self.draw(&self.regions, step, self.config.max_images, full, sample)?;

        let mut pixels = vec![0.0; samples.len() * 3 * side * side];
        for (sample, pixels) in samples.iter().zip(pixels.chunks_exact_mut(3 * side * side)) {
            sample.view.render(&sample.image, side, pixels);
        }
        let (mut texts, mut image_index, mut is_image) = (Vec::new(), Vec::new(), Vec::new());
        let (mut boxes, mut region_mask) = (Vec::new(), Vec::new());
        let images = samples.len();
        for (i, sample) in samples.into_iter().enumerate() {
            for (text, place) in sample.concepts {
                texts.push(text);
                image_index.push(i as u32);
                is_image.push(place.is_none());
                boxes.push(place.map_or([0.5, 0.5, 1.0, 1.0], |place| place.centered()));
                region_mask.extend(match place {
                    Some(place) => place.region_mask(grid),
                    None => vec![1.0; 1 + grid * grid],
                });
            }
        }
        Ok(RegionBatch {
            pixels,
            images,
            text: self.collate(texts),
            image_index,
            boxes,
            region_mask,
            patches: grid * grid,
            is_image,
        })
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
        let batch = step.wrapping_mul(self.ranks).wrapping_add(self.rank);
        let first = step.wrapping_mul(count as u64);
        let mut samples = Vec::with_capacity(count);
        let mut failures = 0;
        for attempt in 0u64.. {
            if samples.len() >= count || full(&samples) {
                break;
            }
            let mut rng = generator(self.config.seed, order.need().stream(), batch, attempt + 1);
            let record = match order.record(first.wrapping_add(attempt)) {
                Err(error @ DataError::Config { .. }) => return Err(error),
                record => record,
            };
            let origin = record.as_ref().ok().map(|record| record.origin.clone());
            match record.and_then(|record| sample(&record, &mut rng, &samples)) {
                Ok(sample) => {
                    self.lock_broken().seen += 1;
                    samples.push(sample);
                    failures = 0;
                }
                Err(error) => {
                    failures += 1;
                    // Twice as many failures in a row as there are records: nothing works at all.
                    let hopeless = order.len().is_some_and(|len| failures >= 2 * len);
                    let limit = self.config.max_broken_share;
                    self.lock_broken().note(origin.as_ref(), error, limit, hopeless)?;
                }
            }
        }
        Ok(samples)
    }

    fn lock_broken(&self) -> MutexGuard<'_, Broken> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn captioned(&self, record: &Record, rng: &mut ChaCha8Rng) -> Result<Captioned, DataError> {
        let image = self.cache.get(&record.image, Some(self.config.resolution), &record.origin)?;
        let caption = record.captions.choose(rng).ok_or_else(|| missing(record, "a caption"))?;
        let text = self.text(caption, rng)?;
        let mut rows = Vec::new();
        if let Some(config) = &self.config.generation {
            rows.push(self.caption_row(record, config, rng)?);
            let questions = record.questions.choose_multiple(rng, config.questions_per_image);
            for (question, answer) in questions {
                rows.push(self.answer_row(question, answer)?);
            }
        }
        let said = rows.iter().flat_map(|row| &row.said).chain([&text.text]);
        let flip = self.config.transform().flip(said.map(String::as_str), rng);
        let view = View { flip, ..View::whole(image.width, image.height) };
        Ok(Captioned { image, view, text, rows })
    }

    fn regions_of(
        &self,
        record: &Record,
        most: usize,
        way: Option<u32>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Regions, DataError> {
        let transform = self.config.transform();
        // A crop needs the pixels as stored.
        let resolution = (!transform.random_crop).then_some(self.config.resolution);
        let image = self.cache.get(&record.image, resolution, &record.origin)?;
        let (width, height) = (image.width, image.height);
        let mut elems = Vec::with_capacity(record.elems.len());
        for (i, elem) in record.elems.iter().enumerate() {
            let bbox = clip_box(elem.bbox, width, height).ok_or_else(|| DataError::BoxOutside {
                origin: record.origin.to_string(),
                field: format!("elems[{i}].bb"),
                bbox: elem.bbox,
                width,
                height,
            })?;
            elems.push((elem, bbox));
        }
        elems.shuffle(rng);
        let &(_, kept) = elems.first().ok_or_else(|| missing(record, "an element"))?;
        let crop = transform.crop(kept, width, height, rng);
        let unflipped = View { crop, flip: false };
        let least = self.config.min_perc_in_image;
        elems.retain(|(_, bbox)| unflipped.place(*bbox, least).is_some());

        let mut chosen = Vec::new();
        if let Some(caption) = record.captions.choose(rng).filter(|_| self.config.whole_image_text) {
            chosen.push((self.text(caption, rng)?, None));
        }
        for (elem, bbox) in elems.into_iter().take(self.config.regions_per_image) {
            chosen.push((self.element_text(elem, record, way, rng)?, Some(bbox)));
        }
        chosen.truncate(most);
        let flip = transform.flip(chosen.iter().map(|(text, _)| text.text.as_str()), rng);
        let view = View { crop, flip };
        let place = |bbox: Option<[f32; 4]>| bbox.and_then(|bbox| view.place(bbox, least));
        let concepts = chosen.into_iter().map(|(text, bbox)| (text, place(bbox))).collect();
        Ok(Regions { image, view, concepts })
    }

    /// `way` says which of the labels, if it is to be one.
    fn element_text(
        &self,
        elem: &Element,
        record: &Record,
        way: Option<u32>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Text, DataError> {
        let text = match way {
            Some(way) => elem.labels.get(way as usize % elem.labels.len().max(1)),
            None => elem.texts.choose(rng),
        };
        let text = text.ok_or_else(|| missing(record, "a text, or a label, of each element"))?;
        let attribute = elem.attributes.choose(rng);
        match attribute.filter(|_| rng.random_bool(self.config.attribute_probability)) {
            Some(attribute) => self.text(&format!("{attribute} {text}"), rng),
            None => self.text(text, rng),
        }
    }

    fn text(&self, text: &str, rng: &mut ChaCha8Rng) -> Result<Text, DataError> {
        let cleaned = pre_caption(text, self.config.max_words)?;
        let ids = self.tokenizer.encode(&cleaned, self.config.max_tokens, self.config.append_sep)?;
        if ids.len() < 2 + usize::from(self.config.append_sep) {
            return Err(DataError::EmptyText { text: text.to_owned() });
        }
        let masked = self.config.masking.mask(&ids, &self.tokenizer, rng);
        Ok(Text { text: cleaned, ids, masked })
    }

    fn caption_row(&self, record: &Record, config: &GenerationConfig, rng: &mut ChaCha8Rng) -> Result<Row, DataError> {
        let caption = match config.target {
            Target::First => record.captions.first(),
            Target::Random => record.captions.choose(rng),
        };
        let caption = caption.ok_or_else(|| missing(record, "a caption"))?;
        let caption = pre_caption(caption, self.config.max_words)?;
        let prompt = self.tokenizer.tokens(&config.prompt)?;
        let target = self.tokenizer.tokens(&caption)?;
        // The prompt is short and says what to do: the caption is what gets cut.
        let room = self.config.max_tokens.saturating_sub(2 + prompt.len()).max(1);
        Ok(self.row(&prompt, &target[..target.len().min(room)], vec![caption]))
    }

    fn answer_row(&self, question: &str, answer: &str) -> Result<Row, DataError> {
        let question = pre_question(question, self.config.max_words);
        let answer = pre_caption(answer, self.config.max_words)?;
        let prompt = self.tokenizer.tokens(&question)?;
        let target = self.tokenizer.tokens(&answer)?;
        let room = self.config.max_tokens.saturating_sub(2).max(1);
        let target = &target[..target.len().min(room)];
        let prompt = &prompt[..prompt.len().min(room - target.len())];
        Ok(self.row(prompt, target, vec![question, answer]))
    }

    fn row(&self, prompt: &[u32], target: &[u32], said: Vec<String>) -> Row {
        let (cls, sep) = ([self.tokenizer.cls_id()], [self.tokenizer.sep_id()]);
        Row { ids: [&cls, prompt, target, &sep].concat(), prompt: 1 + prompt.len(), said }
    }

    fn collate(&self, texts: Vec<Text>) -> TextBatch {
        let (rows, pad) = (texts.len(), self.tokenizer.pad_id());
        let len = texts.iter().map(|text| text.ids.len()).max().unwrap_or(0);
        let mut batch = TextBatch { rows, len, ..TextBatch::default() };
        for (row, text) in texts.into_iter().enumerate() {
            push_row(&mut batch.ids, &text.ids, pad, len);
            push_row(&mut batch.mask, &vec![1.0; text.ids.len()], 0.0, len);
            push_row(&mut batch.masked_ids, &text.masked.ids, pad, len);
            let start = (row * len) as u32;
            batch.masked_positions.extend(text.masked.positions.iter().map(|p| start + p));
            batch.masked_labels.extend(text.masked.labels.iter().map(|&label| i64::from(label)));
            batch.keys.push(text_key(&text.text).cast_signed());
            batch.texts.push(text.text);
        }
        batch
    }
}

/// One image of a caption batch.
struct Captioned {
    image: Arc<Decoded>,
    view: View,
    text: Text,
    rows: Vec<Row>,
}

/// One image of a region batch.
struct Regions {
    image: Arc<Decoded>,
    view: View,
    /// Texts and where they belong; nowhere is the whole image.
    concepts: Vec<(Text, Option<Placed>)>,
}

/// A text, ready for a batch.
struct Text {
    text: String,
    ids: Vec<u32>,
    masked: Masked,
}

/// A row for a decoder.
struct Row {
    ids: Vec<u32>,
    /// How many of them are given.
    prompt: usize,
    /// The texts in it.
    said: Vec<String>,
}

fn missing(record: &Record, expected: &'static str) -> DataError {
    let origin = record.origin.to_string();
    DataError::MissingText { origin, expected }
}

/// Appends `values` and as much padding as makes them `len`.
fn push_row<V: Copy>(to: &mut Vec<V>, values: &[V], padding: V, len: usize) {
    let end = to.len() + len;
    to.extend_from_slice(values);
    to.resize(end, padding);
}

fn collate_generation(rows: &[(u32, &Row)], pad: u32) -> GenerationBatch {
    let len = rows.iter().map(|(_, row)| row.ids.len()).max().unwrap_or(0);
    let mut batch = GenerationBatch { rows: rows.len(), len, ..GenerationBatch::default() };
    for &(image, row) in rows {
        // A position's label is the token after it, from the last given token on.
        let mut labels = vec![IGNORE; row.prompt - 1];
        labels.extend(row.ids[row.prompt..].iter().map(|&id| i64::from(id)));
        push_row(&mut batch.ids, &row.ids, pad, len);
        push_row(&mut batch.mask, &vec![1.0; row.ids.len()], 0.0, len);
        push_row(&mut batch.labels, &labels, IGNORE, len);
        batch.image_index.push(image);
    }
    batch
}
