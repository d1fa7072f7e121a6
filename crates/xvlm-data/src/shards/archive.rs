//! WebDataset shards: tar archives in which the members of a record share their name up to its first dot.

use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tar::{EntryType, Header, PaxExtensions};

use super::index::{Index, Need};
use super::{Form, Found, lines};
use crate::error::{DataError, Place};
use crate::json::io_error;
use crate::records::{ImageSource, Reading, Record, parse_object};
use crate::storage::FileReader;

const BLOCK: u64 = 512;
/// Longest name that is read; longer ones are of no file.
const LONGEST_NAME: u64 = 1 << 16;

/// A member's name and where its content is.
struct Member {
    name: Vec<u8>,
    /// Where the headers begin that are about it.
    start: u64,
    content: Range<u64>,
}

/// What is met on the way through an archive.
enum Step {
    Member(Member),
    /// No header: what was found instead, and where.
    Damage(u64, &'static str),
    /// The content reaches over the end of the file.
    Cut(u64, Vec<u8>),
    End,
}

/// Goes through the headers of an archive, without reading the members.
struct Walk<R> {
    source: R,
    offset: u64,
    end: u64,
    /// Whether the last block was no header, so that the next header is searched for.
    lost: bool,
}

/// Reads at a place.
trait Source {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()>;
}

impl Source for &[u8] {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let start = usize::try_from(offset).ok();
        let part = start.and_then(|start| self.get(start..start.checked_add(buffer.len())?));
        buffer.copy_from_slice(part.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Reads small pieces of a file in their order, several at a time.
struct Ahead<'a> {
    reader: BufReader<FileReader<'a>>,
    offset: u64,
}

impl Source for Ahead<'_> {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let skip = offset.wrapping_sub(self.offset);
        if skip <= self.reader.buffer().len() as u64 {
            std::io::BufRead::consume(&mut self.reader, skip as usize);
        } else {
            let capacity = self.reader.capacity();
            let mut file = FileReader::new(self.reader.get_ref().file(), self.reader.get_ref().end());
            file.seek(offset);
            self.reader = BufReader::with_capacity(capacity, file);
        }
        self.offset = offset + buffer.len() as u64;
        self.reader.read_exact(buffer)
    }
}

impl<R: Source> Walk<R> {
    fn new(source: R, end: u64) -> Self {
        Self { source, offset: 0, end, lost: false }
    }

    /// The next member that is a file.
    fn step(&mut self) -> std::io::Result<Step> {
        let (mut start, mut name, mut size) = (self.offset, None, None);
        let mut empty = 0;
        loop {
            let at = self.offset;
            if self.end - at < BLOCK {
                let whole = self.end == at && !self.lost;
                self.offset = self.end;
                // Writers that are cut off between members leave no end; that loses nothing.
                return Ok(if whole || self.lost { Step::End } else { Step::Damage(at, "a part of a header") });
            }
            let mut header = Header::new_old();
            self.source.read_at(at, header.as_mut_bytes())?;
            self.offset = at + BLOCK;
            if header.as_bytes().iter().all(|&byte| byte == 0) {
                // Two empty blocks end an archive; behind them may be another, when archives were joined.
                empty += 1;
                (start, name, size) = (self.offset, None, None);
                continue;
            }
            let Some(length) = content_length(&header, size) else {
                if self.lost {
                    continue;
                }
                // What follows two empty blocks and is no header is what some writers fill the last block with.
                let filling = empty >= 2;
                self.lost = true;
                if filling {
                    continue;
                }
                return Ok(Step::Damage(at, "something else"));
            };
            if std::mem::take(&mut self.lost) {
                (start, name) = (at, None);
            }
            let content = self.offset..self.offset.saturating_add(length);
            let kind = header.entry_type();
            if content.end > self.end {
                let name = name.unwrap_or_else(|| header.path_bytes().into_owned());
                if length > self.end {
                    // No such file: the header lies, and a good one may come behind it.
                    self.lost = true;
                    return Ok(Step::Damage(at, "a member that is larger than the archive"));
                }
                self.offset = self.end;
                return Ok(Step::Cut(start, name));
            }
            self.offset = content.end.next_multiple_of(BLOCK).min(self.end);
            match kind {
                EntryType::GNULongName | EntryType::XHeader => {
                    let Some(text) = self.text(&content)? else {
                        return Ok(Step::Damage(at, "a name that is too long"));
                    };
                    if kind == EntryType::GNULongName {
                        name = Some(text.split(|&byte| byte == 0).next().unwrap_or_default().to_vec());
                    } else {
                        for extension in PaxExtensions::new(&text).flatten() {
                            match extension.key_bytes() {
                                b"path" => name = Some(extension.value_bytes().to_vec()),
                                b"size" => size = extension.value().ok().and_then(|value| value.parse().ok()),
                                _ => {}
                            }
                        }
                    }
                }
                EntryType::GNULongLink | EntryType::XGlobalHeader => {}
                EntryType::Regular | EntryType::Continuous => {
                    let name = name.unwrap_or_else(|| header.path_bytes().into_owned());
                    return Ok(Step::Member(Member { name, start, content }));
                }
                // Folders, links and devices.
                _ => (start, name, size) = (self.offset, None, None),
            }
        }
    }

    fn text(&mut self, content: &Range<u64>) -> std::io::Result<Option<Vec<u8>>> {
        let length = content.end - content.start;
        if length > LONGEST_NAME {
            return Ok(None);
        }
        let mut text = vec![0; length as usize];
        self.source.read_at(content.start, &mut text)?;
        Ok(Some(text))
    }
}

/// Bytes of a member's content; `None` if the block is no header.
fn content_length(header: &Header, size: Option<u64>) -> Option<u64> {
    let bytes = header.as_bytes();
    // The field of the checksum itself counts as spaces.
    let sum: u32 = bytes[..148].iter().chain(&bytes[156..]).map(|&byte| u32::from(byte)).sum::<u32>() + 8 * 32;
    if header.cksum().ok()? != sum {
        return None;
    }
    match header.entry_type() {
        // Links and folders have no content, whatever they say.
        EntryType::Link
        | EntryType::Symlink
        | EntryType::Directory
        | EntryType::Char
        | EntryType::Block
        | EntryType::Fifo => Some(0),
        EntryType::Regular | EntryType::Continuous => size.or_else(|| header.entry_size().ok()),
        _ => header.entry_size().ok(),
    }
}

/// A name up to the first dot behind the last slash, and what is behind that dot in lower case.
fn key(name: &[u8]) -> (&[u8], String) {
    let file = name.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    match name[file..].iter().position(|&byte| byte == b'.') {
        Some(dot) => {
            let extension = String::from_utf8_lossy(&name[file + dot + 1..]).to_ascii_lowercase();
            (&name[..file + dot], extension)
        }
        None => (name, String::new()),
    }
}

/// What a member is to its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Image,
    Caption,
    Object,
    Other,
}

fn role(extension: &str) -> Role {
    match extension {
        "jpg" | "jpeg" | "png" | "webp" | "gif" => Role::Image,
        "txt" | "text" | "caption" => Role::Caption,
        "json" => Role::Object,
        _ => Role::Other,
    }
}

fn place(key: &[u8], rows: bool) -> Place {
    let text = String::from_utf8_lossy(key);
    match text.parse().ok().filter(|_| rows) {
        Some(row) => Place::Row(row),
        None => Place::Key(text.into()),
    }
}

fn damage(name: &Arc<Path>, place: Place, expected: &str, found: impl Into<String>) -> DataError {
    DataError::Shard { path: name.to_path_buf(), place, expected: expected.to_owned(), found: found.into() }
}

/// The members of one record while the archive is gone through.
struct Group {
    key: Vec<u8>,
    start: u64,
    end: u64,
    extensions: Vec<String>,
    image: bool,
    flags: u8,
    problem: Option<DataError>,
}

/// Finds the records of an archive of `length` bytes. What is no record is told to `found`.
pub(super) fn scan(
    file: &File,
    length: u64,
    name: &Arc<Path>,
    reading: &Reading,
    longest: u32,
    found: &mut Found<'_>,
) -> Result<Index, DataError> {
    let io = |source: std::io::Error| io_error(name, source);
    let mut index = Index::new(Form::Tar);
    let reader = BufReader::with_capacity(1 << 14, FileReader::new(file, length));
    let mut walk = Walk::new(Ahead { reader, offset: 0 }, length);
    let mut group: Option<Group> = None;
    loop {
        let step = walk.step().map_err(io)?;
        let Step::Member(member) = step else {
            match step {
                Step::Cut(at, cut) => {
                    // The members before the cut are of a record that is not whole, if they share its key.
                    let (key, _) = key(&cut);
                    group = group.filter(|group| group.key != key);
                    close(group.take(), &mut index, name, longest, found);
                    found(&mut index, damage(name, Place::Byte(at), "a whole member", cut_off(&cut)));
                }
                Step::Damage(at, what) => {
                    close(group.take(), &mut index, name, longest, found);
                    found(&mut index, damage(name, Place::Byte(at), "the header of a member", what));
                    continue;
                }
                Step::Member(_) | Step::End => {}
            }
            close(group.take(), &mut index, name, longest, found);
            return Ok(index.finish(length));
        };
        let (key, extension) = key(&member.name);
        let role = role(&extension);
        let same = |group: &Group| group.key == key && !group.extensions.contains(&extension);
        if !group.as_ref().is_some_and(same) {
            close(group.take(), &mut index, name, longest, found);
        }
        let group = group.get_or_insert_with(|| Group {
            key: key.to_vec(),
            start: member.start,
            end: member.start,
            extensions: Vec::new(),
            image: false,
            flags: 0,
            problem: None,
        });
        group.end = member.content.end;
        let size = member.content.end - member.content.start;
        match role {
            Role::Image => group.image = true,
            Role::Caption if size > 0 => group.flags |= Need::Captions.flag(),
            Role::Object if size <= u64::from(longest) => {
                let mut bytes = vec![0; size as usize];
                walk.source.read_at(member.content.start, &mut bytes).map_err(io)?;
                match outline(&bytes, reading) {
                    Some((image, flags)) => {
                        group.image |= image;
                        group.flags |= flags;
                    }
                    None => {
                        let place = place(key, false);
                        group.problem = Some(match serde_json::from_slice::<Value>(&bytes) {
                            Err(source) => DataError::Json { path: name.to_path_buf(), place, source },
                            Ok(_) => damage(name, place, "a JSON object of UTF-8", "something else"),
                        });
                    }
                }
            }
            _ => {}
        }
        // Members beyond these are of no use, and many would be looked through again and again.
        if role != Role::Other {
            group.extensions.push(extension);
        }
    }
}

fn cut_off(member: &[u8]) -> String {
    format!("the end of the archive inside {}", crate::error::excerpt(&String::from_utf8_lossy(member)))
}

fn outline(bytes: &[u8], reading: &Reading) -> Option<(bool, u8)> {
    lines::outline(bytes, &reading.keys)
}

fn close(group: Option<Group>, index: &mut Index, name: &Arc<Path>, longest: u32, found: &mut Found<'_>) {
    let Some(group) = group else { return };
    if group.extensions.is_empty() {
        // A read-me or the like.
        return;
    }
    let length = group.end - group.start;
    let error = if let Some(problem) = group.problem {
        problem
    } else if length > u64::from(longest) {
        damage(name, place(&group.key, false), &format!("a record of at most {longest} bytes"), length.to_string())
    } else if !group.image {
        damage(name, place(&group.key, false), "an image: a jpg, jpeg, png, webp or gif", "none")
    } else if group.flags == 0 {
        damage(name, place(&group.key, false), "a caption, elems or questions: a txt or json", "none")
    } else if index.push(group.start, length as u32, group.flags) {
        return;
    } else {
        damage(name, place(&group.key, false), &format!("at most {} records", u32::MAX), "more")
    };
    found(index, error);
}

/// The record that the bytes of its members make; `rows` if its key is the row of a table.
pub(super) fn read(bytes: &[u8], name: &Arc<Path>, reading: &Reading, rows: bool) -> Result<Record, DataError> {
    let io = |source: std::io::Error| io_error(name, source);
    let mut walk = Walk::new(bytes, bytes.len() as u64);
    let (mut place, mut image, mut caption, mut object) = (Place::Whole, None, None, None);
    loop {
        let member = match walk.step().map_err(io)? {
            Step::Member(member) => member,
            Step::End => break,
            Step::Damage(..) | Step::Cut(..) => {
                return Err(damage(
                    name,
                    place,
                    "the members of a record",
                    "something else: the index is of another file",
                ));
            }
        };
        let (key, extension) = key(&member.name);
        if place == Place::Whole {
            place = self::place(key, rows);
        }
        let content = &bytes[member.content.start as usize..member.content.end as usize];
        match role(&extension) {
            Role::Image => image = Some(ImageSource::Bytes(content.into())),
            Role::Caption => {
                let text = std::str::from_utf8(content).map(str::trim);
                let text =
                    text.map_err(|error| damage(name, place.clone(), "a caption of UTF-8", error.to_string()))?;
                caption = Some(text.to_owned()).filter(|text| !text.is_empty());
            }
            Role::Object => {
                let value: Value = serde_json::from_slice(content).map_err(|source| DataError::Json {
                    path: name.to_path_buf(),
                    place: place.clone(),
                    source,
                })?;
                object = Some(value);
            }
            Role::Other => {}
        }
    }
    let object = object.unwrap_or_else(|| Value::Object(serde_json::Map::new()));
    parse_object(&object, name, place, reading, image, caption)
}
