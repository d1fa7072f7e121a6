//! Batches on the host: which records, which texts of them, and how they are put together.
//!
//! A batch is a function of (records, configuration, seed, step): workers may build batches in any
//! order, and a run resumed at a step sees the same data. There are two streams. *Captions* go with
//! whole images; *regions* go with boxes inside them (X-VLM trains on both in turn).

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::image::{Decoded, ImageCache};
use crate::masking::{Masked, MaskingGenerator};
use crate::records::{Element, Origin, Record};
use crate::tokens::{TextTokenizer, pre_caption, pre_question, text_key};
use crate::transform::{Placed, Transform, View, clip_box};

/// Label of a position at which nothing is to be predicted.
pub const IGNORE: i64 = -100;

/// What batches are made of. Defaults are those of X-VLM's base model (`Pretrain_XVLM_base_4m.yaml`),
/// for one process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// Seed of all randomness. Default 42.
    pub seed: u64,
    /// Side of the square images, in pixels; a multiple of `final_stride`. Default 224.
    pub resolution: usize,
    /// Side of the square that one patch token stands for, in pixels. Default 32.
    pub final_stride: usize,
    /// Images in a caption batch. Default 128.
    pub batch_size: usize,
    /// Most images in a region batch. Default 48.
    pub max_images: usize,
    /// Most texts in a region batch, those of whole images included. Default 128.
    pub max_regions: usize,
    /// Most elements of one image in a region batch. Default 5.
    pub regions_per_image: usize,
    /// Whether region batches hold captions of whole images too. Default true.
    pub whole_image_text: bool,
    /// Probability that one of an element's attributes goes before its text. Default 1.
    pub attribute_probability: f64,
    /// Most words of a text. Default 40.
    pub max_words: usize,
    /// Most tokens of a text, special tokens included. Default 40.
    pub max_tokens: usize,
    /// Whether `[SEP]` ends texts (generation rows always have it). Default false.
    pub append_sep: bool,
    /// Blanks for masked language modelling.
    pub masking: MaskingGenerator,
    /// Whether region batches see a random part of each image. Default true.
    pub random_crop: bool,
    /// Elements of which no more than this share of the area is in that part are left out.
    /// Default 0.5.
    pub min_perc_in_image: f64,
    /// Whether half of the images are mirrored. Default true.
    pub hflip: bool,
    /// Whether images whose texts say left or right are not mirrored. Default true.
    pub careful_hflip: bool,
    /// Rows for a text decoder beside each caption batch. Default none.
    pub generation: Option<GenerationConfig>,
    /// Share of broken records that stops the run. Default 0.05.
    pub max_broken_share: f64,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self {
            seed: 42,
            resolution: 224,
            final_stride: 32,
            batch_size: 128,
            max_images: 48,
            max_regions: 128,
            regions_per_image: 5,
            whole_image_text: true,
            attribute_probability: 1.0,
            max_words: 40,
            max_tokens: 40,
            append_sep: false,
            masking: MaskingGenerator::default(),
            random_crop: true,
            min_perc_in_image: 0.5,
            hflip: true,
            careful_hflip: true,
            generation: None,
            max_broken_share: 0.05,
        }
    }
}

impl BatchConfig {
    /// Patches along a side of the image.
    #[must_use]
    pub fn grid(&self) -> usize {
        self.resolution / self.final_stride.max(1)
    }

    fn transform(&self) -> Transform {
        Transform { random_crop: self.random_crop, hflip: self.hflip, careful_hflip: self.careful_hflip }
    }

    fn check(&self) -> Result<(), DataError> {
        let wrong = |field, expected: &str, found: String| {
            let expected = expected.to_owned();
            Err(DataError::Config { field, expected, found })
        };
        for (field, value, least) in [
            ("resolution", self.resolution, 1),
            ("final_stride", self.final_stride, 1),
            ("batch_size", self.batch_size, 1),
            ("max_images", self.max_images, 1),
            ("max_regions", self.max_regions, 1),
            ("regions_per_image", self.regions_per_image, 1),
            ("max_words", self.max_words, 1),
            ("max_tokens", self.max_tokens, 2 + usize::from(self.append_sep)),
        ] {
            if value < least {
                return wrong(field, &format!("at least {least}"), value.to_string());
            }
        }
        if !self.resolution.is_multiple_of(self.final_stride) {
            let expected = format!("a multiple of final_stride, {}", self.final_stride);
            return wrong("resolution", &expected, self.resolution.to_string());
        }
        for (field, value) in [
            ("attribute_probability", self.attribute_probability),
            ("max_broken_share", self.max_broken_share),
            ("masking.mask_prob", self.masking.mask_prob),
            ("masking.skipgram_prb", self.masking.skipgram_prb),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return wrong(field, "a share from 0 to 1", value.to_string());
            }
        }
        if !(0.0..1.0).contains(&self.min_perc_in_image) {
            let found = self.min_perc_in_image.to_string();
            return wrong("min_perc_in_image", "a share from 0 to less than 1", found);
        }
        Ok(())
    }
}

/// Which of a record's captions a decoder learns to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Always the first.
    #[default]
    First,
    /// Any of them.
    Random,
}

/// Rows for a text decoder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerationConfig {
    /// What goes before a caption. Default `a picture of`.
    pub prompt: String,
    /// Most questions of each image; each makes one row more. Default 0.
    pub questions_per_image: usize,
    /// Which caption. Default the first.
    pub target: Target,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self { prompt: "a picture of".to_owned(), questions_per_image: 0, target: Target::First }
    }
}

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

/// A record that was left out, and why.
#[derive(Debug, Clone)]
pub struct BrokenRecord {
    /// File and line.
    pub origin: Origin,
    /// What is wrong with it.
    pub error: Arc<DataError>,
}

impl fmt::Display for BrokenRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (origin, error) = (self.origin.to_string(), self.error.to_string());
        if error.contains(&origin) { f.write_str(&error) } else { write!(f, "{origin}: {error}") }
    }
}

/// Makes batches of records.
#[derive(Debug)]
pub struct BatchBuilder {
    records: Arc<Vec<Record>>,
    tokenizer: Arc<TextTokenizer>,
    config: BatchConfig,
    cache: Arc<ImageCache>,
    captions: Shuffled,
    regions: Shuffled,
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
        records: Arc<Vec<Record>>,
        tokenizer: Arc<TextTokenizer>,
        config: BatchConfig,
        cache: Arc<ImageCache>,
    ) -> Result<Self, DataError> {
        config.check()?;
        Ok(Self {
            captions: Shuffled::new(config.seed, 0, &records, |r| !r.captions.is_empty()),
            regions: Shuffled::new(config.seed, 1, &records, |r| !r.elems.is_empty()),
            records,
            tokenizer,
            config,
            cache,
            broken: Mutex::default(),
            rank: 0,
            ranks: 1,
        })
    }

    /// The same for process `rank` of `ranks`: their batches of a step are neighbours in the shuffled
    /// order, so together they go through the records once an epoch.
    #[must_use]
    pub fn for_rank(self, rank: usize, ranks: usize) -> Self {
        Self { rank: rank as u64, ranks: ranks.max(1) as u64, ..self }
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

    /// Caption batches of all processes that make an epoch, rounded up.
    #[must_use]
    pub fn caption_steps(&self) -> u64 {
        let step = self.config.batch_size as u64 * self.ranks;
        (self.captions.indices.len() as u64).div_ceil(step)
    }

    /// Broken records met so far, in the order of their indices.
    #[must_use]
    pub fn broken(&self) -> Vec<BrokenRecord> {
        self.lock_broken().records.values().cloned().collect()
    }

    /// How often a record was taken so far, and how often it was broken.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let broken = self.lock_broken();
        (broken.seen, broken.met)
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
        let sample = |record: &Record, rng: &mut ChaCha8Rng, before: &[Regions]| {
            self.regions_of(record, most - texts(before), rng)
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
        order: &Shuffled,
        step: u64,
        count: usize,
        full: impl Fn(&[S]) -> bool,
        sample: impl Fn(&Record, &mut ChaCha8Rng, &[S]) -> Result<S, DataError>,
    ) -> Result<Vec<S>, DataError> {
        let batch = step.wrapping_mul(self.ranks).wrapping_add(self.rank);
        let first = batch.wrapping_mul(count as u64);
        let mut samples = Vec::with_capacity(count);
        let mut failures = 0;
        for attempt in 0u64.. {
            if samples.len() >= count || full(&samples) {
                break;
            }
            let index = order.record(first.wrapping_add(attempt))?;
            let record = &self.records[index];
            let mut rng = generator(self.config.seed, order.stream, batch, attempt + 1);
            match sample(record, &mut rng, &samples) {
                Ok(sample) => {
                    self.lock_broken().seen += 1;
                    samples.push(sample);
                    failures = 0;
                }
                Err(error) => {
                    failures += 1;
                    // Twice as many failures in a row as there are records: nothing works at all.
                    let hopeless = failures >= 2 * order.indices.len();
                    let limit = self.config.max_broken_share;
                    self.lock_broken().note(index, record, error, limit, hopeless)?;
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

    fn regions_of(&self, record: &Record, most: usize, rng: &mut ChaCha8Rng) -> Result<Regions, DataError> {
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
            chosen.push((self.element_text(elem, record, rng)?, Some(bbox)));
        }
        chosen.truncate(most);
        let flip = transform.flip(chosen.iter().map(|(text, _)| text.text.as_str()), rng);
        let view = View { crop, flip };
        let place = |bbox: Option<[f32; 4]>| bbox.and_then(|bbox| view.place(bbox, least));
        let concepts = chosen.into_iter().map(|(text, bbox)| (text, place(bbox))).collect();
        Ok(Regions { image, view, concepts })
    }

    fn element_text(&self, elem: &Element, record: &Record, rng: &mut ChaCha8Rng) -> Result<Text, DataError> {
        let text = elem.texts.choose(rng).ok_or_else(|| missing(record, "a text of each element"))?;
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

/// A generator of its own for each thing that is random.
fn generator(seed: u64, stream: u64, batch: u64, attempt: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, number) in key.chunks_exact_mut(8).zip([seed, stream, batch, attempt]) {
        bytes.copy_from_slice(&number.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// An endless order of records: all of them, shuffled, again and again.
#[derive(Debug)]
struct Shuffled {
    seed: u64,
    stream: u64,
    /// The records that take part.
    indices: Vec<u32>,
    /// The orders of recent epochs: batches reach over the end, and workers are not in step.
    recent: Mutex<VecDeque<(u64, Arc<[u32]>)>>,
}

impl Shuffled {
    fn new(seed: u64, stream: u64, records: &[Record], takes_part: impl Fn(&Record) -> bool) -> Self {
        let records = (0u32..).zip(records);
        let indices = records.filter(|(_, record)| takes_part(record)).map(|(i, _)| i).collect();
        Self { seed, stream, indices, recent: Mutex::default() }
    }

    /// The record at a position of the endless order.
    fn record(&self, position: u64) -> Result<usize, DataError> {
        let count = self.indices.len() as u64;
        if count == 0 {
            let expected = ["at least one with a caption", "at least one with elems"];
            return Err(DataError::Config {
                field: "records",
                expected: expected[usize::from(self.stream != 0)].to_owned(),
                found: "none".to_owned(),
            });
        }
        let order = self.order(position / count);
        Ok(order[(position % count) as usize] as usize)
    }

    fn order(&self, epoch: u64) -> Arc<[u32]> {
        const KEPT: usize = 2;
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = recent.iter().find(|(kept, _)| *kept == epoch) {
            return Arc::clone(order);
        }
        let mut order = self.indices.clone();
        // Attempts are counted from 1, so 0 is free for this.
        order.shuffle(&mut generator(self.seed, self.stream, epoch, 0));
        let order: Arc<[u32]> = order.into();
        recent.truncate(KEPT - 1);
        recent.push_front((epoch, Arc::clone(&order)));
        order
    }
}

/// What is known of broken records.
#[derive(Debug, Default)]
struct Broken {
    records: BTreeMap<usize, BrokenRecord>,
    /// Records taken.
    seen: u64,
    /// Broken ones among them.
    met: u64,
}

impl Broken {
    fn note(
        &mut self,
        index: usize,
        record: &Record,
        error: DataError,
        limit: f64,
        hopeless: bool,
    ) -> Result<(), DataError> {
        /// Fewer records say little about the share.
        const ENOUGH: u64 = 20;
        const EXAMPLES: usize = 5;
        self.seen += 1;
        self.met += 1;
        self.records
            .entry(index)
            .or_insert_with(|| BrokenRecord { origin: record.origin.clone(), error: Arc::new(error) });
        let too_many = self.seen >= ENOUGH && self.met as f64 > limit * self.seen as f64;
        if !too_many && !hopeless {
            return Ok(());
        }
        let examples = self.records.values().take(EXAMPLES);
        Err(DataError::TooManyBroken {
            broken: self.met,
            seen: self.seen,
            limit,
            examples: examples.map(|broken| format!("\n  {broken}")).collect(),
        })
    }
}
