//! What names of published checkpoints mean. This is the only place that knows them.

use std::collections::BTreeMap;

use crate::checkpoint::TensorInfo;
use crate::convert::Layout;

/// Where a checkpoint comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// X-VLM itself, pre-trained or fine-tuned.
    Xvlm,
    /// Swin transformers of Microsoft.
    Swin,
    /// CLIP with a vision transformer, as on the Hugging Face hub.
    ClipVit,
    /// DeiT of Facebook.
    Deit,
    /// BERT, as on the Hugging Face hub.
    Bert,
    /// RoBERTa, as on the Hugging Face hub.
    Roberta,
}

impl Origin {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Xvlm, Self::Swin, Self::ClipVit, Self::Deit, Self::Bert, Self::Roberta];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xvlm => "xvlm",
            Self::Swin => "swin",
            Self::ClipVit => "clip-vit",
            Self::Deit => "deit",
            Self::Bert => "bert",
            Self::Roberta => "roberta",
        }
    }

    /// Whether its checkpoints hold a parameter.
    pub(crate) fn has(self, parameter: &str) -> bool {
        match self {
            Self::Xvlm => true,
            Self::Swin | Self::ClipVit | Self::Deit => parameter.starts_with("vision_encoder."),
            Self::Bert | Self::Roberta => {
                let is_text = ["text_encoder.", "text_decoder."].iter().any(|part| parameter.starts_with(part));
                is_text && !parameter.contains("crossattention.")
            }
        }
    }
}

/// What becomes of the text and fusion layers of a pre-trained model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextLayers {
    /// The same (`models/model_pretrain.py`).
    Same,
    /// An encoder without its language head (`models/model_retrieval.py`, `models/model_bbox.py`).
    Encoder,
    /// An encoder whose fusion layers are there twice (`models/model_nlvr.py`).
    Paired,
    /// An encoder, and a decoder made of its fusion layers (`models/model_vqa.py`).
    EncoderAndDecoder,
    /// A decoder (`models/model_captioning.py`).
    Decoder,
}

/// What becomes of a tensor.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Parameters of the model.
    Becomes(Vec<String>),
    /// Nothing, and that is right.
    Unused(&'static str),
    /// Nothing, if it has the numbers of one of the tensors that [`tied_to`] names.
    Copy,
    /// Nothing that is known.
    Unknown,
}

const BUFFER: Fate = Fate::Unused("follows from the sizes");
const OTHER_HEAD: Fate = Fate::Unused("is of another task");
const BEYOND: Fate = Fate::Unused("is of a layer that the model has not");
const NO_PART: Fate = Fate::Unused("is of a part that X-VLM has not");

/// What becomes of a tensor of a checkpoint, all of whose tensors are `tensors`.
pub(crate) fn fate(origin: Origin, tensor: &str, layout: &Layout, tensors: &BTreeMap<String, TensorInfo>) -> Fate {
    match origin {
        Origin::Xvlm => of_xvlm(tensor, layout),
        Origin::Swin | Origin::Deit => match tensor {
            _ if is_buffer(tensor) => BUFFER,
            _ if tensor.starts_with("head.") || tensor.starts_with("head_dist.") => NO_PART,
            _ => of_xvlm(&format!("vision_encoder.{tensor}"), layout),
        },
        Origin::ClipVit => match tensor.strip_prefix("vision_model.") {
            _ if is_buffer(tensor) => BUFFER,
            Some(tensor) => {
                let name = tensor.strip_prefix("embeddings.").unwrap_or(tensor);
                let name = name.replace("patch_embedding.weight", "patch_embed.weight");
                let name = name.replace("position_embedding.weight", "pos_embed.weight");
                of_xvlm(&format!("vision_encoder.{name}"), layout)
            }
            None => {
                let others = ["text_model.", "visual_projection.", "text_projection.", "logit_scale"];
                if others.iter().any(|part| tensor.starts_with(part)) { NO_PART } else { Fate::Unknown }
            }
        },
        Origin::Bert => of_text(tensor, "bert", &["cls.predictions."], layout, tensors),
        Origin::Roberta => of_text(tensor, "roberta", &["lm_head."], layout, tensors),
    }
}

/// A tensor of a text model whose layers stand under `body` (or under nothing), and its language head under one of `heads`.
fn of_text(tensor: &str, body: &str, heads: &[&str], layout: &Layout, tensors: &BTreeMap<String, TensorInfo>) -> Fate {
    // The first published BERT checkpoints have the words of TensorFlow.
    let name = tensor.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias");
    if is_buffer(&name) {
        return BUFFER;
    }
    if heads.iter().any(|head| name.starts_with(head)) {
        return of_xvlm(&format!("text_encoder.{name}"), layout);
    }
    let name = name.strip_prefix(body).and_then(|name| name.strip_prefix('.')).unwrap_or(&name);
    if name.starts_with("pooler.") || name.starts_with("cls.seq_relationship.") {
        return NO_PART;
    }
    let Some((layer, part)) = layer_of(name) else { return of_xvlm(&format!("text_encoder.{body}.{name}"), layout) };
    let layer = if layout.every_other_layer {
        let numbers = tensors.keys().filter_map(|name| layer_of(&name[name.find("encoder.layer.")?..]));
        let depth = numbers.map(|(number, _)| number + 1).max().unwrap_or(0);
        every_other(layer, depth, layout)
    } else {
        Some(layer).filter(|&layer| layer < layout.num_hidden_layers)
    };
    match layer {
        Some(layer) => of_xvlm(&format!("text_encoder.{body}.encoder.layer.{layer}.{part}"), layout),
        None => BEYOND,
    }
}

/// Where a layer of a deeper model goes: those below the fusion layer stay, and every other of the last ones becomes a fusion
/// layer. Of BERT-large's 24 layers, 13, 15, … 23 become 6 to 11.
fn every_other(layer: usize, depth: usize, layout: &Layout) -> Option<usize> {
    if layer < layout.fusion_layer {
        return Some(layer);
    }
    let fused = layout.num_hidden_layers - layout.fusion_layer;
    let first = (depth + 1).checked_sub(2 * fused)?;
    let from_first = layer.checked_sub(first)?;
    (from_first % 2 == 0).then_some(layout.fusion_layer + from_first / 2)
}

/// A tensor of X-VLM.
fn of_xvlm(tensor: &str, layout: &Layout) -> Fate {
    let is_parameter = |name: &str| layout.parameters.contains_key(name);
    let becomes = |names: Vec<String>| {
        let names: Vec<String> = names.into_iter().filter(|name| is_parameter(name)).collect();
        if names.is_empty() { Fate::Unknown } else { Fate::Becomes(names) }
    };
    if is_buffer(tensor) {
        return BUFFER;
    }
    if is_parameter(tensor) {
        return Fate::Becomes(vec![tensor.to_owned()]);
    }
    if let Some((body, name)) = body_of(tensor) {
        let encoder = format!("text_encoder.{name}");
        let layer = layer_of(name);
        return match layout.text {
            TextLayers::Same => Fate::Unknown,
            TextLayers::Encoder => becomes(vec![encoder]),
            TextLayers::Decoder => becomes(vec![format!("text_decoder.{body}.{name}")]),
            TextLayers::Paired => match layer
                .and_then(|(layer, part)| Some((layer.checked_sub(layout.fusion_layer)?, part)))
            {
                Some((fused, part)) => {
                    let first = layout.fusion_layer + 2 * fused;
                    becomes(
                        [first, first + 1].map(|layer| format!("text_encoder.encoder.layer.{layer}.{part}")).to_vec(),
                    )
                }
                None => becomes(vec![encoder]),
            },
            TextLayers::EncoderAndDecoder => {
                let decoder = match layer {
                    None => Some(name.to_owned()),
                    Some((layer, part)) => {
                        let fused = layer.checked_sub(layout.fusion_layer);
                        fused.map(|layer| format!("encoder.layer.{layer}.{part}"))
                    }
                };
                let decoder = decoder.map(|name| format!("text_decoder.{body}.{name}"));
                becomes([Some(encoder), decoder].into_iter().flatten().collect())
            }
        };
    }
    if tied_head(tensor).is_some() || layout.text == TextLayers::Paired && previous_layer(tensor).is_some() {
        return Fate::Copy;
    }
    for head in ["cls.", "lm_head."] {
        if let Some(rest) = tensor.strip_prefix("text_encoder.").filter(|rest| rest.starts_with(head)) {
            return match layout.text {
                TextLayers::Decoder | TextLayers::EncoderAndDecoder => becomes(vec![format!("text_decoder.{rest}")]),
                TextLayers::Encoder | TextLayers::Paired => OTHER_HEAD,
                TextLayers::Same => Fate::Unknown,
            };
        }
    }
    let heads = ["itm_head.", "bbox_head.", "cls_head.", "ta_head.", "vision_proj.", "text_proj.", "temp"];
    if heads.iter().any(|head| tensor.starts_with(head)) { OTHER_HEAD } else { Fate::Unknown }
}

/// `bert` or `roberta`, and the name below it, of a tensor of the pre-trained text encoder.
fn body_of(tensor: &str) -> Option<(&str, &str)> {
    let (body, name) = tensor.strip_prefix("text_encoder.")?.split_once('.')?;
    ["bert", "roberta"].contains(&body).then_some((body, name))
}

/// The number of a layer, and the name below it, of `encoder.layer.7.output.dense.weight`.
fn layer_of(name: &str) -> Option<(usize, &str)> {
    let (number, part) = name.strip_prefix("encoder.layer.")?.split_once('.')?;
    Some((number.parse().ok()?, part))
}

/// Whether a tensor of this name is no parameter but follows from the sizes: indices and masks of attention windows, and
/// numbers of positions.
pub fn is_buffer(name: &str) -> bool {
    let in_block = |name: &str| {
        let mut parts = name.rsplitn(3, '.').skip(1);
        parts.next().is_some_and(|number| number.parse::<usize>().is_ok())
            && parts.next().is_some_and(|rest| rest.ends_with(".blocks"))
    };
    match name.rsplit_once('.') {
        Some((block, "attn_mask")) => in_block(&format!("{block}.attn_mask")),
        Some((attention, "relative_position_index")) => attention.ends_with(".attn") && in_block(attention),
        Some((embeddings, "position_ids")) => ["embeddings", "vision_encoder"]
            .iter()
            .any(|end| embeddings == *end || embeddings.strip_suffix(end).is_some_and(|before| before.ends_with('.'))),
        Some(_) => false,
        None => name == "position_ids",
    }
}

/// The parameter that a tensor of this name may be a copy of: what a language head shares with the embeddings, or what the second
/// of two layers about two images shares with the first.
pub fn tied_to(name: &str) -> Option<String> {
    tied_head(name).or_else(|| previous_layer(name))
}

/// What the last layer of a language head is tied to.
fn tied_head(name: &str) -> Option<String> {
    for (head, body) in [("cls.predictions.decoder.", "bert"), ("lm_head.decoder.", "roberta")] {
        if let Some(before) = name.strip_suffix("weight").and_then(|name| name.strip_suffix(head)) {
            return Some(format!("{before}{body}.embeddings.word_embeddings.weight"));
        }
        if name.strip_suffix("bias").is_some_and(|name| name.ends_with(head)) {
            return Some(name.replace(".decoder.bias", ".bias"));
        }
    }
    None
}

/// The key or value projection of the layer before, of whose cross attention this may be a copy.
fn previous_layer(name: &str) -> Option<String> {
    let (before, rest) = name.split_once("encoder.layer.")?;
    let (number, part) = rest.split_once('.')?;
    let shared = ["crossattention.self.key.", "crossattention.self.value."];
    let number = number.parse::<usize>().ok()?.checked_sub(1).filter(|_| shared.iter().any(|s| part.starts_with(s)))?;
    Some(format!("{before}encoder.layer.{number}.{part}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(text: TextLayers, parameters: &[&str]) -> Layout {
        Layout {
            text,
            fusion_layer: 6,
            num_hidden_layers: 12,
            every_other_layer: false,
            parameters: parameters.iter().map(|name| ((*name).to_owned(), vec![1])).collect(),
        }
    }

    #[test]
    fn layers_of_a_deeper_model() {
        let layout = layout(TextLayers::Same, &[]);
        assert_eq!(
            [13, 15, 17, 19, 21, 23].map(|layer| every_other(layer, 24, &layout)),
            [6, 7, 8, 9, 10, 11].map(Some)
        );
        assert_eq!([0, 5].map(|layer| every_other(layer, 24, &layout)), [0, 5].map(Some));
        assert_eq!([6, 12, 14, 22].map(|layer| every_other(layer, 24, &layout)), [None; 4]);
    }

    #[test]
    fn buffers_are_known_by_their_place() {
        for name in [
            "vision_encoder.layers.0.blocks.1.attn_mask",
            "layers.3.blocks.0.attn.relative_position_index",
            "text_encoder.bert.embeddings.position_ids",
            "bert.embeddings.position_ids",
            "embeddings.position_ids",
            "vision_model.embeddings.position_ids",
            "vision_encoder.position_ids",
            "position_ids",
        ] {
            assert!(is_buffer(name), "{name}");
        }
        for name in ["vision_encoder.foo_attn_mask", "blocks.attn_mask", "x.relative_position_index", "my.position_ids"]
        {
            assert!(!is_buffer(name), "{name}");
        }
    }

    #[test]
    fn text_layers_go_where_the_task_has_them() {
        let source = "text_encoder.bert.encoder.layer.7.output.dense.weight";
        let becomes = |text, names: &[&str]| {
            let expected = Fate::Becomes(names.iter().map(|name| (*name).to_owned()).collect());
            assert_eq!(of_xvlm(source, &layout(text, names)), expected);
        };
        becomes(TextLayers::Encoder, &["text_encoder.encoder.layer.7.output.dense.weight"]);
        becomes(TextLayers::Decoder, &["text_decoder.bert.encoder.layer.7.output.dense.weight"]);
        becomes(
            TextLayers::Paired,
            &["text_encoder.encoder.layer.8.output.dense.weight", "text_encoder.encoder.layer.9.output.dense.weight"],
        );
        becomes(
            TextLayers::EncoderAndDecoder,
            &[
                "text_encoder.encoder.layer.7.output.dense.weight",
                "text_decoder.bert.encoder.layer.1.output.dense.weight",
            ],
        );
        assert_eq!(of_xvlm("something.else", &layout(TextLayers::Encoder, &[])), Fate::Unknown);
        assert_eq!(of_xvlm("itm_head.0.weight", &layout(TextLayers::Encoder, &[])), OTHER_HEAD);
    }
}
