//! The comparison: each side does each case in turn, so that whatever else the machine does meets all of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use serde_json::Value;

use super::peak::Peaks;
use super::served;
use super::sides::{Peer, Precision, Side, Who};
use super::start_up::{self, StartUp};
use super::train::{BenchTrain, Timed};
use super::{Bench, Outcome};
use xvlm_benches::cases::{Case, Work};

/// No case has fewer rounds than these, however long they take.
const LEAST_ROUNDS: usize = 3;

/// How long something took, in rounds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Timing {
    /// Seconds.
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) rounds: Vec<f64>,
    /// Bytes, of a process that did nothing else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peak_memory: Option<u64>,
}

impl Timing {
    pub(crate) fn of(rounds: Vec<f64>) -> Self {
        let min = rounds.iter().copied().fold(f64::INFINITY, f64::min);
        Self { median: served::median(rounds.clone()), min, rounds, peak_memory: None }
    }

    fn of_steps(steps: &[Timed]) -> Self {
        let peak_memory = steps.iter().map(|step| step.peak_memory).max();
        Self { peak_memory, ..Self::of(steps.iter().map(|step| step.seconds).collect()) }
    }
}

/// One case in one precision.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) case: &'static str,
    pub(crate) title: &'static str,
    pub(crate) precision: Precision,
    /// FLOPs of the products of matrices.
    pub(crate) flops: Option<u64>,
    pub(crate) ours: Timing,
    /// By mode.
    pub(crate) peers: BTreeMap<&'static str, Timing>,
    /// Why a peer could not do it.
    pub(crate) unsupported: BTreeMap<&'static str, String>,
    /// A peer's median over ours.
    pub(crate) ratios: BTreeMap<&'static str, f64>,
    pub(crate) share_of_peak: Option<f64>,
    /// The length of the difference from what our side comes to in f32, over the length of that.
    pub(crate) deviation: Option<f64>,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    pub(crate) cpu: String,
    pub(crate) threads: usize,
    /// Of the peers' parts.
    pub(crate) versions: BTreeMap<&'static str, Value>,
    pub(crate) peaks: Peaks,
    pub(crate) rows: Vec<Row>,
    pub(crate) start_up: Option<StartUp>,
}

pub(crate) fn run(bench: &Bench, cases: &[&'static Case]) -> Outcome<Comparison> {
    let folder = bench.peers.then_some(bench.peers_dir.as_path());
    if let Some(folder) = folder {
        served::set_up(folder)?;
    }
    let mut comparison = Comparison {
        cpu: cpu(),
        threads: std::thread::available_parallelism()?.get(),
        versions: BTreeMap::new(),
        peaks: Peaks::measure()?,
        rows: Vec::new(),
        start_up: None,
    };
    let inference: Vec<&'static Case> = cases.iter().copied().filter(|case| case.is_inference()).collect();
    if !inference.is_empty() {
        let mut sides = start(bench, folder, &mut comparison)?;
        for case in inference {
            let rows = compare(bench, case, &mut sides)?;
            comparison.rows.extend(rows.into_iter().map(|row| row.with_share(&comparison.peaks)));
        }
    }
    for case in cases {
        match case.work {
            Work::Step => {
                for precision in [Precision::F32, Precision::Bf16] {
                    eprintln!("{}, {}", case.title, precision.name());
                    comparison.rows.push(step(bench, case, precision)?);
                }
            }
            Work::StartUp => {
                eprintln!("{}", case.title);
                comparison.start_up = Some(start_up::measure(bench.rounds())?);
            }
            _ => {}
        }
    }
    Ok(comparison)
}

/// All sides, ours first.
fn start(bench: &Bench, folder: Option<&Path>, comparison: &mut Comparison) -> Outcome<Vec<Side>> {
    let mut sides = Precision::ALL.into_iter().map(Side::ours).collect::<Outcome<Vec<_>>>()?;
    let peers = if bench.only.is_empty() { Peer::ALL.to_vec() } else { bench.only.clone() };
    if let Some(folder) = folder {
        sides.extend(peers.into_iter().map(|peer| Side::peer(peer, folder)).collect::<Outcome<Vec<_>>>()?);
    }
    for side in &mut sides {
        let versions = side.wait()?;
        if let Who::Peer(peer) = side.who {
            comparison.versions.insert(peer.mode(), versions);
        }
    }
    Ok(sides)
}

/// One case by all sides; a row for each precision of ours.
fn compare(bench: &Bench, case: &'static Case, sides: &mut [Side]) -> Outcome<Vec<Row>> {
    let start = Instant::now();
    let mut unsupported = BTreeMap::new();
    let mut ready = Vec::new();
    // Those that compile do so side by side, when the others, one after the other, are ready.
    let (compilers, others): (Vec<_>, Vec<_>) = sides.iter_mut().partition(|side| side.compiles());
    let mut enlist = |side: &'_ mut Side| -> Outcome<bool> {
        match (side.prepared()?, side.who) {
            (Ok(()), _) => Ok(true),
            (Err(why), Who::Peer(peer)) => {
                unsupported.insert(peer.mode(), why);
                Ok(false)
            }
            (Err(why), Who::Ours(_)) => Err(why.into()),
        }
    };
    for side in others {
        side.prepare(case)?;
        if enlist(side)? {
            ready.push((side, Vec::new()));
        }
    }
    let compilers = compilers.into_iter().map(|side| side.prepare(case).map(|()| side)).collect::<Outcome<Vec<_>>>()?;
    for side in compilers {
        if enlist(side)? {
            ready.push((side, Vec::new()));
        }
    }
    let prepared = start.elapsed();
    let begin = Instant::now();
    for round in 0..bench.rounds() {
        if round >= LEAST_ROUNDS && begin.elapsed() >= bench.budget() {
            break;
        }
        for (side, seconds) in &mut ready {
            seconds.push(side.run()?);
        }
    }
    eprintln!(
        "{}: prepared in {:.0} s, {:.0} s of rounds",
        case.title,
        prepared.as_secs_f64(),
        begin.elapsed().as_secs_f64()
    );
    let mut samples = BTreeMap::new();
    let (mut ours, mut peers) = (BTreeMap::new(), BTreeMap::new());
    for (side, seconds) in ready {
        match side.who {
            Who::Ours(precision) => {
                samples.insert(precision.name(), side.sample()?);
                ours.insert(precision.name(), Timing::of(seconds));
            }
            Who::Peer(peer) => drop(peers.insert(peer.mode(), Timing::of(seconds))),
        }
    }
    sides.iter_mut().try_for_each(Side::forget)?;
    let exact = samples.get(Precision::F32.name()).cloned().unwrap_or_default();
    let rows = Precision::ALL.into_iter().filter_map(|precision| {
        let modes = || precision.peers().iter().map(|peer| peer.mode());
        let ours = ours.remove(precision.name())?;
        let peers: BTreeMap<_, Timing> = modes().filter_map(|mode| Some((mode, peers.get(mode)?.clone()))).collect();
        let unsupported = modes().filter_map(|mode| Some((mode, unsupported.get(mode)?.clone()))).collect();
        let is_exact = precision == Precision::F32;
        let deviation = samples.get(precision.name()).filter(|_| !is_exact).map(|found| deviation(found, &exact));
        Some(Row { deviation, flops: case.flops(), ..Row::of(case, precision, ours, peers, unsupported) })
    });
    Ok(rows.collect())
}

impl Row {
    fn of(
        case: &'static Case,
        precision: Precision,
        ours: Timing,
        peers: BTreeMap<&'static str, Timing>,
        unsupported: BTreeMap<&'static str, String>,
    ) -> Self {
        let ratios = peers.iter().map(|(mode, timing)| (*mode, timing.median / ours.median)).collect();
        let (flops, share_of_peak, deviation) = (None, None, None);
        Self {
            case: case.name,
            title: case.title,
            precision,
            flops,
            ours,
            peers,
            unsupported,
            ratios,
            share_of_peak,
            deviation,
        }
    }

    fn with_share(self, peaks: &Peaks) -> Self {
        let rate = self.flops.map(|flops| flops as f64 / self.ours.median);
        Self { share_of_peak: rate.map(|rate| rate / peaks.of(self.precision)), ..self }
    }
}

/// The length of the difference over the length of what is exact.
fn deviation(found: &[f32], exact: &[f32]) -> f64 {
    let squares = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|number| number * number).sum::<f64>();
    let difference = squares(&mut found.iter().zip(exact).map(|(a, b)| f64::from(a - b)));
    (difference / squares(&mut exact.iter().map(|&number| f64::from(number)))).sqrt()
}

/// A step of pre-training, in processes of its own.
fn step(bench: &Bench, case: &'static Case, precision: Precision) -> Outcome<Row> {
    let chore =
        BenchTrain::for_comparison(bench.peers_dir.clone(), !bench.peers, bench.rounds(), case.images, precision);
    let (ours, peer) = chore.measure()?;
    let mode = match precision {
        Precision::F32 => Peer::EagerF32.mode(),
        _ => Peer::EagerBf16.mode(),
    };
    let peers = peer.map(|(steps, _)| (mode, Timing::of_steps(&steps))).into_iter().collect();
    Ok(Row::of(case, precision, Timing::of_steps(&ours), peers, BTreeMap::new()))
}

/// The processor, as it calls itself.
fn cpu() -> String {
    let told = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = told.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}
