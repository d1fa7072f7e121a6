//! Files that are there wholly or not at all.

use std::fs::File;
use std::io;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::json::folder;

/// A new file beside `path`, that [`keep`] gives its name; dropped before, it is gone.
pub(crate) fn beside(path: &Path) -> io::Result<NamedTempFile> {
    let folder = folder(path);
    let mut builder = tempfile::Builder::new();
    builder.prefix(".writing-");
    // As an ordinary new file, which the umask restricts; temporary files are private otherwise.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(if folder.as_os_str().is_empty() { Path::new(".") } else { &folder })
}

/// Gives a finished file its name, once the disk has its content.
pub(crate) fn keep(file: NamedTempFile, path: &Path) -> io::Result<()> {
    file.as_file().sync_all()?;
    file.persist(path)?;
    let folder = folder(path);
    // Makes the name last too; only Unix has a way to ask for it.
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { &folder };
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}
