//! `cargo xtask tidy`: what would otherwise have to be looked for.

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
    ("xvlm-weights", &["xvlm-kernels"]),
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
    for folder in ["crates", "xtask", "benches"] {
        for file in sources(&root().join(folder))? {
            complaints.extend(complaint_about(&file, &fs::read_to_string(&file)?));
        }
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

fn complaint_about(file: &Path, text: &str) -> Option<String> {
    let lines = text.lines().count();
    let is_test = file.components().any(|part| part.as_os_str() == "tests");
    let name = file.strip_prefix(root()).unwrap_or(file).display();
    (lines > LONGEST && !is_test).then(|| format!("{name}: expected at most {LONGEST} lines, found {lines}"))
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
    fn long_files_are_named() {
        let text = "x\n".repeat(LONGEST + 1);
        let complaint = complaint_about(&root().join("crates/a.rs"), &text);
        assert_eq!(complaint, Some(format!("crates/a.rs: expected at most {LONGEST} lines, found {}", LONGEST + 1)));
        assert_eq!(complaint_about(&root().join("a/tests/b.rs"), &text), None);
    }

    #[test]
    fn the_workspace_is_tidy() {
        run().unwrap();
    }
}
