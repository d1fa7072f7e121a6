//! The sides of the comparison: ours in each precision, and the peers; each a process of its own.

use std::path::Path;
use std::process::Command;

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};
use xvlm::Precision;

use super::Outcome;
use super::served::{self, Served};
use xvlm_benches::cases::Case;

/// A way of running the same in Python.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Peer {
    EagerF32,
    EagerBf16,
    CompileF32,
    CompileBf16,
    OnnxF32,
}

impl Peer {
    pub(crate) const ALL: [Self; 5] =
        [Self::EagerF32, Self::EagerBf16, Self::CompileF32, Self::CompileBf16, Self::OnnxF32];

    /// Its name on the command lines.
    pub(crate) fn mode(self) -> &'static str {
        match self {
            Self::EagerF32 => "eager-f32",
            Self::EagerBf16 => "eager-bf16",
            Self::CompileF32 => "compile-f32",
            Self::CompileBf16 => "compile-bf16",
            Self::OnnxF32 => "onnx-f32",
        }
    }

    /// Those that compute in what our side does.
    pub(crate) fn of(precision: Precision) -> &'static [Self] {
        match precision {
            Precision::F32 => &[Self::EagerF32, Self::CompileF32, Self::OnnxF32],
            Precision::Bf16 => &[Self::EagerBf16, Self::CompileBf16],
            Precision::Int8 => &[],
        }
    }
}

/// Who computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Ours(Precision),
    Peer(Peer),
}

/// A process of the comparison.
pub(crate) struct Side {
    pub(crate) who: Who,
    served: Served,
    /// Why it takes part no more.
    failed: Option<String>,
}

impl Side {
    pub(crate) fn ours(precision: Precision) -> Outcome<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "--serve", precision.name()]);
        let served = Served::spawn(&format!("our side ({precision})"), command)?;
        Ok(Self { who: Who::Ours(precision), served, failed: None })
    }

    pub(crate) fn peer(peer: Peer, folder: &Path) -> Outcome<Self> {
        let mut command = Command::new(served::python(folder));
        command.arg(served::scripts().join("inference.py")).args(["--serve", "--mode", peer.mode()]);
        command.args(["--threads", &std::thread::available_parallelism()?.to_string()]);
        // What the compiler made for the same shapes stays for the next run.
        command.env("TORCHINDUCTOR_CACHE_DIR", std::path::absolute(folder)?.join("inductor"));
        Ok(Self { who: Who::Peer(peer), served: Served::spawn(peer.mode(), command)?, failed: None })
    }

    /// Waits until it has started; the versions of a peer's parts.
    pub(crate) fn wait(&mut self) -> Outcome<Value> {
        Ok(self.served.answer()?["versions"].take())
    }

    pub(crate) fn id(&self) -> u32 {
        self.served.id()
    }

    /// What it has done. A peer's failure ends only its own part, from then on: this is why.
    pub(crate) fn settle<T>(&mut self, done: Outcome<T>) -> Outcome<Result<T, String>> {
        match (done, self.who) {
            (Ok(done), _) => Ok(Ok(done)),
            (Err(error), Who::Ours(_)) => Err(error),
            (Err(error), Who::Peer(_)) => Ok(Err(self.failed.insert(error.to_string()).clone())),
        }
    }

    /// Whether it takes part no more.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Asks it to make a case ready and to do it once: [`Self::prepared`] waits for that.
    pub(crate) fn prepare(&mut self, case: &Case) -> Outcome<()> {
        if let Some(why) = &self.failed {
            return Err(why.clone().into());
        }
        self.served.tell(&json!({ "prepare": case }).to_string())
    }

    /// Waits until the case is ready; why not, if the side cannot.
    pub(crate) fn prepared(&mut self) -> Outcome<Result<(), String>> {
        let answer = self.served.answer()?;
        Ok(match answer["unsupported"].as_str() {
            Some(why) => Err(why.to_owned()),
            None => Ok(()),
        })
    }

    /// Whether most of what it does to prepare a case is to compile: in one thread, for long.
    pub(crate) fn compiles(&self) -> bool {
        matches!(self.who, Who::Peer(Peer::CompileF32 | Peer::CompileBf16 | Peer::OnnxF32))
    }

    /// Seconds that the case takes.
    pub(crate) fn run(&mut self) -> Outcome<f64> {
        let answer = self.served.ask(r#""run""#)?;
        let seconds = answer["seconds"].as_f64();
        Ok(seconds.ok_or_else(|| format!("{}: seconds: expected a number, found {answer}", self.served.name))?)
    }

    /// Some of the numbers that the case comes to; of our sides only.
    pub(crate) fn sample(&mut self) -> Outcome<Vec<f32>> {
        let mut answer = self.served.ask(r#""sample""#)?;
        Ok(serde_json::from_value(answer["sample"].take())?)
    }

    /// Forgets the case, so that its memory is free for others.
    pub(crate) fn forget(&mut self) -> Outcome<()> {
        self.served.ask(r#""drop""#).map(drop)
    }
}
