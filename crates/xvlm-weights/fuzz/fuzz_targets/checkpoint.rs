//! Opens any bytes as a checkpoint and reads all that it lists. From `crates/xvlm-weights`:
//! `cargo +nightly fuzz run --strip-dead-code checkpoint` (a dependency does not compile with dead code linked). Good
//! seeds are small checkpoints of each form.
#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use xvlm_weights::Checkpoint;

fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("room for it");
    if let Ok(checkpoint) = Checkpoint::open(file.path()) {
        for name in checkpoint.tensors().keys() {
            let _ = checkpoint.read(name);
        }
    }
});
