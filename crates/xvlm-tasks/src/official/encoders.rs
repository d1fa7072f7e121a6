//! The encoders of a configuration of the original, and their own files.

use std::path::Path;

use serde_json::Value;
use xvlm_encoders::{Activation, BertConfig, SwinConfig, TextModel, VisionConfig, VitConfig, VitFamily};

use super::section::Section;
use crate::error::ConfigProblem;

/// Side of a patch of every Swin of the original, before patches merge.
const SWIN_PATCH: usize = 4;

pub(super) fn vision(root: &Section) -> Result<VisionConfig, ConfigProblem> {
    let image_res = root.size("image_res")?;
    let patch_size = root.size("patch_size")?;
    if root.flag_or("use_clip_vit", false)? {
        let vision = root.file("vision_config")?;
        vision.expect("patch_size", patch_size)?;
        return Ok(VisionConfig::Vit(VitConfig {
            hidden_size: vision.size("vision_width")?,
            num_hidden_layers: vision.size("num_hidden_layers")?,
            num_attention_heads: vision.size("num_attention_heads")?,
            intermediate_size: vision.size("intermediate_size")?,
            local_attn_depth: vision.size("local_attn_depth")?,
            hidden_act: activation(&vision, Activation::QuickGelu)?,
            attention_dropout: vision.number_or("attention_dropout", 0.0)?,
            patch_size,
            ..VitConfig::clip_base(image_res)
        }));
    }
    if root.flag_or("use_swin", false)? {
        let vision = root.file("vision_config")?;
        vision.expect("image_res", image_res)?;
        let swin = swin(&vision)?;
        let valid = swin.validate();
        valid.map_err(|error| vision.problem("", &error.expected, &format!("{} {}", error.field, error.found)))?;
        let width = swin.width();
        vision.expect("vision_width", width)?;
        root.expect("patch_size", swin.stride())?;
        return Ok(VisionConfig::Swin(swin));
    }
    root.expect("patch_size", 16)?;
    Ok(VisionConfig::Vit(VitConfig::deit_base(image_res)))
}

fn swin(vision: &Section) -> Result<SwinConfig, ConfigProblem> {
    Ok(SwinConfig {
        embed_dim: vision.size("embed_dim")?,
        depths: vision.sizes("depths")?,
        num_heads: vision.sizes("num_heads")?,
        window_size: vision.size("window_size")?,
        patch_size: SWIN_PATCH,
        ..SwinConfig::base(vision.size("image_res")?)
    })
}

fn activation(section: &Section, default: Activation) -> Result<Activation, ConfigProblem> {
    let name = match default {
        Activation::Gelu => "gelu",
        Activation::QuickGelu => "quick_gelu",
    };
    match section.text_or("hidden_act", name)?.as_str() {
        "gelu" => Ok(Activation::Gelu),
        "quick_gelu" => Ok(Activation::QuickGelu),
        other => Err(section.problem("hidden_act", "gelu or quick_gelu", other)),
    }
}

pub(super) fn text(root: &Section) -> Result<BertConfig, ConfigProblem> {
    let text = root.file("text_config")?;
    let config = bert(&text)?;
    let is_roberta = config.model_type == TextModel::Roberta;
    let says_roberta = root.flag_or("use_roberta", is_roberta)?;
    if says_roberta != is_roberta {
        let expected = format!("{is_roberta}, as model_type of {} says", text.file.display());
        return Err(root.problem("use_roberta", &expected, &says_roberta.to_string()));
    }
    Ok(config)
}

fn bert(text: &Section) -> Result<BertConfig, ConfigProblem> {
    let (model_type, base) = match text.text_or("model_type", "bert")?.as_str() {
        "bert" => (TextModel::Bert, BertConfig::base()),
        "roberta" => (TextModel::Roberta, BertConfig::roberta_base()),
        other => return Err(text.problem("model_type", "bert or roberta", other)),
    };
    if text.text_or("hidden_act", "gelu")? != "gelu" {
        return Err(text.problem("hidden_act", "gelu", &text.text_or("hidden_act", "")?));
    }
    Ok(BertConfig {
        model_type,
        pad_token_id: text.size_or("pad_token_id", base.pad_token_id as usize)? as u32,
        vocab_size: text.size("vocab_size")?,
        hidden_size: text.size("hidden_size")?,
        num_hidden_layers: text.size("num_hidden_layers")?,
        fusion_layer: text.size("fusion_layer")?,
        num_attention_heads: text.size("num_attention_heads")?,
        intermediate_size: text.size("intermediate_size")?,
        max_position_embeddings: text.size("max_position_embeddings")?,
        type_vocab_size: text.size_or("type_vocab_size", base.type_vocab_size)?,
        layer_norm_eps: text.number_or("layer_norm_eps", base.layer_norm_eps)?,
        hidden_dropout_prob: text.number_or("hidden_dropout_prob", 0.1)?,
        attention_probs_dropout_prob: text.number_or("attention_probs_dropout_prob", 0.1)?,
        initializer_range: text.number_or("initializer_range", 0.02)?,
    })
}

/// A vision encoder's own configuration: a JSON file of the original, or the arguments of its class (`SwinTransformer`,
/// `CLIPVisionTransformer`, `VisionTransformer`).
///
/// # Errors
/// As [`from_official`](super::from_official).
pub fn vision_config(config: &Value, path: &Path) -> Result<VisionConfig, ConfigProblem> {
    let section = Section::new(config, path)?;
    if section.has("window_size") {
        return Ok(VisionConfig::Swin(swin(&section)?));
    }
    let eps = |default| section.number_or("norm_eps", default);
    Ok(VisionConfig::Vit(if section.has("hidden_act") {
        VitConfig {
            patch_size: section.size("patch_size")?,
            hidden_size: section.size("hidden_size").or_else(|_| section.size("vision_width"))?,
            num_hidden_layers: section.size("num_hidden_layers")?,
            num_attention_heads: section.size("num_attention_heads")?,
            intermediate_size: section.size("intermediate_size")?,
            local_attn_depth: section.size_or("local_attn_depth", 4)?,
            hidden_act: activation(&section, Activation::QuickGelu)?,
            norm_eps: eps(1e-5)?,
            ..VitConfig::clip_base(section.size("image_size")?)
        }
    } else {
        let width = section.size("embed_dim")?;
        VitConfig {
            family: VitFamily::Deit,
            patch_size: section.size("patch_size")?,
            hidden_size: width,
            num_hidden_layers: section.size("depth")?,
            num_attention_heads: section.size("num_heads")?,
            intermediate_size: (section.number_or("mlp_ratio", 4.0)? * width as f64) as usize,
            local_attn_depth: section.size_or("local_attn_depth", 4)?,
            norm_eps: eps(1e-6)?,
            ..VitConfig::deit_base(section.size("img_size")?)
        }
    }))
}

/// A text encoder's own configuration: `config_bert.json`, `config_roberta.json`.
///
/// # Errors
/// As [`from_official`](super::from_official).
pub fn text_config(config: &Value, path: &Path) -> Result<BertConfig, ConfigProblem> {
    bert(&Section::new(config, path)?)
}
