//! From what a document says of a picture to the picture's bytes.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use percent_encoding::percent_decode_str;

/// Where a picture is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    /// In a file.
    File(PathBuf),
    /// In the document itself.
    Inline(Vec<u8>),
    /// On another machine.
    Remote,
    /// Nowhere: why.
    Nowhere(String),
}

/// Padding may be left out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Where a reference leads: relative to `folder`, or to `base` if the document has one, which is itself relative to `folder`;
/// what begins with `/` is relative to `root`.
pub(super) fn resolve(reference: &str, base: Option<&str>, folder: &Path, root: Option<&Path>) -> Source {
    // As a browser reads an address: without line ends and tabs, without space around it.
    let reference: String = reference.trim().chars().filter(|c| !matches!(c, '\t' | '\n' | '\r')).collect();
    if let Some(found) = absolute(&reference) {
        return found;
    }
    let reference = path_of(&reference);
    if reference.is_empty() {
        return Source::Nowhere("expected the address of a picture, found none".to_owned());
    }
    let joined = match base.map(str::trim).filter(|base| !base.is_empty()) {
        Some(base) => match absolute(base) {
            Some(Source::File(base)) => {
                return Source::File(Path::new(folder_of(&base.to_string_lossy())).join(decoded(reference)));
            }
            Some(Source::Remote) => return Source::Remote,
            Some(_) => return Source::Nowhere(format!("expected a base that is a folder, found {base}")),
            None if reference.starts_with('/') => reference.to_owned(),
            None => format!("{}{reference}", folder_of(path_of(base))),
        },
        None => reference.to_owned(),
    };
    match (joined.strip_prefix('/'), root) {
        (None, _) => Source::File(folder.join(decoded(&joined))),
        (Some(path), Some(root)) => Source::File(root.join(decoded(path.trim_start_matches('/')))),
        (Some(_), None) => Source::Nowhere(format!("expected to know the folder that {joined} begins in, found none")),
    }
}

/// What an address that begins with a scheme or a host means; none if it is relative.
fn absolute(reference: &str) -> Option<Source> {
    if reference.starts_with("//") {
        return Some(Source::Remote);
    }
    let (scheme, rest) = reference.split_once(':')?;
    let mut letters = scheme.bytes();
    // One letter is a drive.
    let is_scheme = scheme.len() > 1
        && letters.next().is_some_and(|c| c.is_ascii_alphabetic())
        && letters.all(|c| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'-' | b'.'));
    if !is_scheme {
        return None;
    }
    Some(match scheme.to_ascii_lowercase().as_str() {
        "http" | "https" | "ftp" => Source::Remote,
        "data" => inline(rest),
        "file" => {
            let path = path_of(rest);
            let path = path.strip_prefix("//localhost").or(path.strip_prefix("//")).unwrap_or(path);
            Source::File(decoded(path))
        }
        other => Source::Nowhere(format!("expected the address of a file, found one of the scheme {other}")),
    })
}

/// The content of a `data:` address: `[type][;base64],content`.
fn inline(rest: &str) -> Source {
    let Some((kind, content)) = rest.split_once(',') else {
        return Source::Nowhere("data address: expected a comma before the content, found none".to_owned());
    };
    let content: Vec<u8> = percent_decode_str(content).collect();
    if !kind.trim_end().to_ascii_lowercase().ends_with(";base64") {
        return Source::Inline(content);
    }
    let content: Vec<u8> = content.into_iter().filter(|byte| !byte.is_ascii_whitespace()).collect();
    match BASE64.decode(content) {
        Ok(content) => Source::Inline(content),
        Err(error) => Source::Nowhere(format!("data address: expected base64, found: {error}")),
    }
}

/// An address up to its last slash.
fn folder_of(path: &str) -> &str {
    &path[..path.rfind('/').map_or(0, |slash| slash + 1)]
}

/// An address without query and fragment.
fn path_of(reference: &str) -> &str {
    let end = reference.find(['?', '#']).unwrap_or(reference.len());
    &reference[..end]
}

fn decoded(path: &str) -> PathBuf {
    PathBuf::from(percent_decode_str(path).decode_utf8_lossy().into_owned())
}

/// The first address of a `srcset`.
pub(super) fn first_of_set(set: &str) -> Option<&str> {
    let start = set.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == ',');
    let end = start.find(|c: char| c.is_ascii_whitespace()).unwrap_or(start.len());
    Some(start[..end].trim_end_matches(',')).filter(|address| !address.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> Source {
        Source::File(path.into())
    }

    #[test]
    fn addresses_lead_where_a_browser_would_go() {
        let at = |reference: &str| resolve(reference, None, Path::new("site/blog"), Some(Path::new("site")));
        assert_eq!(at("a.png"), file("site/blog/a.png"));
        assert_eq!(at(" ../img/a%20b.png?v=3#top "), file("site/blog/../img/a b.png"));
        assert_eq!(at("/img/a.png"), file("site/img/a.png"));
        assert_eq!(at("100%.png"), file("site/blog/100%.png"));
        assert_eq!(at("f%C3%BCr.png"), file("site/blog/für.png"));
        assert_eq!(at("a\n.png"), file("site/blog/a.png"));
        assert_eq!(at("file:///tmp/a.png"), file("/tmp/a.png"));
        assert_eq!(at("c:a.png"), file("site/blog/c:a.png"));
        for remote in ["http://a/b.png", "HTTPS://a/b.png", "//a/b.png"] {
            assert_eq!(at(remote), Source::Remote);
        }
        for (nowhere, expected) in [
            ("", "found none"),
            ("#a", "found none"),
            ("cid:4", "scheme cid"),
            ("data:image/png", "comma"),
            ("data:image/png;base64,§", "base64"),
        ] {
            let Source::Nowhere(problem) = at(nowhere) else { panic!("{nowhere}") };
            assert!(problem.contains(expected), "{nowhere}: {problem}");
        }
        let problem = resolve("/a.png", None, Path::new("x"), None);
        assert!(matches!(problem, Source::Nowhere(problem) if problem.contains("/a.png")));
    }

    #[test]
    fn a_base_comes_between() {
        let at = |reference: &str, base: &str| {
            resolve(reference, Some(base), Path::new("site/blog"), Some(Path::new("site")))
        };
        assert_eq!(at("a.png", "../img/"), file("site/blog/../img/a.png"));
        assert_eq!(at("a.png", "../img/page.html?x"), file("site/blog/../img/a.png"));
        assert_eq!(at("a.png", "/img/"), file("site/img/a.png"));
        assert_eq!(at("/a.png", "img/"), file("site/a.png"));
        assert_eq!(at("a.png", ""), file("site/blog/a.png"));
        assert_eq!(at("a.png", "file:///srv/site/"), file("/srv/site/a.png"));
        assert_eq!(at("a.png", "https://example.org/"), Source::Remote);
        assert!(matches!(at("a.png", "data:,x"), Source::Nowhere(_)));
        assert_eq!(at("data:,x", "https://example.org/"), Source::Inline(b"x".to_vec()));
    }

    #[test]
    fn a_document_can_hold_its_pictures() {
        let at = |reference: &str| resolve(reference, None, Path::new(""), None);
        for reference in
            ["data:image/png;base64,aGk=", "data:;base64,a Gk", "data:image/gif;BASE64,aGk%3D", "data:,h%69"]
        {
            assert_eq!(at(reference), Source::Inline(b"hi".to_vec()), "{reference}");
        }
    }

    #[test]
    fn a_set_has_a_first() {
        assert_eq!(first_of_set(" a.png 1x, b.png 2x"), Some("a.png"));
        assert_eq!(first_of_set("a.png, b.png 2x"), Some("a.png"));
        assert_eq!(first_of_set("data:image/png;base64,aGk= 1x"), Some("data:image/png;base64,aGk="));
        assert_eq!(first_of_set(" , "), None);
    }
}
