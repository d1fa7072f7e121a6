//! From an entry of a list of files to the shards that it means.

use std::path::{Path, PathBuf};

use super::{Location, StorageOptions, failure};
use crate::error::DataError;
use crate::json::io_error;

/// Most names that one entry's braces may stand for.
const MOST_NAMES: usize = 1_000_000;

/// The shards that an entry of a list of files means, in their order:
///
/// - a file, or the URL of an object;
/// - a folder, or a URL that ends in `/` or names no object: all shards directly in it, by name, but for `_SUCCESS`, index
///   files, hidden files, and the statistics and tables that img2dataset puts beside its archives;
/// - a name with `*`, `?` or `[…]` in it: all that fit, by name;
/// - a name with `{00000..00331}` or `{a,b}` in it: each of them, whether it is there or not.
///
/// # Errors
///
/// [`DataError::Io`] or [`DataError::Shard`] when a folder or store cannot be listed, or nothing fits.
pub fn expand(entry: &str, options: &StorageOptions) -> Result<Vec<Location>, DataError> {
    if let Location::File(path) = Location::parse(entry)
        && path.exists()
    {
        return one(Location::File(path), options);
    }
    let mut shards = Vec::new();
    for name in braces(entry)? {
        shards.extend(one(Location::parse(&name), options)?);
    }
    Ok(shards)
}

fn one(location: Location, options: &StorageOptions) -> Result<Vec<Location>, DataError> {
    match location {
        Location::File(path) => local(path),
        Location::Url(url) => remote(url, options),
    }
}

fn local(path: PathBuf) -> Result<Vec<Location>, DataError> {
    if path.is_dir() {
        let io = |source| io_error(&path, source);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(io)? {
            let entry = entry.map_err(io)?;
            // Follows links, and takes a broken one for a shard that cannot be opened.
            if !entry.path().is_dir() {
                names.push(entry.path());
            }
        }
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let kept = shards_of_folder(names.iter().map(text).collect());
        names.retain(|name| kept.binary_search(&text(name)).is_ok());
        names.sort();
        return some(&path, names.into_iter().map(Location::File).collect());
    }
    let Some(pattern) = path.to_str().filter(|text| is_pattern(text) && !path.exists()) else {
        return Ok(vec![Location::File(path)]);
    };
    let found = glob::glob(pattern).map_err(|error| failure(&path, "a pattern", error.to_string()))?;
    let mut names = Vec::new();
    for name in found {
        names.push(name.map_err(|error| {
            let path = error.path().to_owned();
            io_error(&path, error.into())
        })?);
    }
    names.retain(|name| !name.is_dir() && !name.to_str().is_some_and(is_index));
    names.sort();
    some(&path, names.into_iter().map(Location::File).collect())
}

#[cfg(feature = "remote")]
fn remote(url: String, options: &StorageOptions) -> Result<Vec<Location>, DataError> {
    let (address, query) = url.split_once('?').map_or((url.as_str(), None), |(address, query)| (address, Some(query)));
    let last = address.rsplit('/').next().unwrap_or_default();
    // A server of files has no list, and a question mark begins a query there.
    let on_the_web = url.starts_with("http://") || url.starts_with("https://");
    let path = if on_the_web { address } else { url.as_str() };
    if is_pattern(path) {
        let start = path.split(['*', '?', '[']).next().unwrap_or_default();
        let folder = start.rfind('/').map_or(start, |end| &start[..=end]);
        let pattern =
            glob::Pattern::new(path).map_err(|error| failure(Path::new(path), "a pattern", error.to_string()))?;
        let matching = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
        let mut names = super::remote::list(folder, options, true)?;
        names.retain(|name| pattern.matches_with(name, matching) && !is_index(name));
        names.sort();
        return some(Path::new(path), names.into_iter().map(Location::Url).collect());
    }
    if on_the_web && (query.is_some() || !last.is_empty()) || last.contains('.') {
        return Ok(vec![Location::Url(url)]);
    }
    let folder = if last.is_empty() { url.clone() } else { format!("{url}/") };
    let names = shards_of_folder(super::remote::list(&folder, options, false)?);
    if names.is_empty() && !last.is_empty() {
        return Ok(vec![Location::Url(url)]);
    }
    some(Path::new(&url), names.into_iter().map(Location::Url).collect())
}

#[cfg(not(feature = "remote"))]
fn remote(url: String, _: &StorageOptions) -> Result<Vec<Location>, DataError> {
    Err(super::needs_feature(&url))
}

/// A URL without its query, which may hold a signature.
pub(crate) fn shown(url: &str) -> &str {
    if url.starts_with("http") { url.split('?').next().unwrap_or(url) } else { url }
}

fn some(path: &Path, shards: Vec<Location>) -> Result<Vec<Location>, DataError> {
    if shards.is_empty() { Err(failure(path, "at least one shard", "none".to_owned())) } else { Ok(shards) }
}

fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

fn is_index(name: &str) -> bool {
    name.ends_with(".idx")
}

/// Endings of what lies beside shards.
const NO_SHARDS: [&str; 7] = [".txt", ".md", ".yaml", ".yml", ".csv", ".tsv", ".log"];

/// Of the files of a folder those that are shards, sorted.
fn shards_of_folder(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    let last = |name: &str| name.rsplit(['/', std::path::MAIN_SEPARATOR]).next().unwrap_or_default().to_owned();
    let is_archive = |name: &str| [".tar", ".tar.gz", ".tar.zst"].iter().any(|end| name.ends_with(end));
    let archives: std::collections::HashSet<String> = names
        .iter()
        .filter(|name| is_archive(name))
        .filter_map(|name| name.split_once(".tar").map(|(stem, _)| stem.to_owned()))
        .collect();
    names.retain(|name| {
        let file = last(name);
        let of_archive = |end| name.strip_suffix(end).is_some_and(|stem| archives.contains(stem));
        !file.contains("_SUCCESS")
            && !file.starts_with('.')
            && !is_index(&file)
            && !NO_SHARDS.iter().any(|end| file.ends_with(end))
            && file != crate::convert::MANIFEST
            && !of_archive(".parquet")
            && !of_archive("_stats.json")
    });
    names
}

/// The names that a name with braces stands for.
fn braces(text: &str) -> Result<Vec<String>, DataError> {
    let mut names = vec![text.to_owned()];
    let mut done = Vec::new();
    // Each round opens the first braces of each name.
    while let Some(name) = names.pop() {
        match first_braces(&name) {
            None => done.push(name),
            Some((before, choices, after)) => {
                if choices.len().saturating_add(names.len()) > MOST_NAMES || done.len() > MOST_NAMES {
                    let expected = format!("braces that stand for at most {MOST_NAMES} names");
                    return Err(failure(Path::new(text), &expected, "more".to_owned()));
                }
                names.extend(choices.into_iter().rev().map(|choice| format!("{before}{choice}{after}")));
            }
        }
    }
    Ok(done)
}

/// The name up to its first braces that hold a choice, the choices, and the rest.
fn first_braces(name: &str) -> Option<(&str, Vec<String>, &str)> {
    for (start, _) in name.match_indices('{') {
        let end = start + matching(&name[start..])?;
        if let Some(choices) = choices(&name[start + 1..end]) {
            return Some((&name[..start], choices, &name[end + 1..]));
        }
    }
    None
}

/// Where the brace that closes the first one is.
fn matching(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (i, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(i);
        }
    }
    None
}

fn choices(inside: &str) -> Option<Vec<String>> {
    if let Some((first, last)) = inside.split_once("..") {
        let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
        let (from, to) = (number(first)?, number(last)?);
        let width = if first.starts_with('0') { first.len() } else { 0 };
        // One more than may be, so that too many are seen to be.
        let to = to.min(from.saturating_add(MOST_NAMES as u64));
        return Some((from..=to).map(|number| format!("{number:0width$}")).collect());
    }
    let mut parts = vec![String::new()];
    let mut depth = 0;
    for c in inside.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        match parts.last_mut() {
            Some(part) if depth > 0 || c != ',' => part.push(c),
            _ => parts.push(String::new()),
        }
    }
    (parts.len() > 1).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_stand_for_several_names() {
        for (text, expected) in [
            ("a.tar", vec!["a.tar"]),
            ("{008..011}.tar", vec!["008.tar", "009.tar", "010.tar", "011.tar"]),
            ("{8..10}", vec!["8", "9", "10"]),
            ("x{a,b}{1..2}", vec!["xa1", "xa2", "xb1", "xb2"]),
            ("{a,{b,c}d}", vec!["a", "bd", "cd"]),
            ("{a}/{..}/{5..x}/{", vec!["{a}/{..}/{5..x}/{"]),
            ("{2..1}", vec![]),
        ] {
            assert_eq!(braces(text).unwrap(), expected, "{text}");
        }
        assert!(braces("{0..99999999999}").is_err());
        assert!(braces("{0..9999}{0..9999}{0..9999}{0..9999}").is_err());
    }
}
