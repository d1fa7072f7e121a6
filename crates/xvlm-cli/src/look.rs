//! Questions about pictures: which pictures, who is asked, and where the answers go.

use std::path::{Path, PathBuf};

use clap::Args;
use rayon::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xvlm::data::DataError;
use xvlm::tasks::embed::Pictures;
use xvlm::tasks::sweep::{Answers, LeftOut, Sweep, Work};
use xvlm::{Bundled, Picture, PixelBox, Predictor};

use crate::output::{self, CliError, Rows, table};
use crate::sweep::{SweepArgs, Swept};
use crate::{ModelArgs, share};

/// Pictures at a time: they are in memory with all their pixels.
const BATCH: usize = 16;

/// The pictures, who looks at them, and where the answers go.
#[derive(Args)]
pub(crate) struct Look {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    pub(crate) sweep: SweepArgs,
    /// Share of broken pictures that may be left out; they are counted and named [default: 0]
    #[arg(long, value_name = "SHARE", value_parser = share::<f64>)]
    pub(crate) max_bad_fraction: Option<f64>,
    /// Print the result as JSON: a list with an object for each picture; with --out a summary, and the list is in the result file
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which pictures.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// Picture (JPEG, PNG, WebP or GIF); several may be given
    #[arg(long = "image", value_name = "FILE", num_args = 1..)]
    files: Vec<PathBuf>,
    /// Folder of pictures, with all below it
    #[arg(long = "images", value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Text file with a path of a picture a line, relative to the folder of the file
    #[arg(long, value_name = "FILE")]
    list: Option<PathBuf>,
}

/// What was found out about one picture.
#[derive(Serialize, Deserialize)]
pub(crate) struct About<T> {
    /// The path, with a sign for what is not UTF-8.
    pub(crate) image: String,
    width: u32,
    height: u32,
    pub(crate) results: Vec<T>,
}

/// What is asked of each picture.
pub(crate) struct Question {
    /// Names the files of answers and of the result.
    pub(crate) name: &'static str,
    /// What the answers depend on.
    pub(crate) options: Value,
}

/// Pictures that can be asked about.
pub(crate) struct Asking<'a, 'c> {
    pub(crate) predictor: &'a Predictor,
    sweep: &'a mut Sweep<'c>,
    images: &'a [PathBuf],
}

/// What was found out about all pictures.
pub(crate) struct Found<T> {
    name: &'static str,
    about: Vec<About<T>>,
    left_out: Vec<LeftOut>,
}

#[derive(Serialize)]
struct Summary<'a> {
    result_file: PathBuf,
    pictures: usize,
    left_out: &'a [LeftOut],
}

impl Look {
    /// The pictures.
    pub(crate) fn images(&self) -> Result<Vec<PathBuf>, CliError> {
        Ok(match (&self.which.folder, &self.which.list) {
            (Some(folder), _) => Pictures::folder(folder)?.paths(),
            (None, Some(file)) => Pictures::list(file)?.paths(),
            (None, None) => self.which.files.clone(),
        })
    }

    /// Whether it is about one picture that is named, not about those that happen to be in a folder or a list.
    pub(crate) fn is_of_one(&self) -> bool {
        self.which.files.len() == 1
    }

    /// Opens the model and lets `ask` ask about `images`; nothing where another process tells the result.
    pub(crate) fn ask<T>(
        &self,
        built_in: Bundled,
        images: &[PathBuf],
        ask: impl FnOnce(Asking) -> Result<Found<T>, CliError>,
    ) -> Result<Option<Found<T>>, CliError> {
        let (model, max_bad_fraction) = (&self.model, self.max_bad_fraction.unwrap_or(0.0));
        let is_one = images.len() == 1;
        let swept = Swept { units: "pictures", model, built_in, from: None, max_bad_fraction, is_one };
        self.sweep.run(swept, |predictor, sweep| ask(Asking { predictor, sweep, images }))
    }

    /// Prints what was found: a table, with a heading for each picture if there are several; or files it, if there is --out.
    pub(crate) fn tell<T: Serialize>(
        &self,
        found: Option<Found<T>>,
        rows: impl Fn(usize, &T) -> Rows,
    ) -> Result<(), CliError> {
        self.tell_as(found, |about, several| {
            let mut all = Rows::new();
            for of_one in about {
                if several {
                    all.push((of_one.image.clone(), None));
                }
                all.extend(of_one.results.iter().enumerate().flat_map(|(i, result)| rows(i, result)));
            }
            table(&all)
        })
    }

    /// The same with another text for people; `text` is told whether there were several pictures, some of which may be left out.
    pub(crate) fn tell_as<T: Serialize>(
        &self,
        found: Option<Found<T>>,
        text: impl FnOnce(&[About<T>], bool) -> String,
    ) -> Result<(), CliError> {
        let Some(Found { name, about, left_out }) = found else { return Ok(()) };
        for LeftOut { problem, .. } in left_out.iter().take(8) {
            output::say(&format!("left out: {problem}"));
        }
        let asked = about.len() + left_out.len();
        if !left_out.is_empty() {
            output::say(&format!("left out: {} of {asked} pictures", left_out.len()));
        }
        match self.sweep.write_json(&format!("{name}.json"), &about)? {
            Some(result_file) => {
                let summary = Summary { result_file, pictures: about.len(), left_out: &left_out };
                output::print(self.json, &summary, |summary| {
                    table(&[
                        ("pictures".to_owned(), Some(summary.pictures.to_string())),
                        ("left out".to_owned(), Some(summary.left_out.len().to_string())),
                        (format!("result file: {}", summary.result_file.display()), None),
                    ])
                })?;
            }
            None => output::print(self.json, &about, |about| text(about, asked > 1))?,
        }
        match about.is_empty() {
            true => Err(CliError::Broken { what: "pictures", count: left_out.len() }),
            false => Ok(()),
        }
    }
}

impl Asking<'_, '_> {
    /// Asks `ask` about some pictures at a time, given with their numbers. A picture that cannot be opened or that `check`
    /// refuses is left out; if none may be, it ends the work.
    pub(crate) fn of_each<T: Serialize + DeserializeOwned>(
        self,
        question: Question,
        check: impl Fn(&Path, &Picture) -> Result<(), DataError> + Sync,
        ask: impl Fn(&[usize], Vec<Picture>) -> Result<Vec<Vec<T>>, xvlm::Error>,
    ) -> Result<Found<T>, CliError> {
        let Question { name, options } = question;
        let work = Work { name, options, batch: BATCH };
        let strict = self.sweep.max_bad_fraction <= 0.0;
        let units: Vec<(usize, &PathBuf)> = self.images.iter().enumerate().collect();
        let name_of = |(_, image): &(usize, &PathBuf)| image.display().to_string();
        let answers = self.sweep.run(&work, &units, name_of, |units| {
            let open = |(_, image): &&(usize, &PathBuf)| {
                let picture = Picture::open_upright(image)?;
                check(image, &picture).map(|()| picture)
            };
            let opened: Vec<Result<Picture, DataError>> = units.par_iter().map(open).collect();
            let (mut pictures, mut numbers, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
            for (opened, (number, _)) in opened.into_iter().zip(units) {
                match opened {
                    Err(error) if strict => return Err(error.into()),
                    Err(error) => sizes.push(Err(error)),
                    Ok(picture) => {
                        sizes.push(Ok((picture.width(), picture.height())));
                        numbers.push(*number);
                        pictures.push(picture);
                    }
                }
            }
            let found = if pictures.is_empty() { Vec::new() } else { ask(&numbers, pictures)? };
            assert_eq!(found.len(), numbers.len(), "a picture that is asked about has results of its own");
            let mut found = found.into_iter();
            let answers = sizes.into_iter().zip(units).filter_map(|(size, (_, image))| match size {
                Err(error) => Some(Err(error)),
                Ok((width, height)) => {
                    let image = image.to_string_lossy().into_owned();
                    found.next().map(|results| Ok(About { image, width, height, results }))
                }
            });
            Ok(answers.collect())
        })?;
        let Answers { given, left_out } = answers;
        Ok(Found { name, about: given.into_iter().flatten().collect(), left_out })
    }
}

/// A box in pixels, as results for people have it and `--box` takes it.
pub(crate) fn edges(bounds: &PixelBox) -> String {
    [bounds.xmin, bounds.ymin, bounds.xmax, bounds.ymax].map(|edge| format!("{edge:.1}")).join(",")
}

pub(crate) fn percent(probability: f32) -> String {
    format!("{:.1} %", 100.0 * probability)
}

/// The texts of `--text`, each with at least one word.
pub(crate) fn worded(texts: &[String]) -> Result<Vec<&str>, CliError> {
    let word = |text: &String| text.chars().any(char::is_alphanumeric);
    match texts.iter().find(|text| !word(text)) {
        Some(text) => {
            let found = format!("{text:?}");
            Err(CliError::Option { option: "--text", expected: "at least one word", found })
        }
        None => Ok(texts.iter().map(String::as_str).collect()),
    }
}

/// For pictures that need no check.
pub(crate) fn any(_: &Path, _: &Picture) -> Result<(), DataError> {
    Ok(())
}
