//! Files that are there wholly or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::WeightsError;

/// Writes a file so that `path` holds its old content or the new one, whatever happens in between.
///
/// The content goes to a temporary file of the same folder, which is flushed to the disk and renamed.
///
/// # Errors
/// [`WeightsError::Io`] if `write` or a file operation fails; the file at `path` is then as it was.
pub fn write_file_atomically(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), WeightsError> {
    let folder = folder_of(path);
    let replace = || {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".writing-");
        // As an ordinary new file, which the umask restricts; temporary files are private otherwise.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(&folder)?;
        write_through(file.as_file(), write)?;
        file.persist(path)?;
        sync_folder(&folder)
    };
    replace().map_err(WeightsError::io(path))
}

/// Writes to a file, and returns when the disk has it.
pub(crate) fn write_through(file: &File, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    write(&mut out)?;
    out.flush()?;
    file.sync_all()
}

/// Makes renames in a folder last; only Unix has a way to ask for it.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// The folder that a path stands in.
pub(crate) fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}
