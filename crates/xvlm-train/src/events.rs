//! Event files: how TensorBoard reads a run.
//!
//! A file is a row of records of the TFRecord format, each an `Event` (`tensorflow/core/util/event.proto`): the version
//! first, then the begin of a session, then the numbers of every [`MetricsRow`]. The few fields that are needed are written
//! here by hand: a generator of code for them, or `tensorboard-rs`, which is not maintained, would be the larger part.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::error::TrainError;
use crate::metrics::MetricsRow;

/// What every file begins with. From version 2 on, readers go by the begin of a session to see what a resumed run does anew.
const VERSION: &str = "brain.Event:2";
/// `SessionLog.START`.
const START: u64 = 1;

/// A file that is being written. Each process that trains writes one of its own; TensorBoard joins those of a folder.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a file in a folder, which is made if it is not there, for the iterations after `done` ones. Numbers of those
    /// iterations in older files of the folder, which a run before wrote, count no more.
    ///
    /// # Errors
    /// [`TrainError::Io`] if it cannot be written.
    pub fn begin(folder: &Path, done: u64) -> Result<Self, TrainError> {
        fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
        let path = new_path(folder).map_err(TrainError::io(folder))?;
        let file = OpenOptions::new().create_new(true).append(true).open(&path).map_err(TrainError::io(&path))?;
        let mut events = Self { path, file };
        let mut version = Message::event(0);
        version.bytes(3, VERSION.as_bytes());
        // What a session purges begins with its own first step.
        let mut start = Message::event(done + 1);
        let mut session = Message::default();
        session.integer(1, START);
        start.bytes(7, &session.0);
        events.write(&[version, start])?;
        Ok(events)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds the numbers of a row: each loss as `loss/NAME`, the others by their own names.
    ///
    /// # Errors
    /// [`TrainError::Io`] if they cannot be written.
    pub fn append(&mut self, row: &MetricsRow) -> Result<(), TrainError> {
        let fields = serde_json::to_value(row).map_err(|error| TrainError::io(&self.path)(error.into()))?;
        let events: Vec<_> =
            scalars(&fields).into_iter().map(|(tag, value)| scalar(row.iteration, &tag, value)).collect();
        self.write(&events)
    }

    /// Writes records with one call: a process that is killed leaves all of them or, on most systems, none.
    fn write(&mut self, events: &[Message]) -> Result<(), TrainError> {
        let records: Vec<u8> = events.iter().flat_map(|event| record(&event.0)).collect();
        self.file.write_all(&records).map_err(TrainError::io(&self.path))
    }
}

/// A name that comes after those of all event files of the folder: TensorBoard reads them by name.
fn new_path(folder: &Path) -> io::Result<PathBuf> {
    let mut seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let of_file =
            name.to_str().and_then(|name| name.strip_prefix("events.out.tfevents.")?.split('.').next()?.parse().ok());
        seconds = seconds.max(of_file.map_or(0, |other: u64| other.saturating_add(1)));
    }
    // Linux tells its name here; TensorBoard shows it nowhere, and only wants files of several machines to differ.
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String =
        host.trim().chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
    let host = if host.is_empty() { "localhost" } else { &host };
    Ok(folder.join(format!("events.out.tfevents.{seconds:010}.{host}.{}", std::process::id())))
}

/// Names and values of a row that has been made JSON. What was not measured, or is not finite, is null there.
fn scalars(row: &Value) -> Vec<(String, f64)> {
    let mut scalars = Vec::new();
    for (name, value) in row.as_object().into_iter().flatten().filter(|(name, _)| *name != "iteration") {
        match value {
            Value::Object(losses) => {
                let named = |(loss, value): (&String, &Value)| Some((format!("loss/{loss}"), value.as_f64()?));
                scalars.extend(losses.iter().filter_map(named));
            }
            value => scalars.extend(value.as_f64().map(|value| (name.clone(), value))),
        }
    }
    scalars
}

/// An `Event` with one number: `summary { value { tag, simple_value } }`.
fn scalar(step: u64, tag: &str, number: f64) -> Message {
    let (mut value, mut summary, mut event) = (Message::default(), Message::default(), Message::event(step));
    value.bytes(1, tag.as_bytes());
    value.float(2, number as f32);
    summary.bytes(1, &value.0);
    event.bytes(5, &summary.0);
    event
}

/// A message of protocol buffers that is being written; fields have their numbers.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// An `Event` of now.
    fn event(step: u64) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let mut event = Self::default();
        event.key(1, 1);
        event.0.extend(now.to_le_bytes());
        event.integer(2, step);
        event
    }

    /// Before every field: its number and how it is encoded.
    fn key(&mut self, field: u64, encoding: u64) {
        self.varint(field << 3 | encoding);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn integer(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.varint(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.key(field, 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
    }
}

/// A record: the length and its checksum, the bytes and theirs.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    [&length[..], &masked_checksum(&length).to_le_bytes(), bytes, &masked_checksum(bytes).to_le_bytes()].concat()
}

/// CRC-32C, turned and shifted, so that a checksum of what has checksums in it stays one (`tensorflow/core/lib/hash/crc32c.h`).
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Reads an event file as TensorBoard does: whole records, until one is not; later sessions purge.
    fn read(files: &[PathBuf]) -> BTreeMap<String, Vec<(u64, f32)>> {
        let mut scalars = BTreeMap::<String, Vec<(u64, f32)>>::new();
        for file in files {
            let content = fs::read(file).unwrap();
            let mut rest = content.as_slice();
            let mut is_first = true;
            while let Some(event) = next_record(&mut rest) {
                let parts = fields(event);
                let number =
                    |field| parts.iter().find(|(number, ..)| *number == field).map_or(0, |(_, value, _)| *value);
                let bytes = |field| parts.iter().find(|(number, ..)| *number == field).map(|(.., bytes)| *bytes);
                let wall = f64::from_bits(number(1));
                assert!(wall > 1.6e9 && wall < 1e11, "{wall}");
                assert_eq!(bytes(3), is_first.then_some(VERSION.as_bytes()), "the version, first and only there");
                is_first = false;
                let step = number(2);
                if let Some(session) = bytes(7) {
                    assert_eq!(fields(session), [(1, START, &[][..])]);
                    scalars.values_mut().for_each(|points| points.retain(|(other, _)| *other < step));
                }
                for (_, _, value) in bytes(5).map(fields).unwrap_or_default() {
                    let value = fields(value);
                    assert_eq!((value[0].0, value[1].0), (1, 2));
                    let tag = String::from_utf8(value[0].2.to_vec()).unwrap();
                    scalars.entry(tag).or_default().push((step, f32::from_bits(value[1].1 as u32)));
                }
            }
        }
        scalars
    }

    fn next_record<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
        let (length, after) = rest.split_first_chunk::<8>()?;
        let (checksum, after) = after.split_first_chunk::<4>()?;
        assert_eq!(u32::from_le_bytes(*checksum), masked_checksum(length));
        let (bytes, after) = after.split_at_checked(u64::from_le_bytes(*length) as usize)?;
        let (checksum, after) = after.split_first_chunk::<4>()?;
        assert_eq!(u32::from_le_bytes(*checksum), masked_checksum(bytes));
        *rest = after;
        Some(bytes)
    }

    /// Number, value (of numbers) and content (of bytes) of each field.
    fn fields(mut message: &[u8]) -> Vec<(u64, u64, &[u8])> {
        fn varint(message: &mut &[u8]) -> u64 {
            let length = message.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
            let (bytes, rest) = message.split_at(length);
            *message = rest;
            bytes.iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f))
        }
        let mut fields = Vec::new();
        while !message.is_empty() {
            let key = varint(&mut message);
            let (value, length) = match key & 7 {
                0 => (varint(&mut message), 0),
                1 => (u64::from_le_bytes(message[..8].try_into().unwrap()), 8),
                2 => (0, varint(&mut message) as usize),
                5 => (u64::from(u32::from_le_bytes(message[..4].try_into().unwrap())), 4),
                other => panic!("encoding {other}"),
            };
            let (content, rest) = message.split_at(length);
            fields.push((key >> 3, value, if key & 7 == 2 { content } else { &[] }));
            message = rest;
        }
        fields
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    fn row(iteration: u64, loss: f64) -> MetricsRow {
        MetricsRow { iteration, losses: BTreeMap::from([("itc".to_owned(), loss)]), lr: 0.5, ..MetricsRow::default() }
    }

    #[test]
    fn bytes_are_those_of_tensorboard() {
        // Of its `RecordWriter` for b"abc",
        let checksums = [[0xb0, 0x99, 0x49, 0x0e], [0x6e, 0x57, 0xf1, 0x21]];
        let expected = [&[3, 0, 0, 0, 0, 0, 0, 0], &checksums[0][..], b"abc", &checksums[1]].concat();
        assert_eq!(record(b"abc"), expected);
        // and of its `Event` of step 300 with `Value(tag="loss/itc", simple_value=2.5)`, after the time.
        let expected = [&[16, 172, 2, 42, 17, 10, 15, 10, 8], &b"loss/itc"[..], &[21, 0, 0, 32, 64]].concat();
        assert_eq!(scalar(300, "loss/itc", 2.5).0[9..], expected);
    }

    #[test]
    fn every_number_of_a_row_is_a_scalar() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::begin(dir.path(), 0).unwrap();
        events.append(&MetricsRow { peak_memory_mib: Some(300), ..row(1_000_000, 2.5) }).unwrap();
        let scalars = read(&[events.path().to_owned()]);
        for (tag, value) in [("loss/itc", 2.5), ("lr", 0.5), ("grad_norm", 0.0), ("peak_memory_mib", 300.0)] {
            assert_eq!(scalars[tag], [(1_000_000, value)], "{tag}");
        }
        assert!(!scalars.contains_key("iteration"));
    }

    #[test]
    fn what_a_resumed_run_does_anew_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tensorboard");
        let mut first = EventFile::begin(&folder, 0).unwrap();
        for iteration in [50, 100, 150] {
            first.append(&row(iteration, iteration as f64)).unwrap();
        }
        // Killed at 150, after the checkpoint of 100.
        let mut second = EventFile::begin(&folder, 100).unwrap();
        second.append(&row(150, 7.0)).unwrap();
        let files = files(&folder);
        assert_eq!(files, [first.path(), second.path()], "in the order in which they are read");
        assert_eq!(read(&files)["loss/itc"], [(50, 50.0), (100, 100.0), (150, 7.0)]);
    }

    #[test]
    fn a_record_that_is_cut_off_costs_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::begin(dir.path(), 0).unwrap();
        events.append(&row(1, 1.0)).unwrap();
        let whole = fs::read(events.path()).unwrap().len();
        events.append(&row(2, 2.0)).unwrap();
        let content = fs::read(events.path()).unwrap();
        for length in whole..content.len() {
            fs::write(events.path(), &content[..length]).unwrap();
            assert_eq!(read(&[events.path().to_owned()])["loss/itc"][0], (1, 1.0), "{length} bytes");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "").unwrap();
        assert!(EventFile::begin(&path, 0).unwrap_err().to_string().contains("file"));
    }
}
