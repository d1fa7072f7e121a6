//! How a program lends its threads and its memory to the operations of this crate.

/// Runs a program's work the way tensors are computed fastest on the CPU. Call it once, first thing in `main`.
///
/// - `work` runs on a thread of rayon's pool, so that operations hand their parts to each other without waking a thread.
/// - The allocator keeps what a step frees: the next step wants tensors of the same sizes, and memory that goes back to
///   the system comes back as page faults (a fifth of the time of a training step of the small model; glibc only).
/// - candle's own threads, which wait for element-wise operations, sleep instead of spinning on a core that rayon needs
///   (unless the environment variable `CANDLE_BARRIER_POOL_SPIN_LIMIT` says otherwise).
pub fn run<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    keep_freed_memory();
    let_candle_sleep();
    rayon::scope(|_| work())
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_freed_memory() {
    const MIB: libc::c_int = 1 << 20;
    // SAFETY: `mallopt` only sets parameters of the allocator; values out of range are refused.
    unsafe {
        // Above any tensor of a step; older versions take no more than 32 MiB.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 * MIB);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1024 * MIB);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1024 * MIB);
        libc::mallopt(libc::M_TOP_PAD, 64 * MIB);
        // The memory of other arenas is given back when their last piece is free, whatever the thresholds say.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_freed_memory() {}

fn let_candle_sleep() {
    const LIMIT: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads == 1 && std::env::var_os(LIMIT).is_none() {
        // SAFETY: no other thread is there to read the environment meanwhile.
        unsafe { std::env::set_var(LIMIT, "1") };
    }
}
