//! Files as memory.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::time::SystemTime;

use memmap2::Mmap;

/// The content of a file, mapped into memory: a part is read from the disk when it is first looked at, and several processes
/// share it. Where a file cannot be mapped (a pipe, some network file systems) it is read instead.
///
/// The file must not be written to while it is mapped; replacing it by renaming another, as this workspace writes files, is no
/// writing to it. If another program does write, what is read here may be of either content, and [`Self::is_unchanged`] says
/// afterwards that it happened; a part that is cut off while it is being read ends the process (`SIGBUS`), as it does in
/// every program that maps files.
#[derive(Debug)]
pub struct MappedFile {
    file: File,
    bytes: Bytes,
    stamp: (u64, Option<SystemTime>),
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Read(Vec<u8>),
}

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// If it cannot be opened or read.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let stamp = stamp(&file)?;
        // SAFETY: the mapping is private, and read as bytes, of which every value is valid. Rust's own rule that shared bytes do
        // not change is left to whoever else may write the file, as the documentation of this type says.
        let bytes = match unsafe { Mmap::map(&file) } {
            Ok(map) => Bytes::Mapped(map),
            Err(_) => {
                let mut bytes = Vec::new();
                io::Read::read_to_end(&mut file, &mut bytes)?;
                Bytes::Read(bytes)
            }
        };
        Ok(Self { file, bytes, stamp })
    }

    /// Whether the file has the length and the time of its last change that it was opened with.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn is_unchanged(&self) -> io::Result<bool> {
        Ok(stamp(&self.file)? == self.stamp)
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Read(bytes) => bytes,
        }
    }
}

fn stamp(file: &File) -> io::Result<(u64, Option<SystemTime>)> {
    let metadata = file.metadata()?;
    Ok((metadata.len(), metadata.modified().ok()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_its_bytes_and_changes_are_noticed() {
        let path = std::env::temp_dir().join(format!("xvlm-mapped-{}", std::process::id()));
        fs::write(&path, b"numbers").unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        assert_eq!(&*mapped, b"numbers");
        assert!(mapped.is_unchanged().unwrap());
        // A file that takes its place is another file.
        fs::remove_file(&path).unwrap();
        fs::write(&path, b"").unwrap();
        assert_eq!(&*mapped, b"numbers");
        assert!(mapped.is_unchanged().unwrap());
        let empty = MappedFile::open(&path).unwrap();
        assert!(empty.is_empty());
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"more").unwrap();
        assert!(!empty.is_unchanged().unwrap());
        fs::remove_file(&path).unwrap();
        assert!(MappedFile::open(&path).is_err());
        assert!(MappedFile::open(&std::env::temp_dir()).is_err());
    }
}
