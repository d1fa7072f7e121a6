//! Parquet tables of images and texts, as img2dataset and the Hugging Face hub write them, made into an archive.
//!
//! | column | holds |
//! |---|---|
//! | `jpg`, `png`, `webp`, `image`, `binary` | the content of an image file, or a struct of `bytes` and `path` |
//! | `image_rpath`, `image_path` | path of an image file |
//! | `caption`, `text`, `TEXT` | a string or a list of strings |
//! | `elems`, `questions` | JSON, as in a line |
//! | `status` | rows whose status is not `success` are left out |

use std::any::Any;
use std::fs::File;
use std::io::BufWriter;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::writer::{RecordWriter, WriteError};
use super::{Form, Found, Index, Shard, ShardLimits, pages};
use crate::error::{DataError, Place};
use crate::records::{ImageSource, Reading, Record, RecordKeys, parse_object};
use crate::storage::{failure, spool};

const IMAGES: [&str; 5] = ["jpg", "png", "webp", "image", "binary"];
const PATHS: [&str; 2] = ["image_rpath", "image_path"];
const CAPTIONS: [&str; 3] = ["caption", "text", "TEXT"];
const OBJECTS: [&str; 2] = ["elems", "questions"];
const STATUS: &str = "status";

/// Writes a table's rows as an archive whose keys are the numbers of the rows. What is no record is told to `found`.
///
/// # Errors
///
/// [`DataError::Shard`] when it is no table with an image and a text, or larger than `limits` allow; [`DataError::Io`].
pub(super) fn to_archive(
    file: File,
    archive: &File,
    shard: &Shard,
    limits: &ShardLimits,
    found: &mut Found<'_>,
) -> Result<Index, DataError> {
    const TABLE: &str = "a Parquet table";
    let wrong = |found: String| failure(&shard.name, TABLE, found);
    let pages = file.try_clone().map_err(|source| crate::json::io_error(&shard.name, source))?;
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(wrong)?;
    let columns = Columns::of(reader.metadata().file_metadata().schema(), &shard.reading.keys);
    let columns = columns.map_err(|(expected, found)| failure(&shard.name, expected, found))?;
    let mut table = Table {
        shard,
        reading: Reading { keys: RecordKeys::default(), root: shard.reading.root.clone() },
        limits,
        out: RecordWriter::new(BufWriter::with_capacity(1 << 18, archive), Form::Tar, Default::default()),
    };
    let mut first = 0;
    for group in 0..reader.num_row_groups() {
        let rows = usize::try_from(reader.metadata().row_group(group).num_rows()).unwrap_or(0);
        let mut row = first;
        let result = guarded(|| {
            let group = reader.get_row_group(group)?;
            for column in group.metadata().columns().iter().filter(|column| columns.have(column)) {
                let (start, length) = column.byte_range();
                pages::check(&pages, start, length).map_err(ParquetError::General)?;
            }
            table.group(&*group, &columns, &mut row, found)
        });
        match result {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error),
            Err(message) => {
                // The rest of the group is lost; the next one stands for itself.
                let end = first.saturating_add(rows);
                let error = || DataError::Shard {
                    path: shard.name.to_path_buf(),
                    place: Place::Row(row),
                    expected: "a row that can be decoded".to_owned(),
                    found: format!("{message} (which costs the rows before {end})"),
                };
                found(&mut table.out.index, error());
                let others = end.saturating_sub(row).saturating_sub(1);
                table.out.index.broken.add(others as u64, error(), None);
            }
        }
        first = first.saturating_add(rows);
    }
    let (_, index) = table.out.finish().map_err(|source| spool::failed(limits.spool_dir.as_deref(), source))?;
    Ok(index)
}

/// Runs the decoder; what it does not expect of a damaged file must not end the program.
fn guarded<T>(work: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| {
            let text = error.to_string();
            if text.contains("zstd") || text.contains("ZSTD") {
                format!("{text} (cargo build --features zstd reads tables compressed by Zstandard)")
            } else {
                text
            }
        }),
        Err(panic) => {
            let panic: &(dyn Any + Send) = &*panic;
            let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
            Err(text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "damage".to_owned()))
        }
    }
}

/// Which columns hold what.
struct Columns {
    /// Those that are read.
    projection: Type,
    caption: Option<String>,
    image: Option<String>,
    path: Option<String>,
}

impl Columns {
    fn of(schema: &Type, keys: &RecordKeys) -> Result<Self, (&'static str, String)> {
        let fields = schema.get_fields();
        let names: Vec<&str> = fields.iter().map(|field| field.name()).collect();
        let first = |known: &[&str]| known.iter().find(|name| names.contains(name)).map(|name| (*name).to_owned());
        let chosen = |key: &Option<String>, known: &[&str]| match key {
            Some(key) => first(&[key]),
            None => first(known),
        };
        let caption = chosen(&keys.caption_key, &CAPTIONS);
        let (image, path) = match (&keys.image_key, keys.is_image_rpath) {
            (Some(key), Some(true)) => (None, first(&[key])),
            (key, _) => (chosen(key, &IMAGES), if key.is_none() { first(&PATHS) } else { None }),
        };
        if image.is_none() && path.is_none() {
            return Err(("a table with a column of images (jpg, image, image_path, …)", names.join(", ")));
        }
        let wanted = |name: &str| {
            let known = [&caption, &image, &path].iter().any(|column| column.as_deref() == Some(name));
            known || OBJECTS.contains(&name) || name == STATUS
        };
        let fields = fields.iter().filter(|field| wanted(field.name())).map(Arc::clone).collect();
        let projection = Type::group_type_builder(schema.name()).with_fields(fields).build();
        let projection = projection.map_err(|error| ("a Parquet schema", error.to_string()))?;
        Ok(Self { projection, caption, image, path })
    }
}

impl Columns {
    /// Whether a column is read.
    fn have(&self, column: &ColumnChunkMetaData) -> bool {
        let name = column.column_path().parts().first();
        self.projection.get_fields().iter().any(|field| name.is_some_and(|name| field.name() == name))
    }
}

struct Table<'a> {
    shard: &'a Shard,
    reading: Reading,
    limits: &'a ShardLimits,
    out: RecordWriter<BufWriter<&'a File>>,
}

impl Table<'_> {
    /// Writes the rows of a group; `row` is the number of the next.
    fn group(
        &mut self,
        group: &dyn RowGroupReader,
        columns: &Columns,
        row: &mut usize,
        found: &mut Found<'_>,
    ) -> Result<Result<(), DataError>, ParquetError> {
        // The reader holds as many values of each column, which may be images.
        const ROWS_AT_ONCE: usize = 16;
        for values in RowIter::from_row_group(Some(columns.projection.clone()), group)?.with_batch_size(ROWS_AT_ONCE) {
            let values = values?;
            match self.record(values, columns, *row) {
                Ok(Some(record)) => {
                    if let Err(error) = self.out.write(&format!("{row:09}"), &record) {
                        return Ok(Err(match error {
                            // Of its own making, when there are more records than a shard can have.
                            WriteError::Io(source) if source.kind() != std::io::ErrorKind::Other => {
                                spool::failed(self.limits.spool_dir.as_deref(), source)
                            }
                            error => error.at(&self.shard.name),
                        }));
                    }
                    if self.out.offset > self.limits.max_spool_bytes {
                        return Ok(Err(self.shard.too_large(self.limits)));
                    }
                }
                Ok(None) => {}
                Err(error) => found(&mut self.out.index, error),
            }
            *row += 1;
        }
        Ok(Ok(()))
    }

    /// The record of a row; `None` if its image could not be downloaded when the table was made.
    fn record(&self, row: Row, columns: &Columns, number: usize) -> Result<Option<Record>, DataError> {
        let place = Place::Row(number);
        let wrong = |field: &str, expected: &str, found: String| DataError::Field {
            path: self.shard.name.as_ref().into(),
            place: place.clone(),
            field: field.to_owned(),
            expected: expected.to_owned(),
            found,
        };
        let (mut object, mut image) = (Map::new(), None);
        for (name, field) in row.into_columns() {
            let is = |column: &Option<String>| column.as_deref() == Some(name.as_str());
            if name == STATUS {
                if text(&field).is_some_and(|status| status != "success") {
                    return Ok(None);
                }
            } else if is(&columns.caption) {
                object.insert("caption".to_owned(), texts(&field));
            } else if is(&columns.image) {
                match self.image(field) {
                    Ok(Some(Ok(bytes))) => image = Some(bytes),
                    Ok(Some(Err(path))) => {
                        object.insert("image_rpath".to_owned(), path.into());
                    }
                    Ok(None) => {}
                    Err(found) => return Err(wrong(&name, "the content of an image file", found)),
                }
            } else if is(&columns.path) {
                object.entry("image_rpath").or_insert_with(|| texts(&field));
            } else if !matches!(field, Field::Null) {
                let text = text(&field)
                    .ok_or_else(|| wrong(&name, "JSON in a string", crate::error::excerpt(&field.to_string())))?;
                let value: Value = serde_json::from_str(&text)
                    .map_err(|error| wrong(&name, "JSON", format!("{:?}: {error}", crate::error::excerpt(&text))))?;
                object.insert(name, value);
            }
        }
        if image.is_none() && !object.contains_key("image_rpath") {
            return Err(wrong("image", "the content or the path of an image file", "null".to_owned()));
        }
        let object = Value::Object(object);
        let record = parse_object(&object, &self.shard.name, place.clone(), &self.reading, image, None)?;
        Ok(Some(record))
    }

    /// The image in a column: its bytes, or else its path.
    fn image(&self, field: Field) -> Result<Option<Result<ImageSource, String>>, String> {
        match field {
            Field::Null => Ok(None),
            Field::Bytes(bytes) if bytes.len() as u64 > u64::from(self.limits.max_record_bytes) => {
                Err(format!("{} bytes", bytes.len()))
            }
            Field::Bytes(bytes) => Ok(Some(Ok(ImageSource::Bytes(bytes.data().into())))),
            Field::Str(path) => Ok(Some(Err(path))),
            Field::Group(row) => {
                let mut path = None;
                for (name, field) in row.into_columns() {
                    match self.image(field)? {
                        Some(Ok(bytes)) if name == "bytes" => return Ok(Some(Ok(bytes))),
                        Some(Err(text)) if name == "path" => path = Some(text),
                        _ => {}
                    }
                }
                Ok(path.map(Err))
            }
            other => Err(crate::error::excerpt(&other.to_string())),
        }
    }
}

/// A string, whether the table says that it is one or not.
fn text(field: &Field) -> Option<String> {
    match field {
        Field::Str(text) => Some(text.clone()),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok().map(str::to_owned),
        _ => None,
    }
}

/// A string or a list of them, as JSON; what is neither fails where it is looked at.
fn texts(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::ListInternal(list) => list.elements().iter().map(texts).collect(),
        other => text(other).map_or_else(|| Value::Bool(false), Value::String),
    }
}
