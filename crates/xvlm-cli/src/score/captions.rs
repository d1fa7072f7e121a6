//! Captions: BLEU, ROUGE-L, CIDEr, CIDEr-D, METEOR.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use xvlm::data::Place;
use xvlm::data::annotations::{CaptionItem, Loaded, Reading, Report, read_document_counts};
use xvlm::metrics::captions::cider::{CiderD, DocumentFrequencies, cider_d, with_end};
use xvlm::metrics::captions::{bleu, ptb, rouge_l_each};

use super::read::{self, Once};
use super::{Common, SHOWN, check_splits, count, meteor, metrics};
use crate::output::{self, CliError, Rows};

/// The word that tables of document frequencies for training have at the end of each caption.
const END: &str = "<eos>";

/// Captions: BLEU-1 to -4, ROUGE-L and CIDEr as the COCO evaluation computes them
///
/// References are COCO's caption annotations, Karpathy's, or a list of X-VLM's form; results are [{image_id, caption}].
#[derive(Args)]
pub(super) struct Captions {
    /// Reference captions
    #[arg(long, value_name = "FILE")]
    refs: PathBuf,
    #[command(flatten)]
    common: Common,
    /// Only images of this split, where the references tell it; repeatable
    #[arg(long, value_name = "NAME")]
    split: Vec<String>,
    /// CIDEr-D, too, with these document frequencies: a pickle such as coco-train-words.p, or JSON
    #[arg(long, value_name = "FILE")]
    df: Option<PathBuf>,
    /// Write the document frequencies of the references there, as JSON that --df reads
    #[arg(long, value_name = "FILE")]
    save_df: Option<PathBuf>,
    /// METEOR, too, by the official program (meteor-1.5.jar, beside it its folder `data`), which needs Java
    #[arg(long, value_name = "JAR")]
    meteor_jar: Option<PathBuf>,
}

#[derive(Serialize)]
struct Scores {
    bleu_1: f64,
    bleu_2: f64,
    bleu_3: f64,
    bleu_4: f64,
    rouge_l: f64,
    cider: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cider_d: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    meteor: Option<f64>,
    images: usize,
    references: usize,
    /// Captions that have no word once punctuation is gone.
    without_words: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    without_words_ids: Vec<String>,
}

/// Images with their reference captions, in the order of the file.
type References = Vec<(String, Vec<String>)>;

impl Captions {
    pub(super) fn run(self) -> Result<(), CliError> {
        let mut references = self.references()?;
        let hyps = &self.common.hyps;
        let list: Value = read::document(hyps)?;
        let results = read::results(hyps, &list, "image_id")?;
        let mut captions = HashMap::new();
        for (id, item) in &results {
            captions.insert(id.as_str(), item.text("caption")?);
        }
        let asked = references.iter().map(|(id, _)| id.as_str());
        let given = results.iter().map(|(id, _)| id.as_str());
        let coverage = self.common.pairing("images", "image_id").compare(asked, given)?;
        references.retain(|(id, _)| captions.contains_key(id.as_str()));

        let texts: Vec<&str> = references.iter().map(|(id, _)| captions[id.as_str()]).collect();
        let captions = ptb::tokenize_all(&texts);
        let raw: Vec<&str> = references.iter().flat_map(|(_, texts)| texts.iter().map(String::as_str)).collect();
        let mut words = ptb::tokenize_all(&raw).into_iter();
        let tokenised: Vec<Vec<String>> =
            references.iter().map(|(_, texts)| words.by_ref().take(texts.len()).collect()).collect();

        let [bleu_1, bleu_2, bleu_3, bleu_4] = bleu(&captions, &tokenised).map_err(metrics)?;
        let rouge = rouge_l_each(&captions, &tokenised).map_err(metrics)?;
        let own = CiderD::new(DocumentFrequencies::of_references(&tokenised).map_err(metrics)?);
        let cider = cider_d(&captions, &tokenised, &own).map_err(metrics)?;
        if let Some(path) = &self.save_df {
            output::write(path, &serde_json::to_vec(&as_json(own.frequencies()))?)?;
        }
        let given = self.df.as_deref().map(|path| with_table(path, &captions, &tokenised)).transpose()?;
        let meteor = self.meteor_jar.as_deref().map(|jar| meteor::score(jar, &captions, &tokenised)).transpose()?;

        let silent = || references.iter().zip(&captions).filter(|(_, words)| words.is_empty());
        let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
        let scores = Scores {
            bleu_1,
            bleu_2,
            bleu_3,
            bleu_4,
            rouge_l: mean(&rouge),
            cider: mean(&cider),
            cider_d: given.as_deref().map(mean),
            meteor: meteor.as_ref().map(|(all, _)| *all),
            images: references.len(),
            references: raw.len(),
            without_words: silent().count(),
            without_words_ids: silent().take(SHOWN).map(|((id, _), _)| id.clone()).collect(),
        };
        let each = || {
            let entry = |at: usize| {
                let bleu = bleu(&captions[at..=at], &tokenised[at..=at]).unwrap_or_default();
                let mut entry = json!({
                    "image_id": references[at].0, "words": captions[at],
                    "bleu_1": bleu[0], "bleu_2": bleu[1], "bleu_3": bleu[2], "bleu_4": bleu[3],
                    "rouge_l": rouge[at], "cider": cider[at],
                });
                if let Some(given) = &given {
                    entry["cider_d"] = given[at].into();
                }
                if let Some((_, meteor)) = &meteor {
                    entry["meteor"] = meteor[at].into();
                }
                entry
            };
            (0..references.len()).map(entry).collect()
        };
        self.common.print("captions", std::slice::from_ref(&self.refs), scores, coverage, each, rows)
    }

    fn references(&self) -> Result<References, CliError> {
        let path = &self.refs;
        let document: Value = read::document(path)?;
        if document.get("annotations").is_some() {
            // This form tells no splits.
            check_splits(&self.split, std::iter::empty(), &Report::default())?;
            return coco(path, &document);
        }
        // The images themselves are not opened.
        let reading = Reading { images: Some("/".into()), splits: self.split.clone(), ..Reading::strict() };
        let Loaded { mut items, report } = reading.captions(&[path])?;
        check_splits(&self.split, items.iter().filter_map(|item| item.split.as_deref()), &report)?;
        let is_wanted = |split: &String| self.split.is_empty() || self.split.contains(split);
        items.retain(|item| item.split.as_ref().is_none_or(is_wanted));
        let items = CaptionItem::by_image(items);
        let references: References = items.into_iter().map(|item| (item.id, item.captions)).collect();
        check(path, &references)?;
        Ok(references)
    }
}

/// COCO's form, whose `images` may have nothing but an `id`, or lack.
fn coco(path: &Path, document: &Value) -> Result<References, CliError> {
    let mut references = References::new();
    let mut places = HashMap::new();
    let images = document.get("images").filter(|images| !images.is_null());
    if let Some(images) = images {
        let mut once = Once::default();
        for (number, image) in read::items(path, "images", images)?.into_iter().enumerate() {
            let id = image.id("id")?;
            once.add(path, Place::Item(number), "images.id", &id)?;
            places.insert(id.clone(), references.len());
            references.push((id, Vec::new()));
        }
    }
    for annotation in read::items(path, "annotations", &document["annotations"])? {
        let (id, caption) = (annotation.id("image_id")?, annotation.text("caption")?.to_owned());
        match places.get(&id) {
            Some(&at) => references[at].1.push(caption),
            None if images.is_none() => {
                places.insert(id.clone(), references.len());
                references.push((id, vec![caption]));
            }
            None => return Err(annotation.wrong("image_id", "an image of the file")),
        }
    }
    check(path, &references)?;
    Ok(references)
}

fn check(path: &Path, references: &References) -> Result<(), CliError> {
    let without = references.iter().find(|(_, captions)| captions.is_empty());
    match without {
        _ if references.is_empty() => {
            Err(read::wrong(path, Place::Whole, "images", "at least one image with captions", "none"))
        }
        Some((id, _)) => {
            let expected = "at least one caption of each image";
            Err(read::wrong(path, Place::Whole, "annotations", expected, format!("none of image {id}")))
        }
        None => Ok(()),
    }
}

/// CIDEr-D of each caption with the document frequencies of a file.
fn with_table(path: &Path, captions: &[String], references: &[Vec<String>]) -> Result<Vec<f64>, CliError> {
    let table = read_document_counts(path)?;
    let ends = table.counts.iter().any(|(ngram, _)| ngram.len() == 1 && ngram[0] == END);
    let table = DocumentFrequencies::from_counts(table.documents, table.counts);
    let table = CiderD::new(table.map_err(|error| {
        read::wrong(path, Place::Whole, "document_frequency", "a table of counts", error.to_string())
    })?);
    if !ends {
        return cider_d(captions, references, &table).map_err(metrics);
    }
    let captions: Vec<String> = captions.iter().map(|caption| with_end(caption)).collect();
    let end = |captions: &Vec<String>| captions.iter().map(|caption| with_end(caption)).collect();
    let references: Vec<Vec<String>> = references.iter().map(end).collect();
    cider_d(&captions, &references, &table).map_err(metrics)
}

fn as_json(table: &DocumentFrequencies) -> Value {
    let counts: serde_json::Map<_, _> =
        table.iter().map(|(ngram, count)| (ngram.join(" "), Value::from(count))).collect();
    json!({"ref_len": table.documents(), "document_frequency": counts})
}

fn rows(scores: &Scores) -> Rows {
    let row = |name: &str, score: f64| (name.to_owned(), Some(format!("{score:.4}")));
    let mut rows = vec![
        row("BLEU-1", scores.bleu_1),
        row("BLEU-2", scores.bleu_2),
        row("BLEU-3", scores.bleu_3),
        row("BLEU-4", scores.bleu_4),
        row("ROUGE-L", scores.rouge_l),
        row("CIDEr", scores.cider),
    ];
    rows.extend(scores.cider_d.map(|score| row("CIDEr-D", score)));
    rows.extend(scores.meteor.map(|score| row("METEOR", score)));
    rows.push(count("images", scores.images));
    rows.push(count("references", scores.references));
    if scores.without_words > 0 {
        rows.push(count("captions without words", scores.without_words));
    }
    rows
}
