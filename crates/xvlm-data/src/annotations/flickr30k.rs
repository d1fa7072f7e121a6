//! Flickr30k's captions, and Flickr30k Entities: which phrase of a caption means which boxes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::report::{Reason, Report};
use super::source::{Raw, Reader, Records, image_file, origin, skip_item, skip_outside};
use super::stream::{Extents, Lines, open_plain};
use crate::error::{DataError, Place, excerpt};
use crate::json::{Context, io_error};
use crate::records::Element;

/// Flickr30k's captions with, if wanted, the phrases of Flickr30k Entities.
///
/// A phrase becomes an element with the box around all boxes of its entity ("two men" means both of them), and every
/// phrase that people used for it.
#[derive(Debug, Clone, Default)]
pub struct Flickr30k {
    /// `results_20130124.token`, or `results.csv` (`image_name| comment_number| comment`).
    pub captions: PathBuf,
    /// The folder of the images.
    pub images: PathBuf,
    /// The folder of Flickr30k Entities, with `Annotations/*.xml` and `Sentences/*.txt`.
    pub entities: Option<PathBuf>,
}

struct FlickrReader {
    file: Arc<Path>,
    extents: Extents,
    order: Vec<u64>,
    next: usize,
    images: PathBuf,
    entities: Option<PathBuf>,
}

/// The image and the caption of a line: `1.jpg#0<tab>text`, `1.jpg| 0| text` or `1.jpg,text`.
fn row(line: &str) -> Option<(&str, &str)> {
    let (image, caption) = match line.split_once('\t') {
        Some((name, caption)) => (name.rsplit_once('#').map_or(name, |(image, _)| image), caption),
        None => match line.split_once('|') {
            Some((image, rest)) => (image, rest.split_once('|')?.1),
            None => line.split_once(',')?,
        },
    };
    let image = image.trim();
    (!image.is_empty()).then_some((image, caption.trim().trim_matches('"')))
}

fn is_header(line: &str) -> bool {
    ["image_name", "image,", "image|"].iter().any(|start| line.starts_with(start))
}

impl Flickr30k {
    /// Notes where in the file of captions each image is.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`]. Lines that are broken are counted in the report.
    pub fn open(&self) -> Result<Records, DataError> {
        let path = self.captions.as_path();
        let mut report = Report::default();
        let mut extents = Extents::new(path, open_plain(path)?);
        let mut lines = Lines::open(path)?;
        while let Some(line) = lines.next()? {
            let Ok(text) = line.text(path) else {
                report.skip(Reason::Malformed, || format!("{}:{}: no UTF-8", path.display(), line.number));
                continue;
            };
            if text.trim().is_empty() || (line.number == 1 && is_header(text)) {
                continue;
            }
            match row(text) {
                Some((image, _)) => extents.add_line(image, &line)?,
                None => {
                    let context = Context { path, place: Place::Line(line.number) };
                    skip_item(context.error("line", "an image and a caption", excerpt(text)), &mut report)?;
                }
            }
        }
        let order = extents.order();
        let reader = FlickrReader {
            file: Arc::from(path),
            extents,
            order,
            next: 0,
            images: self.images.clone(),
            entities: self.entities.clone(),
        };
        Ok(Records::new(reader).with_report(report))
    }
}

impl Reader for FlickrReader {
    fn next(&mut self, report: &mut Report) -> Result<Option<Raw>, DataError> {
        while let Some(&key) = self.order.get(self.next) {
            self.next += 1;
            let (mut id, mut captions, mut number) = (String::new(), Vec::new(), 1);
            for chunk in self.extents.read(key)? {
                number = if captions.is_empty() { chunk.number } else { number };
                let text = String::from_utf8_lossy(&chunk.bytes);
                for (image, caption) in text.lines().filter_map(row) {
                    image.clone_into(&mut id);
                    captions.push(caption.to_owned());
                }
            }
            let origin = origin(&self.file, Place::Line(number));
            let image = match image_file(&self.images, &id) {
                Ok(image) => image,
                Err(found) => {
                    skip_outside(&origin, &found, report);
                    continue;
                }
            };
            let stem = id.rsplit_once('.').map_or(id.as_str(), |(stem, _)| stem).to_owned();
            let (mut size, mut elems) = (None, Vec::new());
            if let Some(folder) = &self.entities {
                match entities(folder, &stem, report) {
                    Ok((found, phrases)) => (size, elems) = (Some(found), phrases),
                    Err(error) => report.skip(Reason::Malformed, || error),
                }
            }
            let aliases = vec![format!("flickr:{stem}")];
            let questions = Vec::new();
            return Ok(Some(Raw {
                id: stem,
                aliases,
                image,
                size,
                fractions: false,
                captions,
                elems,
                questions,
                origin,
            }));
        }
        Ok(None)
    }

    fn images(&self) -> Option<u64> {
        Some(self.order.len() as u64)
    }
}

/// Phrases with the boxes of their entities, and the image's size.
fn entities(folder: &Path, stem: &str, report: &mut Report) -> Result<((u32, u32), Vec<Element>), DataError> {
    let read = |path: &Path| std::fs::read(path).map_err(|source| io_error(path, source));
    let boxes = folder.join("Annotations").join(format!("{stem}.xml"));
    let sentences = folder.join("Sentences").join(format!("{stem}.txt"));
    let (size, boxes) = read_boxes(&boxes, &String::from_utf8_lossy(&read(&boxes)?))?;
    let text = read(&sentences)?;
    let (mut order, mut phrases) = (Vec::new(), HashMap::<String, Vec<String>>::new());
    for (i, line) in String::from_utf8_lossy(&text).lines().enumerate() {
        let context = Context { path: &sentences, place: Place::Line(i + 1) };
        if let Err(error) = read_phrases(line, &mut order, &mut phrases) {
            skip_item(context.error("phrase", "[/EN#<id>/<type> words]", error), report)?;
        }
    }
    let element = |id: &String| {
        let bbox = *boxes.get(id)?;
        let texts = phrases.remove(id)?;
        Some(Element { bbox, texts, attributes: Vec::new(), labels: Vec::new() })
    };
    Ok((size, order.iter().filter_map(element).collect()))
}

/// Adds the phrases of a sentence such as `[/EN#1/people Two men] stand .` to those of their entities.
fn read_phrases(
    sentence: &str,
    order: &mut Vec<String>,
    phrases: &mut HashMap<String, Vec<String>>,
) -> Result<(), String> {
    let mut rest = sentence;
    while let Some((_, after)) = rest.split_once('[') {
        let wrong = || excerpt(after);
        let (inside, after) = after.split_once(']').ok_or_else(wrong)?;
        let (entity, words) = inside.split_once(' ').ok_or_else(wrong)?;
        let id = entity.strip_prefix("/EN#").and_then(|entity| entity.split('/').next()).ok_or_else(wrong)?;
        rest = after;
        // Entity 0 is what no box was asked for.
        if id == "0" || words.trim().is_empty() {
            continue;
        }
        let known = phrases.entry(id.to_owned()).or_insert_with(|| {
            order.push(id.to_owned());
            Vec::new()
        });
        if !known.iter().any(|other| other.eq_ignore_ascii_case(words)) {
            known.push(words.to_owned());
        }
    }
    Ok(())
}

type Boxes = HashMap<String, [f32; 4]>;

/// The image's size, and for each entity the box around its boxes, which are given by their first and last pixels counted
/// from 1.
fn read_boxes(path: &Path, xml: &str) -> Result<((u32, u32), Boxes), DataError> {
    let context = Context { path, place: Place::Whole };
    let number = |part: &str, name: &str| {
        let text = elements(part, name).next();
        let number = text.and_then(|text| text.trim().parse::<u32>().ok());
        number.ok_or_else(|| context.error(name, "a whole number", text.map_or("nothing".to_owned(), excerpt)))
    };
    let size = elements(xml, "size").next().ok_or_else(|| context.error("size", "the size of the image", "nothing"))?;
    let size = (number(size, "width")?, number(size, "height")?);
    let mut edges: HashMap<String, [u32; 4]> = HashMap::new();
    for object in elements(xml, "object") {
        for bounds in elements(object, "bndbox") {
            let [left, top] = [number(bounds, "xmin")?, number(bounds, "ymin")?];
            let [right, bottom] = [number(bounds, "xmax")?, number(bounds, "ymax")?];
            for id in elements(object, "name") {
                let known = edges.entry(id.trim().to_owned()).or_insert([left, top, right, bottom]);
                *known = [known[0].min(left), known[1].min(top), known[2].max(right), known[3].max(bottom)];
            }
        }
    }
    let bbox = |[left, top, right, bottom]: [u32; 4]| {
        let (x, y) = (f64::from(left) - 1.0, f64::from(top) - 1.0);
        [x, y, f64::from(right) - x, f64::from(bottom) - y].map(|pixels| pixels as f32)
    };
    Ok((size, edges.into_iter().map(|(id, edges)| (id, bbox(edges))).collect()))
}

/// What stands between `<name>` and `</name>`, for each such pair; these files nest no element in one of its own name.
fn elements<'a>(xml: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let mut rest = xml;
    std::iter::from_fn(move || {
        let (_, after) = rest.split_once(open.as_str())?;
        let (inside, after) = after.split_once(close.as_str())?;
        rest = after;
        Some(inside)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_each_form_are_told_apart() {
        assert_eq!(row("1.jpg#0\tTwo men , one dog ."), Some(("1.jpg", "Two men , one dog .")));
        assert_eq!(row("1.jpg| 0| Two men , one dog ."), Some(("1.jpg", "Two men , one dog .")));
        assert_eq!(row("1.jpg,\"Two men , one dog .\""), Some(("1.jpg", "Two men , one dog .")));
        assert_eq!(row("nothing"), None);
        assert_eq!(row("1.jpg| 4 nothing"), None);
    }

    #[test]
    fn phrases_of_an_entity_are_gathered() {
        let (mut order, mut phrases) = (Vec::new(), HashMap::new());
        for sentence in
            ["[/EN#7/people Two men] near [/EN#0/notvisual that] .", "[/EN#7/people Men] , [/EN#9/other/scene a dog]"]
        {
            read_phrases(sentence, &mut order, &mut phrases).unwrap();
        }
        assert_eq!(order, ["7", "9"]);
        assert_eq!(phrases["7"], ["Two men", "Men"]);
        assert!(read_phrases("[/EN#7/people Two men", &mut order, &mut phrases).is_err());
        assert!(read_phrases("[Two men]", &mut order, &mut phrases).is_err());
    }
}
