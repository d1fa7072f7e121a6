//! Paths that a record names stay inside a root: a data set of others must not make a run read just any file.

use std::path::{Component, Path, PathBuf};

/// The file that `text` names below `root`; `None` if it is outside. Decided by the names alone, so a link that stands
/// inside the root may lead anywhere.
pub(crate) fn inside(root: &Path, text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    if path.has_root() || path.is_absolute() {
        let path = without_dots(path)?;
        let root = if root.as_os_str().is_empty() { Path::new(".") } else { root };
        return path.starts_with(without_dots(&std::path::absolute(root).ok()?)?).then_some(path);
    }
    Some(root.join(without_dots(path)?))
}

/// [`inside`], of what may be a file: not the root itself, or a path that ends in dots.
pub(crate) fn file_inside(root: &Path, text: &str) -> Option<PathBuf> {
    Path::new(text).file_name().and_then(|_| inside(root, text))
}

/// The path with `.` and `..` resolved; `None` if `..` leaves where it starts.
fn without_dots(path: &Path) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                if !matches!(clean.components().next_back(), Some(Component::Normal(_))) {
                    return None;
                }
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    Some(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_their_root() {
        let inside = |text| inside(Path::new("/data/set"), text);
        for (text, expected) in [
            ("a.jpg", "/data/set/a.jpg"),
            ("./b/../a.jpg", "/data/set/a.jpg"),
            ("/data/set/c/a.jpg", "/data/set/c/a.jpg"),
            ("/data/other/../set/a.jpg", "/data/set/a.jpg"),
        ] {
            assert_eq!(inside(text), Some(PathBuf::from(expected)), "{text}");
        }
        for text in ["../a.jpg", "b/../../a.jpg", "/etc/passwd", "/data/settled/a.jpg", "/data/set/../x", "/../x"] {
            assert_eq!(inside(text), None, "{text}");
        }
        assert_eq!(super::inside(Path::new("/"), "/etc/passwd"), Some(PathBuf::from("/etc/passwd")));
        let here = std::path::absolute(".").unwrap();
        assert_eq!(super::inside(Path::new(""), here.join("a.jpg").to_str().unwrap()), Some(here.join("a.jpg")));
        assert_eq!(super::inside(Path::new(""), "/etc/passwd"), None);
        assert_eq!(file_inside(Path::new("set"), "b/./a.jpg"), Some(PathBuf::from("set/b/a.jpg")));
        for text in ["", ".", "..", "b/..", "../a.jpg"] {
            assert_eq!(file_inside(Path::new("set"), text), None, "{text}");
        }
    }
}
