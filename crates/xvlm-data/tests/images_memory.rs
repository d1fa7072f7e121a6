//! The size that a header claims takes no memory before there is the data for it.

use candle_core::{Device, safetensors};
use peak_alloc::PeakAlloc;
use xvlm_data::Picture;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

#[test]
fn small_files_of_large_images_are_refused_without_taking_memory() {
    /// For the file, its tables and messages.
    const BOUND: usize = 1 << 20;
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/decode.safetensors");
    let files = safetensors::load(golden, &Device::Cpu).unwrap();
    // Baseline, progressive, of inks: the last two are for the general decoder.
    for (name, frame) in
        [("jpeg-420", 0xC0), ("jpeg-progressive", 0xC2), ("jpeg-grey-progressive", 0xC2), ("jpeg-cmyk", 0xC0)]
    {
        let mut bytes: Vec<u8> = files[&format!("file.{name}")].to_vec1().unwrap();
        let frame = bytes.windows(2).position(|pair| pair == [0xFF, frame]).unwrap();
        // 13,000 × 13,000.
        bytes[frame + 5..frame + 9].copy_from_slice(&[0x32, 0xC8, 0x32, 0xC8]);
        MEMORY.reset_peak_usage();
        let before = MEMORY.current_usage();
        let error = Picture::from_bytes(&bytes, &name).unwrap_err().to_string();
        let taken = MEMORY.peak_usage() - before;
        assert!(error.contains("for 13000x13000 pixels"), "{error}");
        assert!(taken < BOUND, "{name}: {taken} bytes");
    }
}
