//! Shards of all kinds, for the tests that read them.
#![allow(dead_code, reason = "not every test needs every kind")]

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use xvlm_data::{DataError, Dataset, DatasetConfig, Place, Record, SourceConfig, StorageOptions};

/// A line whose caption is `n`.
pub(crate) fn line(n: usize) -> String {
    format!("{{\"binary\": \"aW1hZ2U=\", \"caption\": \"text {n}\"}}\n")
}

pub(crate) fn lines(numbers: std::ops::Range<usize>) -> String {
    numbers.map(line).collect()
}

/// Which record it is, by its caption.
pub(crate) fn number(record: &Record) -> usize {
    record.captions[0].rsplit(' ').next().unwrap().parse().unwrap()
}

pub(crate) fn gzip(content: &[u8]) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Compression::fast());
    out.write_all(content).unwrap();
    out.finish().unwrap()
}

pub(crate) fn zstd(content: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(content, ruzstd::encoding::CompressionLevel::Fastest)
}

/// An archive of members with these names and contents.
pub(crate) fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        // Names that `set_path` refuses have to be written as they are.
        if name.len() < 100 {
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            archive.append(&header, *content).unwrap();
        } else {
            archive.append_data(&mut header, name, *content).unwrap();
        }
    }
    archive.into_inner().unwrap()
}

/// A table of columns of strings or bytes, in groups of some rows.
pub(crate) fn parquet(
    schema: &str,
    columns: &[Vec<Option<&[u8]>>],
    rows: usize,
    compression: parquet::basic::Compression,
) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(compression).build();
    let mut out = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut out, schema, Arc::new(properties)).unwrap();
    let all = columns[0].len();
    for start in (0..all).step_by(rows) {
        let mut group = writer.next_row_group().unwrap();
        for column in columns {
            let part = &column[start..all.min(start + rows)];
            let levels: Vec<i16> = part.iter().map(|value| i16::from(value.is_some())).collect();
            let values: Vec<ByteArray> = part.iter().flatten().map(|value| ByteArray::from(value.to_vec())).collect();
            let mut writer = group.next_column().unwrap().unwrap();
            writer.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            writer.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
    out
}

/// A table as img2dataset writes it, of records `numbers`.
pub(crate) fn img2dataset(numbers: std::ops::Range<usize>, rows: usize) -> Vec<u8> {
    let captions: Vec<String> = numbers.clone().map(|n| format!("text {n}")).collect();
    let columns = [
        captions.iter().map(|text| Some(text.as_bytes())).collect(),
        numbers.clone().map(|_| Some(&b"success"[..])).collect(),
        numbers.clone().map(|_| Some(&b"\xff\xd8image"[..])).collect(),
    ];
    let schema =
        "message table { optional binary caption (UTF8); optional binary status (UTF8); optional binary jpg; }";
    parquet(schema, &columns, rows, parquet::basic::Compression::SNAPPY)
}

pub(crate) fn open(path: &Path) -> Result<Dataset, DataError> {
    open_with(SourceConfig::files([path.to_str().unwrap()]), &DatasetConfig::default())
}

pub(crate) fn open_with(source: SourceConfig, config: &DatasetConfig) -> Result<Dataset, DataError> {
    Dataset::open(&[source], config, &StorageOptions::default())
}

/// All that can be read, and all that is broken.
pub(crate) fn visit(dataset: &Dataset) -> (Vec<Arc<Record>>, Vec<DataError>) {
    let (mut records, mut errors) = (Vec::new(), Vec::new());
    let visited: Result<(), ()> = dataset.visit(|record| {
        match record {
            Ok(record) => records.push(record),
            Err(error) => errors.push(error),
        }
        Ok(())
    });
    visited.unwrap();
    (records, errors)
}

/// The records and the errors of a shard with this content.
pub(crate) fn read(name: &str, content: &[u8]) -> (Vec<Arc<Record>>, Vec<DataError>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    match open(&path) {
        Ok(dataset) => visit(&dataset),
        Err(error) => (Vec::new(), vec![error]),
    }
}

pub(crate) fn place(error: &DataError) -> Place {
    error.origin().unwrap().place
}

pub(crate) fn numbers(records: &[Arc<Record>]) -> Vec<usize> {
    records.iter().map(|record| number(record)).collect()
}
