//! The comparison: each side does each case in turn, so that whatever else the machine does meets all of them.

use std::collections::BTreeMap;
use std::convert::identity;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;
use xvlm::Precision;

use super::peak::Peaks;
use super::served;
use super::sides::{Peer, Side, Who};
use super::start_up::{self, StartUp};
use super::train::{BenchTrain, Timed};
use super::{Bench, Outcome};
use crate::Done;
use xvlm_benches::cases::{Case, Work};

/// No case has fewer rounds than these, however long they take.
const LEAST_ROUNDS: usize = 3;
/// No further round of a case begins after so long.
const BUDGET: Duration = Duration::from_secs(20);

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
    /// What it may be at most.
    pub(crate) deviation_bound: Option<f64>,
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

impl Comparison {
    /// Takes the rows of a case in. The peaks are measured again, and the largest count: something else may have been busy before.
    fn add(&mut self, rows: impl IntoIterator<Item = Row>) -> Outcome<()> {
        self.peaks = self.peaks.max(Peaks::measure()?);
        self.rows.extend(rows);
        for row in &mut self.rows {
            let rate = row.flops.map(|flops| flops as f64 / row.ours.median);
            row.share_of_peak = rate.map(|rate| rate / self.peaks.of(row.precision));
        }
        Ok(())
    }
}

/// Measures case by case; after each, `keep` is given all that is measured so far.
pub(crate) fn run(bench: &Bench, cases: &[&'static Case], keep: impl Fn(&Comparison) -> Done) -> Outcome<Comparison> {
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
            comparison.add(compare(bench, case, &mut sides)?)?;
            keep(&comparison)?;
        }
    }
    for case in cases {
        match case.work {
            Work::Step => {
                for precision in [Precision::F32, Precision::Bf16] {
                    eprintln!("{}, {precision}", case.title);
                    let (row, versions) = step(bench, case, precision)?;
                    comparison.versions.extend(versions.map(|versions| ("train-step", versions)));
                    comparison.add([row])?;
                    keep(&comparison)?;
                }
            }
            Work::StartUp => {
                eprintln!("{}", case.title);
                comparison.start_up = Some(start_up::measure(bench.rounds())?);
                keep(&comparison)?;
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
        let versions = side.wait();
        if let (Ok(versions), Who::Peer(peer)) = (side.settle(versions)?, side.who) {
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
    let mut enlist = |side: &mut Side, asked: Outcome<()>| -> Outcome<bool> {
        let prepared = asked.and_then(|()| side.prepared());
        match (side.settle(prepared)?.and_then(identity), side.who) {
            (Ok(()), _) => Ok(true),
            (Err(why), Who::Peer(peer)) => {
                unsupported.insert(peer.mode(), why);
                Ok(false)
            }
            (Err(why), Who::Ours(_)) => Err(why.into()),
        }
    };
    for side in others {
        let asked = side.prepare(case);
        if enlist(side, asked)? {
            ready.push((side, Vec::new()));
        }
    }
    let asked: Vec<_> = compilers.into_iter().map(|side| (side.prepare(case), side)).collect();
    for (asked, side) in asked {
        if enlist(side, asked)? {
            ready.push((side, Vec::new()));
        }
    }
    let prepared = start.elapsed();
    let begin = Instant::now();
    for round in 0..bench.rounds() {
        if round >= LEAST_ROUNDS && begin.elapsed() >= BUDGET {
            break;
        }
        // Each is first in its turn.
        let first = round % ready.len();
        ready.rotate_left(first);
        for (side, seconds) in &mut ready {
            let run = side.run();
            match (side.settle(run)?, side.who) {
                (Ok(time), _) => seconds.push(time),
                (Err(why), Who::Peer(peer)) => drop(unsupported.insert(peer.mode(), why)),
                (Err(why), Who::Ours(_)) => return Err(why.into()),
            }
        }
        ready.rotate_right(first);
        ready.retain(|(side, _)| !side.has_failed());
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
    for side in sides.iter_mut().filter(|side| !side.has_failed()) {
        let forgotten = side.forget();
        // Its rows are measured; why it takes no part in the next is told there.
        let _ = side.settle(forgotten)?;
    }
    let exact = samples.remove(Precision::F32.name()).unwrap_or_default();
    let rows = Precision::ALL.into_iter().filter_map(|precision| -> Option<Outcome<Row>> {
        let modes = || Peer::of(precision).iter().map(|peer| peer.mode());
        let ours = ours.remove(precision.name())?;
        let peers: BTreeMap<_, Timing> = modes().filter_map(|mode| Some((mode, peers.get(mode)?.clone()))).collect();
        let unsupported = modes().filter_map(|mode| Some((mode, unsupported.get(mode)?.clone()))).collect();
        let row = Row { flops: case.flops(), ..Row::of(case, precision, ours, peers, unsupported) };
        let Some(found) = samples.get(precision.name()) else { return Some(Ok(row)) };
        let deviation =
            deviation(found, &exact).map_err(|error| format!("{}, {precision}: {error}", case.title).into());
        Some(deviation.map(|deviation| Row { deviation: Some(deviation), deviation_bound: bound(precision), ..row }))
    });
    rows.collect()
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
        let (flops, share_of_peak, deviation, deviation_bound) = (None, None, None, None);
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
            deviation_bound,
        }
    }

    /// Whether it deviates from f32 by more than its precision explains.
    pub(crate) fn is_off(&self) -> bool {
        self.deviation
            .zip(self.deviation_bound)
            .is_some_and(|(deviation, bound)| deviation.is_nan() || deviation > bound)
    }
}

/// How far a precision may be from f32: a few times what its roundings add up to in the base model.
fn bound(precision: Precision) -> Option<f64> {
    match precision {
        Precision::F32 => None,
        Precision::Bf16 => Some(0.05),
        Precision::Int8 => Some(0.1),
    }
}

/// The length of the difference over the length of what is exact.
fn deviation(found: &[f32], exact: &[f32]) -> Result<f64, String> {
    if found.len() != exact.len() || exact.is_empty() {
        return Err(format!("sample: expected as many numbers as in f32, {}, found {}", exact.len(), found.len()));
    }
    let squares = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|number| number * number).sum::<f64>();
    let difference = squares(&mut found.iter().zip(exact).map(|(a, b)| f64::from(a - b)));
    Ok((difference / squares(&mut exact.iter().map(|&number| f64::from(number)))).sqrt())
}

/// A step of pre-training, in processes of its own, and the versions of the peer's parts.
fn step(bench: &Bench, case: &'static Case, precision: Precision) -> Outcome<(Row, Option<Value>)> {
    let chore =
        BenchTrain::for_comparison(bench.peers_dir.clone(), !bench.peers, bench.rounds(), case.images, precision);
    let (ours, peer) = chore.measure()?;
    let mode = match precision {
        Precision::F32 => Peer::EagerF32.mode(),
        _ => Peer::EagerBf16.mode(),
    };
    let (mut peers, mut unsupported, mut versions) = (BTreeMap::new(), BTreeMap::new(), None);
    match peer {
        Some(Ok((steps, told))) => {
            peers.insert(mode, Timing::of_steps(&steps));
            versions = Some(told);
        }
        Some(Err(why)) => drop(unsupported.insert(mode, why)),
        None => {}
    }
    Ok((Row::of(case, precision, Timing::of_steps(&ours), peers, unsupported), versions))
}

/// The processor, as it calls itself.
fn cpu() -> String {
    let told = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = told.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_compared_is_no_agreement() {
        assert_eq!(deviation(&[3.0, 4.0], &[0.0, 4.0]), Ok(0.75));
        assert!(deviation(&[1.0], &[1.0, 2.0]).is_err());
        assert!(deviation(&[], &[]).is_err());
    }

    #[test]
    fn rows_beyond_their_bound_are_off() {
        let timing = Timing::of(vec![1.0]);
        let row = |deviation| Row {
            deviation,
            deviation_bound: bound(Precision::Bf16),
            ..Row::of(&xvlm_benches::cases::CASES[0], Precision::Bf16, timing.clone(), BTreeMap::new(), BTreeMap::new())
        };
        assert!(!row(None).is_off() && !row(Some(0.05)).is_off());
        assert!(row(Some(0.06)).is_off() && row(Some(f64::NAN)).is_off());
    }
}
