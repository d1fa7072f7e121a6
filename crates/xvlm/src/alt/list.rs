//! Lists of pictures with their descriptions.

use std::fmt;
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;

use super::{Outcome, phrase};

/// What an address in Markdown may have as it is.
const ADDRESS: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_').remove(b'~');

/// A picture and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// Its file.
    pub picture: PathBuf,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl Outcome {
    /// Its name, as in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Described(_) => "described",
            Self::Unsure(_) => "unsure",
            Self::Wordless => "wordless",
            Self::Remote => "remote",
            Self::Unsupported { .. } => "unsupported",
            Self::Broken { .. } => "broken",
            Self::Unplaced => "unplaced",
        }
    }

    fn confidence(&self) -> Option<f32> {
        match self {
            Self::Described(described) | Self::Unsure(described) => Some(described.confidence),
            _ => None,
        }
    }

    fn problem(&self) -> Option<&str> {
        match self {
            Self::Unsupported { problem } | Self::Broken { problem } => Some(problem),
            _ => None,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Described(described) => f.write_str(&described.text),
            Self::Unsure(described) => {
                write!(f, "not written: {:.0} % sure of {:?}", 100.0 * described.confidence, described.text)
            }
            Self::Wordless => f.write_str("not written: the model wrote no word"),
            Self::Remote => f.write_str("not looked at: it is on another machine"),
            Self::Unsupported { problem } => write!(f, "not looked at: {problem}"),
            Self::Broken { problem } => write!(f, "broken: {problem}"),
            Self::Unplaced => f.write_str("not written: where its description ends is not known"),
        }
    }
}

/// The list as comma-separated values with a heading (RFC 4180): picture, description, confidence, outcome, problem.
pub fn csv_list(entries: &[Entry]) -> String {
    let quoted = |text: &str| match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    };
    let row = |Entry { picture, outcome }: &Entry| {
        let confidence = outcome.confidence().map(|confidence| format!("{confidence:.3}")).unwrap_or_default();
        let (text, problem) = (outcome.text().unwrap_or_default(), outcome.problem().unwrap_or_default());
        let cells = [&*picture.to_string_lossy(), text, &confidence, outcome.name(), problem].map(quoted);
        format!("{}\r\n", cells.join(","))
    };
    let heading = "picture,description,confidence,outcome,problem\r\n".to_owned();
    heading + &entries.iter().map(row).collect::<String>()
}

/// The list as a table in Markdown: each picture, with its description as its alternative text, and the description to read.
pub fn markdown_list(entries: &[Entry]) -> String {
    let row = |Entry { picture, outcome }: &Entry| {
        let said = phrase::markdown(&outcome.to_string());
        let alt = outcome.text().map(phrase::markdown).unwrap_or_default();
        format!("| ![{alt}]({}) | {said} |\n", address(picture))
    };
    "| Picture | Description |\n|---|---|\n".to_owned() + &entries.iter().map(row).collect::<String>()
}

fn address(path: &Path) -> String {
    utf8_percent_encode(&path.to_string_lossy(), ADDRESS).to_string()
}

#[cfg(test)]
mod tests {
    use super::super::Described;
    use super::*;

    #[test]
    fn lists_can_be_read() {
        let described = |text: &str| Described { text: text.to_owned(), confidence: 0.25 };
        let entries = [
            Entry { picture: "a b.png".into(), outcome: Outcome::Described(described("A \"red\" circle, a [star].")) },
            Entry { picture: "c.png".into(), outcome: Outcome::Broken { problem: "c.png: no\npicture".to_owned() } },
            Entry { picture: "d.png".into(), outcome: Outcome::Unsure(described("x")) },
        ];
        assert_eq!(
            csv_list(&entries),
            "picture,description,confidence,outcome,problem\r\n\
             a b.png,\"A \"\"red\"\" circle, a [star].\",0.250,described,\r\n\
             c.png,,,broken,\"c.png: no\npicture\"\r\n\
             d.png,,0.250,unsure,\r\n"
        );
        assert_eq!(
            markdown_list(&entries),
            "| Picture | Description |\n|---|---|\n\
             | ![A \"red\" circle, a \\[star\\].](a%20b.png) | A \"red\" circle, a \\[star\\]. |\n\
             | ![](c.png) | broken: c.png: no picture |\n\
             | ![](d.png) | not written: 25 % sure of \"x\" |\n"
        );
    }
}
