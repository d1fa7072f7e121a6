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
    pub(crate) name: String,
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Served {
    /// Starts it, and waits for the line by which it says that it is ready.
    pub(crate) fn start(name: &str, command: Command) -> Outcome<(Self, Value)> {
        let mut served = Self::spawn(name, command)?;
        let ready = served.answer()?;
        Ok((served, ready))
    }

    /// Starts it; its first [`Self::answer`] says that it is ready.
    pub(crate) fn spawn(name: &str, mut command: Command) -> Outcome<Self> {
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|error| format!("{name}: {}: {error}", command.get_program().display()))?;
        let (questions, answers) = (child.stdin.take(), child.stdout.take());
        let (questions, answers) = questions.zip(answers).ok_or_else(|| format!("{name}: its pipes are closed"))?;
        Ok(Self { name: name.to_owned(), child, questions, answers: BufReader::new(answers) })
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
        writeln!(self.questions, "{question}").map_err(|error| format!("{}: {question}: {error}", self.name).into())
    }

    /// The next line that it says.
    pub(crate) fn answer(&mut self) -> Outcome<Value> {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line).map_err(|error| format!("{}: its answer: {error}", self.name))?;
        if read == 0 {
            return Err(format!("{} ended: {}", self.name, self.child.wait()?).into());
        }
        let answer: Value = serde_json::from_str(&line)
            .map_err(|error| format!("{}: expected an answer in JSON, found {line:?}: {error}", self.name))?;
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

/// The median of numbers, of which there is at least one: of an even count the mean of the two in the middle.
pub(crate) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    if numbers.len() % 2 == 1 { numbers[middle] } else { (numbers[middle - 1] + numbers[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[cfg(unix)]
    #[test]
    fn errors_name_the_side_and_what_it_said() {
        let mut command = Command::new("sh");
        let (mut side, _) = Served::start("the peer", {
            command.args(["-c", "echo '{}'; read -r question; echo Warning; exit 3"]);
            command
        })
        .unwrap();
        let error = side.ask("run").unwrap_err().to_string();
        assert!(error.starts_with("the peer: ") && error.contains("Warning"), "{error}");
        let error = side.answer().unwrap_err().to_string();
        assert!(error.starts_with("the peer ended") && error.contains('3'), "{error}");
        let Err(error) = Served::spawn("the peer", Command::new("no such program")) else {
            panic!("expected an error")
        };
        assert!(error.to_string().starts_with("the peer: no such program: "), "{error}");
    }
}
