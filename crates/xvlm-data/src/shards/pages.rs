//! The headers of a Parquet column's pages, looked at before the pages are read: a reader takes as much memory as a header
//! says its page has when it is unpacked.
//!
//! The headers are structs of Thrift's compact protocol (parquet-format, `parquet.thrift`, `PageHeader`).

use std::fs::File;

use crate::storage::read_at;

/// Unpacked bytes that any page may have, and how many more for each byte in the file. Deflate does not reach more than 1032.
const FREE: u64 = 1 << 20;
const RATIO: u64 = 1032;
/// Bytes that are read at first for a header, and its most. It has statistics, which may be a few values.
const FIRST: u64 = 1 << 10;
const MOST: u64 = 1 << 20;

/// Checks the pages of a column that takes `length` bytes from `start`.
///
/// # Errors
///
/// What is wrong with a header.
pub(super) fn check(file: &File, start: u64, length: u64) -> Result<(), String> {
    let (mut at, end) = (start, start.saturating_add(length));
    if end > file.metadata().map_err(|error| error.to_string())?.len() {
        return Err("a column that is larger than the file".to_owned());
    }
    while at < end {
        let read = |most: u64| {
            let mut bytes = vec![0; most.min(end - at) as usize];
            read_at(file, &mut bytes, at).map(|()| Header::parse(&bytes)).map_err(|error| error.to_string())
        };
        let header = match read(FIRST)? {
            Some(header) => header,
            None => read(MOST)?.ok_or("the header of a page that is none")?,
        };
        let (unpacked, packed) = (header.unpacked, header.packed);
        if unpacked > FREE + RATIO * packed {
            return Err(format!("a page of {packed} bytes that says it is {unpacked} when unpacked"));
        }
        at = at.saturating_add(header.length + packed);
    }
    Ok(())
}

/// What is needed of a page's header.
#[derive(Debug, PartialEq)]
struct Header {
    length: u64,
    unpacked: u64,
    packed: u64,
}

impl Header {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut thrift = Thrift { rest: bytes };
        let (mut unpacked, mut packed, mut field) = (None, None, 0);
        while let Some(kind) = thrift.field(&mut field)? {
            match (field, kind) {
                (2, 5) => unpacked = Some(thrift.size()?),
                (3, 5) => packed = Some(thrift.size()?),
                (_, kind) => thrift.skip(kind, 0)?,
            }
        }
        let length = (bytes.len() - thrift.rest.len()) as u64;
        Some(Self { length, unpacked: unpacked?, packed: packed? })
    }
}

/// A value of the compact protocol.
struct Thrift<'a> {
    rest: &'a [u8],
}

impl Thrift<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*byte)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    /// A number that is not negative, in zigzag encoding.
    fn size(&mut self) -> Option<u64> {
        let number = self.varint()?;
        number.is_multiple_of(2).then_some(number / 2)
    }

    /// The type of the next field of a struct; no type at its end.
    fn field(&mut self, field: &mut u64) -> Option<Option<u8>> {
        let head = self.byte()?;
        if head == 0 {
            return Some(None);
        }
        *field = match head >> 4 {
            0 => self.size()?,
            step => *field + u64::from(step),
        };
        Some(Some(head & 0xf))
    }

    fn skip(&mut self, kind: u8, depth: u8) -> Option<()> {
        const DEEPEST: u8 = 8;
        if depth > DEEPEST {
            return None;
        }
        match kind {
            // Booleans are in the type.
            1 | 2 => {}
            3 => drop(self.byte()?),
            4..=6 => drop(self.varint()?),
            7 => self.rest = self.rest.get(8..)?,
            8 => {
                let length = usize::try_from(self.varint()?).ok()?;
                self.rest = self.rest.get(length..)?;
            }
            9 | 10 => {
                let head = self.byte()?;
                let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
                for _ in 0..count {
                    // Booleans of a list are a byte each.
                    self.skip(if matches!(head & 0xf, 1 | 2) { 3 } else { head & 0xf }, depth + 1)?;
                }
            }
            12 => {
                let mut field = 0;
                while let Some(kind) = self.field(&mut field)? {
                    self.skip(kind, depth + 1)?;
                }
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Type 0, sizes, a struct of a number and a list, and a string under a number of its own.
    const HEADER: [u8; 21] = [
        0x15, 0x00, 0x15, 0xd0, 0x0f, 0x15, 0x06, 0x2c, 0x15, 0x02, 0x19, 0x25, 0x02, 0x04, 0x00, 0x08, 0x28, 0x02,
        b'h', b'i', 0x00,
    ];

    #[test]
    fn sizes_of_pages_are_found_and_bounded() {
        assert_eq!(Header::parse(&HEADER), Some(Header { length: 21, unpacked: 1000, packed: 3 }));
        assert!((0..HEADER.len()).all(|end| Header::parse(&HEADER[..end]).is_none()));

        let page = |unpacked: &[u8]| [&HEADER[..3], unpacked, &HEADER[5..], b"abc"].concat();
        let check = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            super::check(&file, 0, bytes.len() as u64)
        };
        let good = page(&[0xd0, 0x0f]);
        assert_eq!(check(&[&good[..], &good].concat()), Ok(()));
        // Two gigabytes, of three bytes.
        let bad = page(&[0xfe, 0xff, 0xff, 0xff, 0x0f]);
        let error = check(&[&good[..], &bad].concat()).unwrap_err();
        assert_eq!(error, "a page of 3 bytes that says it is 2147483647 when unpacked");
        assert!(check(&good[..10]).is_err());
    }
}
