//! Files as memory.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;

/// The content of a file, mapped into memory: a part is read from the disk when it is first looked at, and several processes
/// share it. Where a file cannot be mapped (a pipe, some network file systems) it is read instead.
///
/// The file must not be written to while it is mapped, which may be as long as a model that reads it lives; replacing it by renaming another, as this workspace writes files, is no
/// writing to it. If another program does write, what is read here may be of either content, and [`Self::is_unchanged`] says
/// afterwards that it happened, as far as length and time tell; a part that is cut off while it is being read ends the process (`SIGBUS`), as it does in
/// every program that maps files.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    bytes: Bytes,
    stamp: (u64, Option<SystemTime>),
}

enum Bytes {
    Mapped(Mmap),
    Read(Vec<u8>),
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Mapped(map) => write!(f, "Mapped({} bytes)", map.len()),
            Self::Read(bytes) => write!(f, "Read({} bytes)", bytes.len()),
        }
    }
}

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// If it cannot be opened or read.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let stamp = stamp(&file)?;
        // SAFETY: the mapping is never written through, and read as bytes, of which every value is valid. It is shared with
        // the file: that its bytes do not change, as Rust demands, is the caller's promise, which the documentation of this type
        // asks for.
        let bytes = match unsafe { Mmap::map(&file) } {
            Ok(map) => Bytes::Mapped(map),
            Err(_) => {
                let mut bytes = Vec::new();
                io::Read::read_to_end(&mut file, &mut bytes)?;
                Bytes::Read(bytes)
            }
        };
        Ok(Self { path: path.to_owned(), file, bytes, stamp })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is mapped; it was read into memory otherwise.
    pub fn is_mapped(&self) -> bool {
        matches!(self.bytes, Bytes::Mapped(_))
    }

    /// Whether the file has the length and the time of its last change that it was opened with. What was read instead of
    /// mapped does not change.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn is_unchanged(&self) -> io::Result<bool> {
        match self.bytes {
            Bytes::Mapped(_) => Ok(stamp(&self.file)? == self.stamp),
            Bytes::Read(_) => Ok(true),
        }
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
        assert!(mapped.is_mapped() && mapped.is_unchanged().unwrap());
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

    #[cfg(unix)]
    #[test]
    fn a_pipe_is_read_and_does_not_change_afterwards() {
        let path = std::env::temp_dir().join(format!("xvlm-pipe-{}", std::process::id()));
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a string that ends with a zero.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let writer = std::thread::spawn({
            let path = path.clone();
            move || fs::write(path, b"numbers").unwrap()
        });
        let read = MappedFile::open(&path).unwrap();
        writer.join().unwrap();
        assert_eq!(&*read, b"numbers");
        assert!(!read.is_mapped());
        let pipe = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        pipe.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert!(read.is_unchanged().unwrap());
        fs::remove_file(&path).unwrap();
    }
}
