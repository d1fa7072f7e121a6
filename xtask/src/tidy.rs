//! `cargo xtask tidy`: what a reviewer would otherwise have to look for.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Done, root};

/// Which crates of the workspace each may depend on (`docs/architecture.md`).
const ARROWS: [(&str, &[&str]); 10] = [
    ("xvlm-kernels", &[]),
    ("xvlm-encoders", &["xvlm-kernels"]),
    ("xvlm-losses", &["xvlm-kernels"]),
    ("xvlm-metrics", &[]),
    ("xvlm-data", &[]),
    ("xvlm-weights", &[]),
    ("xvlm-train", &["xvlm-kernels"]),
    (
        "xvlm-tasks",
        &["xvlm-kernels", "xvlm-encoders", "xvlm-losses", "xvlm-metrics", "xvlm-data", "xvlm-weights", "xvlm-train"],
    ),
    (
        "xvlm",
        &[
            "xvlm-kernels",
            "xvlm-encoders",
            "xvlm-losses",
            "xvlm-metrics",
            "xvlm-data",
            "xvlm-weights",
            "xvlm-train",
            "xvlm-tasks",
        ],
    ),
    ("xvlm-cli", &["xvlm"]),
];

/// A longer source file wants to be two.
const LONGEST: usize = 600;

pub(crate) fn run() -> Done {
    let mut complaints = arrows()?;
    for file in sources(&root().join("crates"))?.into_iter().chain(sources(&root().join("xtask"))?) {
        complaints.extend(complaints_about(&file, &fs::read_to_string(&file)?));
    }
    if complaints.is_empty() {
        return Ok(());
    }
    Err(format!("untidy:\n  {}", complaints.join("\n  ")).into())
}

fn arrows() -> Result<Vec<String>, std::io::Error> {
    let mut complaints = Vec::new();
    for (name, allowed) in ARROWS {
        let manifest = root().join("crates").join(name).join("Cargo.toml");
        let text = fs::read_to_string(&manifest)?;
        let wrong = dependencies(&text).filter(|dependency| !allowed.contains(dependency));
        complaints.extend(wrong.map(|found| format!("{name} must not depend on {found}")));
    }
    Ok(complaints)
}

/// The crates of this workspace that a manifest depends on, those of tests left out.
fn dependencies(manifest: &str) -> impl Iterator<Item = &str> {
    let sections = manifest.split("\n[").filter(|section| section.starts_with("dependencies]"));
    let names =
        sections.flat_map(|section| section.lines().skip(1)).filter_map(|line| line.split(['.', ' ', '=']).next());
    names.filter(|name| *name == "xvlm" || name.starts_with("xvlm-"))
}

fn sources(folder: &Path) -> Result<Vec<PathBuf>, std::io::Error> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(sources(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn complaints_about(file: &Path, text: &str) -> Vec<String> {
    let name = file.strip_prefix(root()).unwrap_or(file).display();
    let mut complaints = Vec::new();
    let lines = text.lines().count();
    let is_test = file.components().any(|part| part.as_os_str() == "tests");
    if lines > LONGEST && !is_test {
        complaints.push(format!("{name}: expected at most {LONGEST} lines, found {lines}"));
    }
    for (i, line) in text.lines().enumerate() {
        if line.chars().count() > 120 {
            complaints.push(format!("{name}:{}: expected at most 120 characters", i + 1));
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_of_a_manifest() {
        let manifest = "[package]\nname = \"xvlm-x\"\n\n[dependencies]\nxvlm-kernels.workspace = true\nserde = \"1\"\n\
                        xvlm-data = { path = \"..\" }\n\n[dev-dependencies]\nxvlm-tasks.workspace = true\n";
        assert_eq!(dependencies(manifest).collect::<Vec<_>>(), ["xvlm-kernels", "xvlm-data"]);
    }

    #[test]
    fn long_files_and_lines_are_named() {
        let complaints = complaints_about(&root().join("crates/a.rs"), &"x\n".repeat(LONGEST + 1));
        assert_eq!(complaints, [format!("crates/a.rs: expected at most {LONGEST} lines, found {}", LONGEST + 1)]);
        assert!(complaints_about(&root().join("a/tests/b.rs"), &"x\n".repeat(LONGEST + 1)).is_empty());
        assert_eq!(
            complaints_about(&root().join("b.rs"), &"y".repeat(121)),
            ["b.rs:1: expected at most 120 characters"]
        );
    }

    #[test]
    fn the_workspace_is_tidy() {
        run().unwrap();
    }
}
