//! `xvlm pretrain --dry-run` and `xvlm finetune --dry-run`: what a run is going to be.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use xvlm::data::{TextBatch, TextTokenizer};
use xvlm::encoders::cost::Part;
use xvlm::tasks::finetune::{self, FinetunePlan, FirstBatch, TrainingItems, TrainingState};
use xvlm::tasks::plan::{self, FirstBatches, Memory, ParameterCounts, Plan, Schedule, Stream};
use xvlm::tasks::{FinetuneConfig, PretrainConfig};
use xvlm::weights::ModelFiles;

use crate::data::inspect::{self, Sample, Shown};
use crate::output::{self, CliError, Rows};
use crate::progress::Training;

/// Most pictures of a stream that are drawn, and most whose texts are printed for people.
const DRAWN: usize = 36;
const PRINTED: usize = 4;

/// Whether a run is only to be told of.
#[derive(Args)]
pub(crate) struct DryRunArgs {
    /// Print what the run is going to be (parameters, memory, data, schedule, first batches; of pre-training FLOPs too), draw the first
    /// batches into first-batch.png if there is an --out, and stop
    #[arg(long, conflicts_with_all = ["resume", "ranks", "print_config"])]
    pub(crate) dry_run: bool,
    /// Number of processes that a --dry-run is about
    #[arg(long, value_name = "N", requires = "dry_run", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) processes: Option<u16>,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    plan: &'a Plan,
    /// The estimates of all memory of the device and of the host, in bytes.
    memory_device: u64,
    memory_host: u64,
    first_batches: Vec<First>,
    /// The pictures of the first batches, if they were to be drawn.
    picture: Option<PathBuf>,
}

/// A stream's first batch.
#[derive(Serialize)]
struct First {
    stream: &'static str,
    pictures: usize,
    texts: usize,
    /// Tokens of the longest.
    tokens: usize,
    samples: Vec<Sample>,
}

/// Plans a run of `ranks` processes on the CPU or on GPUs and prints the plan; `first-batch.png` goes to the folder `out`, if there is one.
pub(crate) fn run(
    config: &PretrainConfig,
    ranks: usize,
    on_gpu: bool,
    out: Option<&Path>,
    json: bool,
) -> Result<(), CliError> {
    let (plan, first) = plan::plan(config, ranks, on_gpu, &mut Training::new())?;
    let FirstBatches { captions, regions, builder } = first;
    let side = builder.config().resolution;
    let tokenizer = builder.tokenizer();
    let mut batches = Vec::new();
    let (texts, tokens) = (captions.text.rows, captions.text.len);
    // A text a picture.
    let masked = masked(&captions.text, tokenizer).into_iter();
    let mut samples = inspect::of_captions(captions, side);
    samples.iter_mut().zip(masked).for_each(|(sample, masked)| sample.texts[0].masked = Some(masked));
    batches.push(First { stream: "captions", pictures: samples.len(), texts, tokens, samples });
    if let Some(regions) = regions {
        let (texts, tokens) = (regions.text.rows, regions.text.len);
        let mut masked: Vec<Option<String>> = self::masked(&regions.text, tokenizer).into_iter().map(Some).collect();
        let rows = regions.image_index.clone();
        let mut samples = inspect::of_regions(regions, side);
        // The texts of a picture are in the order of the batch.
        for (image, sample) in samples.iter_mut().enumerate() {
            let of_image = (0..rows.len()).filter(|&row| rows[row] as usize == image);
            sample.texts.iter_mut().zip(of_image).for_each(|(shown, row)| shown.masked = masked[row].take());
        }
        batches.push(First { stream: "regions", pictures: samples.len(), texts, tokens, samples });
    }
    let picture = out.map(|out| out.join("first-batch.png"));
    if let (Some(out), Some(path)) = (out, &picture) {
        std::fs::create_dir_all(out).map_err(CliError::io(out))?;
        let drawn = batches.iter().flat_map(|first| first.samples.iter().take(DRAWN));
        output::write(path, &inspect::sheet(&drawn.collect::<Vec<_>>(), side as u32).to_png()?)?;
    }
    let [memory_device, memory_host] = [plan.memory.device(), plan.memory.host()];
    let report = Report { plan: &plan, memory_device, memory_host, first_batches: batches, picture };
    output::print(json, &report, text)
}

/// Texts as the model sees those whose blanks it is to fill.
fn masked(batch: &TextBatch, tokenizer: &TextTokenizer) -> Vec<String> {
    let row = |ids: &[u32], mask: &[f32]| {
        let seen = ids.iter().zip(mask).filter(|(_, seen)| **seen > 0.0);
        seen.filter_map(|(&id, _)| tokenizer.id_to_token(id)).collect::<Vec<_>>().join(" ")
    };
    let length = batch.len.max(1);
    batch.masked_ids.chunks(length).zip(batch.mask.chunks(length)).map(|(ids, mask)| row(ids, mask)).collect()
}

fn text(report: &Report) -> String {
    let Plan { parameters, memory, streams, flops_per_iteration, schedule } = report.plan;
    let mut rows = Rows::new();
    of_parameters(&mut rows, parameters);
    of_memory(&mut rows, memory);
    of_work(&mut rows, streams, *flops_per_iteration);
    of_data(&mut rows, streams);
    of_schedule(&mut rows, schedule);
    let mut text = output::table(&rows);
    for First { stream, pictures, texts, tokens, samples } in &report.first_batches {
        let shown = &samples[..PRINTED.min(samples.len())];
        text += &format!(
            "First batch of {stream}: {pictures} pictures, {texts} texts of at most {tokens} tokens{}\n{}\n",
            if shown.len() < samples.len() { format!("; the first {} pictures:", shown.len()) } else { ":".to_owned() },
            inspect::list(shown),
        );
    }
    if let Some(path) = &report.picture {
        text += &format!("Drawn in {}\n", path.display());
    }
    text
}

#[derive(Serialize)]
struct FinetuneReport<'a> {
    #[serde(flatten)]
    plan: &'a FinetunePlan,
    /// All memory of the device but that of activations, in bytes.
    memory_device: u64,
    first_batch: Vec<Sample>,
    /// The pictures of the first batch, if they were to be drawn.
    picture: Option<PathBuf>,
}

/// The same for a run of fine-tuning, from the model `start` if the configuration names none.
pub(crate) fn finetuning(
    config: &FinetuneConfig,
    start: Option<&ModelFiles>,
    ranks: usize,
    on_gpu: bool,
    out: Option<&Path>,
    json: bool,
) -> Result<(), CliError> {
    let (plan, first) = finetune::plan(config, start, ranks, on_gpu, &mut Training::new())?;
    let FirstBatch { pixels, side, pictures } = first;
    let shown = |said: finetune::Said| Shown::new(said.text, said.bounds.map(|bounds| inspect::edges(bounds, side)));
    let texts = pictures.into_iter().map(|said| said.into_iter().map(shown).collect());
    let first_batch = inspect::of_pixels(&pixels, side, texts);
    let picture = out.map(|out| out.join("first-batch.png"));
    if let (Some(out), Some(path)) = (out, &picture) {
        std::fs::create_dir_all(out).map_err(CliError::io(out))?;
        let drawn: Vec<&Sample> = first_batch.iter().take(DRAWN).collect();
        output::write(path, &inspect::sheet(&drawn, side as u32).to_png()?)?;
    }
    let report = FinetuneReport { memory_device: plan.memory.sum(), plan: &plan, first_batch, picture };
    output::print(json, &report, finetuning_text)
}

fn finetuning_text(report: &FinetuneReport) -> String {
    let FinetunePlan { task, parameters, fresh, memory, data, schedule } = report.plan;
    let mut rows = Rows::new();
    of_parameters(&mut rows, parameters);
    row(&mut rows, "tensors that start from random numbers", fresh.len().to_string());
    let TrainingState { weights, masters, gradients, reduction, moments, ema, pixels } = *memory;
    heading(&mut rows, "Memory of a process on the device, beside activations");
    for (name, bytes) in [
        ("weights", weights),
        ("f32 masters, beyond the weights", masters),
        ("means of weights", ema),
        ("gradients on their way, about", reduction),
        ("gradients", gradients),
        ("moments", moments),
        ("pixels of a step", pixels),
        ("together", memory.sum()),
    ] {
        if bytes > 0 {
            row(&mut rows, name, size(bytes));
        }
    }
    let TrainingItems { items, items_per_step, epochs, validated } = *data;
    heading(&mut rows, &format!("Data of {task}"));
    row(&mut rows, "items of an epoch", thousands(items));
    row(&mut rows, "effective batch, items", thousands(items_per_step));
    row(&mut rows, "epochs", format!("{epochs:.2}"));
    row(&mut rows, "checkpoints are validated", if validated { "yes" } else { "no" });
    of_schedule(&mut rows, schedule);
    let shown = &report.first_batch[..PRINTED.min(report.first_batch.len())];
    let mut text = output::table(&rows);
    text +=
        &format!("First batch: {} pictures, the first of them:\n{}\n", report.first_batch.len(), inspect::list(shown));
    if let Some(path) = &report.picture {
        text += &format!("Drawn in {}\n", path.display());
    }
    text
}

fn heading(rows: &mut Rows, text: &str) {
    rows.push((text.to_owned(), None));
}

fn row(rows: &mut Rows, name: impl Into<String>, value: impl Into<String>) {
    rows.push((name.into(), Some(value.into())));
}

fn of_parameters(rows: &mut Rows, counts: &ParameterCounts) {
    heading(rows, "Parameters");
    row(rows, "total", thousands(counts.total));
    row(rows, "trainable", thousands(counts.trainable));
    row(rows, "frozen", thousands(counts.frozen));
    for (part, count) in &counts.parts {
        let name = if *part == Part::Heads { "projections and heads" } else { part.name() };
        row(rows, name, thousands(*count));
    }
    for group in &counts.groups {
        let name = format!("lr {:.1e}, weight decay {}", group.lr, group.weight_decay);
        row(rows, name, format!("{} in {} tensors", thousands(group.parameters), group.tensors));
    }
}

fn of_memory(rows: &mut Rows, memory: &Memory) {
    heading(rows, "Memory of a process, estimated, with the largest batch: on the device");
    let more = [
        ("f32 masters, beyond the weights", memory.masters),
        ("means of weights", memory.ema),
        ("gradients on their way, about", memory.reduction),
    ];
    row(rows, "weights", size(memory.weights));
    more.into_iter().filter(|(_, bytes)| *bytes > 0).for_each(|(name, bytes)| row(rows, name, size(bytes)));
    row(rows, "gradients", size(memory.gradients));
    row(rows, "moments", size(memory.moments));
    let chosen = |recomputed: bool| {
        let is_chosen = (memory.activations == memory.activations_recomputed) == recomputed;
        if is_chosen { " (as configured)" } else { "" }
    };
    row(rows, format!("activations, kept{}", chosen(false)), size(memory.activations_kept));
    row(rows, format!("activations, recomputed{}", chosen(true)), size(memory.activations_recomputed));
    row(rows, "batches of an iteration", size(memory.batches));
    row(rows, "together, as configured", size(memory.device()));
    heading(rows, "Memory of a process, estimated: on the host (beside that of the device, if this is the CPU)");
    row(rows, "batches built ahead", size(memory.batches_ahead));
    row(rows, "decoded images, at most", size(memory.image_cache));
    row(rows, "together", size(memory.host()));
}

fn of_work(rows: &mut Rows, streams: &[Stream], per_iteration: f64) {
    heading(rows, "FLOPs of a process, estimated, forward and backward");
    for stream in streams {
        row(rows, format!("step of {}, largest", stream.name), metric(stream.flops_per_step, "FLOP"));
        row(rows, format!("step of {}, first batch", stream.name), metric(stream.flops_of_first_batch, "FLOP"));
    }
    row(rows, "iteration, largest", metric(per_iteration, "FLOP"));
}

fn of_data(rows: &mut Rows, streams: &[Stream]) {
    let unknown = || "not known before the shards were looked through".to_owned();
    for stream in streams {
        heading(rows, &format!("Data of {}", stream.name));
        let what = if stream.name == "captions" { "records with captions" } else { "records with boxes" };
        row(rows, what, stream.records.map_or_else(unknown, thousands));
        row(rows, "shards", thousands(stream.shards as u64));
        row(rows, "effective batch, images", thousands(stream.images_per_step));
        row(rows, "effective batch, texts", thousands(stream.texts_per_step));
        row(rows, "epochs", stream.epochs.map_or_else(unknown, |epochs| format!("{epochs:.2}")));
    }
}

fn of_schedule(rows: &mut Rows, schedule: &Schedule) {
    heading(rows, "Schedule");
    let limit = schedule.time_limit_minutes;
    row(rows, if limit.is_some() { "iterations, at most" } else { "iterations" }, thousands(schedule.iterations));
    if let Some(minutes) = limit {
        row(rows, "time limit, minutes", minutes.to_string());
    }
    row(rows, "warm-up, iterations", thousands(schedule.warmup));
    let rate = |rate: f64| if rate == 0.0 { "0".to_owned() } else { format!("{rate:.1e}") };
    row(rows, "highest learning rate", rate(schedule.peak_lr));
    row(rows, "last learning rate", rate(schedule.final_lr));
    row(rows, "batches of an optimizer step", format!("{} × {} processes", schedule.accumulate, schedule.ranks));
}

/// A count with a space between thousands.
fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let from_end = |i: usize| digits.len() - i;
    digits.chars().enumerate().fold(String::new(), |mut text, (i, digit)| {
        if i > 0 && from_end(i).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
        text
    })
}

fn size(bytes: u64) -> String {
    match bytes as f64 / (1u64 << 20) as f64 {
        mebibytes @ 10_240.0.. => format!("{:.1} GiB", mebibytes / 1024.0),
        mebibytes => format!("{mebibytes:.1} MiB"),
    }
}

/// A number with a prefix of the SI.
fn metric(number: f64, unit: &str) -> String {
    let prefixes = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (factor, prefix) = prefixes.into_iter().find(|(factor, _)| number >= *factor).unwrap_or((1.0, ""));
    format!("{:.2} {prefix}{unit}", number / factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_legible() {
        assert_eq!([0, 999, 1000, 216_123_456].map(thousands), ["0", "999", "1 000", "216 123 456"]);
        assert_eq!([512 << 10, 20 << 30].map(size), ["0.5 MiB", "20.0 GiB"]);
        assert_eq!(metric(1.234e13, "FLOP"), "12.34 TFLOP");
        assert_eq!(metric(12.0, "FLOP"), "12.00 FLOP");
    }
}
