//! Signals that ask a run to stop.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::output::CliError;

/// What becomes true with the first SIGTERM (schedulers, `kill`), SIGINT (Ctrl-C) or SIGUSR1 (what Slurm's `--signal` is often
/// set to). `finishing` says what is done before the end. A later SIGTERM or SIGINT ends the program at once.
#[cfg(unix)]
pub(crate) fn asked_to_stop(finishing: &'static str) -> Result<Arc<AtomicBool>, CliError> {
    use std::sync::atomic::Ordering;
    use std::time::{Duration, Instant};

    use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
    use signal_hook::iterator::Signals;

    use crate::output::say;

    // `timeout` and some schedulers send to the process and then to its group: that is one wish, not two.
    const ONE_WISH: Duration = Duration::from_secs(1);

    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR1]).map_err(CliError::Signals)?;
    let listen = move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            let insists = signal != SIGUSR1 && first.is_some_and(|first| first.elapsed() > ONE_WISH);
            if insists {
                say("asked to stop again: ending at once");
                std::process::exit(128 + signal);
            }
            if !asked.swap(true, Ordering::Relaxed) {
                say(&format!("asked to stop: finishing {finishing} and saving; ask again to end at once"));
            }
            if signal != SIGUSR1 {
                first = first.or_else(|| Some(Instant::now()));
            }
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(listen).map_err(CliError::Signals)?;
    Ok(stop)
}

/// Nothing asks: there are no such signals.
#[cfg(not(unix))]
pub(crate) fn asked_to_stop(_: &'static str) -> Result<Arc<AtomicBool>, CliError> {
    Ok(Arc::default())
}
