//! What leaves the program: results on stdout, messages on stderr, files.

use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use xvlm::data::DataError;
use xvlm::train::TrainError;
use xvlm::weights::WeightsError;

/// What ends a command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// What the library says.
    #[error(transparent)]
    Library(#[from] xvlm::Error),
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// A file holds something else than it should.
    #[error("{}: expected {expected}, found {found}", path.display())]
    File { path: PathBuf, expected: &'static str, found: String },
    /// An option has a value that cannot be used.
    #[error("{option}: expected {expected}, found {found}")]
    Option { option: &'static str, expected: &'static str, found: String },
    /// An option has a value that is none of those there are.
    #[error("{option}: expected one of {known}, found {found}")]
    Choice { option: &'static str, known: String, found: String },
    /// Some of what was asked for could not be had; the result has named it.
    #[error("{what}: {count} broken or missing")]
    Broken { what: &'static str, count: usize },
    /// It was asked to stop.
    #[error("stopped before the end; what was written by then stays")]
    Stopped,
    /// The result could not be written as JSON.
    #[error("result: {0}")]
    Json(#[from] serde_json::Error),
    /// The system does not tell of signals.
    #[cfg(unix)]
    #[error("signals: {0}")]
    Signals(io::Error),
    /// stdout does not take the result.
    #[error("stdout: {0}")]
    Stdout(io::Error),
}

impl From<DataError> for CliError {
    fn from(error: DataError) -> Self {
        Self::Library(error.into())
    }
}

impl From<TrainError> for CliError {
    fn from(error: TrainError) -> Self {
        Self::Library(error.into())
    }
}

impl From<WeightsError> for CliError {
    fn from(error: WeightsError) -> Self {
        Self::Library(error.into())
    }
}

impl From<xvlm::ConfigProblem> for CliError {
    fn from(error: xvlm::ConfigProblem) -> Self {
        Self::Library(error.into())
    }
}

impl CliError {
    /// For `map_err`: names the file of an input or output error.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}

/// Prints a result: as JSON, or as the text that `text` makes of it.
pub(crate) fn print<T: Serialize>(json: bool, result: &T, text: impl FnOnce(&T) -> String) -> Result<(), CliError> {
    let text = if json { serde_json::to_string_pretty(result)? } else { text(result) };
    print_text(&text)
}

/// Prints text and an end of line.
pub(crate) fn print_text(text: &str) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{}", text.trim_end()).and_then(|()| stdout.flush());
    match written {
        // The reader has seen enough, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(CliError::Stdout),
    }
}

/// A line on stderr. If that is closed, nobody wants to know.
pub(crate) fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes a file: wholly, or not at all.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<(), CliError> {
    Ok(xvlm::weights::write_file_atomically(path, |out| out.write_all(content))?)
}

/// Text as HTML or SVG, without the characters that XML cannot hold.
pub(crate) fn escape(text: &str) -> String {
    let is_held = |c: &char| matches!(c, '\t' | '\n') || !(c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'));
    let text: String = text.chars().filter(is_held).collect();
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Rows of a table: a name and a value, or a heading.
pub(crate) type Rows = Vec<(String, Option<String>)>;

/// Two columns: names to the left, values to the right, and headings where there are no values.
pub(crate) fn table(rows: &[(String, Option<String>)]) -> String {
    let widest = |cell: fn(&(String, Option<String>)) -> usize| rows.iter().map(cell).max().unwrap_or(0);
    let name = widest(|(name, _)| name.chars().count());
    let value = widest(|(_, value)| value.as_ref().map_or(0, |value| value.chars().count()));
    let line = |(label, cell): &(String, Option<String>)| match cell {
        Some(cell) => format!("  {label:name$}  {cell:>value$}\n"),
        None => format!("{label}\n"),
    };
    rows.iter().map(line).collect()
}
