//! Names of downloaded images, made from a row's number and its URL.

use std::fmt;
use std::str::FromStr;

use super::digest::{crc32, md5, sha1};
use crate::error::DataError;

/// A pattern such as `{row:09}.jpg` or `{md5}.jpg`.
///
/// | in braces | is |
/// |---|---|
/// | `row` | the row, counted from 0 without the header |
/// | `line` | the row, counted from 1 |
/// | `name` | what follows the last `/` of the URL, without `?` and what follows it |
/// | `md5`, `sha1` | digest of the URL in hexadecimal |
/// | `crc32` | CRC-32 of the URL, in decimal |
///
/// A number may be divided (`row/1000`) and padded with zeros (`row:05`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameTemplate {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Number { what: Number, divide: u64, width: usize },
    Name,
    Md5,
    Sha1,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Row,
    Line,
    Crc32,
}

impl NameTemplate {
    /// The name of the image of row `row` (from 0).
    #[must_use]
    pub fn name(&self, row: u64, url: &str) -> String {
        let mut name = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => name.push_str(text),
                Part::Name => {
                    let path = url.split(['?', '#']).next().unwrap_or_default();
                    name.push_str(path.rsplit('/').next().unwrap_or_default());
                }
                Part::Md5 => name.push_str(&md5(url.as_bytes())),
                Part::Sha1 => name.push_str(&sha1(url.as_bytes())),
                Part::Number { what, divide, width } => {
                    let number = match what {
                        Number::Row => row,
                        Number::Line => row + 1,
                        Number::Crc32 => u64::from(crc32(url.as_bytes())),
                    };
                    name.push_str(&format!("{:0width$}", number / divide));
                }
            }
        }
        name
    }
}

impl fmt::Display for NameTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for NameTemplate {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        let wrong = |found: &str| DataError::Config {
            field: "name template",
            expected: "text with {row}, {line}, {name}, {md5}, {sha1} or {crc32}, such as {row:09}.jpg".to_owned(),
            found: format!("{found:?} in {text:?}"),
        };
        let (mut parts, mut rest) = (Vec::new(), text);
        while let Some((before, after)) = rest.split_once('{') {
            let (inside, after) = after.split_once('}').ok_or_else(|| wrong(rest))?;
            parts.push(Part::Text(before.to_owned()));
            let (what, width) = inside.split_once(':').unwrap_or((inside, "0"));
            let width = width.parse().ok().filter(|&width| width <= 20).ok_or_else(|| wrong(inside))?;
            let (what, divide) = what.split_once('/').unwrap_or((what, "1"));
            let divide = divide.parse().ok().filter(|&divide| divide > 0).ok_or_else(|| wrong(inside))?;
            let number = |what| Part::Number { what, divide, width };
            parts.push(match what {
                "row" => number(Number::Row),
                "line" => number(Number::Line),
                "crc32" => number(Number::Crc32),
                "name" => Part::Name,
                "md5" => Part::Md5,
                "sha1" => Part::Sha1,
                _ => return Err(wrong(inside)),
            });
            rest = after;
        }
        if rest.contains('}') || parts.is_empty() {
            return Err(wrong(rest));
        }
        parts.push(Part::Text(rest.to_owned()));
        Ok(Self { text: text.to_owned(), parts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_of_rows_and_urls() {
        let url = "http://x.org/a/b%20c.png?w=7";
        let name = |template: &str| template.parse::<NameTemplate>().unwrap().name(1234, url);
        assert_eq!(name("{row:09}.jpg"), "000001234.jpg");
        assert_eq!(name("{row/1000:05}/{line}"), "00001/1235");
        assert_eq!(name("{name}"), "b%20c.png");
        assert_eq!(name("{md5}.jpg"), format!("{}.jpg", md5(url.as_bytes())));
        assert_eq!(name("{row}_{crc32}"), format!("1234_{}", crc32(url.as_bytes())));
        for wrong in ["", "x.jpg", "{rows}", "{row", "row}", "{row:x}", "{row/0}", "{row:99}"] {
            assert!(wrong.parse::<NameTemplate>().is_err(), "{wrong}");
        }
    }
}
