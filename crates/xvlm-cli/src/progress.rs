//! How far a command is, on stderr: bars on a terminal, plain lines otherwise.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use xvlm::train::{Progress, StepReport, Summary};

use crate::output::say;

/// A bar of the given template; `None` if stderr is no terminal.
fn bar(template: &str) -> Option<ProgressBar> {
    io::stderr().is_terminal().then(|| {
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(1).with_style(style.progress_chars("━╸ "))
    })
}

/// A time as people say it.
fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds:02} s"),
        (hours, minutes, _) => format!("{hours} h {minutes:02} min"),
    }
}

/// One piece of work of which the number of items is known.
pub(crate) struct Stage {
    name: &'static str,
    bar: Option<ProgressBar>,
    items: usize,
    started: Instant,
}

impl Stage {
    fn new(name: &'static str) -> Self {
        let bar = bar("{msg:22} {bar:40.cyan} {pos}/{len}");
        if let Some(bar) = &bar {
            bar.set_message(name);
        }
        Self { name, bar, items: 0, started: Instant::now() }
    }

    fn at(&mut self, done: usize, of: usize) {
        self.items = done;
        if let Some(bar) = &self.bar {
            bar.set_length(of as u64);
            bar.set_position(done as u64);
        }
    }

    /// Does the work, and says how long it took.
    pub(crate) fn run<T, E>(
        name: &'static str,
        work: impl FnOnce(&mut dyn FnMut(usize, usize)) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut stage = Self::new(name);
        let result = work(&mut |done, of| stage.at(done, of));
        if let Some(bar) = &stage.bar {
            bar.finish_and_clear();
        }
        // One is quickly done, and its answer follows.
        if result.is_ok() && stage.items != 1 {
            let seconds = stage.started.elapsed().as_secs_f64();
            say(&format!("{}: {} in {seconds:.1} s", stage.name, stage.items));
        }
        result
    }
}

/// Training.
pub(crate) struct Training {
    bar: Option<ProgressBar>,
}

impl Training {
    pub(crate) fn new() -> Self {
        Self { bar: bar("training {bar:30.cyan} {pos}/{len}  {msg}") }
    }
}

fn losses(losses: &[(String, f64)]) -> String {
    losses.iter().map(|(name, loss)| format!("{name} {loss:.3}")).collect::<Vec<_>>().join("  ")
}

impl Progress for Training {
    fn start(&mut self, of: u64, at: u64) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(of);
                bar.set_position(at);
                bar.set_message("…");
                // Redrawn between the reports too, so that it is seen to live.
                bar.enable_steady_tick(Duration::from_millis(500));
            }
            None => say(&format!("training from iteration {at} to {of}")),
        }
    }

    fn warning(&mut self, message: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(message)),
            None => say(message),
        }
    }

    fn step(&mut self, report: &StepReport) {
        let mut losses = losses(report.losses);
        if let Some(score) = report.score {
            losses += &format!("  score {score:.4}");
        }
        let (speed, eta) = (report.images_per_second, duration(report.eta));
        match &self.bar {
            Some(bar) => {
                bar.set_position(report.iteration);
                bar.set_message(format!("{losses}  {speed:.0} images/s  {eta} left"));
            }
            None => {
                let (at, of, lr) = (report.iteration, report.of, report.lr);
                say(&format!("{at}/{of}  {losses}  lr {lr:.1e}  {speed:.0} images/s  {eta} left"));
            }
        }
    }

    fn finish(&mut self, summary: &Summary) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let memory = summary.peak_memory_mib.map_or_else(String::new, |peak| format!(", at most {peak} MiB of memory"));
        say(&format!("training: {} iterations in {}{memory}", summary.iterations, duration(summary.elapsed)));
    }
}
