//! Captions written by greedy and beam search, step by step.

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use xvlm::data::{TextTokenizer, pre_caption};
use xvlm::encoders::{Pass, Task, Xvlm};
use xvlm::tasks::{ImageTokens, Search, Source, TextSearch};

use super::case::{Case, Outcome, SAFE};
use super::models::parameter_files;

/// How far the score of a text may be off, as a share of it: the sum of a beam's log-probabilities, or the mean of a greedy text's.
const SCORES: [(&str, f64); 2] = [("scores", 1e-5), ("logprobs", 1e-4)];

/// What is known of the texts of a folder.
pub(super) struct Language {
    /// The tokenizer, if a case tells the vocabulary.
    pub(super) tokenizer: Option<TextTokenizer>,
}

/// Every search of a case, with the texts followed and the logits at each step.
pub(super) fn search(case: &Case, language: &Language) -> Outcome {
    let model = case.xvlm(Task::Captioning)?.model;
    let runs = case.json["cases"].as_object().ok_or("cases: expected a mapping")?.clone();
    for (run, described) in &runs {
        one(case, language, &model, run, described).map_err(|error| format!("{run}: {error}"))?;
    }
    Ok(())
}

fn one(case: &Case, language: &Language, model: &Xvlm, run: &str, described: &Value) -> Outcome {
    let args = &described["args"];
    let known = ["num_beams", "max_length", "min_length", "repetition_penalty", "greedy"];
    if let Some(unknown) = args.as_object().into_iter().flatten().find(|(name, _)| !known.contains(&name.as_str())) {
        return Err(format!("args: expected some of {known:?}, found {}", unknown.0).into());
    }
    let sequences = case.input(&format!("{run}.sequences"))?.to_dtype(DType::I64)?.to_vec2::<i64>()?;
    let (rows, limit) = (sequences.len(), sequences.first().map_or(0, Vec::len));
    let prompt = prompt(case, language, run)?;
    let padding = model.config().text_config.pad_token_id;
    let end = end(case, language, padding)?;
    let greedy = args["greedy"].as_bool().unwrap_or(false);
    let length = |field: &str, default: usize| args[field].as_u64().map_or(default, |length| length as usize);
    let search = Search {
        beams: length("num_beams", 1).max(1),
        min_tokens: length("min_length", 0).saturating_sub(prompt.len()),
        max_tokens: length("max_length", limit).saturating_sub(prompt.len()),
        repetition_penalty: args["repetition_penalty"].as_f64().unwrap_or(1.0) as f32,
        end_at_limit: greedy,
    };
    let pass = Pass::inference();
    let source = Source::images(&ImageTokens::new(model.encode_image(&case.images(rows, model)?, &pass)?))?;
    let next = |ids: &[Vec<u32>], index: &[u32]| -> candle_core::Result<Tensor> {
        let (b, t) = (ids.len(), ids.first().map_or(0, Vec::len));
        let mask = Tensor::ones((b, t), DType::F32, &Device::Cpu)?;
        let ids = Tensor::from_vec(ids.concat(), (b, t), &Device::Cpu)?;
        let decoded = source.look_at(index, |looks| model.decode(&ids, &mask, looks, &pass))?;
        model.next_token_logits(&decoded.narrow(1, t - 1, 1)?.squeeze(1)?)
    };

    let mut texts = TextSearch::new(vec![prompt.clone(); rows], search, end);
    let images: Vec<u32> = (0..rows as u32).collect();
    let mut decoding = source.look_at(&images, |looks| model.begin_texts(looks, prompt.len() + search.max_tokens))?;
    let mut new = vec![prompt.clone(); rows];
    let mut step = 0;
    loop {
        let live: Vec<(usize, Vec<u32>)> = texts.live().map(|(row, ids)| (row, ids.to_vec())).collect();
        let recorded = format!("{run}.beams.{step}");
        if case.has(&recorded) {
            let beams = case.input(&recorded)?.to_dtype(DType::U32)?.to_vec2::<u32>()?;
            // Those of a text that is done go on as copies of others; here they stop. All of the first step are the prompt.
            let followed = beams.chunks(search.beams).enumerate().flat_map(|(row, beams)| {
                let ours: Vec<&Vec<u32>> = live.iter().filter(|(of, _)| *of == row).map(|(_, ids)| ids).collect();
                let ours = if ours.len() == 1 { vec![ours[0]; beams.len()] } else { ours };
                ours.into_iter().cloned().zip(beams.to_vec()).collect::<Vec<_>>()
            });
            let (ours, theirs): (Vec<_>, Vec<_>) = followed.unzip();
            case.check_equal(&recorded, &ours, &theirs);
            let logits = format!("{run}.logits.{step}");
            if case.has(&logits) {
                let index: Vec<u32> = (0..beams.len()).map(|row| (row / search.beams) as u32).collect();
                let (found, expected) = (next(&beams, &index)?, case.input(&logits)?);
                // Nothing follows from the rows of a text that is done: they stand for themselves.
                let goes_on = |row: &u32| u8::from(live.iter().any(|(of, _)| of == &(*row as usize)));
                let is_live = Tensor::from_iter(index.iter().map(goes_on), &Device::Cpu)?;
                let is_live = is_live.unsqueeze(1)?.broadcast_as(found.shape())?;
                case.check_within(&logits, &is_live.where_cond(&found, &expected)?, SAFE, 0.0)?;
            }
        }
        if live.is_empty() {
            break;
        }
        let logits = model.next_token_logits(&decoding.extend(&new)?)?.to_vec2::<f32>()?;
        texts.advance(logits.iter().map(Vec::as_slice));
        decoding.select(&texts.parents().collect::<Vec<_>>())?;
        new = texts.live().map(|(_, ids)| ids[ids.len() - 1..].to_vec()).collect();
        step += 1;
    }

    let found = texts.finish();
    let written = found.iter().map(|sequence| {
        let mut ids: Vec<i64> = sequence.ids.iter().map(|&id| i64::from(id)).collect();
        // The end counts if there is room for it.
        if ids.len() < limit {
            ids.push(i64::from(end));
        }
        ids.resize(limit, i64::from(padding));
        ids
    });
    case.check_equal(&format!("{run}.sequences"), &written.collect::<Vec<_>>(), &sequences);
    let scores: Vec<f32> = found.iter().map(|sequence| sequence.score).collect();
    for (name, share) in SCORES {
        case.check_within(&format!("{run}.{name}"), &Tensor::new(scores.as_slice(), &Device::Cpu)?, share, 0.0)?;
    }
    if let (Some(tokenizer), Some(captions)) = (&language.tokenizer, described["captions"].as_array()) {
        let captions: Vec<String> = captions.iter().map(|text| text.as_str().unwrap_or_default().to_owned()).collect();
        let found: Vec<String> = found.iter().map(|sequence| tokenizer.decode(&sequence.ids[prompt.len()..])).collect();
        case.check_equal(&format!("{run}.captions"), &found, &captions);
    }
    Ok(())
}

/// The tokens that every text begins with: recorded, in this case or in one of the same model, or those of the prompt's words.
fn prompt(case: &Case, language: &Language, run: &str) -> Outcome<Vec<u32>> {
    let recorded = format!("{run}.beams.0");
    if case.has(&recorded) {
        return Ok(case.input(&recorded)?.to_dtype(DType::U32)?.get(0)?.to_vec1()?);
    }
    let files = parameter_files(&case.json);
    if let Some((_, prompt)) = case.shared.prompts.iter().find(|(others, _)| *others == files) {
        return Ok(prompt.clone());
    }
    let text = case.json["prompt"].as_str().or(case.config()?["prompt"].as_str()).ok_or("prompt: expected a text")?;
    let tokenizer = language.tokenizer.as_ref().ok_or("prompt: expected a case with the vocabulary in the folder")?;
    let longest = case.model_config(Task::Captioning)?.max_tokens;
    Ok(tokenizer.encode(&pre_caption(text, usize::MAX)?, longest, false)?)
}

/// The token that ends a text: that of the vocabulary, or what stands before padding in some text of the case.
fn end(case: &Case, language: &Language, padding: u32) -> Outcome<u32> {
    if let Some(tokenizer) = &language.tokenizer {
        return Ok(tokenizer.sep_id());
    }
    for name in case.names("").iter().filter(|name| name.ends_with(".sequences")) {
        for row in case.input(name)?.to_dtype(DType::I64)?.to_vec2::<i64>()? {
            if let Some(at) = row.iter().position(|&id| id == i64::from(padding)).filter(|at| *at > 0) {
                return Ok(row[at - 1] as u32);
            }
        }
    }
    Err("end of text: expected a vocabulary in the folder, or a text with padding in the case, found neither".into())
}
