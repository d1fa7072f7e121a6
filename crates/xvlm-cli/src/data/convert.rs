//! `xvlm data convert`: shards for pre-training of published data sets.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};
use xvlm::data::DataError;
use xvlm::data::annotations::{
    Coco, Conceptual, Exclusions, Flickr30k, Karpathy, NameTemplate, OpenImages, Records, Report, Sbu, SbuCaptions,
    VisualGenome,
};
use xvlm::data::convert::{Compression, ConvertOptions, ConvertProgress, Form, Job, Manifest, convert};

use crate::output::{self, CliError, Rows, table};
use crate::progress::Stage;

/// Make shards for pre-training of a published data set
///
/// Reads the annotations as their publisher gives them away and the images that lie in a folder, and writes shards that
/// `pretrain` reads: an image with its captions, its boxes and their texts, and its questions. Boxes are clipped to their
/// image; what cannot be used is left out, counted and named. Run again after an interruption, it goes on where it was.
#[derive(Args)]
pub(crate) struct Convert {
    #[command(subcommand)]
    set: Set,
}

#[derive(Subcommand)]
enum Set {
    Coco(CocoArgs),
    VisualGenome(VisualGenomeArgs),
    Sbu(SbuArgs),
    Cc3m(Cc3mArgs),
    Cc12m(Cc12mArgs),
    #[command(name = "objects365")]
    Objects365(Objects365Args),
    OpenImages(OpenImagesArgs),
    #[command(name = "flickr30k")]
    Flickr30k(Flickr30kArgs),
    Karpathy(KarpathyArgs),
}

/// How shards are written, and which images are left out.
#[derive(Args)]
struct Shards {
    /// Folder of the images
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// Folder to write; it must not exist yet, be empty, or hold the same conversion unfinished
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What a shard is
    #[arg(long, value_enum, default_value_t = Format::Jsonl)]
    format: Format,
    /// Compress the shards; then they cannot be read at any place, but are unpacked first
    #[arg(long, value_enum)]
    compress: Option<Compress>,
    /// Images of a shard
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    records_per_shard: u32,
    /// Mix the images over all shards, by this seed
    #[arg(long, value_name = "SEED")]
    shuffle: Option<u64>,
    /// Make images smaller of which a side is longer than this many pixels, and their boxes with them
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..))]
    max_side: Option<u32>,
    /// Quality of the JPEGs that images made smaller are written as
    #[arg(long, value_name = "Q", default_value_t = 90, value_parser = clap::value_parser!(u8).range(1..=100))]
    quality: u8,
    /// Shards written at a time [default: the number of processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    workers: Option<u16>,
    /// Leave out images: a text file of identifiers or file names, Karpathy's dataset_*.json, a list of X-VLM's, or RefCOCO's
    /// refs(*).p, of which the validation and test images are left out; repeatable
    #[arg(long, value_name = "FILE")]
    exclude: Vec<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// JSON lines with the images in base64
    Jsonl,
    /// JSON lines with the paths of the images
    Paths,
    /// WebDataset: tar archives
    Tar,
}

#[derive(Clone, Copy, ValueEnum)]
enum Compress {
    Gzip,
    Zstd,
}

/// COCO: captions, and the boxes of its 80 categories
#[derive(Args)]
struct CocoArgs {
    /// captions_train2014.json or another year's; repeatable
    #[arg(long, value_name = "FILE", required_unless_present = "instances")]
    captions: Vec<PathBuf>,
    /// instances_train2014.json or another year's; repeatable
    #[arg(long, value_name = "FILE")]
    instances: Vec<PathBuf>,
    /// Keep boxes around crowds
    #[arg(long)]
    crowds: bool,
    #[command(flatten)]
    shards: Shards,
}

/// Visual Genome: region descriptions, objects with attributes, questions
#[derive(Args)]
struct VisualGenomeArgs {
    /// image_data.json
    #[arg(long, value_name = "FILE")]
    image_data: PathBuf,
    /// region_descriptions.json
    #[arg(long, value_name = "FILE", required_unless_present_any = ["objects", "attributes", "questions"])]
    regions: Option<PathBuf>,
    /// objects.json
    #[arg(long, value_name = "FILE")]
    objects: Option<PathBuf>,
    /// attributes.json; it lists the objects too
    #[arg(long, value_name = "FILE")]
    attributes: Option<PathBuf>,
    /// question_answers.json
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    #[command(flatten)]
    shards: Shards,
}

/// SBU: captions of photographs on Flickr
#[derive(Args)]
struct SbuArgs {
    /// sbu-captions-all.json
    #[arg(long, value_name = "FILE", conflicts_with_all = ["urls", "captions"], required_unless_present = "urls")]
    annotations: Option<PathBuf>,
    /// SBU_captioned_photo_dataset_urls.txt
    #[arg(long, value_name = "FILE", requires = "captions")]
    urls: Option<PathBuf>,
    /// SBU_captioned_photo_dataset_captions.txt
    #[arg(long, value_name = "FILE", requires = "urls")]
    captions: Option<PathBuf>,
    /// How the images are called: {row} (from 0), {line} (from 1), {name} (the end of the URL), {md5}, {sha1}, {crc32}
    #[arg(long, value_name = "TEMPLATE", default_value = "{name}")]
    names: NameTemplate,
    #[command(flatten)]
    shards: Shards,
}

/// Conceptual Captions, 3 million: Train_GCC-training.tsv
#[derive(Args)]
struct Cc3mArgs {
    #[command(flatten)]
    rows: RowsArgs,
}

/// Conceptual 12M: cc12m.tsv
#[derive(Args)]
struct Cc12mArgs {
    #[command(flatten)]
    rows: RowsArgs,
}

#[derive(Args)]
struct RowsArgs {
    /// The file of captions and URLs; what img2dataset has downloaded needs no conversion, `pretrain` reads it
    #[arg(long, value_name = "FILE")]
    annotations: PathBuf,
    /// How the images are called: {row} (from 0), {line} (from 1), {name} (the end of the URL), {md5}, {sha1}, {crc32}, with
    /// {row/1000} for folders and {row:09} for zeros
    #[arg(long, value_name = "TEMPLATE")]
    names: NameTemplate,
    #[command(flatten)]
    shards: Shards,
}

/// Objects365: the boxes of its 365 categories
#[derive(Args)]
struct Objects365Args {
    /// zhiyuan_objv2_train.json; repeatable
    #[arg(long, value_name = "FILE", required = true)]
    annotations: Vec<PathBuf>,
    /// Keep boxes around crowds
    #[arg(long)]
    crowds: bool,
    #[command(flatten)]
    shards: Shards,
}

/// Open Images: boxes, relationships, and the captions of Localized Narratives
#[derive(Args)]
struct OpenImagesArgs {
    /// class-descriptions-boxable.csv; the file of attributes' names too, for relationships; repeatable
    #[arg(long, value_name = "FILE")]
    classes: Vec<PathBuf>,
    /// train-annotations-bbox.csv
    #[arg(long, value_name = "FILE", requires = "classes", required_unless_present_any = ["relationships", "narratives"])]
    boxes: Option<PathBuf>,
    /// train-annotations-vrd.csv
    #[arg(long, value_name = "FILE", requires = "classes")]
    relationships: Option<PathBuf>,
    /// open_images_train_captions.jsonl, or the narratives with traces; repeatable
    #[arg(long, value_name = "FILE")]
    narratives: Vec<PathBuf>,
    /// Keep boxes around groups
    #[arg(long)]
    groups: bool,
    /// Keep boxes around depictions
    #[arg(long)]
    depictions: bool,
    #[command(flatten)]
    shards: Shards,
}

/// Flickr30k: captions, and the phrases of Flickr30k Entities
#[derive(Args)]
struct Flickr30kArgs {
    /// results_20130124.token or results.csv
    #[arg(long, value_name = "FILE")]
    captions: PathBuf,
    /// Folder of Flickr30k Entities, with Annotations and Sentences
    #[arg(long, value_name = "DIR")]
    entities: Option<PathBuf>,
    #[command(flatten)]
    shards: Shards,
}

/// Karpathy's splits of COCO or Flickr30k: captions
#[derive(Args)]
struct KarpathyArgs {
    /// dataset_coco.json or dataset_flickr30k.json
    #[arg(long, value_name = "FILE")]
    annotations: PathBuf,
    /// Splits to read
    #[arg(long, value_name = "SPLIT", value_delimiter = ',', default_value = "train,restval")]
    splits: Vec<String>,
    #[command(flatten)]
    shards: Shards,
}

/// A data set, ready to be opened.
struct Opener {
    name: &'static str,
    inputs: Vec<PathBuf>,
    /// Settings of its reader beside files and folders.
    settings: Value,
    shards: Shards,
    open: Box<dyn FnOnce() -> Result<Records, DataError>>,
}

impl Convert {
    pub(crate) fn run(self) -> Result<(), CliError> {
        match self.set {
            Set::Coco(CocoArgs { captions, instances, crowds, shards }) => {
                coco("coco", [captions, instances].concat(), crowds, shards)
            }
            Set::Objects365(Objects365Args { annotations, crowds, shards }) => {
                coco("objects365", annotations, crowds, shards)
            }
            Set::VisualGenome(args) => args.opener(),
            Set::Sbu(args) => args.opener()?,
            Set::Cc3m(args) => args.rows.opener("cc3m"),
            Set::Cc12m(args) => args.rows.opener("cc12m"),
            Set::OpenImages(args) => args.opener(),
            Set::Flickr30k(args) => args.opener(),
            Set::Karpathy(args) => args.opener(),
        }
        .run()
    }
}

fn coco(name: &'static str, annotations: Vec<PathBuf>, crowds: bool, shards: Shards) -> Opener {
    let set = Coco { annotations: annotations.clone(), images: shards.images.clone(), crowds };
    let settings = json!({ "crowds": crowds });
    Opener { name, inputs: annotations, settings, shards, open: Box::new(move || set.open()) }
}

impl VisualGenomeArgs {
    fn opener(self) -> Opener {
        let Self { image_data, regions, objects, attributes, questions, shards } = self;
        let files = [&regions, &objects, &attributes, &questions];
        let inputs = std::iter::once(&image_data).chain(files.into_iter().flatten()).cloned().collect();
        let given: Vec<bool> = files.iter().map(|file| file.is_some()).collect();
        let images = shards.images.clone();
        let set = VisualGenome { image_data, images, regions, objects, attributes, questions };
        let settings = json!({ "files": given });
        Opener { name: "visual-genome", inputs, settings, shards, open: Box::new(move || set.open()) }
    }
}

impl SbuArgs {
    fn opener(self) -> Result<Opener, CliError> {
        let Self { annotations, urls, captions, names, shards } = self;
        let (inputs, captions) = match (annotations, urls, captions) {
            (Some(json), ..) => (vec![json.clone()], SbuCaptions::Json(json)),
            (None, Some(urls), Some(captions)) => {
                (vec![urls.clone(), captions.clone()], SbuCaptions::Lines { urls, captions })
            }
            _ => {
                let expected = "--annotations, or --urls with --captions";
                return Err(CliError::Option { option: "sbu", expected, found: "neither".to_owned() });
            }
        };
        let settings = json!({ "names": names.to_string() });
        let set = Sbu { captions, images: shards.images.clone(), names };
        Ok(Opener { name: "sbu", inputs, settings, shards, open: Box::new(move || set.open()) })
    }
}

impl RowsArgs {
    fn opener(self, name: &'static str) -> Opener {
        let Self { annotations, names, shards } = self;
        let (inputs, settings) = (vec![annotations.clone()], json!({ "names": names.to_string() }));
        let set = Conceptual { rows: annotations, images: shards.images.clone(), names };
        Opener { name, inputs, settings, shards, open: Box::new(move || set.open()) }
    }
}

impl OpenImagesArgs {
    fn opener(self) -> Opener {
        let Self { classes, boxes, relationships, narratives, groups, depictions, shards } = self;
        let given = [boxes.is_some(), relationships.is_some()];
        let files = classes.iter().chain(&boxes).chain(&relationships).chain(&narratives);
        let inputs = files.cloned().collect();
        let settings = json!({ "groups": groups, "depictions": depictions, "files": given });
        let images = shards.images.clone();
        let set = OpenImages { classes, boxes, relationships, narratives, images, groups, depictions };
        Opener { name: "open-images", inputs, settings, shards, open: Box::new(move || set.open()) }
    }
}

impl Flickr30kArgs {
    fn opener(self) -> Opener {
        let Self { captions, entities, shards } = self;
        let inputs = std::iter::once(&captions).chain(&entities).cloned().collect();
        let set = Flickr30k { captions, images: shards.images.clone(), entities };
        Opener { name: "flickr30k", inputs, settings: Value::Null, shards, open: Box::new(move || set.open()) }
    }
}

impl KarpathyArgs {
    fn opener(self) -> Opener {
        let Self { annotations, splits, shards } = self;
        let (inputs, settings) = (vec![annotations.clone()], json!({ "splits": splits }));
        let set = Karpathy { file: annotations, images: shards.images.clone(), splits };
        Opener { name: "karpathy", inputs, settings, shards, open: Box::new(move || set.open()) }
    }
}

/// What was written.
#[derive(Serialize)]
struct Written<'a> {
    out: &'a Path,
    source: &'a str,
    shards: usize,
    bytes: u64,
    images: u64,
    captions: u64,
    elements: u64,
    questions: u64,
    left_out: Report,
}

impl<'a> Written<'a> {
    fn new(out: &'a Path, manifest: &'a Manifest) -> Self {
        let mut written = Self {
            out,
            source: &manifest.source,
            shards: 0,
            bytes: 0,
            images: 0,
            captions: 0,
            elements: 0,
            questions: 0,
            left_out: manifest.left_out(),
        };
        for shard in &manifest.shards {
            written.shards += usize::from(shard.file.is_some());
            written.bytes += shard.bytes;
            written.images += shard.records;
            written.captions += shard.captions;
            written.elements += shard.elems;
            written.questions += shard.questions;
        }
        written
    }

    fn text(&self) -> String {
        let numbers = [
            ("shards", self.shards as u64),
            ("bytes", self.bytes),
            ("images", self.images),
            ("captions", self.captions),
            ("elements", self.elements),
            ("questions", self.questions),
        ];
        let mut rows: Rows = vec![(format!("{} in {}", self.source, self.out.display()), None)];
        rows.extend(numbers.map(|(name, number)| (name.to_owned(), Some(number.to_string()))));
        if !self.left_out.is_empty() {
            rows.push(("left out".to_owned(), None));
        }
        let left_out = self.left_out.iter();
        rows.extend(left_out.map(|(reason, skipped)| (reason.to_string(), Some(skipped.count.to_string()))));
        let examples = self.left_out.iter().flat_map(|(_, skipped)| &skipped.examples);
        table(&rows) + &examples.map(|example| format!("{example}\n")).collect::<String>()
    }
}

/// A bar as the progress of a conversion.
struct Bar<'a>(&'a mut dyn FnMut(usize, usize));

impl ConvertProgress for Bar<'_> {
    fn reading(&mut self, images: u64, of: Option<u64>) {
        (self.0)(images as usize, of.unwrap_or(images) as usize);
    }

    fn writing(&mut self, images: u64, of: u64) {
        (self.0)(images as usize, of as usize);
    }
}

impl Opener {
    fn run(self) -> Result<(), CliError> {
        let Self { name, mut inputs, settings, shards, open } = self;
        let Shards {
            images,
            out,
            format,
            compress,
            records_per_shard,
            shuffle,
            max_side,
            quality,
            workers,
            exclude,
            json,
        } = shards;
        // Shards, and what they were made from, are told in JSON.
        let in_utf8 = |option, path: &Path| {
            let wrong = || CliError::Option { option, expected: "a path in UTF-8", found: path.display().to_string() };
            path.to_str().map(str::to_owned).ok_or_else(wrong)
        };
        let images_text = in_utf8("images", &images)?;
        in_utf8("out", &out)?;
        inputs.iter().try_for_each(|file| in_utf8("annotations", file).map(drop))?;
        exclude.iter().try_for_each(|file| in_utf8("exclude", file).map(drop))?;
        let mut excluded = Exclusions::default();
        for file in &exclude {
            excluded.read(file)?;
        }
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        let options = ConvertOptions {
            out: out.clone(),
            form: match format {
                Format::Jsonl => Form::JsonImages,
                Format::Paths => Form::JsonPaths,
                Format::Tar => Form::Tar,
            },
            compression: match compress {
                None => Compression::None,
                Some(Compress::Gzip) => Compression::Gzip,
                Some(Compress::Zstd) => Compression::Zstd,
            },
            records_per_shard: records_per_shard as usize,
            shuffle,
            max_side,
            quality,
            workers: workers.map_or_else(processors, usize::from),
        };
        let settings = json!({ "set": settings, "images": images_text, "excluded": exclude.len() });
        inputs.extend(exclude);
        let job = Job { name: name.to_owned(), inputs, settings };
        let manifest =
            Stage::run("converting", |at| convert(&job, || Ok(open()?.without(excluded)), &options, &mut Bar(at)))?;
        output::print(json, &Written::new(&out, &manifest), Written::text)
    }
}
