//! Files of embeddings: Parquet and safetensors.
//!
//! Parquet has a row for each embedding: `id`, `image`, `kind`, `x`, `y`, `width`, `height`, `text`, `embedding` (a list of
//! floats). Safetensors has a tensor `embeddings [N, E]` and, under the key `rows` of its metadata, a JSON list with an object
//! for each row of it.

use std::any::Any;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use half::f16;
use parquet::column::reader::get_typed_column_reader;
use parquet::data_type::{ByteArray, ByteArrayType, DataType, FixedLenByteArray, FixedLenByteArrayType, FloatType};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use xvlm_data::{DataError, Place};

use crate::error::TaskError;

/// How embeddings are filed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Apache Parquet, a row for each embedding.
    #[default]
    Parquet,
    /// A tensor, and what its rows are in the metadata.
    Safetensors,
}

impl Format {
    /// What names of files end in.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::Safetensors => "safetensors",
        }
    }
}

/// How numbers are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Numbers {
    /// 4 bytes, exact.
    #[default]
    F32,
    /// 2 bytes, 11 significant bits.
    F16,
}

/// What an embedding is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A whole picture.
    Image,
    /// A box in a picture.
    Region,
    /// A text.
    Text,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Image, Self::Region, Self::Text];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Region => "region",
            Self::Text => "text",
        }
    }
}

/// What a row of embeddings is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The picture's identifier.
    pub id: String,
    /// Its file, or where it was found.
    pub image: String,
    /// What the embedding is of.
    pub kind: Kind,
    /// The box `(x, y, w, h)` in pixels, of a region or of a text that tells one.
    #[serde(rename = "box", default, skip_serializing_if = "Option::is_none")]
    pub bounds: Option<[f32; 4]>,
    /// The text; of a region what it is called, where the data say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// Rows of embeddings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// What each is of.
    pub rows: Vec<Row>,
    /// All of them, one after the other.
    pub embeddings: Vec<f32>,
}

impl Rows {
    /// Numbers of each embedding.
    fn width(&self) -> usize {
        self.embeddings.len() / self.rows.len().max(1)
    }

    pub(super) fn push(&mut self, row: Row, embedding: &[f32]) {
        self.rows.push(row);
        self.embeddings.extend_from_slice(embedding);
    }
}

/// Writes a file: wholly, or not at all.
pub(super) fn write(path: &Path, rows: &Rows, format: Format, numbers: Numbers) -> Result<(), TaskError> {
    let bytes = match format {
        Format::Parquet => to_parquet(rows, numbers).map_err(|error| error.to_string()),
        Format::Safetensors => to_safetensors(rows, numbers),
    };
    let bytes = bytes.map_err(|found| damaged(path, "rows that can be written", found))?;
    Ok(xvlm_weights::write_file_atomically(path, |out| out.write_all(&bytes))?)
}

/// Reads a file.
pub(super) fn read(path: &Path, format: Format) -> Result<Rows, TaskError> {
    let rows = match format {
        Format::Parquet => {
            let file = File::open(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
            guarded(|| from_parquet(file))
        }
        Format::Safetensors => {
            let bytes = std::fs::read(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
            from_safetensors(&bytes)
        }
    };
    rows.map_err(|found| damaged(path, "a file of embeddings", found))
}

fn damaged(path: &Path, expected: &str, found: String) -> TaskError {
    let (path, place) = (path.to_owned(), Place::Whole);
    DataError::Shard { path, place, expected: expected.to_owned(), found }.into()
}

/// Runs the decoder; what it does not expect of a damaged file must not end the program.
fn guarded<T>(work: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let panic: &(dyn Any + Send) = &*panic;
            Err(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "damage".to_owned()))
        }
    }
}

fn schema(numbers: Numbers) -> String {
    let element = match numbers {
        Numbers::F32 => "required float element",
        Numbers::F16 => "required fixed_len_byte_array(2) element (FLOAT16)",
    };
    format!(
        "message embeddings {{
            required binary id (STRING);
            required binary image (STRING);
            required binary kind (STRING);
            optional float x;
            optional float y;
            optional float width;
            optional float height;
            optional binary text (STRING);
            required group embedding (LIST) {{ repeated group list {{ {element}; }} }}
        }}"
    )
}

type Group<'a, 'b> = &'a mut SerializedRowGroupWriter<'b, Vec<u8>>;

/// Writes the next column; `present` says which rows have a value, if not all.
fn column<T: DataType>(
    group: Group,
    values: &[T::T],
    definitions: Option<&[i16]>,
    repetitions: Option<&[i16]>,
) -> Result<(), ParquetError> {
    let none = || ParquetError::General("expected another column".to_owned());
    let mut column = group.next_column()?.ok_or_else(none)?;
    column.typed::<T>().write_batch(values, definitions, repetitions)?;
    column.close()
}

fn to_parquet(rows: &Rows, numbers: Numbers) -> Result<Vec<u8>, ParquetError> {
    let schema = Arc::new(parse_message_type(&schema(numbers))?);
    // Of embeddings no two are alike: a dictionary of them would only cost time.
    let properties = WriterProperties::builder()
        .set_compression(parquet::basic::Compression::SNAPPY)
        .set_column_dictionary_enabled("embedding.list.element".into(), false)
        .build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    let texts = |of: &dyn Fn(&Row) -> Option<&str>| -> (Vec<ByteArray>, Vec<i16>) {
        let is_there = rows.rows.iter().map(|row| i16::from(of(row).is_some()));
        (rows.rows.iter().filter_map(of).map(ByteArray::from).collect(), is_there.collect())
    };
    column::<ByteArrayType>(&mut group, &texts(&|row| Some(&row.id)).0, None, None)?;
    column::<ByteArrayType>(&mut group, &texts(&|row| Some(&row.image)).0, None, None)?;
    column::<ByteArrayType>(&mut group, &texts(&|row| Some(row.kind.name())).0, None, None)?;
    let boxed: Vec<i16> = rows.rows.iter().map(|row| i16::from(row.bounds.is_some())).collect();
    for edge in 0..4 {
        let edges: Vec<f32> = rows.rows.iter().filter_map(|row| Some(row.bounds?[edge])).collect();
        column::<FloatType>(&mut group, &edges, Some(&boxed), None)?;
    }
    let (values, there) = texts(&|row| row.text.as_deref());
    column::<ByteArrayType>(&mut group, &values, Some(&there), None)?;
    let width = rows.width();
    let definitions = vec![1; rows.embeddings.len()];
    let repetitions: Vec<i16> = (0..rows.embeddings.len()).map(|i| i16::from(i % width != 0)).collect();
    match numbers {
        Numbers::F32 => {
            column::<FloatType>(&mut group, &rows.embeddings, Some(&definitions), Some(&repetitions))?;
        }
        Numbers::F16 => {
            let half = |&x: &f32| FixedLenByteArray::from(f16::from_f32(x).to_le_bytes().to_vec());
            let values: Vec<FixedLenByteArray> = rows.embeddings.iter().map(half).collect();
            column::<FixedLenByteArrayType>(&mut group, &values, Some(&definitions), Some(&repetitions))?;
        }
    }
    group.close()?;
    writer.into_inner()
}

/// The values of a column, and which rows have one.
fn values<T: DataType>(group: &dyn RowGroupReader, column: usize) -> Result<(Vec<T::T>, Vec<i16>), ParquetError> {
    let physical = group.metadata().column(column).column_type();
    if physical != T::get_physical_type() {
        let expected = T::get_physical_type();
        return Err(ParquetError::General(format!("column {column}: expected {expected}, found {physical}")));
    }
    let mut reader = get_typed_column_reader::<T>(group.get_column_reader(column)?);
    let rows = usize::try_from(group.metadata().num_rows()).unwrap_or(0);
    let (mut values, mut definitions, mut repetitions) = (Vec::new(), Vec::new(), Vec::new());
    let mut done = 0;
    while done < rows {
        let (read, ..) =
            reader.read_records(rows - done, Some(&mut definitions), Some(&mut repetitions), &mut values)?;
        if read == 0 {
            break;
        }
        done += read;
    }
    Ok((values, definitions))
}

fn from_parquet(file: File) -> Result<Rows, ParquetError> {
    const COLUMNS: [&str; 9] = ["id", "image", "kind", "x", "y", "width", "height", "text", "embedding.list.element"];
    let wrong = |message: String| ParquetError::General(message);
    let reader = SerializedFileReader::new(file)?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).collect();
    if names != COLUMNS {
        return Err(wrong(format!("expected columns {}, found {}", COLUMNS.join(", "), names.join(", "))));
    }
    let mut all = Rows::default();
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group)?;
        let texts = |column| -> Result<Vec<String>, ParquetError> {
            let (values, _) = values::<ByteArrayType>(&*group, column)?;
            values.iter().map(|value| Ok(value.as_utf8()?.to_owned())).collect()
        };
        let (ids, images, kinds) = (texts(0)?, texts(1)?, texts(2)?);
        let mut edges = Vec::with_capacity(4);
        for column in 3..7 {
            let (values, there) = values::<FloatType>(&*group, column)?;
            edges.push((values.into_iter(), there));
        }
        let (texts, there) = (texts(7)?, values::<ByteArrayType>(&*group, 7)?.1);
        let mut texts = texts.into_iter();
        let embeddings = match group.metadata().column(8).column_type() {
            parquet::basic::Type::FLOAT => values::<FloatType>(&*group, 8)?.0,
            _ => {
                let halves = values::<FixedLenByteArrayType>(&*group, 8)?.0;
                let half = |value: &FixedLenByteArray| match *value.data() {
                    [low, high] => Ok(f16::from_le_bytes([low, high]).to_f32()),
                    _ => Err(wrong(format!("embedding: expected 2 bytes a number, found {}", value.len()))),
                };
                halves.iter().map(half).collect::<Result<_, _>>()?
            }
        };
        for (row, ((id, image), kind)) in ids.into_iter().zip(images).zip(kinds).enumerate() {
            let kind = Kind::ALL.into_iter().find(|known| known.name() == kind);
            let kind = kind.ok_or_else(|| wrong("kind: expected image, region or text".to_owned()))?;
            let mut edge = |at: usize| match edges[at].1.get(row) {
                Some(1) => edges[at].0.next(),
                _ => None,
            };
            let bounds = [edge(0), edge(1), edge(2), edge(3)];
            let bounds = match bounds {
                [Some(x), Some(y), Some(w), Some(h)] => Some([x, y, w, h]),
                _ => None,
            };
            let text = if there.get(row) == Some(&1) { texts.next() } else { None };
            all.rows.push(Row { id, image, kind, bounds, text });
        }
        all.embeddings.extend(embeddings);
    }
    match all.rows.len() {
        0 => Ok(all),
        rows if all.embeddings.len().is_multiple_of(rows) => Ok(all),
        rows => {
            Err(wrong(format!("expected embeddings of one length, found {} numbers of {rows}", all.embeddings.len())))
        }
    }
}

fn to_safetensors(rows: &Rows, numbers: Numbers) -> Result<Vec<u8>, String> {
    let (dtype, bytes): (Dtype, Vec<u8>) = match numbers {
        Numbers::F32 => (Dtype::F32, rows.embeddings.iter().flat_map(|x| x.to_le_bytes()).collect()),
        Numbers::F16 => (Dtype::F16, rows.embeddings.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()),
    };
    let shape = vec![rows.rows.len(), rows.width()];
    let view = TensorView::new(dtype, shape, &bytes).map_err(|error| error.to_string())?;
    let rows = serde_json::to_string(&rows.rows).map_err(|error| error.to_string())?;
    let metadata = [("format".to_owned(), "pt".to_owned()), ("rows".to_owned(), rows)];
    safetensors::serialize([("embeddings", view)], Some(metadata.into())).map_err(|error| error.to_string())
}

fn from_safetensors(bytes: &[u8]) -> Result<Rows, String> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let rows = header.metadata().as_ref().and_then(|metadata| metadata.get("rows"));
    let rows = rows.ok_or("no `rows` in the metadata")?;
    let rows: Vec<Row> = serde_json::from_str(rows).map_err(|error| format!("rows: {error}"))?;
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let view = file.tensor("embeddings").map_err(|error| error.to_string())?;
    let embeddings: Vec<f32> = match view.dtype() {
        Dtype::F32 => view.data().as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect(),
        Dtype::F16 => view.data().as_chunks::<2>().0.iter().map(|x| f16::from_le_bytes(*x).to_f32()).collect(),
        other => return Err(format!("embeddings of type {other}")),
    };
    match view.shape() {
        [n, _] if *n == rows.len() => Ok(Rows { rows, embeddings }),
        shape => Err(format!("embeddings of shape {shape:?} for {} rows", rows.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Rows {
        let row = |kind, bounds, text: Option<&str>| Row {
            id: "7".to_owned(),
            image: "a/ü.jpg".to_owned(),
            kind,
            bounds,
            text: text.map(str::to_owned),
        };
        Rows {
            rows: vec![
                row(Kind::Image, None, None),
                row(Kind::Region, Some([1.0, 2.0, 3.5, 4.0]), Some("a dog")),
                row(Kind::Region, Some([0.0, 0.0, 1.0, 1.0]), None),
                row(Kind::Text, None, Some("a dog, running")),
            ],
            embeddings: (0..12).map(|i| i as f32 / 4.0 - 1.0).collect(),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        for format in [Format::Parquet, Format::Safetensors] {
            for numbers in [Numbers::F32, Numbers::F16] {
                let path = dir.path().join("part");
                write(&path, &rows(), format, numbers).unwrap();
                // Quarters are exact in either.
                assert_eq!(read(&path, format).unwrap(), rows(), "{format:?} {numbers:?}");
            }
        }
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for format in [Format::Parquet, Format::Safetensors] {
            let path = dir.path().join("part");
            write(&path, &rows(), format, Numbers::F32).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            let error = read(&path, format).unwrap_err().to_string();
            assert!(error.contains("part") && error.contains("a file of embeddings"), "{error}");
            std::fs::write(&path, "something else").unwrap();
            assert!(read(&path, format).is_err());
        }
    }
}
