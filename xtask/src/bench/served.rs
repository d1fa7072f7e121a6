//! Programs that are measured: each a process of its own that answers a line with a line of JSON.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::Outcome;
use crate::Done;

/// A process that waits for questions on its stdin; it ends with this.
pub(crate) struct Served {
    name: &'static str,
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Served {
    /// Starts it, and waits for the line by which it says that it is ready.
    pub(crate) fn start(name: &'static str, command: Command) -> Outcome<(Self, Value)> {
        let mut served = Self::spawn(name, command)?;
        let ready = served.answer()?;
        Ok((served, ready))
    }

    /// Starts it; its first [`Self::answer`] says that it is ready.
    pub(crate) fn spawn(name: &'static str, mut command: Command) -> Outcome<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (questions, answers) = (child.stdin.take(), child.stdout.take());
        let (questions, answers) = questions.zip(answers).ok_or_else(|| format!("{name}: its pipes are closed"))?;
        Ok(Self { name, child, questions, answers: BufReader::new(answers) })
    }

    /// Of the process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it answers to a line.
    pub(crate) fn ask(&mut self, question: &str) -> Outcome<Value> {
        self.tell(question)?;
        self.answer()
    }

    /// Asks without waiting: [`Self::answer`] has to come before the next question.
    pub(crate) fn tell(&mut self, question: &str) -> Outcome<()> {
        Ok(writeln!(self.questions, "{question}")?)
    }

    /// The next line that it says.
    pub(crate) fn answer(&mut self) -> Outcome<Value> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err(format!("{} ended: {}", self.name, self.child.wait()?).into());
        }
        let answer: Value = serde_json::from_str(&line)?;
        match answer.get("error") {
            Some(error) => Err(format!("{}: {error}", self.name).into()),
            None => Ok(answer),
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The peers' scripts.
pub(crate) fn scripts() -> PathBuf {
    crate::root().join("benches/peers")
}

/// The Python of the peers' environment.
pub(crate) fn python(peers: &Path) -> PathBuf {
    peers.join("env/bin/python")
}

/// Makes the peers' environment, if it is not there yet, or lacks what has been asked for since.
pub(crate) fn set_up(peers: &Path) -> Done {
    let script = scripts().join("setup.sh");
    let done = std::fs::read(peers.join("env/setup.sh"));
    match done.is_ok_and(|done| std::fs::read(&script).is_ok_and(|script| script == done)) {
        true => Ok(()),
        false => succeed(Command::new("sh").arg(script).arg(peers)),
    }
}

/// Runs a command that has to succeed.
pub(crate) fn succeed(command: &mut Command) -> Done {
    // Its results would mix with the report.
    match command.stdout(Stdio::null()).status()? {
        status if status.success() => Ok(()),
        status => Err(format!("{command:?}: {status}").into()),
    }
}

/// CPU time that this process has used in all its threads (proc_pid_stat(5), fields 14 and 15).
pub(crate) fn cpu_time() -> Outcome<Duration> {
    /// Ticks a second: fixed for every Linux that programs see.
    const TICKS: u32 = 100;
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The name of the program, in parentheses, may hold spaces.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u32 = fields.skip(11).take(2).map(str::parse::<u32>).sum::<Result<_, _>>()?;
    Ok(Duration::from_secs(ticks.into()) / TICKS)
}

/// The median of numbers, of which there is at least one.
pub(crate) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}
