//! Vision and text encoders alone.

use candle_core::{D, DType, Tensor};
use xvlm::encoders::{Attention, Bert, Concepts, MlmHead, Pass, Regions, TextModel, Vision};
use xvlm::losses;
use xvlm::tasks::official;

use super::case::{Case, Outcome, product};
use super::models::Built;

/// The whole image, regions of it, every stage, and gradients of the products with given cotangents.
pub(super) fn vision(case: &Case) -> Outcome {
    let config = official::vision_config(case.config()?, &case.path)?;
    let Built { model, parameters } = case.build("vision_encoder.", |vb| Vision::new(&config, vb))?;
    let pixels = case.input("in.image")?;
    let pass = Pass::inference().keeping();
    let whole = model.encode(&pixels, &pass)?;
    case.check("out.vision", &whole)?;
    for name in case.names("mid.").iter().filter(|name| !name.starts_with("region.")) {
        let found = match (name.as_str(), pass.kept(name)) {
            // The norm of Swin is what comes out, without the mean.
            ("norm", _) => whole.narrow(1, 1, whole.dim(1)? - 1)?,
            ("patch_embed", Some(found)) if case.input("mid.patch_embed")?.rank() == 4 => image_order(&found)?,
            (_, Some(found)) => found,
            (_, None) => return Err(format!("mid.{name}: expected a stage of the encoder, found none").into()),
        };
        case.check(&format!("mid.{name}"), &found)?;
    }
    let mut loss = match case.has("in.cot") {
        true => product(&whole, &case.input("in.cot")?)?,
        false => whole.to_dtype(DType::F64)?.sum_all()?,
    };
    if case.has("in.atts") {
        let (index, mask) = (case.index("in.idx")?, case.mask("in.atts")?);
        let pass = Pass::inference().keeping();
        let (regions, images) = model.encode_regions(&pixels, Regions { index: &index, mask: &mask }, &pass)?;
        case.check("out.region", &regions)?;
        case.check("out.region_fullatts", &images)?;
        for name in case.names("mid.region.") {
            let kept = pass.kept(&name);
            let found = kept.ok_or_else(|| format!("mid.region.{name}: expected a stage, found none"))?;
            case.check(&format!("mid.region.{name}"), &found)?;
        }
        if case.has("in.cot_region") {
            loss = (loss + product(&regions, &case.input("in.cot_region")?)?)?;
        }
    }
    case.check("out.loss", &loss)?;
    case.check_gradients(&loss.backward()?, &parameters)
}

/// Tokens `[N, L, C]` as a convolution has them `[N, C, P, P]`.
fn image_order(tokens: &Tensor) -> candle_core::Result<Tensor> {
    let (n, l, c) = tokens.dims3()?;
    let side = l.isqrt();
    tokens.transpose(1, 2)?.reshape((n, c, side, side))
}

struct Text {
    bert: Bert,
    head: MlmHead,
}

/// Text and fusion layers, all of them, causal, and the masked-language head.
pub(super) fn text(case: &Case) -> Outcome {
    let json = case.config()?;
    let config = official::text_config(json, &case.path)?;
    let width = json["encoder_width"].as_u64().ok_or("config.encoder_width: expected a whole number")? as usize;
    let Built { model: Text { bert, head }, parameters } = case.build("text_encoder.", |vb| {
        let body = match config.model_type {
            TextModel::Bert => vb.pp("bert"),
            TextModel::Roberta => vb.pp("roberta"),
        };
        Ok(Text { bert: Bert::new(&config, width, body)?, head: MlmHead::new(&config, vb)? })
    })?;
    let texts = case.texts("in.text")?;
    let (tokens, seen) = (case.input("in.image_embeds")?, case.mask("in.image_atts")?);
    let index: Vec<u32> = (0..tokens.dim(0)? as u32).collect();
    let looks = [Concepts { tokens: &tokens, index: &index, mask: &seen }];
    let through = |ids: &Tensor, attention, pass: &Pass| -> candle_core::Result<(Tensor, Tensor)> {
        let text = bert.encode(ids, &texts.mask, attention, pass)?;
        let fused = bert.fuse(&text, &texts.mask, &looks, attention, pass)?;
        Ok((text, fused))
    };

    let pass = Pass::inference().keeping();
    let (text, fused) = through(&texts.ids, Attention::Full, &pass)?;
    case.check("out.text", &text)?;
    case.check("out.fusion", &fused)?;
    // The original ran once from the text and once from the ids: the same layers.
    case.check("out.multi_modal", &fused)?;
    let kept = |name: String| pass.kept(&name).ok_or_else(|| format!("{name}: expected a layer, found none"));
    if case.has("mid.embeddings") {
        case.check("mid.embeddings", &kept("embeddings".to_owned())?)?;
    }
    for (prefix, first) in [("mid.text.hidden.", 0), ("mid.fusion.hidden.", config.fusion_layer)] {
        for number in case.names(prefix) {
            let layer = match number.parse::<usize>()? + first {
                0 => kept("embeddings".to_owned())?,
                layer => kept(format!("layer.{}", layer - 1))?,
            };
            case.check(&format!("{prefix}{number}"), &layer)?;
        }
    }
    let (_, causal) = through(&texts.ids, Attention::Causal, &Pass::inference())?;
    case.check("out.causal", &causal)?;

    let masked = match case.has("in.text_ids_masked") {
        true => through(&case.ids("in.text_ids_masked")?, Attention::Full, &Pass::inference())?.1,
        false => fused.clone(),
    };
    let (positions, labels) = (case.ids("in.masked_pos")?, case.integers("in.masked_ids")?);
    let all = head.forward(&masked, bert.words())?;
    case.check("out.mlm_logits_all_positions", &all)?;
    let logits = head.forward(&at(&masked, &positions)?, bert.words())?;
    case.check("out.mlm_logits", &logits)?;
    let mlm = losses::masked_language(&logits.flatten_to(1)?, &labels)?;
    case.check("out.mlm_loss", &mlm)?;
    let mut loss = mlm.to_dtype(DType::F64)?;
    if case.has("in.cot") {
        let cotangent = case.input("in.cot")?;
        loss = ((loss + product(&fused, &cotangent)?)? + product(&causal, &cotangent)?)?;
    }
    case.check("out.loss", &loss)?;
    case.check_gradients(&loss.backward()?, &parameters)
}

/// The tokens `[B, T, H]` at some positions of each row `[B, K]` → `[B, K, H]`.
pub(super) fn at(tokens: &Tensor, positions: &Tensor) -> candle_core::Result<Tensor> {
    let (b, t, h) = tokens.dims3()?;
    let k = positions.dim(D::Minus1)?;
    let starts = Tensor::arange_step(0u32, (b * t) as u32, t as u32, tokens.device())?.unsqueeze(1)?;
    let rows = positions.to_dtype(DType::U32)?.broadcast_add(&starts)?.flatten_all()?;
    tokens.reshape((b * t, h))?.index_select(&rows, 0)?.reshape((b, k, h))
}
