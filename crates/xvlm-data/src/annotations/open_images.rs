//! Open Images (V4 to V7): boxes, visual relationships, and the captions of Localized Narratives.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::json_items::parse_item;
use super::report::{Reason, Report};
use super::source::{Raw, Reader, Records, image_file, skip_item, skip_outside};
use super::stream::{Extents, Lines, open_plain};
use crate::error::{DataError, Place, excerpt};
use crate::json::Context;
use crate::records::{Element, Origin};

/// Open Images' files, merged by image. A box becomes an element with its class, a relationship one with the text "X on Y" and
/// the box around both; an attribute (relationship `is`) goes before the class of its box.
///
/// Boxes are published as fractions of the image, and stay so: see [`super::Annotated::fractions`].
#[derive(Debug, Clone, Default)]
pub struct OpenImages {
    /// `*-class-descriptions-boxable.csv`: names of the classes; files of attributes' names may follow.
    pub classes: Vec<PathBuf>,
    /// `*-annotations-bbox.csv`.
    pub boxes: Option<PathBuf>,
    /// `*-annotations-vrd.csv`.
    pub relationships: Option<PathBuf>,
    /// `open_images_*_captions.jsonl` or `open_images_*_localized_narratives-*.jsonl`.
    pub narratives: Vec<PathBuf>,
    /// The folder of the images, `<ImageID>.jpg`.
    pub images: PathBuf,
    /// Keep boxes around groups (`IsGroupOf`).
    pub groups: bool,
    /// Keep boxes around depictions (`IsDepiction`).
    pub depictions: bool,
}

/// A comma-separated file of which the rows of each image are known.
struct Table {
    extents: Extents,
    columns: HashMap<String, usize>,
}

struct OpenImagesReader {
    images: PathBuf,
    names: HashMap<String, String>,
    order: Vec<u64>,
    next: usize,
    boxes: Option<Table>,
    relationships: Option<Table>,
    narratives: Vec<Extents>,
    groups: bool,
    depictions: bool,
}

impl OpenImages {
    /// Reads the names of classes, and where in the files each image is.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`], and [`DataError::Field`] if a file lacks a column. Rows that are broken are counted in the report.
    pub fn open(&self) -> Result<Records, DataError> {
        let mut report = Report::default();
        let mut names = HashMap::new();
        for path in &self.classes {
            read_names(path, &mut names)?;
        }
        let (mut order, mut seen) = (Vec::new(), std::collections::HashSet::new());
        let mut add = |keys: Vec<u64>| order.extend(keys.into_iter().filter(|&key| seen.insert(key)));
        let mut table = |path: &Option<PathBuf>, columns: &[&str]| -> Result<Option<Table>, DataError> {
            let Some(path) = path else { return Ok(None) };
            let (table, keys) = Table::open(path, columns, &mut report)?;
            add(keys);
            Ok(Some(table))
        };
        let boxes = table(&self.boxes, &["LabelName", "XMin", "XMax", "YMin", "YMax"])?;
        let relationships = table(&self.relationships, &RELATIONSHIP)?;
        let mut narratives = Vec::new();
        for path in &self.narratives {
            let (extents, keys) = index_narratives(path, &mut report)?;
            add(keys);
            narratives.push(extents);
        }
        let reader = OpenImagesReader {
            images: self.images.clone(),
            names,
            order,
            next: 0,
            boxes,
            relationships,
            narratives,
            groups: self.groups,
            depictions: self.depictions,
        };
        Ok(Records::new(reader).with_report(report))
    }
}

const RELATIONSHIP: [&str; 11] = [
    "LabelName1",
    "LabelName2",
    "XMin1",
    "XMax1",
    "YMin1",
    "YMax1",
    "XMin2",
    "XMax2",
    "YMin2",
    "YMax2",
    "RelationshipLabel",
];

/// `LabelName,DisplayName` (classes; in some versions without that header) or `id,name` (attributes).
fn read_names(path: &Path, names: &mut HashMap<String, String>) -> Result<(), DataError> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(open_plain(path)?);
    for (i, row) in reader.records().enumerate() {
        let context = Context { path, place: Place::Line(i + 1) };
        let row = row.map_err(|error| context.error("row", "comma-separated values", error.to_string()))?;
        match (row.get(0), row.get(1)) {
            (Some("LabelName" | "id"), _) => {}
            (Some(label), Some(name)) if !name.trim().is_empty() => {
                // Some versions write materials as "(made of)Leather".
                let name = name.trim().trim_start_matches("(made of)");
                names.insert(label.to_owned(), name.to_owned());
            }
            _ => return Err(context.error("row", "a class and its name", excerpt(&format!("{row:?}")))),
        }
    }
    Ok(())
}

impl Table {
    fn open(path: &Path, wanted: &[&str], report: &mut Report) -> Result<(Self, Vec<u64>), DataError> {
        let mut lines = Lines::open(path)?;
        let header = match lines.next()? {
            Some(line) => line.text(path)?.trim_start_matches('\u{feff}').to_owned(),
            None => String::new(),
        };
        let columns: HashMap<String, usize> =
            header.split(',').enumerate().map(|(i, name)| (name.trim().to_owned(), i)).collect();
        for name in wanted.iter().chain(&["ImageID"]) {
            if !columns.contains_key(*name) {
                let context = Context { path, place: Place::Line(1) };
                return Err(context.error("header", format!("a column {name}"), excerpt(&header)));
            }
        }
        let column = columns["ImageID"];
        let mut extents = Extents::new(path, open_plain(path)?);
        while let Some(line) = lines.next()? {
            if line.bytes.trim_ascii().is_empty() {
                continue;
            }
            let id = line.bytes.split(|&byte| byte == b',').nth(column).unwrap_or_default();
            match std::str::from_utf8(id) {
                Ok(id) if !id.trim().is_empty() => extents.add_line(id, &line)?,
                _ => {
                    let context = Context { path, place: Place::Line(line.number) };
                    let found = excerpt(&String::from_utf8_lossy(line.bytes));
                    skip_item(context.error("ImageID", "an image's identifier", found), report)?;
                }
            }
        }
        let keys = extents.order();
        Ok((Self { extents, columns }, keys))
    }

    /// Hands the rows about an image to `each`, which may refuse one.
    fn rows(
        &mut self,
        key: u64,
        report: &mut Report,
        mut each: impl FnMut(&Row<'_>, &mut Report) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        for chunk in self.extents.read(key)? {
            let mut reader =
                csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(chunk.bytes.as_slice());
            for (i, fields) in reader.records().enumerate() {
                let context = Context { path: &self.extents.path, place: Place::Line(chunk.number + i) };
                let done = match fields {
                    Ok(fields) => each(&Row { context, columns: &self.columns, fields: &fields }, report),
                    Err(error) => Err(context.error("row", "comma-separated values", error.to_string())),
                };
                if let Err(error) = done {
                    skip_item(error, report)?;
                }
            }
        }
        Ok(())
    }
}

struct Row<'a> {
    context: Context<'a>,
    columns: &'a HashMap<String, usize>,
    fields: &'a csv::StringRecord,
}

impl Row<'_> {
    fn text(&self, name: &str) -> Result<&str, DataError> {
        let field = self.columns.get(name).and_then(|&column| self.fields.get(column)).map(str::trim);
        match field {
            Some(text) if !text.is_empty() => Ok(text),
            _ => Err(self.context.error(name, "a value", "nothing")),
        }
    }

    /// A box in fractions of the image; `suffix` tells the columns apart in relationships.
    fn bbox(&self, suffix: &str) -> Result<[f32; 4], DataError> {
        let number = |name: &str| {
            let name = format!("{name}{suffix}");
            let text = self.text(&name)?;
            let number: Option<f64> = text.parse().ok();
            let number = number.filter(|number| (-1.0..=2.0).contains(number));
            number.ok_or_else(|| self.context.error(name, "a fraction of the image", excerpt(text)))
        };
        let ([x0, x1], [y0, y1]) = ([number("XMin")?, number("XMax")?], [number("YMin")?, number("YMax")?]);
        Ok([x0, y0, x1 - x0, y1 - y0].map(|fraction| fraction as f32))
    }

    fn flag(&self, name: &str) -> bool {
        self.text(name).is_ok_and(|text| text == "1")
    }

    fn id(&self) -> Result<&str, DataError> {
        self.text("ImageID")
    }
}

/// Which image a narrative is about.
#[derive(serde::Deserialize)]
struct Head {
    image_id: String,
}

fn index_narratives(path: &Path, report: &mut Report) -> Result<(Extents, Vec<u64>), DataError> {
    let mut extents = Extents::new(path, open_plain(path)?);
    let mut lines = Lines::open(path)?;
    while let Some(line) = lines.next()? {
        if line.bytes.trim_ascii().is_empty() {
            continue;
        }
        match serde_json::from_slice::<Head>(line.bytes) {
            Ok(head) => extents.add(&head.image_id, line.offset, line.length, line.number)?,
            Err(source) => {
                let place = Place::Line(line.number);
                skip_item(DataError::Json { path: path.to_owned(), place, source }, report)?;
            }
        }
    }
    let keys = extents.order();
    Ok((extents, keys))
}

/// The rectangle around two boxes.
fn around(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
    let (x, y) = (a[0].min(b[0]), a[1].min(b[1]));
    let (right, bottom) = ((a[0] + a[2]).max(b[0] + b[2]), (a[1] + a[3]).max(b[1] + b[3]));
    [x, y, right - x, bottom - y]
}

impl OpenImagesReader {
    /// The identifier that a key is the hash of, read from the first file that has it, and where that was.
    fn identify(&mut self, key: u64) -> Result<Option<(String, Origin)>, DataError> {
        let mut found = None;
        for table in [&mut self.boxes, &mut self.relationships].into_iter().flatten() {
            let mut nothing = Report::default();
            table.rows(key, &mut nothing, |row, _| {
                if found.is_none() {
                    let Context { path, place } = &row.context;
                    found = Some((row.id()?.to_owned(), Origin { file: (*path).into(), place: place.clone() }));
                }
                Ok(())
            })?;
            if found.is_some() {
                return Ok(found);
            }
        }
        for extents in &mut self.narratives {
            for chunk in extents.read(key)? {
                if let Ok(head) = serde_json::from_slice::<Head>(&chunk.bytes) {
                    let origin = Origin { file: extents.path.as_path().into(), place: Place::Line(chunk.number) };
                    return Ok(Some((head.image_id, origin)));
                }
            }
        }
        Ok(None)
    }

    fn elements(&mut self, key: u64, report: &mut Report) -> Result<Vec<Element>, DataError> {
        let names = &self.names;
        let name = |row: &Row<'_>, column: &str, report: &mut Report| -> Result<Option<String>, DataError> {
            let label = row.text(column)?;
            let name = names.get(label).cloned();
            if name.is_none() {
                let Context { path, place } = &row.context;
                report.skip(Reason::UnknownCategory, || format!("{}{place}: {label}", path.display()));
            }
            Ok(name)
        };
        let mut elems: Vec<Element> = Vec::new();
        let (groups, depictions) = (self.groups, self.depictions);
        if let Some(table) = &mut self.boxes {
            table.rows(key, report, |row, report| {
                let Context { path, place } = &row.context;
                if !groups && row.flag("IsGroupOf") {
                    report.skip(Reason::Crowd, || format!("{}{place}", path.display()));
                    return Ok(());
                }
                if !depictions && row.flag("IsDepiction") {
                    report.skip(Reason::Depiction, || format!("{}{place}", path.display()));
                    return Ok(());
                }
                let bbox = row.bbox("")?;
                if let Some(name) = name(row, "LabelName", report)? {
                    elems.push(Element { bbox, texts: vec![name.clone()], attributes: Vec::new(), labels: vec![name] });
                }
                Ok(())
            })?;
        }
        if let Some(table) = &mut self.relationships {
            table.rows(key, report, |row, report| {
                let (first, second) = (row.bbox("1")?, row.bbox("2")?);
                let (Some(one), Some(other)) = (name(row, "LabelName1", report)?, name(row, "LabelName2", report)?)
                else {
                    return Ok(());
                };
                let relation = row.text("RelationshipLabel")?.replace('_', " ");
                if relation == "is" {
                    let same = |element: &&mut Element| element.bbox == first && element.labels.contains(&one);
                    match elems.iter_mut().find(same) {
                        Some(element) => element.attributes.push(other),
                        None => elems.push(Element {
                            bbox: first,
                            texts: vec![one.clone()],
                            attributes: vec![other],
                            labels: vec![one],
                        }),
                    }
                    return Ok(());
                }
                let text = format!("{one} {relation} {other}");
                let bbox = around(first, second);
                elems.push(Element { bbox, texts: vec![text], attributes: Vec::new(), labels: Vec::new() });
                Ok(())
            })?;
        }
        Ok(elems)
    }
}

impl Reader for OpenImagesReader {
    fn next(&mut self, report: &mut Report) -> Result<Option<Raw>, DataError> {
        while let Some(&key) = self.order.get(self.next) {
            self.next += 1;
            let Some((id, origin)) = self.identify(key)? else { continue };
            let image = match image_file(&self.images, &format!("{id}.jpg")) {
                Ok(image) => image,
                Err(found) => {
                    skip_outside(&origin, &found, report);
                    continue;
                }
            };
            let mut captions = Vec::new();
            for extents in &mut self.narratives {
                for chunk in extents.read(key)? {
                    let value = parse_item(&extents.path, &Place::Line(chunk.number), &chunk.bytes);
                    match value.as_ref().map(|value| value.get("caption").and_then(Value::as_str)) {
                        Ok(Some(caption)) => captions.push(caption.to_owned()),
                        _ => report.skip(Reason::Malformed, || {
                            format!("{}:{}: caption: expected a string", extents.path.display(), chunk.number)
                        }),
                    }
                }
            }
            let elems = self.elements(key, report)?;
            let (aliases, questions) = (Vec::new(), Vec::new());
            let (size, fractions) = (None, true);
            return Ok(Some(Raw { id, aliases, image, size, fractions, captions, elems, questions, origin }));
        }
        Ok(None)
    }

    fn images(&self) -> Option<u64> {
        Some(self.order.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_box_around_two_holds_both() {
        assert_eq!(around([10.0, 20.0, 5.0, 5.0], [0.0, 22.0, 12.0, 10.0]), [0.0, 20.0, 15.0, 12.0]);
    }
}
