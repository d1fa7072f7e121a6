//! `xvlm embed`: embeddings of many pictures, to files.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;
use xvlm::Bundled;
use xvlm::tasks::embed::{self, Format, Kind, Numbers, Options, Pictures, Summary};

use crate::ModelArgs;
use crate::output::{self, CliError, table};
use crate::sweep::{SweepArgs, Swept};

/// Which pictures.
#[derive(Args)]
#[group(multiple = false)]
pub(crate) struct PictureArgs {
    /// Folder of pictures (JPEG, PNG, WebP or GIF), with all below it
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Text file with a path of a picture a line, relative to the folder of the file
    #[arg(long, value_name = "FILE")]
    list: Option<PathBuf>,
    /// Annotation files with captions: X-VLM's lists, COCO's or Karpathy's
    #[arg(long, value_name = "FILE", num_args = 1..)]
    annotations: Vec<PathBuf>,
    /// Shards: JSON lines, tar archives or Parquet tables with captions and boxes; folders and patterns such as
    /// "data/{00000..00331}.tar" are taken too
    #[arg(long, value_name = "SHARD", num_args = 1..)]
    shards: Vec<String>,
}

impl PictureArgs {
    /// The pictures; what is broken in annotations is named.
    pub(crate) fn open(&self, image_root: Option<&Path>) -> Result<Pictures, CliError> {
        if let Some(dir) = &self.images {
            return Ok(Pictures::folder(dir)?);
        }
        if let Some(file) = &self.list {
            return Ok(Pictures::list(file)?);
        }
        if self.annotations.is_empty() {
            return Ok(Pictures::shards(&self.shards, image_root)?);
        }
        let (pictures, report) = Pictures::annotated(&self.annotations, image_root)?;
        if !report.is_empty() {
            output::say(report.to_string().trim_end());
        }
        Ok(pictures)
    }
}

/// Embed pictures, regions of them and their texts into files
///
/// Writes a file of embeddings for every thousand pictures into parts/ of the folder --out, and index.json, which `xvlm search`
/// opens. Embeddings have unit length: their products are cosines. Pictures, boxes and texts that are broken are named.
#[derive(Args)]
#[command(mut_group("PictureArgs", |group| group.required(true)))]
#[command(mut_arg("out", |arg| arg.required(true).help("Folder to write")))]
#[command(mut_arg("resume", |arg| arg.help("Go on from the embeddings in --out")))]
pub(crate) struct Embed {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pictures: PictureArgs,
    /// What paths of images in --annotations and --shards are relative to [default: the folder of the file]
    #[arg(long, value_name = "DIR")]
    image_root: Option<PathBuf>,
    /// What to embed, as far as the data have it
    #[arg(long, value_name = "KIND", value_enum, value_delimiter = ',', default_values_t = [What::Image, What::Region, What::Text])]
    kinds: Vec<What>,
    /// Form of the files
    #[arg(long, value_name = "FORM", value_enum, default_value_t = Form::Parquet)]
    format: Form,
    /// Store numbers in two bytes
    #[arg(long)]
    f16: bool,
    #[command(flatten)]
    sweep: SweepArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What is embedded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// Whole pictures
    Image,
    /// Boxes in them
    Region,
    /// Texts
    Text,
}

impl What {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Image => Kind::Image,
            Self::Region => Kind::Region,
            Self::Text => Kind::Text,
        }
    }
}

/// The form of files.
#[derive(Clone, Copy, ValueEnum)]
enum Form {
    /// A row for each embedding
    Parquet,
    /// A tensor, and what its rows are in the metadata
    Safetensors,
}

#[derive(Serialize)]
struct Report<'a> {
    out: &'a Path,
    #[serde(flatten)]
    summary: &'a Summary,
}

impl Embed {
    pub(crate) fn run(self) -> Result<(), CliError> {
        let options = Options {
            images: self.kinds.contains(&What::Image),
            regions: self.kinds.contains(&What::Region),
            texts: self.kinds.contains(&What::Text),
            format: match self.format {
                Form::Parquet => Format::Parquet,
                Form::Safetensors => Format::Safetensors,
            },
            numbers: if self.f16 { Numbers::F16 } else { Numbers::F32 },
        };
        let out = self.sweep.out.as_deref().unwrap_or(Path::new(""));
        let (model, built_in) = (&self.model, Bundled::General);
        let pictures = self.pictures.open(self.image_root.as_deref())?;
        let swept = Swept { units: "files", model, built_in, from: None, max_bad_fraction: 0.0, is_one: false };
        let summary = self
            .sweep
            .run(swept, |predictor, sweep| Ok(embed::embed(predictor.model(), &pictures, &options, out, sweep)?))?;
        let Some(summary) = summary else { return Ok(()) };
        summary.left_out.iter().take(8).for_each(|problem| output::say(&format!("left out: {problem}")));
        output::print(self.json, &Report { out, summary: &summary }, |Report { summary, .. }| {
            let count = |name: &str, count: u64| (name.to_owned(), Some(count.to_string()));
            table(&[
                count("pictures", summary.images),
                count("regions", summary.regions),
                count("texts", summary.texts),
                count("files", summary.files.len() as u64),
                count("left out", summary.left_out.len() as u64),
            ])
        })
    }
}
