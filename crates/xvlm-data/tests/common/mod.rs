//! Files for tests.
#![allow(dead_code, reason = "each test binary uses some of these")]

pub(crate) mod sets;

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

/// A folder that goes away with the test.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    pub(crate) fn json(&self, name: &str, value: &Value) -> PathBuf {
        self.write(name, value.to_string())
    }

    /// A picture of a colour that differs by size.
    pub(crate) fn image(&self, name: &str, width: u32, height: u32) -> PathBuf {
        let pixel = image::Rgb([width as u8, height as u8, 90]);
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::RgbImage::from_pixel(width, height, pixel).save(&path).unwrap();
        path
    }
}

pub(crate) fn gzip(path: &Path) -> PathBuf {
    let packed = path.with_extension("json.gz");
    let mut out = flate2::write::GzEncoder::new(std::fs::File::create(&packed).unwrap(), flate2::Compression::fast());
    out.write_all(&std::fs::read(path).unwrap()).unwrap();
    out.finish().unwrap();
    packed
}

pub(crate) fn zstd(path: &Path) -> PathBuf {
    let packed = path.with_extension("json.zst");
    let bytes = std::fs::read(path).unwrap();
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    // Two frames, as concatenated files have.
    let (a, b) = bytes.split_at(bytes.len() / 2);
    let frames = [ruzstd::encoding::compress_to_vec(a, level), ruzstd::encoding::compress_to_vec(b, level)];
    std::fs::write(&packed, frames.concat()).unwrap();
    packed
}
