//! Files of scenes, in the formats that [`crate::records`] and [`crate::annotations`] read.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::{SIDE, Scene, Split, answers, generator, statements};
use crate::error::{DataError, Place};
use crate::json::io_error;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SynthOptions {
    /// Number of scenes.
    pub scenes: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Which pairs of colour and shape occur.
    pub split: Split,
    /// Whether `pretrain.jsonl` carries its images (as `binary`) instead of naming their files.
    pub embed_images: bool,
}

/// Scenes that are made at once, and then written in order.
const CHUNK: usize = 256;
/// Phrases that single out an object, for each object of a record.
const EXPRESSIONS: usize = 3;
/// Statements about each pair of scenes.
const STATEMENTS: usize = 2;

/// Writes a folder of files about scenes 0 to `options.scenes`; `progress` is told how many are done.
///
/// | file | holds |
/// |---|---|
/// | `images/` | the pictures, as PNG |
/// | `pretrain.jsonl` | captions (the canonical one first), elements with texts, questions |
/// | `retrieval.json` | five captions a picture that fit no other |
/// | `vqa.json`, `answer_list.json` | questions; every answer that there is |
/// | `nlvr.json` | statements about two pictures |
/// | `grounding.json` | phrases that single out an object, with its box |
/// | `captions.json` | short captions, the canonical one first |
/// | `fill.json` | phrases with a blank |
/// | `scenes.json` | the scenes themselves |
///
/// The folder appears when everything is written, or not at all.
///
/// # Errors
///
/// [`DataError::Config`] when `out` exists and is not empty; [`DataError::Io`].
pub fn write(out: &Path, options: &SynthOptions, progress: &mut dyn FnMut(usize)) -> Result<(), DataError> {
    let refuse = |found: String| DataError::Config {
        field: "out",
        expected: "a folder that is empty or does not exist yet".to_owned(),
        found,
    };
    if out.exists() {
        let mut entries = fs::read_dir(out).map_err(|source| io_error(out, source))?;
        if entries.next().is_some() {
            return Err(refuse(format!("{} with something in it", out.display())));
        }
    }
    let name = out.file_name().ok_or_else(|| refuse(out.display().to_string()))?;
    let partial = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
    let partial = out.with_file_name(partial);
    let result = write_files(&partial, options, progress).and_then(|()| {
        if out.exists() {
            fs::remove_dir(out).map_err(|source| io_error(out, source))?;
        }
        fs::rename(&partial, out).map_err(|source| io_error(out, source))
    });
    if result.is_err() {
        // What went wrong before matters more than what may go wrong here.
        let _ = fs::remove_dir_all(&partial);
    }
    result
}

/// Reads `scenes.json`.
///
/// # Errors
///
/// [`DataError::Io`]; [`DataError::Json`].
pub fn read_scenes(path: impl AsRef<Path>) -> Result<Vec<Scene>, DataError> {
    let path = path.as_ref();
    let bytes = fs::read(path).map_err(|source| io_error(path, source))?;
    serde_json::from_slice(&bytes).map_err(|source| DataError::Json {
        path: path.to_owned(),
        place: Place::Whole,
        source,
    })
}

/// What one scene adds to the files.
struct Entry {
    scene: Scene,
    png: Vec<u8>,
    record: Value,
    retrieval: Value,
    vqa: Vec<Value>,
    nlvr: Vec<Value>,
    grounding: Vec<Value>,
    captions: Value,
    fill: Vec<Value>,
}

fn write_files(folder: &Path, options: &SynthOptions, progress: &mut dyn FnMut(usize)) -> Result<(), DataError> {
    let images = folder.join("images");
    fs::create_dir_all(&images).map_err(|source| io_error(&images, source))?;
    let path = folder.join("pretrain.jsonl");
    let create = fs::File::create(&path).map_err(|source| io_error(&path, source))?;
    let mut records = BufWriter::new(create);
    let list = |name| List::create(folder.join(name));
    let (mut retrieval, mut vqa, mut nlvr) = (list("retrieval.json")?, list("vqa.json")?, list("nlvr.json")?);
    let (mut grounding, mut fill, mut scenes) = (list("grounding.json")?, list("fill.json")?, list("scenes.json")?);
    let mut captions = Vec::with_capacity(options.scenes);

    for start in (0..options.scenes).step_by(CHUNK) {
        let end = (start + CHUNK).min(options.scenes);
        let entries = (start..end).into_par_iter().map(|index| {
            let entry = entry(index, options)?;
            let path = folder.join(image_name(index));
            fs::write(&path, &entry.png).map_err(|source| io_error(&path, source))?;
            Ok(entry)
        });
        for entry in entries.collect::<Result<Vec<Entry>, DataError>>()? {
            writeln!(records, "{}", entry.record).map_err(|source| io_error(&path, source))?;
            retrieval.extend([&entry.retrieval])?;
            vqa.extend(&entry.vqa)?;
            nlvr.extend(&entry.nlvr)?;
            grounding.extend(&entry.grounding)?;
            fill.extend(&entry.fill)?;
            scenes.extend([&json!(entry.scene)])?;
            captions.push(entry.captions);
        }
        progress(end);
    }
    records.flush().map_err(|source| io_error(&path, source))?;
    for list in [retrieval, vqa, nlvr, grounding, fill, scenes] {
        list.finish()?;
    }
    let whole = [("captions.json", json!({ "images": captions })), ("answer_list.json", json!(answers()))];
    for (name, value) in whole {
        let path = folder.join(name);
        fs::write(&path, value.to_string()).map_err(|source| io_error(&path, source))?;
    }
    Ok(())
}

/// A JSON array, written an item a line.
struct List {
    path: PathBuf,
    file: BufWriter<fs::File>,
    empty: bool,
}

impl List {
    fn create(path: PathBuf) -> Result<Self, DataError> {
        let file = fs::File::create(&path).map_err(|source| io_error(&path, source))?;
        Ok(Self { path, file: BufWriter::new(file), empty: true })
    }

    fn extend<'a>(&mut self, items: impl IntoIterator<Item = &'a Value>) -> Result<(), DataError> {
        for item in items {
            let before = if std::mem::take(&mut self.empty) { "[\n" } else { ",\n" };
            self.put(&format!("{before}{item}"))?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), DataError> {
        let end = if self.empty { "[]\n" } else { "\n]\n" };
        self.put(end)?;
        self.file.flush().map_err(|source| io_error(&self.path, source))
    }

    fn put(&mut self, text: &str) -> Result<(), DataError> {
        self.file.write_all(text.as_bytes()).map_err(|source| io_error(&self.path, source))
    }
}

fn image_name(index: usize) -> String {
    format!("images/{index:06}.png")
}

fn entry(index: usize, options: &SynthOptions) -> Result<Entry, DataError> {
    let scene = |index| Scene::generate(options.seed, index as u64, options.split);
    let rng = |stream| generator(options.seed, index as u64, options.split, stream);
    let (scene, other) = (scene(index), (index + 1 < options.scenes).then(|| scene(index + 1)));
    let png = png(&scene)?;
    // Training texts and evaluation texts each have a generator.
    let (mut training, mut testing, mut pairing) = (rng(1), rng(2), rng(3));
    let image = image_name(index);
    let id = |kind: &str, i: usize| format!("{kind}{index:06}-{i}");

    let mut record = json!({
        "image_id": index,
        "caption": scene.captions(&mut training),
        "elems": elements(&scene, &mut training),
        "questions": scene.questions(&mut training).into_iter()
            .map(|q| json!({ "question": q.question, "answer": q.answer }))
            .collect::<Value>(),
    });
    if options.embed_images {
        record["binary"] = json!(STANDARD.encode(&png));
    } else {
        record["image_rpath"] = json!(image);
    }

    let vqa = scene.questions(&mut testing).into_iter().enumerate().map(|(i, q)| {
        json!({ "question_id": id("q", i), "image": image, "question": q.question,
                "answer": q.answer, "kind": q.kind })
    });
    let vqa = vqa.collect();
    let grounding = scene.referring_expressions(1, &mut testing).into_iter().enumerate();
    let grounding = grounding.map(|(i, expression)| {
        json!({ "ref_id": id("r", i), "image": image, "image_id": index, "text": expression.text,
                "bbox": scene.objects[expression.object].bbox, "height": SIDE, "width": SIDE })
    });
    let grounding = grounding.collect();
    let fill = scene
        .fill_phrases(&mut testing)
        .into_iter()
        .map(|fill| json!({ "image": image, "text": fill.text, "answers": fill.answers, "kind": fill.kind }));
    let fill = fill.collect();
    let captions = std::iter::once(scene.canonical_caption());
    let captions = captions.chain((0..4).map(|_| scene.relation_caption(&mut testing)));
    let sentences: Vec<Value> = captions.map(|caption| json!({ "raw": caption })).collect();
    let nlvr = other.map_or_else(Vec::new, |other| {
        let images = [image.clone(), image_name(index + 1)];
        let statements = statements(&scene, &other, STATEMENTS, &mut pairing).into_iter();
        statements.map(|s| json!({ "images": images, "sentence": s.sentence, "label": nlvr_label(s.label) })).collect()
    });
    Ok(Entry {
        record,
        retrieval: json!({ "image": image, "image_id": index,
                           "caption": scene.retrieval_captions(&mut testing) }),
        vqa,
        nlvr,
        grounding,
        captions: json!({ "id": index, "file_name": image, "sentences": sentences }),
        fill,
        png,
        scene,
    })
}

/// As the data of NLVR2 spell it.
fn nlvr_label(label: bool) -> &'static str {
    if label { "True" } else { "False" }
}

/// The objects as elements of a record: every phrase about each.
fn elements(scene: &Scene, rng: &mut rand_chacha::ChaCha8Rng) -> Vec<Value> {
    let expressions = scene.referring_expressions(EXPRESSIONS, rng);
    let element = |(i, object): (usize, &super::Object)| {
        let mut texts = scene.region_descriptions(i, rng);
        let own = expressions.iter().filter(|expression| expression.object == i);
        texts.extend(own.map(|expression| expression.text.clone()));
        json!({ "bb": object.bbox, "caption": texts, "attributes": scene.attributes(i),
                "label": [object.shape.word(), object.texture.word()] })
    };
    scene.objects.iter().enumerate().map(element).collect()
}

fn png(scene: &Scene) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    let encoder = PngEncoder::new_with_quality(&mut bytes, CompressionType::Fast, FilterType::Sub);
    let side = SIDE as u32;
    encoder
        .write_image(&scene.render(), side, side, ExtendedColorType::Rgb8)
        .map_err(|error| DataError::Image { name: format!("scene {}", scene.id), message: error.to_string() })?;
    Ok(bytes)
}
