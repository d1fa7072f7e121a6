//! Writing what `torch.load` reads: a zip archive as of PyTorch 1.6.

use std::io::{self, BufWriter, Write};

use candle_core::Tensor;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::opcodes::*;
use crate::error::{NamedShape, WeightsError};
use crate::tensors::{StoredType, count, invalid, write_numbers};

/// The folder in the archive; PyTorch takes any.
const ROOT: &str = "archive";
/// Numbers start at a multiple of this many bytes, as PyTorch has them, to be mapped into memory.
const ALIGNMENT: u16 = 64;
/// The first size that does not fit the original zip format.
const ZIP64: u64 = u32::MAX as u64;

/// Writes `{'model': state dict}` as PyTorch 1.6 and later save it; `torch.load`, with `weights_only`, too, and the
/// original X-VLM read it.
///
/// `tensor` gives each tensor when it is its turn, once and in the order of `entries`, so that memory need hold one at
/// a time.
///
/// # Errors
/// If writing fails, a name comes twice, or a tensor has another shape than was said or cannot be brought to the CPU.
/// An error of `tensor` is the source of the error returned; [`write_file_atomically`] gives it back as it was.
///
/// [`write_file_atomically`]: crate::write_file_atomically
pub fn write_pytorch(
    out: &mut dyn Write,
    entries: &[NamedShape],
    stored: StoredType,
    mut tensor: impl FnMut(&str) -> Result<Tensor, WeightsError>,
) -> io::Result<()> {
    let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(invalid(format!("tensor {}: expected each name once, found it again", twice[0])));
    }
    let mut zip = ZipWriter::new_stream(Muted { out, failed: false });
    let pickle = pickle(entries, stored)?;
    add(&mut zip, "data.pkl", pickle.len() as u64, |out| out.write_all(&pickle))?;
    add(&mut zip, "byteorder", 6, |out| out.write_all(b"little"))?;
    for (key, entry) in entries.iter().enumerate() {
        let len = count(entry)?.saturating_mul(stored.size());
        add(&mut zip, &format!("data/{key}"), len, |out| {
            write_numbers(out, entry, &tensor(&entry.name).map_err(io::Error::other)?, stored)
        })?;
    }
    add(&mut zip, "version", 2, |out| out.write_all(b"3\n"))?;
    zip.finish()?;
    Ok(())
}

/// An entry of `len` bytes.
fn add<W: Write>(
    zip: &mut ZipWriter<zip::write::StreamWriter<W>>,
    name: &str,
    len: u64,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .with_alignment(ALIGNMENT)
        .large_file(len >= ZIP64);
    zip.start_file(format!("{ROOT}/{name}"), options)?;
    // Numbers come one by one, and the archive takes a checksum of what it gets.
    let mut out = BufWriter::with_capacity(1 << 16, zip);
    write(&mut out)?;
    out.flush()
}

/// `{'model': OrderedDict((name, _rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())), …)}`
fn pickle(entries: &[NamedShape], stored: StoredType) -> io::Result<Vec<u8>> {
    let class = match stored {
        StoredType::F32 => "FloatStorage",
        StoredType::F16 => "HalfStorage",
        StoredType::Bf16 => "BFloat16Storage",
    };
    let mut out = vec![PROTO, 2, EMPTY_DICT];
    text(&mut out, "model")?;
    empty_dict(&mut out);
    out.push(MARK);
    for (key, entry) in entries.iter().enumerate() {
        text(&mut out, &entry.name)?;
        global(&mut out, "torch._utils", "_rebuild_tensor_v2");
        out.push(MARK);

        out.push(MARK);
        text(&mut out, "storage")?;
        global(&mut out, "torch", class);
        text(&mut out, &key.to_string())?;
        text(&mut out, "cpu")?;
        integer(&mut out, count(entry)?);
        out.extend([TUPLE, BINPERSID]);

        integer(&mut out, 0);
        integers(&mut out, entry.shape.iter().map(|len| *len as u64));
        integers(&mut out, strides(&entry.shape).into_iter());
        out.push(NEWFALSE);
        empty_dict(&mut out);
        out.extend([TUPLE, REDUCE]);
    }
    out.extend([SETITEMS, SETITEM, STOP]);
    Ok(out)
}

/// How many numbers lie from one index to the next in each dimension.
fn strides(shape: &[usize]) -> Vec<u64> {
    let mut strides = vec![1u64; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis].max(1) as u64);
    }
    strides
}

fn text(out: &mut Vec<u8>, text: &str) -> io::Result<()> {
    let len = u32::try_from(text.len()).map_err(io::Error::other)?;
    out.push(BINUNICODE);
    out.extend(len.to_le_bytes());
    out.extend(text.as_bytes());
    Ok(())
}

fn global(out: &mut Vec<u8>, module: &str, name: &str) {
    out.push(GLOBAL);
    out.extend(format!("{module}\n{name}\n").as_bytes());
}

fn empty_dict(out: &mut Vec<u8>) {
    global(out, "collections", "OrderedDict");
    out.extend([EMPTY_TUPLE, REDUCE]);
}

fn integers(out: &mut Vec<u8>, values: impl Iterator<Item = u64>) {
    out.push(MARK);
    values.for_each(|value| integer(out, value));
    out.push(TUPLE);
}

/// A number below 2^63, as sizes are.
fn integer(out: &mut Vec<u8>, value: u64) {
    if let Ok(value) = i32::try_from(value) {
        out.push(BININT);
        out.extend(value.to_le_bytes());
    } else {
        out.extend([LONG1, 8]);
        out.extend(value.to_le_bytes());
    }
}

/// Writes until the first error, and after it nothing: an archive that is given up is completed all the same when it
/// is dropped, and complains on the standard error output if it cannot be.
struct Muted<'a> {
    out: &'a mut dyn Write,
    failed: bool,
}

impl Muted<'_> {
    fn unless_failed<T>(&mut self, or: T, act: impl FnOnce(&mut dyn Write) -> io::Result<T>) -> io::Result<T> {
        if self.failed {
            return Ok(or);
        }
        act(self.out).inspect_err(|error| self.failed = error.kind() != io::ErrorKind::Interrupted)
    }
}

impl Write for Muted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.unless_failed(bytes.len(), |out| out.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.unless_failed((), |out| out.flush())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::Part;
    use crate::checkpoint::pickle::{Pickle, Value};

    #[test]
    fn large_sizes_are_written_as_they_are() {
        for shape in [vec![5, 1 << 31], vec![3, 0, 7], vec![1 << 62], vec![]] {
            let entry = NamedShape { name: "w".into(), shape: shape.clone() };
            let bytes = pickle(&[entry], StoredType::F32).unwrap();
            let read = Pickle::read(&bytes[..], &Part::new(Path::new("file"), "pickle")).unwrap();
            let Some(Value::Tensor(index)) = read.get(read.get(read.root, "model").unwrap(), "w") else { panic!() };
            assert_eq!(read.storages[0].len, shape.iter().product::<usize>());
            assert_eq!(read.layout(read.view(index)).unwrap().1, shape);
        }
        let entry = NamedShape { name: "w".into(), shape: vec![1 << 32, 1 << 32] };
        let error = pickle(&[entry], StoredType::F32).unwrap_err().to_string();
        assert_eq!(error, "tensor w: expected a shape whose size is a number, found [4294967296, 4294967296]");
    }
}
