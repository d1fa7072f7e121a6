//! Sets of a caption and a URL a row: Conceptual Captions (CC-3M, CC-12M) and SBU.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::json_items::{JsonItems, parse_item};
use super::report::Report;
use super::source::{Raw, Reader, Records, image_file, origin, skip_item, skip_outside};
use super::stream::Lines;
use super::template::NameTemplate;
use crate::error::{DataError, Place, excerpt};
use crate::json::Context;
use crate::records::Origin;

/// Conceptual Captions as published: a row has a caption and a URL, in either order (CC-3M: caption first; CC-12M: URL
/// first), separated by a tabulator. The images are what a download tool has left in a folder.
#[derive(Debug, Clone)]
pub struct Conceptual {
    /// The file of rows.
    pub rows: PathBuf,
    /// The folder of the images.
    pub images: PathBuf,
    /// How an image's file is called.
    pub names: NameTemplate,
}

/// SBU Captions as published: two text files, line by line, or `sbu-captions-all.json`.
#[derive(Debug, Clone)]
pub struct Sbu {
    /// Its captions.
    pub captions: SbuCaptions,
    /// The folder of the images.
    pub images: PathBuf,
    /// How an image's file is called.
    pub names: NameTemplate,
}

/// In which form SBU's captions are.
#[derive(Debug, Clone)]
pub enum SbuCaptions {
    /// `SBU_captioned_photo_dataset_urls.txt` and `SBU_captioned_photo_dataset_captions.txt`.
    Lines {
        /// The URLs.
        urls: PathBuf,
        /// The captions.
        captions: PathBuf,
    },
    /// `sbu-captions-all.json`: an object with the lists `image_urls` and `captions`.
    Json(PathBuf),
}

/// What makes an image of a row.
struct Images {
    folder: PathBuf,
    names: NameTemplate,
}

impl Images {
    /// The image of a row (from 0); one that the template leads out of the folder with is counted.
    fn raw(&self, origin: Origin, row: u64, url: &str, caption: &str, report: &mut Report) -> Option<Raw> {
        let name = self.names.name(row, url);
        match image_file(&self.folder, &name) {
            Ok(image) => Some(Raw {
                id: row.to_string(),
                aliases: vec![url.to_owned()],
                image,
                size: None,
                fractions: false,
                captions: vec![caption.to_owned()],
                elems: Vec::new(),
                questions: Vec::new(),
                origin,
            }),
            Err(found) => {
                skip_outside(&origin, &found, report);
                None
            }
        }
    }
}

fn is_url(text: &str) -> bool {
    text.starts_with("http://") || text.starts_with("https://")
}

struct Rows {
    file: Arc<Path>,
    lines: Lines<BufReader<File>>,
    images: Images,
    /// Rows so far, without the header.
    row: u64,
}

impl Conceptual {
    /// Opens the file; rows are read as they are asked for.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`].
    pub fn open(&self) -> Result<Records, DataError> {
        let images = Images { folder: self.images.clone(), names: self.names.clone() };
        let lines = Lines::open(&self.rows)?;
        Ok(Records::new(Rows { file: Arc::from(self.rows.as_path()), lines, images, row: 0 }))
    }
}

impl Reader for Rows {
    fn next(&mut self, report: &mut Report) -> Result<Option<Raw>, DataError> {
        while let Some(line) = self.lines.next()? {
            if line.bytes.trim_ascii().is_empty() {
                continue;
            }
            let number = line.number;
            let text = match line.text(&self.file) {
                Ok(text) => text,
                Err(error) => {
                    skip_item(error, report)?;
                    self.row += 1;
                    continue;
                }
            };
            let columns: Vec<&str> = text.split('\t').map(str::trim).collect();
            let pair = match columns.as_slice() {
                [url, caption, ..] if is_url(url) && !is_url(caption) => Some((*url, *caption)),
                [caption, url, ..] if is_url(url) => Some((*url, *caption)),
                // The header that some tools add.
                [a, b, ..] if number == 1 && a.len().max(b.len()) < 16 => continue,
                _ => None,
            };
            let row = self.row;
            self.row += 1;
            let Some((url, caption)) = pair else {
                let context = Context { path: &self.file, place: Place::Line(number) };
                skip_item(context.error("row", "a caption and a URL with a tabulator between", excerpt(text)), report)?;
                continue;
            };
            if let Some(raw) = self.images.raw(origin(&self.file, Place::Line(number)), row, url, caption, report) {
                return Ok(Some(raw));
            }
        }
        Ok(None)
    }

    fn images(&self) -> Option<u64> {
        None
    }
}

impl Sbu {
    /// Opens the files; lines are read as they are asked for, the JSON form is held in memory.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`], and [`DataError::Field`] if the JSON form has not as many URLs as captions.
    pub fn open(&self) -> Result<Records, DataError> {
        let images = Images { folder: self.images.clone(), names: self.names.clone() };
        Ok(match &self.captions {
            SbuCaptions::Lines { urls, captions } => Records::new(LinePairs {
                file: Arc::from(captions.as_path()),
                url_file: urls.clone(),
                urls: Lines::open(urls)?,
                captions: Lines::open(captions)?,
                images,
                row: 0,
            }),
            SbuCaptions::Json(path) => {
                let mut columns: [Vec<Box<str>>; 2] = [Vec::new(), Vec::new()];
                let mut items = JsonItems::open(path, &["image_urls", "captions"])?;
                while let Some(item) = items.next()? {
                    let text = match parse_item(path, &Place::Item(item.number), item.bytes)? {
                        Value::String(text) => text,
                        // Counted with its row, as a text without words.
                        _ => String::new(),
                    };
                    columns[item.section].push(text.into());
                }
                let [urls, captions] = columns;
                if urls.len() != captions.len() || urls.is_empty() {
                    let context = Context { path, place: Place::Whole };
                    let found = format!("{} and {}", urls.len(), captions.len());
                    return Err(context.error("file", "as many `image_urls` as `captions`, at least one", found));
                }
                Records::new(Columns { file: Arc::from(path.as_path()), urls, captions, images, row: 0 })
            }
        })
    }
}

struct LinePairs {
    file: Arc<Path>,
    url_file: PathBuf,
    urls: Lines<BufReader<File>>,
    captions: Lines<BufReader<File>>,
    images: Images,
    row: u64,
}

impl Reader for LinePairs {
    fn next(&mut self, report: &mut Report) -> Result<Option<Raw>, DataError> {
        loop {
            let (url, caption) = match (self.urls.next()?, self.captions.next()?) {
                (Some(url), Some(caption)) => (url, caption),
                (None, None) => return Ok(None),
                (url, _) => {
                    let (path, longer) =
                        if url.is_some() { (&*self.file, "URLs") } else { (self.url_file.as_path(), "captions") };
                    let context = Context { path, place: Place::Line(self.row as usize + 1) };
                    return Err(context.error("line", "as many URLs as captions", format!("more {longer}")));
                }
            };
            let row = self.row;
            self.row += 1;
            let texts = url.text(&self.url_file).and_then(|url| Ok((url, caption.text(&self.file)?)));
            match texts {
                Ok((url, text)) => {
                    let origin = origin(&self.file, Place::Line(caption.number));
                    if let Some(raw) = self.images.raw(origin, row, url.trim(), text, report) {
                        return Ok(Some(raw));
                    }
                }
                Err(error) => skip_item(error, report)?,
            }
        }
    }

    fn images(&self) -> Option<u64> {
        None
    }
}

struct Columns {
    file: Arc<Path>,
    urls: Vec<Box<str>>,
    captions: Vec<Box<str>>,
    images: Images,
    row: usize,
}

impl Reader for Columns {
    fn next(&mut self, report: &mut Report) -> Result<Option<Raw>, DataError> {
        while let (Some(url), Some(caption)) = (self.urls.get(self.row), self.captions.get(self.row)) {
            let row = self.row as u64;
            self.row += 1;
            let origin = origin(&self.file, Place::Item(row as usize));
            if let Some(raw) = self.images.raw(origin, row, url, caption, report) {
                return Ok(Some(raw));
            }
        }
        Ok(None)
    }

    fn images(&self) -> Option<u64> {
        Some(self.urls.len() as u64)
    }
}
