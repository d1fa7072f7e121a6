//! The comparison as one table in Markdown.

use std::fmt::Write;

use xvlm::Precision;

use super::compare::{Comparison, Row, Timing};
use super::sides::Peer;

/// The columns of peers: a peer's name, and its mode in each precision.
const COLUMNS: [(&str, &[Peer]); 3] = [
    ("PyTorch", &[Peer::EagerF32, Peer::EagerBf16]),
    ("torch.compile", &[Peer::CompileF32, Peer::CompileBf16]),
    ("ONNX Runtime", &[Peer::OnnxF32]),
];

/// Medians with minima, in seconds; how many times as long the peers take; what our side reaches.
pub(crate) fn markdown(comparison: &Comparison) -> Result<String, std::fmt::Error> {
    let Comparison { cpu, threads, versions, peaks, rows, start_up } = comparison;
    let mut out = String::new();
    writeln!(
        out,
        "{cpu}, {threads} threads; medians (minima) in seconds of rounds in which each side does a case once.\n"
    )?;
    let giga = |rate: f64| rate / 1e9;
    writeln!(
        out,
        "Peak: {:.0} GFLOP/s of fused multiply-adds (f32); our largest linear layer: f32 {:.0}, bf16 {:.0}, int8 {:.0} GFLOP/s.\n\
         Share of peak: of the first in f32, of the layer in bf16 and int8.\n",
        giga(peaks.fused_multiply_adds_f32),
        giga(peaks.linear_f32),
        giga(peaks.linear_bf16),
        giga(peaks.linear_int8),
    )?;
    if let Some(told) = versions.values().max_by_key(|told| told.as_object().map(serde_json::Map::len)) {
        writeln!(out, "Peers: {told}\n")?;
    }
    if !rows.is_empty() {
        let columns: String = COLUMNS.iter().map(|(name, _)| format!(" {name} | × |")).collect();
        writeln!(out, "| case | | ours |{columns} share of peak | deviation from f32 |")?;
        writeln!(out, "|---|---|---|{}---|---|", "---|---|".repeat(COLUMNS.len()))?;
    }
    for row in rows {
        let peers: String = COLUMNS.iter().map(|(_, modes)| cells(row, modes)).collect();
        let share = row.share_of_peak.map(|share| format!("{:.0} %", 100.0 * share)).unwrap_or_default();
        let mark = if row.is_off() { " (!)" } else { "" };
        let deviation = row.deviation.map(|deviation| format!("{deviation:.1e}{mark}")).unwrap_or_default();
        let (title, precision) = (row.title, row.precision);
        writeln!(out, "| {title} | {precision} | {} |{peers} {share} | {deviation} |", seconds(&row.ours))?;
    }
    for row in rows.iter().filter(|row| row.is_off()) {
        let (title, precision, bound) = (row.title, row.precision, row.deviation_bound.unwrap_or_default());
        writeln!(out, "\n(!) {title}, {precision}: expected a deviation of at most {bound}.")?;
    }
    let missing = rows.iter().flat_map(|row| row.unsupported.iter().map(move |(peer, why)| (row.title, peer, why)));
    for (number, (title, peer, why)) in missing.enumerate() {
        let head = if number == 0 { "\nNot done:\n\n" } else { "" };
        writeln!(out, "{head}- {peer}, {title}: {why}")?;
    }
    for peer in Peer::ALL {
        if let Some((ratio, row)) = least(rows, peer) {
            writeln!(out, "\nLeast ratio to {}: {ratio:.2}, {}.", peer.mode(), row.title)?;
        }
    }
    for row in rows.iter().filter(|row| row.ours.peak_memory.is_some()) {
        writeln!(out, "\n{}", memory(row))?;
    }
    for precision in Precision::ALL {
        if let Some(ratio) = many_phrases(rows, precision) {
            writeln!(
                out,
                "\nBoxes of 32 phrases about one image take {ratio:.2} × those of one phrase ({precision})."
            )?;
        }
    }
    if let Some(start_up) = start_up {
        let (process, work) = (start_up.process.median, start_up.work.median);
        writeln!(
            out,
            "\n`xvlm ground` on the base model at 384 pixels: {process:.3} s from start to answer, {work:.3} s of bare work, \
             ratio {:.2}.",
            start_up.ratio
        )?;
        let many = start_up.many_phrases.median;
        writeln!(out, "\nThe same work with 32 phrases: {many:.3} s, {:.2} × one phrase.", many / work)?;
    }
    Ok(out)
}

fn seconds(timing: &Timing) -> String {
    format!("{:.3} ({:.3})", timing.median, timing.min)
}

/// What the one of some peers that computes in the row's precision takes, and how many times as long as ours.
fn cells(row: &Row, modes: &[Peer]) -> String {
    let found = modes.iter().find_map(|peer| row.peers.get(peer.mode()).zip(row.ratios.get(peer.mode())));
    match found {
        Some((timing, ratio)) => format!(" {} | {ratio:.2} |", seconds(timing)),
        None => " | |".to_owned(),
    }
}

/// Where we are the least ahead of a peer.
fn least(rows: &[Row], peer: Peer) -> Option<(f64, &Row)> {
    let ratios = rows.iter().filter_map(|row| Some((*row.ratios.get(peer.mode())?, row)));
    ratios.min_by(|(a, _), (b, _)| a.total_cmp(b))
}

fn memory(row: &Row) -> String {
    let gigabytes = |timing: &Timing| timing.peak_memory.unwrap_or_default() as f64 / 1e9;
    let ours = gigabytes(&row.ours);
    let beside = row.peers.values().next().map(|peer| {
        let peer = gigabytes(peer);
        format!(", the peer {peer:.2} GB, ratio {:.2}", ours / peer)
    });
    format!("Peak memory, {}, {}: {ours:.2} GB{}.", row.title, row.precision, beside.unwrap_or_default())
}

/// What 32 phrases cost over what one does.
fn many_phrases(rows: &[Row], precision: Precision) -> Option<f64> {
    let median =
        |case: &str| rows.iter().find(|row| row.case == case && row.precision == precision).map(|row| row.ours.median);
    Some(median("ground-32-phrases")? / median("ground-phrase")?)
}
