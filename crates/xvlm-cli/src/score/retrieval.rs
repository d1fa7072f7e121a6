//! Retrieval: recalls from rankings.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use xvlm::data::Place;
use xvlm::data::annotations::{Loaded, Reading};
use xvlm::metrics::retrieval::RetrievalScores;

use super::read::{self, Fields};
use super::{Common, Coverage, check_splits, count, percent};
use crate::output::{CliError, Rows};

/// The longest ranking that a recall looks at.
const DEPTH: usize = 10;

/// Texts found by their image and images found by their text: recall at 1, 5 and 10
///
/// References are lists of X-VLM's form, Karpathy's or COCO's caption annotations; results are {image_to_text: {image: [texts]},
/// text_to_image: {text: [images]}}, the best first. Images go by their identifiers, texts by their numbers: all captions of
/// the references are counted from 0.
#[derive(Args)]
pub(super) struct Retrieval {
    /// Images with captions; repeatable
    #[arg(long, value_name = "FILE", required = true)]
    refs: Vec<PathBuf>,
    #[command(flatten)]
    common: Common,
    /// Only images of this split, where the references tell it; repeatable
    #[arg(long, value_name = "NAME")]
    split: Vec<String>,
}

#[derive(Deserialize)]
struct Results {
    image_to_text: Fields<Vec<Value>>,
    text_to_image: Fields<Vec<Value>>,
}

#[derive(Serialize)]
struct Scores {
    #[serde(flatten)]
    scores: RetrievalScores,
    /// Images and texts that were searched with.
    images: usize,
    texts: usize,
    /// Rankings that end before the tenth although there is more to rank.
    short: usize,
}

/// One way of a retrieval.
struct Way<'a> {
    field: &'static str,
    /// What is searched with, and what counts as found.
    queries: Vec<(&'a str, Vec<&'a str>)>,
    /// What is found.
    targets: HashSet<&'a str>,
}

/// Ranks of one way, by what was searched with.
struct Ranks<'a> {
    ranks: Vec<(&'a str, Option<usize>)>,
    short: Vec<&'a str>,
    coverage: Coverage,
}

impl Retrieval {
    pub(super) fn run(self) -> Result<(), CliError> {
        // The images themselves are not opened.
        let reading = Reading { images: Some("/".into()), splits: self.split.clone(), ..Reading::strict() };
        let Loaded { items, report } = reading.retrieval(&self.refs)?;
        check_splits(&self.split, items.iter().filter_map(|item| item.split.as_deref()), &report)?;
        let mut texts: Vec<(String, &str)> = Vec::new();
        for item in &items {
            for _ in &item.captions {
                texts.push((texts.len().to_string(), item.image_id.as_str()));
            }
        }
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut of_images: Vec<(&str, Vec<&str>)> = Vec::new();
        for (text, image) in &texts {
            let at = *places.entry(image).or_insert(of_images.len());
            if at == of_images.len() {
                of_images.push((image, Vec::new()));
            }
            of_images[at].1.push(text);
        }
        if texts.is_empty() {
            return Err(read::wrong(&self.refs[0], Place::Whole, "references", "at least one caption", "none"));
        }
        let of_texts = texts.iter().map(|(text, image)| (text.as_str(), vec![*image])).collect();
        let image_ids: HashSet<&str> = of_images.iter().map(|(image, _)| *image).collect();
        let text_ids = texts.iter().map(|(text, _)| text.as_str()).collect();
        let to_text = Way { field: "image_to_text", queries: of_images, targets: text_ids };
        let to_image = Way { field: "text_to_image", queries: of_texts, targets: image_ids };

        let Results { image_to_text, text_to_image } = read::document(&self.common.hyps)?;
        let found = self.ranks(&to_text, &image_to_text.0, "images")?;
        let back = self.ranks(&to_image, &text_to_image.0, "texts")?;
        let mut coverage = found.coverage;
        coverage.missing += back.coverage.missing;
        coverage.missing_ids.extend(back.coverage.missing_ids);
        coverage.unknown += back.coverage.unknown;
        coverage.unknown_ids.extend(back.coverage.unknown_ids);
        let only =
            |ranks: &[(&str, Option<usize>)]| ranks.iter().map(|(_, rank)| *rank).collect::<Vec<_>>().into_iter();
        let scores = Scores {
            scores: RetrievalScores::of_ranks(only(&found.ranks), only(&back.ranks)),
            images: found.ranks.len(),
            texts: back.ranks.len(),
            short: found.short.len() + back.short.len(),
        };
        let each = || {
            let ways = [("image", &found.ranks), ("text", &back.ranks)];
            let entries = |(name, ranks): (&'static str, &Vec<(&str, Option<usize>)>)| {
                ranks.iter().map(|(id, rank)| json!({name: id, "rank": rank})).collect::<Vec<_>>()
            };
            ways.into_iter().flat_map(entries).collect()
        };
        self.common.print("retrieval", &self.refs, scores, coverage, each, rows)
    }

    /// Where the best of what counts as found stands.
    fn ranks<'a>(
        &self,
        way: &Way<'a>,
        results: &[(String, Vec<Value>)],
        items: &'static str,
    ) -> Result<Ranks<'a>, CliError> {
        let path = &self.common.hyps;
        let wrong =
            |field: String, expected: &str, found: String| read::wrong(path, Place::Whole, field, expected, found);
        let mut rankings: HashMap<&str, Vec<String>> = HashMap::new();
        for (id, ranking) in results {
            let mut seen = HashSet::new();
            let mut ids = Vec::with_capacity(ranking.len());
            for (at, entry) in ranking.iter().enumerate() {
                let field = || format!("{}.{id}[{at}]", way.field);
                let target = read::id(entry).filter(|target| way.targets.contains(target.as_str()));
                let Some(target) = target else {
                    return Err(wrong(field(), "an item of the references", read::kind(entry)));
                };
                if !seen.insert(target.clone()) {
                    return Err(wrong(field(), "each item once", format!("{target} again")));
                }
                ids.push(target);
            }
            if rankings.insert(id, ids).is_some() {
                return Err(wrong(way.field.to_owned(), "an identifier of its own", format!("{id} twice")));
            }
        }
        let asked = way.queries.iter().map(|(id, _)| *id);
        let given = results.iter().map(|(id, _)| id.as_str());
        let coverage = self.common.pairing(items, way.field).compare(asked, given)?;
        let (mut ranks, mut short) = (Vec::new(), Vec::new());
        for (id, own) in &way.queries {
            let Some(ranking) = rankings.get(id) else { continue };
            let rank = ranking.iter().position(|target| own.contains(&target.as_str()));
            if rank.is_none() && ranking.len() < DEPTH.min(way.targets.len()) {
                short.push(*id);
            }
            ranks.push((*id, rank));
        }
        if !short.is_empty() && !self.common.partial {
            let expected = format!("rankings of at least {} items", DEPTH.min(way.targets.len()));
            let found = format!(
                "{} shorter ones ({}); --partial takes what they lack for not found",
                short.len(),
                super::names(&short)
            );
            return Err(wrong(way.field.to_owned(), &expected, found));
        }
        Ok(Ranks { ranks, short, coverage })
    }
}

fn rows(scores: &Scores) -> Rows {
    let Scores { scores, images, texts, short } = scores;
    let mut rows = vec![
        percent("text of an image, R@1", scores.text_r1),
        percent("text of an image, R@5", scores.text_r5),
        percent("text of an image, R@10", scores.text_r10),
        percent("image of a text, R@1", scores.image_r1),
        percent("image of a text, R@5", scores.image_r5),
        percent("image of a text, R@10", scores.image_r10),
        percent("mean", scores.r_mean),
        count("images", *images),
        count("texts", *texts),
    ];
    if *short > 0 {
        rows.push(count("rankings that end too early", *short));
    }
    rows
}
