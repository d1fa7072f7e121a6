//! Images with texts of parts of them: the region stream of pre-training.

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom, index};
use rand_chacha::ChaCha8Rng;

use super::pixels::{Shown, render};
use super::texts::{Text, TextBatch};
use super::{BatchBuilder, missing};
use crate::config::{FlipTexts, Padding};
use crate::error::DataError;
use crate::order::generator;
use crate::records::{Element, Record};
use crate::transform::{Placed, clip_box};

/// The stream that ways of classing are drawn from; 0 and 1 are those of the orders of captions and regions.
const WAYS: u64 = 2;
/// The stream that says which texts a batch of fixed size leaves out or repeats.
const SIZES: u64 = 3;

/// Images with texts of parts of them.
#[derive(Debug, Clone, PartialEq)]
pub struct RegionBatch {
    /// `[N·3·R·R]`, normalised.
    pub pixels: Vec<f32>,
    /// Number of images, `N`.
    pub images: usize,
    /// `[N]`: where each image's record is, for messages.
    pub origins: Vec<String>,
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
    /// `[B]`: 0 at rows that the contrastive loss leaves out ([`Padding::Masked`]), 1 at all others.
    pub row_weights: Vec<f32>,
}

/// One image of a region batch.
#[derive(Debug)]
struct Regions {
    shown: Shown,
    origin: String,
    concepts: Vec<Concept>,
}

/// A text and where it belongs; nowhere is the whole image.
#[derive(Debug)]
struct Concept {
    text: Text,
    place: Option<Placed>,
}

impl BatchBuilder {
    /// Images with texts of parts of them: `max_images` records of a shuffled pass, and `max_regions` of their texts, as
    /// [`Padding`] says. Elements whose boxes are not inside their image are left out; an image with no others is broken.
    ///
    /// # Errors
    ///
    /// [`DataError::TooManyBroken`]; [`DataError::Config`] when no record has elements.
    pub fn regions(&self, step: u64) -> Result<RegionBatch, DataError> {
        let most = self.config.max_regions;
        let fixed = self.config.padding != Padding::None;
        let texts = |samples: &[Regions]| samples.iter().map(|s| s.concepts.len()).sum::<usize>();
        let full = |samples: &[Regions]| !fixed && texts(samples) >= most;
        // Of the whole step: all processes class alike.
        let mut ways = generator(self.config.seed, WAYS, step, 0);
        let way = ways.random_bool(self.config.label_share).then(|| ways.random::<u32>());
        let sample = |record: &Record, rng: &mut ChaCha8Rng, before: &[Regions]| {
            let room = if fixed { usize::MAX } else { most - texts(before) };
            self.regions_of(record, room.min(self.config.regions_per_image), way, rng)
        };
        let samples = self.draw(&self.regions, step, self.config.max_images, full, sample)?;
        let mut rng = generator(self.config.seed, SIZES, self.batch(step), 0);
        Ok(self.collate_regions(samples, &mut rng))
    }

    fn regions_of(
        &self,
        record: &Record,
        most: usize,
        way: Option<u32>,
        rng: &mut ChaCha8Rng,
    ) -> Result<Regions, DataError> {
        let framer = self.framer();
        let opened = framer.parts(&record.image, &record.origin)?;
        let (width, height) = opened.size();
        let inside = |elem: &'_ Element| clip_box(elem.bbox, width, height);
        let mut elems: Vec<_> = record.elems.iter().filter_map(|elem| Some((elem, inside(elem)?))).collect();
        if elems.is_empty() {
            record.boxes_inside(width, height)?;
        }
        let &(_, kept) = elems.choose(rng).ok_or_else(|| missing(record, "an element"))?;
        let mut view = framer.around(&opened, kept, rng);
        elems.shuffle(rng);

        // As in X-VLM, the text of the whole image is one of the texts that an image may have.
        let mut chosen = Vec::new();
        if let Some(caption) = record.captions.choose(rng).filter(|_| self.config.whole_image_text) {
            chosen.push((self.region_texts().text(caption, rng)?, None));
        }
        let least = self.config.min_perc_in_image;
        for (elem, bbox) in elems {
            if chosen.len() >= most {
                break;
            }
            if view.place(bbox, least).is_some() {
                chosen.push((self.element_text(elem, record, way, rng)?, Some(bbox)));
            }
        }
        view.flip = match self.config.hflip_texts {
            FlipTexts::Record => framer.transform.flip(record.texts(), rng),
            FlipTexts::Batch => framer.transform.flip(chosen.iter().map(|(text, _)| text.text.as_str()), rng),
        };
        let place = |bbox: Option<[f32; 4]>| bbox.and_then(|bbox| view.place(bbox, least));
        let concepts = chosen.into_iter().map(|(text, bbox)| Concept { text, place: place(bbox) }).collect();
        Ok(Regions { shown: framer.show_parts(&opened, view, rng)?, concepts, origin: record.origin.to_string() })
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
            Some(attribute) => self.region_texts().text(&format!("{attribute} {text}"), rng),
            None => self.region_texts().text(text, rng),
        }
    }

    fn collate_regions(&self, samples: Vec<Regions>, rng: &mut ChaCha8Rng) -> RegionBatch {
        let grid = self.config.grid();
        let images = samples.len();
        let pixels = render(samples.iter().map(|sample| &sample.shown), self.config.resolution);
        let origins = samples.iter().map(|sample| sample.origin.clone()).collect();
        let concepts =
            (0u32..).zip(samples).flat_map(|(image, sample)| sample.concepts.into_iter().map(move |c| (image, c)));
        let concepts: Vec<(u32, Concept)> = concepts.collect();
        let (rows, real) = match self.config.padding {
            Padding::None => ((0..concepts.len()).collect(), concepts.len()),
            Padding::Repeats | Padding::Masked => fixed_rows(concepts.len(), self.config.max_regions, rng),
        };
        let repeat = if self.config.padding == Padding::Masked { 0.0 } else { 1.0 };
        let mut batch = RegionBatch {
            pixels,
            images,
            origins,
            text: self.region_texts().collate(rows.iter().map(|&row| concepts[row].1.text.clone()).collect()),
            image_index: rows.iter().map(|&row| concepts[row].0).collect(),
            boxes: Vec::with_capacity(rows.len()),
            region_mask: Vec::with_capacity(rows.len() * (1 + grid * grid)),
            patches: grid * grid,
            is_image: rows.iter().map(|&row| concepts[row].1.place.is_none()).collect(),
            row_weights: (0..rows.len()).map(|i| if i < real { 1.0 } else { repeat }).collect(),
        };
        for &row in &rows {
            let place = concepts[row].1.place;
            batch.boxes.push(place.map_or([0.5, 0.5, 1.0, 1.0], |place| place.centered()));
            batch.region_mask.extend(match place {
                Some(place) => place.region_mask(grid),
                None => vec![1.0; 1 + grid * grid],
            });
        }
        batch
    }
}

/// `size` of `count` rows, and how many of them come first that are no repeats: a random choice in their order, or all of them
/// and then a random choice of repeats; where even that is too few, all of them again and again (`RegionTextJsonDataset.collate_fn`).
fn fixed_rows(count: usize, size: usize, rng: &mut ChaCha8Rng) -> (Vec<usize>, usize) {
    if count == 0 {
        return (Vec::new(), 0);
    }
    if count >= size {
        let mut rows = index::sample(rng, count, size).into_vec();
        rows.sort_unstable();
        return (rows, size);
    }
    let mut rows: Vec<usize> = (0..count).collect();
    let missing = size - count;
    if missing <= count {
        rows.extend(index::sample(rng, count, missing));
    } else {
        rows.extend((0..count).cycle().take(missing));
    }
    (rows, count)
}
