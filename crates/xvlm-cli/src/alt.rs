//! `xvlm alt`: alternative texts for those who do not see pictures.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use xvlm::alt::{
    self, Alt as AltText, Choice, Describer, Document, Edited, Entry, Format, Outcome, Page, Phrasing, Report, fill_in,
    is_picture,
};
use xvlm::{Picture, Predictor, Written};

use crate::caption::WritingArgs;
use crate::output::{self, CliError, say};
use crate::progress::Stage;
use crate::{ModelArgs, share, signals};

/// Write alternative texts: descriptions of pictures for those who do not see them
#[derive(Args)]
pub(crate) struct Alt {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Documents(Documents),
    Pictures(Pictures),
}

impl Alt {
    pub(crate) fn run(self) -> Result<(), CliError> {
        match self.what {
            What::Documents(command) => command.run(),
            What::Pictures(command) => command.run(),
        }
    }
}

/// Who describes, and how.
#[derive(Args)]
struct DescribeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    writing: WritingArgs,
    /// What stands before each description
    #[arg(long, value_name = "TEXT", default_value = "")]
    prefix: String,
    /// What stands after each description, such as " (written by a machine)"
    #[arg(long, value_name = "TEXT", default_value = "")]
    suffix: String,
    /// Leave descriptions as the model writes them, without capital letter and full stop
    #[arg(long)]
    plain: bool,
    /// Descriptions of which the model is less sure (0 to 1) are reported, but not written
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share::<f32>)]
    min_confidence: f32,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl DescribeArgs {
    fn describer(&self) -> Describer {
        let (prefix, suffix) = (self.prefix.clone(), self.suffix.clone());
        Describer::new(Phrasing { sentence: !self.plain, prefix, suffix }, self.min_confidence)
    }

    /// What describes pictures, until it is asked to stop, for which it listens if something `is_kept` of what is done.
    fn describe(
        &self,
        predictor: &Predictor,
        is_kept: bool,
    ) -> Result<impl FnMut(&[Picture]) -> Result<Vec<Written>, CliError>, CliError> {
        let writing = self.writing.of(predictor.writing());
        let stop = if is_kept { signals::asked_to_stop("what is at hand")? } else { Arc::default() };
        Ok(move |pictures: &[Picture]| match stop.load(Ordering::Relaxed) {
            true => Err(CliError::Stopped),
            false => Ok(predictor.captions(pictures, &writing)?),
        })
    }
}

/// Write the alt that images of HTML and Markdown files lack
///
/// An image without alt gets one; an empty alt says that the image is decoration, and is left as it is, like every other byte of
/// the file. Comments, scripts, templates and code are left alone. Images on other machines (http, https) are counted, not looked
/// at. If an image is missing or broken, the exit code tells.
///
/// With --in-place, files are written while the work goes on: after an interruption, the same command goes on, as images that have a
/// description by now are left alone (with --replace it begins anew).
#[derive(Args)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["in_place", "out", "dry_run"]))]
struct Documents {
    /// HTML or Markdown file, or a folder of them; several may be given
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
    /// Write into the files
    #[arg(long)]
    in_place: bool,
    /// Write to this file; of several files or a folder, into this folder
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Write nothing, only say what would be written
    #[arg(long)]
    dry_run: bool,
    /// Describe images with an empty alt too
    #[arg(long)]
    decorative: bool,
    /// Replace descriptions that are there
    #[arg(long)]
    replace: bool,
    /// Folder that addresses with a / in front begin in [default: the folder given]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    #[command(flatten)]
    describe: DescribeArgs,
}

/// A file that may lack descriptions.
struct File {
    path: PathBuf,
    /// Its place in the folder that was given.
    inside: PathBuf,
    root: Option<PathBuf>,
    format: Format,
}

#[derive(Serialize)]
struct Done<'a> {
    document: &'a Path,
    images: usize,
    described_before: usize,
    decorative: usize,
    /// Descriptions that are, or would be, written.
    written: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    reports: Vec<Report>,
}

#[derive(Serialize)]
struct Summary<'a> {
    documents: Vec<Done<'a>>,
    /// Different pictures that were looked at.
    pictures: usize,
    /// How many images had which outcome.
    outcomes: BTreeMap<&'static str, usize>,
    /// Whether descriptions were written into files.
    changed: bool,
}

impl Documents {
    fn run(self) -> Result<(), CliError> {
        let files = self.files()?;
        let mut describer = self.describe.describer();
        let (mut opened, mut contents): (Vec<Result<Document, String>>, Vec<Vec<u8>>) = Default::default();
        for file in &files {
            let read = fs::read(&file.path).map_err(|error| error.to_string()).and_then(|content| {
                let document = Document::read(file.format, content.clone()).map_err(|problem| problem.to_string())?;
                contents.push(content);
                Ok(document)
            });
            opened.push(read);
        }
        let predictor = self.describe.model.open()?;
        let mut describe = self.describe.describe(&predictor, !self.dry_run)?;
        let choice = Choice { decorative: self.decorative, given: self.replace };
        let readable = files.iter().zip(&opened).filter_map(|(file, read)| Some((file, read.as_ref().ok()?)));
        let readable: Vec<(&File, &Document)> = readable.collect();
        let pages = readable.iter().map(|&(file, document)| {
            let (path, root) = (file.path.as_path(), file.root.as_deref());
            Page { path, document, root }
        });
        let pages: Vec<Page> = pages.collect();
        let mut write = |number: usize, edited: &Edited, is_done: bool| {
            let content: &mut Vec<u8> = &mut contents[number];
            if self.write(readable[number].0, content, edited, is_done)? {
                content.clone_from(&edited.content);
            }
            Ok(())
        };
        let filled = Stage::run("images", |at| fill_in(&pages, choice, &mut describer, &mut describe, &mut write, at))?;
        let mut filled = filled.into_iter();
        let mut documents = Vec::new();
        for (file, read) in files.iter().zip(&opened) {
            let filled = read.as_ref().map(|read| (read, filled.next().unwrap_or_default()));
            documents.push(match filled {
                Ok((document, (reports, edited))) => {
                    let with = |alt| document.images().iter().filter(|image| image.alt == alt).count();
                    Done {
                        document: &file.path,
                        images: document.images().len(),
                        described_before: with(AltText::Given),
                        decorative: with(AltText::Decorative),
                        written: edited.changes.len(),
                        problem: None,
                        reports,
                    }
                }
                Err(problem) => Done {
                    document: &file.path,
                    images: 0,
                    described_before: 0,
                    decorative: 0,
                    written: 0,
                    problem: Some(problem.clone()),
                    reports: Vec::new(),
                },
            });
        }
        let mut outcomes = BTreeMap::new();
        for report in documents.iter().flat_map(|done| &done.reports) {
            *outcomes.entry(report.outcome.name()).or_default() += 1;
        }
        let unread = documents.iter().filter(|done| done.problem.is_some()).count();
        let broken = outcomes.get("broken").copied().unwrap_or_default();
        let written: usize = documents.iter().map(|done| done.written).sum();
        let changed = !self.dry_run && written > 0;
        let summary = Summary { documents, pictures: describer.pictures(), outcomes, changed };
        output::print(self.describe.json, &summary, |summary| {
            let mut text = String::new();
            for done in &summary.documents {
                let name = done.document.display();
                text.extend(done.problem.iter().map(|problem| format!("{name}: {problem}\n")));
                for report in &done.reports {
                    let source = report.source.as_deref().map(shortened).unwrap_or_default();
                    text += &format!("{name}:{}: {source}: {}\n", report.line, report.outcome);
                }
            }
            let verb = if self.dry_run { "to be written" } else { "written" };
            let (descriptions, pictures) = (counted(written, "description"), counted(summary.pictures, "picture"));
            text += &format!("{descriptions} {verb}, of {pictures}");
            text.extend(
                summary
                    .outcomes
                    .iter()
                    .filter(|(name, _)| **name != "described")
                    .map(|(name, n)| format!(", {n} {name}")),
            );
            text
        })?;
        match broken + unread {
            0 => Ok(()),
            count => Err(CliError::Broken { what: "images and documents", count }),
        }
    }

    /// The files to be read, each once.
    fn files(&self) -> Result<Vec<File>, CliError> {
        let mut files: Vec<File> = Vec::new();
        let mut add = |path: PathBuf, inside: PathBuf, root: Option<PathBuf>, format| {
            let root = self.root.clone().or(root);
            if files.iter().all(|file| file.path != path) {
                files.push(File { path, inside, root, format });
            }
        };
        for path in &self.paths {
            if fs::metadata(path).map_err(CliError::io(path))?.is_dir() {
                let mut found = 0;
                for file in alt::files_of(path).map_err(|(path, error)| CliError::io(&path)(error))? {
                    if let Some(format) = Format::of(&file) {
                        found += 1;
                        let inside = file.strip_prefix(path).unwrap_or(&file).to_owned();
                        add(file, inside, Some(path.clone()), format);
                    }
                }
                if found == 0 {
                    let expected = "a folder with HTML or Markdown files";
                    return Err(CliError::File { path: path.clone(), expected, found: "none".to_owned() });
                }
                continue;
            }
            match Format::of(path) {
                Some(format) => add(path.clone(), path.file_name().unwrap_or_default().into(), None, format),
                None => {
                    let found = "another file".to_owned();
                    return Err(CliError::File {
                        path: path.clone(),
                        expected: "HTML or Markdown, by its name",
                        found,
                    });
                }
            }
        }
        let mut names: Vec<&Path> = files.iter().map(|file| file.inside.as_path()).collect();
        names.sort();
        if let (Some(_), Some(pair)) = (&self.out, names.windows(2).find(|pair| pair[0] == pair[1])) {
            let found = format!("{} twice", pair[0].display());
            return Err(CliError::Option { option: "--out", expected: "files of different names", found });
        }
        Ok(files)
    }

    /// Writes a document with the descriptions so far, which may not be all; whether it stands in the place of `before` now.
    fn write(&self, file: &File, before: &[u8], edited: &Edited, is_done: bool) -> Result<bool, CliError> {
        if self.dry_run || (self.out.is_some() && !is_done) {
            return Ok(false);
        }
        if let Some(out) = &self.out {
            let is_one = self.paths.len() == 1 && self.paths[0] == file.path;
            let path = if is_one { out.clone() } else { out.join(&file.inside) };
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            folder.map_or(Ok(()), |folder| fs::create_dir_all(folder).map_err(CliError::io(folder)))?;
            output::write(&path, &edited.content)?;
            return Ok(false);
        }
        if edited.changes.is_empty() {
            return Ok(false);
        }
        // A link stays one, and the file keeps who may read it.
        let path = fs::canonicalize(&file.path).map_err(CliError::io(&file.path))?;
        if fs::read(&path).map_err(CliError::io(&path))? != before {
            let found = "another one: it was changed meanwhile".to_owned();
            return Err(CliError::File { path, expected: "the file as it was read", found });
        }
        let permissions = fs::metadata(&path).map_err(CliError::io(&path))?.permissions();
        output::write(&path, &edited.content)?;
        fs::set_permissions(&path, permissions).map_err(CliError::io(&path))?;
        Ok(true)
    }
}

/// A number of things.
fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// An address as people can read it: one that holds its picture is long.
fn shortened(source: &str) -> String {
    const LONGEST: usize = 80;
    match source.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &source[..end]),
        None => source.to_owned(),
    }
}

/// Describe the pictures of a folder
///
/// Pictures are JPEG, PNG, WebP and GIF files, those in folders of the folder too. Equal pictures are described once. If one is
/// broken, the exit code tells.
#[derive(Args)]
struct Pictures {
    /// Folder of pictures, or a picture; several may be given
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
    /// Form of the list
    #[arg(long, value_enum, value_name = "FORM", default_value_t = Form::Text, conflicts_with = "json")]
    format: Form,
    /// Write the list to this file instead of printing it; with --json it is printed too
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write each description into a file beside its picture, named after it with .txt at the end, while the work goes on: after an
    /// interruption, the same command goes on, unless there is --replace; its list is of the pictures that were left
    #[arg(long)]
    sidecar: bool,
    /// Replace files that are beside the pictures
    #[arg(long, requires = "sidecar")]
    replace: bool,
    #[command(flatten)]
    describe: DescribeArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    /// A line for each picture.
    Text,
    /// A list of objects.
    Json,
    /// A table with a heading, separated by commas.
    Csv,
    /// A table with the pictures in it.
    Markdown,
}

impl Pictures {
    fn run(self) -> Result<(), CliError> {
        let mut files: Vec<PathBuf> = Vec::new();
        for path in &self.paths {
            match fs::metadata(path).map_err(CliError::io(path))?.is_dir() {
                true => {
                    let inside = alt::files_of(path).map_err(|(path, error)| CliError::io(&path)(error))?;
                    files.extend(inside.into_iter().filter(|file| is_picture(file)));
                }
                false => files.push(path.clone()),
            }
        }
        let mut seen = HashSet::new();
        files.retain(|file| seen.insert(file.clone()));
        let kept =
            if self.sidecar && !self.replace { files.iter().filter(|file| sidecar(file).exists()).count() } else { 0 };
        files.retain(|file| !self.sidecar || self.replace || !sidecar(file).exists());
        if kept > 0 {
            let have = if kept == 1 { "has a file beside it" } else { "have a file beside them" };
            say(&format!("{} {have} already; --replace writes it anew", counted(kept, "picture")));
        }
        if files.is_empty() && kept == 0 {
            let path = self.paths[0].clone();
            return Err(CliError::File { path, expected: "a folder with pictures", found: "none".to_owned() });
        }
        let mut describer = self.describe.describer();
        let predictor = self.describe.model.open()?;
        let mut describe = self.describe.describe(&predictor, self.sidecar)?;
        let entries = Stage::run("pictures", |at| {
            let mut entries = Vec::with_capacity(files.len());
            for some in files.chunks(PORTION) {
                let before = entries.len();
                let mut counter = |done, _| at(before + done, files.len());
                for (picture, outcome) in
                    some.iter().zip(describer.describe_files(some, &mut describe, &mut counter)?)
                {
                    if let (true, Some(text)) = (self.sidecar, outcome.text()) {
                        output::write(&sidecar(picture), format!("{text}\n").as_bytes())?;
                    }
                    entries.push(Entry { picture: picture.clone(), outcome });
                }
            }
            Ok::<_, CliError>(entries)
        })?;
        let list = match (self.format, self.describe.json) {
            (Form::Json, _) | (_, true) => serde_json::to_string_pretty(&entries)? + "\n",
            (Form::Text, _) => {
                entries.iter().map(|entry| format!("{}: {}\n", entry.picture.display(), entry.outcome)).collect()
            }
            (Form::Csv, _) => alt::csv_list(&entries),
            (Form::Markdown, _) => alt::markdown_list(&entries),
        };
        if let Some(out) = &self.out {
            output::write(out, list.as_bytes())?;
        }
        if self.out.is_none() || self.describe.json {
            output::print_text(&list)?;
        }
        match entries.iter().filter(|entry| matches!(entry.outcome, Outcome::Broken { .. })).count() {
            0 => Ok(()),
            count => Err(CliError::Broken { what: "pictures", count }),
        }
    }
}

/// Pictures after which the files beside them are written: as many as are described at a time, so that one that is asked to stop
/// has filed all that it has described.
const PORTION: usize = 8;

/// The file beside a picture.
fn sidecar(picture: &Path) -> PathBuf {
    let mut name = picture.file_name().unwrap_or_default().to_owned();
    name.push(".txt");
    picture.with_file_name(name)
}
