//! `cargo xtask bench --cost`: the vision encoder over sizes of images and batches, beside what the arithmetic says.

use std::fmt::Write;
use std::time::Instant;

use candle_core::{Device, Tensor};
use serde::Serialize;
use xvlm::Precision;
use xvlm::encoders::cost::Load;
use xvlm::encoders::{Pass, XvlmConfig};

use super::chart::{Chart, Series};
use super::{Outcome, served};
use xvlm_benches::base;

/// Sides of images, in pixels: windows of 7 to 24 tokens.
const SIZES: [usize; 7] = [224, 288, 384, 480, 576, 672, 768];
const BATCHES: [usize; 4] = [1, 4, 16, 64];
/// No batch has more pixels than 64 images of 224: a quarter of a minute, and some GB.
const MOST_PIXELS: usize = 64 * 224 * 224;

/// One size of images and of batches.
#[derive(Debug, Serialize)]
pub(crate) struct Point {
    size: usize,
    batch: usize,
    /// The least of some rounds.
    seconds: f64,
    /// Of products of matrices.
    flops: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Cost {
    points: Vec<Point>,
    /// Seconds a FLOP: the median of all points.
    per_flop: f64,
    /// The largest and the smallest of them over the median: 1 and 1 if the arithmetic told all.
    most: f64,
    least: f64,
}

impl Point {
    fn per_flop(&self) -> f64 {
        self.seconds / self.flops as f64
    }
}

pub(crate) fn run(rounds: usize) -> Outcome<Cost> {
    let mut points = Vec::new();
    for size in SIZES {
        let model = base::model(&XvlmConfig::base(size), Precision::F32, &Device::Cpu)?;
        for batch in BATCHES.into_iter().filter(|batch| batch * size * size <= MOST_PIXELS) {
            let pixels = Tensor::rand(-1f32, 1.0, (batch, 3, size, size), &Device::Cpu)?;
            let mut seconds = f64::INFINITY;
            // The first of a size warms up; what takes long is done twice at most.
            let times = if batch == 1 { 1 + rounds } else { rounds.min(2) };
            for _ in 0..times {
                let start = Instant::now();
                model.encode_image(&pixels, &Pass::inference())?;
                seconds = seconds.min(start.elapsed().as_secs_f64());
            }
            let flops = XvlmConfig::base(size).cost(&Load { images: batch, ..Load::default() }).flops;
            eprintln!("{batch} × {size}: {seconds:.3} s, {:.0} GFLOP/s", flops as f64 / seconds / 1e9);
            points.push(Point { size, batch, seconds, flops });
        }
    }
    let per_flop = served::median(points.iter().map(Point::per_flop).collect());
    let over = || points.iter().map(|point| point.per_flop() / per_flop);
    let (least, most) = over().fold((f64::INFINITY, 0.0f64), |(least, most), over| (least.min(over), most.max(over)));
    Ok(Cost { points, per_flop, most, least })
}

pub(crate) fn markdown(cost: &Cost) -> Result<String, std::fmt::Error> {
    let Cost { points, per_flop, most, least } = cost;
    let mut out = String::new();
    writeln!(
        out,
        "Vision encoder, f32: seconds over those of the arithmetic at {:.0} GFLOP/s, the median; from {least:.2} to {most:.2}.\n",
        1.0 / per_flop / 1e9
    )?;
    writeln!(out, "| pixels | batch | GFLOP | seconds | over arithmetic |\n|---|---|---|---|---|")?;
    for point in points {
        let Point { size, batch, seconds, flops } = point;
        let over = point.per_flop() / per_flop;
        writeln!(out, "| {size} | {batch} | {:.0} | {seconds:.3} | {over:.2} |", *flops as f64 / 1e9)?;
    }
    Ok(out)
}

/// A line of dots for each size, on the line of the arithmetic.
pub(crate) fn drawing(cost: &Cost) -> String {
    let series = SIZES.map(|size| {
        let points = || cost.points.iter().filter(move |point| point.size == size);
        Series {
            name: format!("{size} px"),
            dots: points().map(|point| (point.batch as f64, point.seconds)).collect(),
            line: points().map(|point| (point.batch as f64, point.flops as f64 * cost.per_flop)).collect(),
        }
    });
    Chart {
        title: "Vision encoder (Swin-B), f32: measured (dots), and as the arithmetic says (lines)",
        x: "images in a batch",
        y: "seconds",
        series: &series,
    }
    .to_svg()
}
