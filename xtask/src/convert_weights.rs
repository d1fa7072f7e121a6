//! `cargo xtask convert-weights`: published checkpoints to model folders, and back.

use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use xvlm::data::TextTokenizer;
use xvlm::encoders::{Task, TextModel, XvlmConfig};
use xvlm::tasks::convert::{Goal, convert, export};
use xvlm::tasks::{ModelConfig, official};
use xvlm::weights::{Checkpoint, ConversionReport, LoadRules, Origin, StoredType};

use crate::Done;

/// Make a model folder of published checkpoints, or a checkpoint of a model folder
///
/// Reads PyTorch checkpoints (zip files, and the pickles from before version 1.6), pytorch_model.bin, safetensors and their
/// sharded forms. No pickle is ever executed.
#[derive(Args)]
pub(crate) struct ConvertWeights {
    /// What a checkpoint is (see --list), and its file; several make one model, the later before the earlier
    #[arg(long, num_args = 2, value_names = ["KIND", "INPUT"])]
    from: Vec<String>,
    /// Write the model of a folder for another program: `xvlm`, the original
    #[arg(long, num_args = 2, value_names = ["KIND", "FOLDER"])]
    #[arg(conflicts_with_all = ["from", "preset", "config", "task", "image_res", "tokenizer", "every_other_layer"])]
    #[arg(conflicts_with_all = ["allow_missing", "allow_unused", "seed"])]
    to: Option<Vec<String>>,
    /// Sizes of the model: a name of --list
    #[arg(long, conflicts_with = "config")]
    preset: Option<String>,
    /// Sizes of the model: a configuration of the original (YAML), or a config.json
    #[arg(long)]
    config: Option<PathBuf>,
    /// The model folder to write, or, with --to, the file
    #[arg(long)]
    out: Option<PathBuf>,
    /// What the model is for: pretrain, retrieval, vqa, nlvr, nlvr_pretrain, grounding or captioning
    #[arg(long, default_value = "pretrain")]
    task: String,
    /// Side of the images, if it is another than that of the configuration
    #[arg(long, value_name = "PIXELS")]
    image_res: Option<usize>,
    /// How numbers are stored: f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// tokenizer.json or vocab.txt; by default one that lies beside an input, or where the configuration says
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Take fusion layers from every other of the last layers of a deeper BERT (load_bertL_by_sep)
    #[arg(long)]
    every_other_layer: bool,
    /// Parameters that may stay as initialised: the beginning of a name, or a pattern with *
    #[arg(long, value_name = "PATTERN", value_parser = NonEmptyStringValueParser::new())]
    allow_missing: Vec<String>,
    /// Tensors that may be left out
    #[arg(long, value_name = "PATTERN", value_parser = NonEmptyStringValueParser::new())]
    allow_unused: Vec<String>,
    /// Seed of the parameters that no checkpoint has
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Print the report as one JSON document
    #[arg(long)]
    json: bool,
    /// Say what each kind of checkpoint needs, and which presets there are
    #[arg(long)]
    list: bool,
}

impl ConvertWeights {
    pub(crate) fn run(&self) -> Done {
        if self.list {
            print!("{}", listing());
            return Ok(());
        }
        let out = self.out.as_deref().ok_or("--out: expected where to write, found nothing")?;
        let stored = stored(&self.dtype)?;
        if let Some([kind, folder]) = self.to.as_deref() {
            if kind != "xvlm" {
                return Err(format!("--to: expected xvlm, found {kind}").into());
            }
            let tensors = export(Path::new(folder), out, stored)?;
            match self.json {
                true => println!("{}", serde_json::json!({"file": out, "tensors": tensors})),
                false => println!("{}: {tensors} tensors", out.display()),
            }
            return Ok(());
        }
        let sources = self.sources()?;
        let goal = self.goal(stored)?;
        if goal.every_other_layer && !sources.iter().any(|(origin, _)| matches!(origin, Origin::Bert | Origin::Roberta))
        {
            return Err("--every-other-layer: expected --from bert or --from roberta, found neither".into());
        }
        let file = self.tokenizer_file(&sources, &goal.config.model)?;
        let tokenizer = file.as_deref().map(TextTokenizer::from_file).transpose()?;
        let bar = bar();
        let written = &mut |done, of| {
            bar.set_length(of);
            bar.set_position(done);
        };
        let report = convert(&sources, &goal, tokenizer.as_ref(), out, written)?;
        bar.finish_and_clear();
        let hash = hash(&out.join("model.safetensors"))?;
        self.print(&sources, file.as_deref(), &report, &hash)?;
        if tokenizer.is_none() {
            eprintln!(
                "warning: no tokenizer: the model cannot read texts until its tokenizer.json is in {} (--tokenizer FILE)",
                out.display()
            );
        }
        Ok(())
    }

    fn sources(&self) -> Result<Vec<(Origin, Checkpoint)>, Box<dyn std::error::Error>> {
        if self.from.is_empty() {
            return Err("--from: expected a kind and a file, found nothing (--list tells the kinds)".into());
        }
        let mut sources = Vec::new();
        for pair in self.from.chunks_exact(2) {
            let origin = Origin::ALL.into_iter().find(|origin| origin.name() == pair[0]);
            let origin = origin.ok_or_else(|| {
                let known = Origin::ALL.map(Origin::name).join(", ");
                format!("--from: expected one of {known}, found {}", pair[0])
            })?;
            sources.push((origin, Checkpoint::open(Path::new(&pair[1]))?));
        }
        Ok(sources)
    }

    fn goal(&self, stored: StoredType) -> Result<Goal, Box<dyn std::error::Error>> {
        let task = Task::of_name(&self.task).ok_or_else(|| {
            format!("--task: expected one of {}, found {}", Task::ALL.map(Task::name).join(", "), self.task)
        })?;
        let mut every_other_layer = self.every_other_layer;
        let mut config = match (&self.preset, &self.config) {
            (Some(name), None) => preset(name, task)?,
            (None, Some(path)) => {
                every_other_layer |= official::read(path)?["load_bertL_by_sep"].as_bool().unwrap_or(false);
                official::model_config(path, task)?
            }
            _ => return Err("--preset or --config: expected one of them (--list tells the presets)".into()),
        };
        if let Some(image_res) = self.image_res {
            config.model = config.model.at_resolution(image_res)?;
        }
        let rules =
            LoadRules { allow_missing: self.allow_missing.clone(), allow_unexpected: self.allow_unused.clone() };
        Ok(Goal { config, every_other_layer, rules, stored, seed: self.seed })
    }

    /// The tokenizer that was named, or one that is found.
    fn tokenizer_file(
        &self,
        sources: &[(Origin, Checkpoint)],
        model: &XvlmConfig,
    ) -> Result<Option<PathBuf>, Box<dyn std::error::Error>> {
        // The word pieces of BERT mean nothing to RoBERTa.
        if self.tokenizer.is_some() || model.text_config.model_type != TextModel::Bert {
            return Ok(self.tokenizer.clone());
        }
        let beside = sources.iter().filter_map(|(_, checkpoint)| Path::new(checkpoint.name()).parent());
        let mut folders: Vec<PathBuf> = beside.map(Path::to_path_buf).collect();
        if let Some(path) = &self.config {
            folders.extend(official::read(path)?["text_encoder"].as_str().map(PathBuf::from));
        }
        let files = folders.iter().flat_map(|folder| ["tokenizer.json", "vocab.txt"].map(|file| folder.join(file)));
        Ok(files.into_iter().find(|file| file.is_file()))
    }

    fn print(
        &self,
        sources: &[(Origin, Checkpoint)],
        tokenizer: Option<&Path>,
        report: &ConversionReport,
        hash: &str,
    ) -> Done {
        if self.json {
            let document = serde_json::json!({"report": report, "tokenizer": tokenizer, "sha256": hash});
            println!("{}", serde_json::to_string_pretty(&document)?);
            return Ok(());
        }
        for (origin, checkpoint) in sources {
            let (name, kind) = (checkpoint.name(), checkpoint.kind());
            let bytes = indicatif::HumanBytes(checkpoint.tensor_bytes());
            println!("{name}: {kind} of {}, {} tensors, {bytes}", origin.name(), checkpoint.tensors().len());
        }
        print!("{report}");
        if let Some(tokenizer) = tokenizer {
            println!("tokenizer: {}", tokenizer.display());
        }
        println!("model.safetensors: sha256 {hash}");
        Ok(())
    }
}

fn preset(name: &str, task: Task) -> Result<ModelConfig, String> {
    let model = XvlmConfig::preset(name);
    let model =
        model.ok_or_else(|| format!("--preset: expected one of {}, found {name}", XvlmConfig::PRESETS.join(", ")))?;
    Ok(ModelConfig::of(XvlmConfig { task, ..model }))
}

fn stored(dtype: &str) -> Result<StoredType, String> {
    match dtype {
        "f32" => Ok(StoredType::F32),
        "f16" => Ok(StoredType::F16),
        "bf16" => Ok(StoredType::Bf16),
        other => Err(format!("--dtype: expected f32, bf16 or f16, found {other}")),
    }
}

/// A bar over the bytes that are written; nothing if no one is looking.
fn bar() -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40.cyan} {bytes}/{total_bytes}  {bytes_per_sec}");
    ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn hash(path: &Path) -> io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => hasher.update(&buffer[..read]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn listing() -> String {
    let needs = |origin: Origin| match origin {
        Origin::Xvlm => "a checkpoint of the original (.th), pre-trained, or fine-tuned for the same task",
        Origin::Swin => "swin_base_patch4_window7_224_22k.pth of microsoft/Swin-Transformer; fills the vision encoder",
        Origin::ClipVit => "pytorch_model.bin of openai/clip-vit-base-patch16; fills the vision encoder",
        Origin::Deit => "deit_base_patch16_224-b5f2ef4d.pth of facebookresearch/deit; fills the vision encoder",
        Origin::Bert => "pytorch_model.bin of bert-base-uncased; fills text and fusion layers but for cross attention",
        Origin::Roberta => "pytorch_model.bin of roberta-base; fills text and fusion layers but for cross attention",
    };
    let kinds = Origin::ALL.map(|origin| format!("  {:9} {}\n", origin.name(), needs(origin))).concat();
    let presets = XvlmConfig::PRESETS.map(|name| format!("  {name}\n")).concat();
    let tasks = Task::ALL.map(|task| format!("  {}\n", task.name())).concat();
    format!("checkpoints (--from KIND INPUT):\n{kinds}presets (--preset NAME):\n{presets}tasks (--task NAME):\n{tasks}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        convert: ConvertWeights,
    }

    fn parse(arguments: &[&str]) -> Result<ConvertWeights, String> {
        let command = Command::try_parse_from(["convert-weights"].iter().chain(arguments));
        command.map(|command| command.convert).map_err(|error| error.to_string())
    }

    fn run(arguments: &[&str]) -> Result<(), String> {
        parse(arguments)?.run().map_err(|error| error.to_string())
    }

    fn golden(file: &str) -> String {
        crate::root().join("xtask/tests").join(file).display().to_string()
    }

    /// A folder with the golden checkpoint and a vocabulary beside it.
    fn folder() -> (tempfile::TempDir, impl Fn(&str) -> String) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(golden("golden/tiny_pretrain.th"), folder.path().join("tiny.th")).unwrap();
        let texts = std::fs::read(golden("golden/text_preprocess.json")).unwrap();
        let texts: serde_json::Value = serde_json::from_slice(&texts).unwrap();
        let pieces: Vec<&str> =
            texts["vocab"].as_array().unwrap().iter().map(|piece| piece.as_str().unwrap()).collect();
        std::fs::write(folder.path().join("vocab.txt"), pieces.join("\n")).unwrap();
        let base = folder.path().to_owned();
        (folder, move |name: &str| base.join(name).display().to_string())
    }

    #[test]
    fn there_and_back() {
        let (_folder, path) = folder();
        let (input, config, out, back) = (path("tiny.th"), golden("tiny.yaml"), path("out"), path("back.th"));
        let convert = ["--from", "xvlm", &input, "--config", &config, "--task", "captioning", "--image-res", "128"];
        run(&[&convert[..], &["--out", &out, "--dtype", "bf16", "--json"]].concat()).unwrap();
        let opened = xvlm::tasks::Model::open(Path::new(&out), &xvlm::Device::Cpu).unwrap();
        assert_eq!(opened.config().model.vision_config.image_res(), 128);
        assert_eq!(opened.config().model.task, Task::Captioning);
        assert_eq!(opened.tokenizer().vocab_size(), 200, "the vocabulary that lies beside the input");
        run(&["--to", "xvlm", &out, "--out", &back]).unwrap();
        let back = Checkpoint::open(Path::new(&back)).unwrap();
        assert!(back.tensors().contains_key("text_decoder.cls.predictions.bias"));
    }

    #[test]
    fn options_that_make_no_sense_are_named() {
        let (_folder, path) = folder();
        let (input, config, out) = (path("tiny.th"), golden("tiny.yaml"), path("out"));
        let wrong = |changed: &[&str]| run(&[changed, &["--out", &out]].concat()).unwrap_err();
        let from = ["--from", "xvlm", &input];
        let with = |more: &[&str]| wrong(&[&from[..], more].concat());
        assert!(wrong(&["--config", &config]).contains("--from: expected a kind and a file"));
        assert!(wrong(&["--from", "swim", &input, "--config", &config]).contains("expected one of xvlm, swin"));
        assert!(wrong(&["--from", "xvlm", "none.th", "--config", &config]).contains("none.th"));
        assert!(with(&[]).contains("--preset or --config: expected one of them"));
        assert!(with(&["--preset", "huge"]).contains("expected one of base-224"));
        assert!(with(&["--preset", "base-224", "--config", &config]).contains("cannot be used with"));
        assert!(with(&["--config", &config, "--task", "chess"]).contains("--task: expected one of pretrain"));
        assert!(with(&["--config", &config, "--dtype", "i8"]).contains("--dtype: expected f32, bf16 or f16"));
        assert!(with(&["--config", &config, "--image-res", "100"]).contains("image_res"));
        assert!(with(&["--config", &config, "--allow-missing", ""]).contains("--allow-missing"));
        assert!(with(&["--config", &config, "--every-other-layer"]).contains("--from bert"));
        assert!(
            with(&["--config", &config, "--from", "swin", &input]).contains("tensors"),
            "the text is no part of Swin"
        );
        let to = ["--to", "xvlm", &out, "--task", "vqa"];
        assert!(wrong(&to).contains("cannot be used with"));
        assert!(run(&["--list"]).is_ok() && listing().contains("clip-vit"));
        assert!(!Path::new(&out).exists());
    }
}
