//! Fine-tuning: what each task's model computes, loses and learns from.

use candle_core::{D, DType, Device, Tensor};
use xvlm::data::GenerationTensors;
use xvlm::encoders::{Attention, Concepts, Pass, Task};
use xvlm::kernels::{self, IGNORE};
use xvlm::tasks::nlvr::{self, Draws};
use xvlm::tasks::vqa::Ranking;
use xvlm::tasks::{ImageTokens, Source, Texts, grounding, retrieval, vqa, writing_loss};

use super::case::{Case, Outcome};
use super::models::Built;
use super::training::sum;

/// ITC with soft labels, ITM, and the scores of the evaluation.
pub(super) fn retrieval(case: &Case) -> Outcome {
    let Built { model, parameters } = case.xvlm(Task::Retrieval)?;
    let text = case.text_tensors()?;
    let rows = text.ids.dim(0)?;
    let pass = Pass::inference();
    let images = ImageTokens::new(model.encode_image(&case.images(rows, &model)?, &pass)?);
    let encoded = model.encode_text(&text.ids, &text.mask, Attention::Full, &pass)?;
    let (image_features, text_features) = (model.project_image(images.tensor())?, model.project_text(&encoded)?);
    case.check("mid.image_embeds", images.tensor())?;
    case.check("mid.text_embeds", &encoded)?;
    case.check("mid.image_feat", &image_features)?;
    case.check("mid.text_feat", &text_features)?;
    let pairs = Case::pairs(&case.integers("draw.image_neg_idx")?, &case.integers("draw.text_neg_idx")?);
    let (texts, index): (Vec<u32>, Vec<u32>) =
        (0..rows as u32).map(|row| (row, row)).chain(pairs.iter().map(|pair| (pair.text, pair.concept))).unzip();
    let texts = Tensor::new(texts, &Device::Cpu)?;
    let mask = Tensor::ones((index.len(), images.tensor().dim(1)?), DType::F32, &Device::Cpu)?;
    let looks = Concepts { tokens: images.tensor(), index: &index, mask: &mask };
    let (encoded, mask) = (encoded.index_select(&texts, 0)?, text.mask.index_select(&texts, 0)?);
    let fused = model.fuse(&encoded, &mask, &looks, Attention::Full, &pass)?;
    case.check("mid.itm_logits", &model.match_logits(&fused)?)?;

    let own: Vec<i64> = (0..rows as i64).collect();
    let contrast = |keys: &[i64]| -> candle_core::Result<Tensor> {
        Ok(xvlm::losses::contrastive(&image_features, &text_features, model.temperature()?, keys, None)?.0)
    };
    case.check("out.loss_itc_without_idx", &contrast(&own)?)?;
    let losses = retrieval::losses(&model, &images, &text, &pass, &mut case.negatives(), None)?.0;
    for (name, loss) in &losses {
        case.check(&format!("out.loss_{name}"), loss)?;
    }
    let total = sum(losses.iter().map(|(_, loss)| loss))?;
    case.check("out.loss", &total)?;
    case.check_gradients(&total.backward()?, &parameters)?;

    if case.has("eval.score_i2t") {
        let table = case.input("eval.score_i2t")?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let k = table.first().map_or(0, |row| row.iter().filter(|&&score| score > -100.0).count());
        let (ids, mask) = (text.ids.to_vec2::<u32>()?, text.mask.to_vec2::<f32>()?);
        let is_there = |(id, mask): (u32, f32)| (mask > 0.0).then_some(id);
        let texts: Vec<Vec<u32>> = ids
            .into_iter()
            .zip(mask)
            .map(|(ids, mask)| ids.into_iter().zip(mask).filter_map(is_there).collect())
            .collect();
        let scores = retrieval::score(&model, &images, &texts, k)?;
        case.check("eval.sims", &scores.similarities)?;
        let (images, texts) = scores.similarities.dims2()?;
        case.check("eval.score_i2t", &dense(&scores.image_to_text, texts)?)?;
        case.check("eval.score_t2i", &dense(&scores.text_to_image, images)?)?;
    }
    Ok(())
}

/// Candidates as the original's table, a row each; −100 where there is none.
fn dense(rankings: &[retrieval::Ranking], columns: usize) -> candle_core::Result<Tensor> {
    let mut scores = vec![-100f32; rankings.len() * columns];
    for (row, ranking) in rankings.iter().enumerate() {
        ranking.iter().for_each(|&(column, logit)| scores[row * columns + column as usize] = logit);
    }
    Tensor::from_vec(scores, (rankings.len(), columns), &Device::Cpu)
}

/// Boxes of texts, in images of their own or in one that several look at.
pub(super) fn grounding(case: &Case) -> Outcome {
    let Built { model, parameters } = case.xvlm(Task::Grounding)?;
    let text = case.text_tensors()?;
    let rows = text.ids.dim(0)?;
    let index = match case.has("in.idx_to_group_img") {
        true => case.index("in.idx_to_group_img")?,
        false => (0..rows as u32).collect(),
    };
    let is_image = match case.has("in.is_image") {
        true => case.integers("in.is_image")?.into_iter().map(|whole| whole == 1).collect(),
        false => vec![false; rows],
    };
    let pass = Pass::inference();
    let count = 1 + index.iter().copied().max().unwrap_or(0) as usize;
    let images = ImageTokens::new(model.encode_image(&case.images(count, &model)?, &pass)?);
    let encoded = model.encode_text(&text.ids, &text.mask, Attention::Full, &pass)?;
    let fused = Source::images(&images)?
        .look_at(&index, |looks| model.fuse(&encoded, &text.mask, looks, Attention::Full, &pass))?;
    case.check("mid.image_embeds", images.tensor())?;
    case.check("mid.text_embeds", &encoded)?;
    case.check("mid.cross", &fused)?;
    case.check("out.coord", &model.predict_box(&fused)?)?;
    let boxes = case.input("in.target_bbox")?;
    let losses = grounding::losses(&model, &images, &text, &index, &boxes, &is_image, &pass)?.0;
    for (name, loss) in &losses {
        case.check(&format!("out.loss_{name}"), loss)?;
    }
    let total = sum(losses.iter().map(|(_, loss)| loss))?;
    case.check("out.loss", &total)?;
    case.check_gradients(&total.backward()?, &parameters)
}

/// Grad-CAM, and the ranking of proposals by it.
pub(super) fn heat_map(case: &Case) -> Outcome {
    let model = case.xvlm(Task::Retrieval)?.model;
    let texts = case.texts("in.text")?;
    let layer = case.json["block_num"].as_u64().ok_or("block_num: expected a whole number")? as usize;
    let images = model.encode_image(&case.images(texts.ids.dim(0)?, &model)?, &Pass::inference())?;
    let images = ImageTokens::new(images);
    let index: Vec<u32> = (0..images.len() as u32).collect();
    let heat = grounding::heat(&model, &images, &texts, &index, layer)?;
    case.check("mid.attn", &heat.attention)?;
    case.check("mid.attn_grad", &heat.gradient)?;
    case.check("mid.itm_logits", &heat.match_logits)?;
    case.check("out.gradcam", &heat.map)?;

    let proposals: Vec<[f32; 4]> = serde_json::from_value(case.json["dets_xywh"].clone()).unwrap_or_default();
    let mut size = None;
    for name in case.names("out.mask_") {
        let (height, width, row) = (|| {
            let (size, row) = name.split_once("_of_")?;
            let (height, width) = size.split_once('x')?;
            Some((height.parse::<usize>().ok()?, width.parse::<usize>().ok()?, row.parse::<usize>().ok()?))
        })()
        .ok_or_else(|| format!("out.mask_{name}: expected a name like out.mask_60x100_of_0"))?;
        let map = kernels::resize_bicubic(&heat.map.get(row)?.unsqueeze(2)?, height, width)?;
        case.check(&format!("out.mask_{name}"), &map)?;
        size = Some((height as u32, width as u32));
    }
    for row in case.names("out.det_scores_") {
        let (height, width) = size.ok_or("out.det_scores: expected the size of the image in out.mask_HxW_of_ROW")?;
        let scores = grounding::StretchedHeat::new(&heat.map.get(row.parse()?)?, width, height)?.rank(&proposals);
        let count = scores.len();
        case.check(&format!("out.det_scores_{row}"), &Tensor::from_vec(scores, count, &Device::Cpu)?)?;
    }
    Ok(())
}

/// A statement about two images.
pub(super) fn statements(case: &Case) -> Outcome {
    let Built { model, parameters } = case.xvlm(Task::Nlvr)?;
    let texts = case.texts("in.text")?;
    let b = texts.ids.dim(0)?;
    let pass = Pass::inference();
    let tokens = model.encode_image(&case.images(2 * b, &model)?, &pass)?;
    case.check("mid.image_embeds", &tokens)?;
    let encoded = model.encode_text(&texts.ids, &texts.mask, Attention::Full, &pass)?;
    let seen = Tensor::ones((b, tokens.dim(1)?), DType::F32, &Device::Cpu)?;
    let index = [0, b as u32].map(|start| (start..start + b as u32).collect::<Vec<_>>());
    let looks = [0, 1].map(|i| Concepts { tokens: &tokens, index: &index[i], mask: &seen });
    case.check("mid.cross", &model.fuse_pair(&encoded, &texts.mask, &looks, &pass)?)?;
    let images = ImageTokens::new(tokens);
    case.check("out.prediction", &nlvr::statement_logits(&model, &images, &texts, &pass)?)?;
    let is_true: Vec<bool> = case.integers("in.targets")?.into_iter().map(|target| target == 1).collect();
    let loss = nlvr::loss(&model, &images, &texts, &is_true, &pass)?;
    case.check("out.loss", &loss)?;
    case.check_gradients(&loss.backward()?, &parameters)
}

/// The draws of the original, in the order it made them.
struct Recorded<'a> {
    case: &'a Case<'a>,
    uniforms: std::vec::IntoIter<f32>,
    picks: usize,
    error: Option<String>,
}

impl Draws for Recorded<'_> {
    fn uniform(&mut self) -> f32 {
        self.uniforms.next().unwrap_or_else(|| {
            self.error = Some("draw.rand: expected more numbers".to_owned());
            0.0
        })
    }

    fn pick(&mut self, weights: &[f32], _count: usize) -> Vec<u32> {
        let number = self.picks;
        self.picks += 1;
        let checked = Tensor::new(weights, &Device::Cpu)
            .map_err(Into::into)
            .and_then(|weights| self.case.check(&format!("draw.weights.{number}"), &weights))
            .and_then(|()| self.case.index(&format!("draw.multinomial.{number}")));
        checked.unwrap_or_else(|error| {
            self.error = Some(error.to_string());
            vec![0]
        })
    }
}

/// Which of two images a text is about.
pub(super) fn assignment(case: &Case) -> Outcome {
    let Built { model, parameters } = case.xvlm(Task::NlvrPretrain)?;
    let texts = case.texts("in.text")?;
    let pass = Pass::inference();
    let images = ImageTokens::new(model.encode_image(&case.images(texts.ids.dim(0)?, &model)?, &pass)?);
    case.check("mid.image_feat", &model.project_image(images.tensor())?)?;
    let uniforms = case.input("draw.rand")?.flatten_all()?.to_vec1::<f32>()?.into_iter();
    let mut draws = Recorded { case, uniforms, picks: 0, error: None };
    let assignments = nlvr::assign(&nlvr::assignment_weights(&model, &images)?, &mut draws)?;
    if let Some(error) = draws.error {
        return Err(error.into());
    }
    let (logits, loss) = nlvr::assignment(&model, &images, &texts, &assignments, &pass)?;
    case.check("out.prediction", &logits)?;
    case.check("out.loss", &loss)?;
    case.check_gradients(&loss.backward()?, &parameters)
}

/// Weighted answers to questions.
pub(super) fn answers(case: &Case) -> Outcome {
    let Built { model, parameters } = case.xvlm(Task::Vqa)?;
    let (questions, answers) = (case.texts("in.q")?, case.texts("in.a")?);
    let counts: Vec<usize> = serde_json::from_value(case.json["k"].clone())?;
    let question: Vec<u32> = (0u32..).zip(counts).flat_map(|(row, count)| std::iter::repeat_n(row, count)).collect();
    let weights = case.input("in.weights")?.to_dtype(DType::F32)?;
    let pass = Pass::inference();
    let rows = questions.ids.dim(0)?;
    let images = ImageTokens::new(model.encode_image(&case.images(rows, &model)?, &pass)?);
    let index: Vec<u32> = (0..rows as u32).collect();
    let states = vqa::question_states(&model, &Source::images(&images)?, &questions, &index, &pass)?;
    case.check("mid.question_states", &states.tokens)?;
    let decoded = states.look_at(&question, |looks| model.decode(&answers.ids, &answers.mask, looks, &pass))?;
    case.check("mid.decoder_logits", &model.next_token_logits(&decoded)?)?;
    case.check("mid.answer_loss", &vqa::answer_costs(&model, &states, &answers, &question, &pass)?)?;
    let loss = vqa::loss(&model, &images, (&questions, &index), (&answers, &question), &weights, &pass)?;
    case.check("out.loss", &loss)?;
    case.check_gradients(&loss.backward()?, &parameters)
}

/// A list of answers ranked for each question.
pub(super) fn ranking(case: &Case) -> Outcome {
    let model = case.xvlm(Task::Vqa)?.model;
    let (questions, answers) = (case.texts("in.q")?, case.texts("in.a")?);
    let k = case.json["k"].as_u64().ok_or("k: expected a whole number")? as usize;
    let pass = Pass::inference();
    let rows = questions.ids.dim(0)?;
    let images = ImageTokens::new(model.encode_image(&case.images(rows, &model)?, &pass)?);
    let index: Vec<u32> = (0..rows as u32).collect();
    let states = vqa::question_states(&model, &Source::images(&images)?, &questions, &index, &pass)?;

    let begin = answers.ids.narrow(0, 0, 1)?.narrow(1, 0, 1)?.broadcast_as((rows, 1))?.contiguous()?;
    let seen = Tensor::ones((rows, 1), DType::F32, &Device::Cpu)?;
    let start = states.look_at(&index, |looks| model.decode(&begin, &seen, looks, &pass))?;
    let start = model.next_token_logits(&start.squeeze(1)?)?;
    case.check("mid.start_logits", &start)?;
    let tokens = answers.ids.narrow(1, 1, 1)?.squeeze(1)?;
    let first = kernels::softmax(&start, D::Minus1)?.index_select(&tokens, 1)?;
    case.check("mid.first_token_prob", &first)?;
    let (mut chosen, mut probabilities, mut costs) = (Vec::new(), Vec::new(), Vec::new());
    for (question, row) in (0u32..).zip(first.to_vec2::<f32>()?) {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        order.truncate(k);
        probabilities.extend(order.iter().map(|&answer| row[answer]));
        chosen.extend(order.iter().map(|&answer| answer as i64));
        let order: Vec<u32> = order.into_iter().map(|answer| answer as u32).collect();
        let asked = vec![question; order.len()];
        let order = Tensor::new(order, &Device::Cpu)?;
        let some = Texts { ids: answers.ids.index_select(&order, 0)?, mask: answers.mask.index_select(&order, 0)? };
        costs.push(vqa::answer_costs(&model, &states, &some, &asked, &pass)?);
    }
    case.check_index("mid.stage1_topk_ids", &chosen)?;
    case.check("mid.stage1_topk_probs", &Tensor::from_vec(probabilities, (rows, k), &Device::Cpu)?)?;
    case.check("mid.answer_loss", &Tensor::cat(&costs, 0)?)?;

    let prompts: Vec<(u32, Vec<u32>)> = (0u32..).zip(begin.to_vec2::<u32>()?).collect();
    let (ids, mask) = (answers.ids.to_vec2::<u32>()?, answers.mask.to_vec2::<f32>()?);
    let tokens = |(ids, mask): (Vec<u32>, Vec<f32>)| {
        ids.into_iter().zip(mask).skip(1).filter(|(_, seen)| *seen > 0.0).map(|(id, _)| id).collect::<Vec<u32>>()
    };
    let list: Vec<Vec<u32>> = ids.into_iter().zip(mask).map(tokens).collect();
    let ranked = vqa::rank(&model, &states, &prompts, &list, Ranking { k, as_original: true })?;
    let best: Vec<i64> = ranked.iter().flatten().map(|ranked| i64::from(ranked.answer)).collect();
    case.check_index("out.topk_ids", &best)?;
    let probabilities: Vec<f32> = ranked.iter().flatten().map(|ranked| ranked.probability).collect();
    case.check("out.topk_probs", &Tensor::from_vec(probabilities, (rows, k), &Device::Cpu)?)
}

/// Captions written by teacher forcing. Without targets every token but padding is one, and nothing is smoothed.
pub(super) fn captions(case: &Case) -> Outcome {
    let Built { model, parameters } = case.xvlm(Task::Captioning)?;
    let texts = case.texts("in.text")?;
    let (b, t) = texts.ids.dims2()?;
    if t == 0 {
        return Err("in.text_ids: expected texts, found none".into());
    }
    let pass = Pass::inference();
    let tokens = model.encode_image(&case.images(b, &model)?, &pass)?;
    let (targets, smoothing) = match case.has("in.targets") {
        true => {
            let smoothing = case.config()?["label_smoothing"].as_f64();
            let smoothing = smoothing.ok_or("config.label_smoothing: expected a number")?;
            (case.integers("in.targets")?, smoothing as f32)
        }
        false => {
            let padding = case.config()?["pad_token_id"].as_i64().unwrap_or(0);
            let ids = case.integers("in.text_ids")?;
            (ids.into_iter().map(|id| if id == padding { IGNORE } else { id }).collect(), 0.0)
        }
    };
    // The label of a position is the target of the next.
    let labels = targets.chunks(t).flat_map(|row| row[1..].iter().copied().chain([IGNORE])).collect();
    let image_index: Vec<u32> = (0..b as u32).collect();
    let source = Source::images(&ImageTokens::new(tokens.clone()))?;
    let decoded = source.look_at(&image_index, |looks| model.decode(&texts.ids, &texts.mask, looks, &pass))?;
    case.check("mid.logits", &model.next_token_logits(&decoded)?)?;
    let batch = GenerationTensors { ids: texts.ids, mask: texts.mask, labels, image_index };
    let loss = writing_loss(&model, &batch, &tokens, smoothing, &pass)?;
    case.check("out.loss", &loss)?;
    case.check_gradients(&loss.backward()?, &parameters)
}
