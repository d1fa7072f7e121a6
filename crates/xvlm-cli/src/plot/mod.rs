//! `xvlm plot`: losses of runs as a figure.

mod figure;
mod scene;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use xvlm::train::{LossCurve, loss_curves, read_metrics};

use self::figure::{Look, Panel};
use self::scene::Scene;
use crate::output::{self, CliError};

/// Draw the losses of one or several runs: a panel a loss, a curve a run
///
/// Behind each running mean stand the values it is taken over. A run may still be under way.
#[derive(Args)]
pub(crate) struct Plot {
    /// Folders of runs, or their metrics.jsonl
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// PNG or SVG file to write
    #[arg(long, value_name = "FILE", default_value = "losses.png")]
    out: PathBuf,
    /// Draw this loss only; repeatable
    #[arg(long = "loss", value_name = "NAME")]
    losses: Vec<String>,
    /// Share of the iterations that running means are taken over, from 0 (none) to 1
    #[arg(long, value_name = "F", default_value_t = Look::default().smooth)]
    smooth: f64,
    /// Logarithmic losses
    #[arg(long)]
    log: bool,
    /// Print what was drawn as JSON
    #[arg(long)]
    json: bool,
}

/// What was drawn.
#[derive(Serialize)]
struct Drawn<'a> {
    out: &'a Path,
    runs: Vec<DrawnRun<'a>>,
}

#[derive(Serialize)]
struct DrawnRun<'a> {
    name: &'a str,
    metrics: &'a Path,
    iterations: u64,
    losses: BTreeMap<&'a str, Ends>,
}

/// Where a loss began and ended, and its lowest value. Each is a mean over the iterations of a row of metrics.
#[derive(Serialize)]
struct Ends {
    first: f64,
    last: f64,
    lowest: f64,
    lowest_at: u64,
}

/// A run to be drawn.
struct Run {
    name: String,
    metrics: PathBuf,
    curves: Vec<LossCurve>,
}

impl Run {
    /// Reads the metrics of a run, or the file that holds them.
    fn open(path: &Path) -> Result<Self, CliError> {
        let metrics = if path.is_dir() { path.join("metrics.jsonl") } else { path.to_path_buf() };
        if path.is_dir() && !metrics.exists() {
            let expected = "a folder of a run, with metrics.jsonl";
            return Err(CliError::File { path: path.to_path_buf(), expected, found: "none".to_owned() });
        }
        let curves = loss_curves(&read_metrics(&metrics)?);
        if curves.is_empty() {
            let found = "none yet".to_owned();
            return Err(CliError::File { path: metrics, expected: "a row of metrics with losses", found });
        }
        // `.` has a name too.
        let folder = metrics.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = folder.canonicalize().map_err(CliError::io(folder))?;
        let name = folder.file_name().map_or_else(|| metrics.display().to_string(), |name| name.display().to_string());
        Ok(Self { name, metrics, curves })
    }

    fn points(&self, loss: &str) -> &[(u64, f64)] {
        self.curves.iter().find(|curve| curve.name == loss).map_or(&[], |curve| &curve.points)
    }

    fn drawn<'a>(&'a self, losses: &[&'a str]) -> DrawnRun<'a> {
        let ends = |&loss: &&'a str| {
            let points = self.points(loss);
            let (first, last) = (points.first()?.1, points.last()?.1);
            let &(lowest_at, lowest) = points.iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
            Some((loss, Ends { first, last, lowest, lowest_at }))
        };
        let last = |curve: &LossCurve| curve.points.last().map_or(0, |point| point.0);
        DrawnRun {
            name: &self.name,
            metrics: &self.metrics,
            iterations: self.curves.iter().map(last).max().unwrap_or(0),
            losses: losses.iter().filter_map(ends).collect(),
        }
    }
}

/// Two forms of a file.
#[derive(Clone, Copy)]
enum Format {
    Png,
    Svg,
}

impl Format {
    fn of(path: &Path) -> Result<Self, CliError> {
        match path.extension().and_then(|extension| extension.to_str()).map(str::to_lowercase).as_deref() {
            Some("png") => Ok(Self::Png),
            Some("svg") => Ok(Self::Svg),
            _ => {
                let found = path.display().to_string();
                Err(CliError::Option { option: "--out", expected: "a name that ends in .png or .svg", found })
            }
        }
    }

    fn write(self, scene: &Scene, path: &Path) -> Result<(), CliError> {
        match self {
            Self::Png => {
                let picture = scene.picture().ok_or_else(|| CliError::File {
                    path: path.to_path_buf(),
                    expected: "a figure that a picture can hold",
                    found: format!("{} by {} units", scene.width, scene.height),
                })?;
                output::write(path, &picture.to_png()?)
            }
            Self::Svg => output::write(path, scene.svg().as_bytes()),
        }
    }
}

impl Plot {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let format = Format::of(&self.out)?;
        if !(0.0..=1.0).contains(&self.smooth) {
            let found = self.smooth.to_string();
            return Err(CliError::Option { option: "--smooth", expected: "a share, from 0 to 1", found });
        }
        let mut runs = self.runs.iter().map(|path| Run::open(path)).collect::<Result<Vec<_>, _>>()?;
        refuse_twice(&runs)?;
        tell_apart(&mut runs);
        let losses = chosen(&runs, &self.losses)?;
        format.write(&scene(&runs, &losses, Look { smooth: self.smooth, log: self.log }), &self.out)?;
        let drawn = Drawn { out: &self.out, runs: runs.iter().map(|run| run.drawn(&losses)).collect() };
        output::print(self.json, &drawn, |drawn| {
            let mut rows = vec![(drawn.out.display().to_string(), None)];
            for run in &drawn.runs {
                rows.push((format!("{}, {} iterations", run.name, run.iterations), None));
                rows.extend(run.losses.iter().map(|(loss, ends)| ((*loss).to_owned(), Some(told(ends)))));
            }
            output::table(&rows)
        })
    }
}

fn told(ends: &Ends) -> String {
    let Ends { first, last, lowest, lowest_at } = ends;
    format!("{first:.4} → {last:.4}, lowest {lowest:.4} at {lowest_at}")
}

/// Gives runs of the same name the paths of their metrics as names.
fn tell_apart(runs: &mut [Run]) {
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    for run in runs.iter_mut().filter(|run| names.iter().filter(|name| **name == run.name).count() > 1) {
        run.name = run.metrics.display().to_string();
    }
}

/// Refuses a run that is given twice, be it by two paths.
fn refuse_twice(runs: &[Run]) -> Result<(), CliError> {
    let mut seen = BTreeSet::new();
    for Run { metrics, .. } in runs {
        if !seen.insert(metrics.canonicalize().map_err(CliError::io(metrics))?) {
            let found = format!("{} twice", metrics.display());
            return Err(CliError::Option { option: "RUN", expected: "each run once", found });
        }
    }
    Ok(())
}

/// The losses to be drawn, each once: those that were asked for, or all, those of whole images before those of regions.
fn chosen<'a>(runs: &'a [Run], asked: &'a [String]) -> Result<Vec<&'a str>, CliError> {
    let known: BTreeSet<&str> =
        runs.iter().flat_map(|run| run.curves.iter().map(|curve| curve.name.as_str())).collect();
    match asked.iter().find(|loss| !known.contains(loss.as_str())) {
        Some(loss) => {
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            Err(CliError::Choice { option: "--loss", known, found: loss.clone() })
        }
        None if asked.is_empty() => {
            let mut all: Vec<&str> = known.into_iter().collect();
            all.sort_by_key(|loss| loss.starts_with("region_"));
            Ok(all)
        }
        None => {
            let mut seen = BTreeSet::new();
            Ok(asked.iter().map(String::as_str).filter(|loss| seen.insert(*loss)).collect())
        }
    }
}

fn scene(runs: &[Run], losses: &[&str], look: Look) -> Scene {
    let points = |points: &[(u64, f64)]| points.iter().map(|&(iteration, loss)| (iteration as f64, loss)).collect();
    let panel = |&loss: &&str| Panel {
        title: loss.to_owned(),
        curves: runs.iter().map(|run| points(run.points(loss))).collect(),
    };
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    figure::figure(&losses.iter().map(panel).collect::<Vec<_>>(), &names, look)
}

/// Draws a run's losses into its folder: `losses.png` and `losses.svg`.
pub(crate) fn write_into(run: &Path) -> Result<(), CliError> {
    let runs = [Run::open(run)?];
    let scene = scene(&runs, &chosen(&runs, &[])?, Look::default());
    Format::Png.write(&scene, &run.join("losses.png"))?;
    Format::Svg.write(&scene, &run.join("losses.svg"))
}

/// A small plot of one loss, to stand in a page.
pub(crate) fn curve(curve: &LossCurve) -> String {
    let points = curve.points.iter().map(|&(iteration, loss)| (iteration as f64, loss)).collect();
    let panel = Panel { title: curve.name.clone(), curves: vec![points] };
    figure::single(&panel, format!("loss {}", curve.name), Look::default()).svg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, losses: &[&str]) -> Run {
        let curve = |name: &&str| LossCurve { name: (*name).to_owned(), points: vec![(50, 2.0), (100, 1.0)] };
        let metrics = Path::new("runs").join(name).join("metrics.jsonl");
        Run { name: name.to_owned(), metrics, curves: losses.iter().map(curve).collect() }
    }

    #[test]
    fn losses_of_all_runs_are_drawn() {
        let runs = [run("a", &["itc", "region_itc"]), run("b", &["mlm", "giou"])];
        assert_eq!(chosen(&runs, &[]).unwrap(), ["giou", "itc", "mlm", "region_itc"]);
        assert_eq!(chosen(&runs, &["mlm", "itc", "mlm"].map(str::to_owned)).unwrap(), ["mlm", "itc"]);
        let error = chosen(&runs, &["itm".to_owned()]).unwrap_err().to_string();
        assert_eq!(error, "--loss: expected one of giou, itc, mlm, region_itc, found itm");
    }

    #[test]
    fn runs_of_one_name_are_told_apart() {
        let mut runs = [run("a", &[]), run("b", &[]), run("a", &[])];
        tell_apart(&mut runs);
        assert!(runs[0].name.ends_with("metrics.jsonl") && runs[2].name.ends_with("metrics.jsonl"));
        assert_eq!(runs[1].name, "b");
    }
}
