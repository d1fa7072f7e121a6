//! Checkpoints, written byte by byte.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs;
use std::path::PathBuf;

use flate2::Crc;
use tempfile::TempDir;

/// Instructions of a pickle that leave one value on the stack.
pub(crate) type Code = Vec<u8>;

/// A pickle of protocol 2.
pub(crate) fn pickle(code: &[u8]) -> Vec<u8> {
    [b"\x80\x02", code, b"."].concat()
}

pub(crate) fn none() -> Code {
    b"N".to_vec()
}

pub(crate) fn boolean(value: bool) -> Code {
    vec![if value { 0x88 } else { 0x89 }]
}

pub(crate) fn int(value: i64) -> Code {
    [&[0x8a, 8][..], &value.to_le_bytes()].concat()
}

pub(crate) fn float(value: f64) -> Code {
    [b"G", &value.to_be_bytes()[..]].concat()
}

pub(crate) fn text(text: &str) -> Code {
    let len = u32::try_from(text.len()).unwrap();
    [b"X", &len.to_le_bytes()[..], text.as_bytes()].concat()
}

pub(crate) fn tuple(items: &[Code]) -> Code {
    [b"(", &items.concat()[..], b"t"].concat()
}

pub(crate) fn list(items: &[Code]) -> Code {
    [b"](", &items.concat()[..], b"e"].concat()
}

pub(crate) fn ints(values: &[i64]) -> Code {
    tuple(&values.iter().copied().map(int).collect::<Vec<_>>())
}

/// A value with entries.
fn filled(value: &[u8], entries: &[(&str, Code)]) -> Code {
    let entries: Vec<Code> = entries.iter().map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [value, b"(", &entries.concat()[..], b"u"].concat()
}

pub(crate) fn dict(entries: &[(&str, Code)]) -> Code {
    filled(b"}", entries)
}

pub(crate) fn global(name: &str) -> Code {
    let (module, name) = name.rsplit_once('.').unwrap();
    format!("c{module}\n{name}\n").into_bytes()
}

pub(crate) fn call(function: &str, arguments: &[Code]) -> Code {
    [global(function), tuple(arguments), b"R".to_vec()].concat()
}

/// An object of a class that nobody knows, with its state.
pub(crate) fn object(class: &str, state: Code) -> Code {
    [global(class), b")\x81".to_vec(), state, b"b".to_vec()].concat()
}

/// As a module's state dict is: with the attribute `_metadata`.
pub(crate) fn ordered(entries: &[(&str, Code)]) -> Code {
    let metadata = dict(&[("_metadata", dict(&[("", dict(&[("version", int(1))]))]))]);
    [filled(&call("collections.OrderedDict", &[]), entries), metadata, b"b".to_vec()].concat()
}

pub(crate) fn storage(class: &str, key: &str, len: i64) -> Code {
    [tuple(&[text("storage"), global(class), text(key), text("cuda:0"), int(len)]), b"Q".to_vec()].concat()
}

pub(crate) fn view(storage: Code, offset: i64, shape: &[i64], strides: &[i64]) -> Code {
    let hooks = call("collections.OrderedDict", &[]);
    let arguments = [storage, int(offset), ints(shape), ints(strides), boolean(false), hooks];
    call("torch._utils._rebuild_tensor_v2", &arguments)
}

/// A vector of f32 that is all of its storage.
pub(crate) fn vector(key: &str, len: i64) -> Code {
    view(storage("torch.FloatStorage", key, len), 0, &[len], &[1])
}

pub(crate) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// An entry of a zip archive, and what its headers say of it.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) method: u16,
    pub(crate) flags: u16,
    pub(crate) len: u32,
    pub(crate) crc: u32,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) fn stored(name: &str, bytes: &[u8]) -> Entry {
    let mut crc = Crc::new();
    crc.update(bytes);
    let len = u32::try_from(bytes.len()).unwrap();
    Entry { name: name.into(), method: 0, flags: 0, len, crc: crc.sum(), bytes: bytes.to_vec() }
}

pub(crate) fn deflated(name: &str, bytes: &[u8]) -> Entry {
    use std::io::Read;
    let mut deflated = Vec::new();
    flate2::read::DeflateEncoder::new(bytes, flate2::Compression::best()).read_to_end(&mut deflated).unwrap();
    Entry { method: 8, bytes: deflated, ..stored(name, bytes) }
}

pub(crate) fn zip(entries: &[Entry]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for entry in entries {
        let start = u32::try_from(file.len()).unwrap();
        let name_len = u16::try_from(entry.name.len()).unwrap();
        let mut fields = Vec::new();
        for field in [20, entry.flags, entry.method, 0, 0x21] {
            fields.extend(u16::to_le_bytes(field));
        }
        for field in [entry.crc, u32::try_from(entry.bytes.len()).unwrap(), entry.len] {
            fields.extend(field.to_le_bytes());
        }
        fields.extend(name_len.to_le_bytes());
        fields.extend([0; 2]);
        file.extend([b"PK\x03\x04", &fields[..], entry.name.as_bytes(), &entry.bytes].concat());
        let rest = [&[0; 10][..], &start.to_le_bytes()].concat();
        directory.extend([b"PK\x01\x02\x14\x00", &fields[..], &rest, entry.name.as_bytes()].concat());
    }
    let count = u16::try_from(entries.len()).unwrap().to_le_bytes();
    let lens = [directory.len(), file.len()].map(|len| u32::try_from(len).unwrap().to_le_bytes());
    let end = [b"PK\x05\x06\0\0\0\0", &count[..], &count, &lens[0], &lens[1], b"\0\0"].concat();
    [file, directory, end].concat()
}

/// The entries of a checkpoint of PyTorch since 1.6.
pub(crate) fn entries(code: &[u8], storages: &[(&str, Vec<u8>)]) -> Vec<Entry> {
    let mut entries = vec![stored("net/data.pkl", &pickle(code)), stored("net/byteorder", b"little")];
    entries.extend(storages.iter().map(|(key, bytes)| stored(&format!("net/data/{key}"), bytes)));
    entries.push(stored("net/version", b"3\n"));
    entries
}

pub(crate) fn archive(code: &[u8], storages: &[(&str, Vec<u8>)]) -> Vec<u8> {
    zip(&entries(code, storages))
}

pub(crate) const MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";

/// A checkpoint of PyTorch before 1.6; storages are key, length in numbers, and bytes.
pub(crate) fn legacy(code: &[u8], storages: &[(&str, i64, Vec<u8>)]) -> Vec<u8> {
    let system = dict(&[("protocol_version", int(1001)), ("little_endian", boolean(true))]);
    let keys = list(&storages.iter().map(|(key, ..)| text(key)).collect::<Vec<_>>());
    let pickles = [int(1001), system, code.to_vec(), keys].map(|code| pickle(&code)).concat();
    let numbers: Vec<u8> =
        storages.iter().flat_map(|(_, len, bytes)| [&len.to_le_bytes()[..], bytes].concat()).collect();
    [MAGIC, &pickles, &numbers].concat()
}

pub(crate) fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A file in a folder of its own, which lives as long as what is returned.
pub(crate) fn file(bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, bytes).unwrap();
    (folder, path)
}
