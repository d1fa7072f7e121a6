//! `cargo xtask gpu-check --pack`: the programs, for a machine with a GPU.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::Program;
use crate::Done;

/// The crates that compute on a GPU and whose tests read no files, so that they run wherever they lie; the tests of other
/// crates look for theirs in the sources.
const PACKAGES: [&str; 6] = ["xvlm-kernels", "xvlm-encoders", "xvlm-losses", "xvlm-tasks", "xvlm", "benches"];

pub(super) fn pack(programs: &[Program], folder: &Path) -> Done {
    let entries = fs::read_dir(folder).map(Iterator::count).unwrap_or(0);
    if entries > 0 && !folder.join("manifest.txt").exists() {
        return Err(format!("{}: expected a new folder or an earlier pack, found other files", folder.display()).into());
    }
    if entries > 0 {
        fs::remove_dir_all(folder)?;
    }
    let bin = folder.join("bin");
    fs::create_dir_all(&bin)?;
    let mut manifest = String::new();
    for program in programs.iter().filter(|program| is_packed(program)) {
        let copy = bin.join(&program.name);
        let stripped = Command::new("strip").arg("-o").arg(&copy).arg(&program.executable).status();
        if !stripped.is_ok_and(|status| status.success()) {
            println!("{}: not stripped, there is no `strip` that can", program.name);
            fs::copy(&program.executable, &copy)?;
        }
        manifest += &format!("{} {}\n", if program.is_bench { "bench" } else { "test" }, program.name);
    }
    fs::write(folder.join("run.sh"), include_str!("run.sh"))?;
    // Last: a folder with a manifest is whole.
    fs::write(folder.join("manifest.txt"), &manifest)?;
    print!("{manifest}");
    println!("`sh {}/run.sh` runs them where there is a GPU", folder.display());
    compress(folder)
}

fn is_packed(program: &Program) -> bool {
    program.folder.file_name().and_then(|name| name.to_str()).is_some_and(|name| PACKAGES.contains(&name))
}

/// Writes FOLDER.tar.xz beside the folder.
fn compress(folder: &Path) -> Done {
    let folder = folder.canonicalize()?;
    let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else {
        return Err(format!("{}: expected a folder with a name", folder.display()).into());
    };
    let name = name.to_string_lossy();
    let (archive, aside) = (parent.join(format!("{name}.tar.xz")), parent.join(format!("{name}.tar.xz.new")));
    if Command::new("xz").arg("--version").output().is_err() {
        println!("not compressed: there is no `xz`");
        return Ok(());
    }
    // The programs share most of what they are linked with, candle's kernels first of all. A window over a few of them finds
    // it again, which no effort within one of them does.
    let mut tar = Command::new("tar");
    tar.current_dir(parent).env("XZ_OPT", "--lzma2=preset=1,dict=192MiB").args(["--sort=name", "-cJf"]);
    let status = tar.arg(&aside).arg(&*name).status()?;
    if !status.success() {
        return Err(format!("{tar:?}: {status}").into());
    }
    fs::rename(&aside, &archive)?;
    let size = fs::metadata(&archive)?.len() as f64 / f64::from(1 << 20);
    println!("{}: {size:.1} MiB", archive.display());
    Ok(())
}
