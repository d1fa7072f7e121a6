//! METEOR by its official program, which is asked line by line.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::output::CliError;

/// The program, running.
struct Meteor<'a> {
    jar: &'a Path,
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// METEOR of all captions together, and of each.
pub(super) fn score(jar: &Path, captions: &[String], references: &[Vec<String>]) -> Result<(f64, Vec<f64>), CliError> {
    let mut meteor = Meteor::start(jar)?;
    let mut evaluate = "EVAL".to_owned();
    for (caption, references) in captions.iter().zip(references) {
        let parts: Vec<String> =
            references.iter().chain([caption]).map(|text| text.replace("|||", "").replace("  ", " ")).collect();
        let statistics = meteor.ask(&format!("SCORE ||| {}", parts.join(" ||| ")))?;
        evaluate.push_str(" ||| ");
        evaluate.push_str(&statistics);
    }
    meteor.write(&evaluate)?;
    let each = captions.iter().map(|_| meteor.number()).collect::<Result<_, _>>()?;
    let all = meteor.number()?;
    Ok((all, each))
}

impl<'a> Meteor<'a> {
    fn start(jar: &'a Path) -> Result<Self, CliError> {
        // It looks for its tables beside itself.
        let whole = jar.canonicalize().map_err(CliError::io(jar))?;
        let java = Path::new("java");
        let mut child = Command::new(java)
            .args(["-jar", "-Xmx2G"])
            .arg(&whole)
            .args(["-", "-", "-stdio", "-l", "en", "-norm"])
            .current_dir(whole.parent().unwrap_or(Path::new(".")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(CliError::io(java))?;
        let (questions, answers) = (child.stdin.take(), child.stdout.take());
        match (questions, answers) {
            (Some(questions), Some(answers)) => Ok(Self { jar, child, questions, answers: BufReader::new(answers) }),
            _ => Err(Self::silent(jar, "no pipes")),
        }
    }

    fn silent(jar: &Path, found: impl Into<String>) -> CliError {
        CliError::File { path: jar.to_owned(), expected: "METEOR 1.5, which answers", found: found.into() }
    }

    fn write(&mut self, line: &str) -> Result<(), CliError> {
        let written = writeln!(self.questions, "{line}").and_then(|()| self.questions.flush());
        written.map_err(|error| Self::silent(self.jar, error.to_string()))
    }

    fn read(&mut self) -> Result<String, CliError> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(0) => Err(Self::silent(self.jar, "its end")),
            Ok(_) => Ok(line.trim().to_owned()),
            Err(error) => Err(Self::silent(self.jar, error.to_string())),
        }
    }

    fn ask(&mut self, question: &str) -> Result<String, CliError> {
        self.write(question)?;
        self.read()
    }

    fn number(&mut self) -> Result<f64, CliError> {
        let line = self.read()?;
        line.parse().map_err(|_| Self::silent(self.jar, format!("{line:?}")))
    }
}

impl Drop for Meteor<'_> {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
