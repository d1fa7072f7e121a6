//! The training losses of X-VLM (Zeng, Zhang and Li 2022, §3.2–3.3): tensors in, a scalar out.
//!
//! - [`contrastive`]: image–text contrastive loss (ITC), and the similarities it is made of;
//! - [`hard_negatives`] and [`matching`]: image–text matching (ITM);
//! - [`masked_language`]: masked language modelling (MLM); [`generation`]: the next token of a caption or an answer;
//!   [`text_costs`]: how unlikely each of several answers is;
//! - [`boxes`]: the box a text means, L1 and GIoU.
//!
//! *Architecture invariant:* no module and no file is known here, and randomness comes from the caller.

use candle_core::{D, DType, Result, Tensor};
use rand::Rng;
use xvlm_kernels as kernels;

/// ITC: rows of `concepts [B, E]` and `texts [B, E]`, both of unit length, that belong together.
///
/// Rows whose `keys` are equal count as belonging together too, sharing the target evenly (as `XVLM.get_contrastive_loss`
/// does with `idx`): two regions that are both "a red circle" must not be pushed apart. Returns the loss, the mean of both
/// directions, and the similarities over the temperature `[B, B]`, a row for each concept.
///
/// # Errors
/// If shapes differ or there is not one key a row.
pub fn contrastive(concepts: &Tensor, texts: &Tensor, temperature: &Tensor, keys: &[i64]) -> Result<(Tensor, Tensor)> {
    let (b, _) = concepts.dims2()?;
    if texts.dims() != concepts.dims() || keys.len() != b {
        candle_core::bail!(
            "contrastive: expected texts of shape {:?} and {b} keys, found {:?} and {}",
            concepts.dims(),
            texts.dims(),
            keys.len()
        );
    }
    let similarities = concepts.matmul(&texts.t()?)?.broadcast_div(temperature)?;
    let targets: Vec<f32> = keys
        .iter()
        .flat_map(|key| {
            let share = 1.0 / keys.iter().filter(|other| *other == key).count() as f32;
            keys.iter().map(move |other| if other == key { share } else { 0.0 })
        })
        .collect();
    let targets = Tensor::from_vec(targets, (b, b), concepts.device())?;
    let direction = |logits: &Tensor| {
        let log_probabilities = kernels::log_softmax(logits, D::Minus1)?;
        log_probabilities.mul(&targets.to_dtype(log_probabilities.dtype())?)?.sum_all()
    };
    let both = (direction(&similarities)? + direction(&similarities.t()?.contiguous()?)?)?;
    Ok(((both / (-2.0 * b as f64))?, similarities))
}

/// A text and a concept, as rows of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Row of the text.
    pub text: u32,
    /// Row of the concept.
    pub concept: u32,
}

/// The weights that hard negatives are drawn with, from `similarities [B, B]` (row-major): the softmax of each row plus
/// 1e-5, and 0 for every column whose key equals the row's (`XVLM.get_matching_loss`).
pub fn negative_weights(similarities: &[f32], keys: &[i64]) -> Vec<f32> {
    let b = keys.len();
    let mut weights = similarities.to_vec();
    for (row, key) in weights.chunks_exact_mut(b.max(1)).zip(keys) {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|w| *w = (*w - top).exp());
        let total: f32 = row.iter().sum();
        for (w, other) in row.iter_mut().zip(keys) {
            *w = if other == key { 0.0 } else { *w / total + 1e-5 };
        }
    }
    weights
}

/// Hard negatives for ITM: for each text a concept that is not its own, then for each concept a text that is not its own,
/// drawn in proportion to [`negative_weights`]. `similarities [B, B]` has a row for each concept. A row that the batch
/// has no negative for is left out, so there are at most `2·B` pairs.
///
/// # Errors
/// If `similarities` is not `[B, B]`.
pub fn hard_negatives(similarities: &Tensor, keys: &[i64], rng: &mut impl Rng) -> Result<Vec<Pair>> {
    let by_concept = similarities.detach().to_dtype(DType::F32)?;
    let mut draw = |rows: &Tensor| -> Result<Vec<(u32, u32)>> {
        let weights = negative_weights(&rows.flatten_all()?.to_vec1()?, keys);
        let rows = weights.chunks_exact(keys.len().max(1)).enumerate();
        Ok(rows.filter_map(|(row, weights)| Some((row as u32, pick(weights, rng)?))).collect())
    };
    let concepts = draw(&by_concept.t()?.contiguous()?)?;
    let texts = draw(&by_concept)?;
    let with_concept = concepts.into_iter().map(|(text, concept)| Pair { text, concept });
    Ok(with_concept.chain(texts.into_iter().map(|(concept, text)| Pair { text, concept })).collect())
}

/// An index drawn in proportion to its weight; none if all weights are 0.
fn pick(weights: &[f32], rng: &mut impl Rng) -> Option<u32> {
    let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    let mut left = rng.random::<f64>() * total;
    let mut last = None;
    for (i, &weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
        last = Some(i as u32);
        left -= f64::from(weight);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// ITM: `logits [P + Q, 2]`, of which the first `positives` rows match and the others do not.
///
/// # Errors
/// If `logits` is not `[_, 2]`.
pub fn matching(logits: &Tensor, positives: usize) -> Result<Tensor> {
    let labels: Vec<i64> = (0..logits.dim(0)?).map(|row| i64::from(row < positives)).collect();
    kernels::cross_entropy(logits, &labels, 0.0)
}

/// MLM: `logits [K, V]` at the masked positions and the tokens that stood there; a negative label −100 is not counted.
///
/// # Errors
/// If there is not one label a row, or a label is not below `V`.
pub fn masked_language(logits: &Tensor, labels: &[i64]) -> Result<Tensor> {
    kernels::cross_entropy(logits, labels, 0.0)
}

/// The next token: `logits [K, V]` and the token that follows each position (−100: not counted), with label smoothing.
///
/// # Errors
/// If there is not one label a row, or a label is not below `V`.
pub fn generation(logits: &Tensor, labels: &[i64], smoothing: f32) -> Result<Tensor> {
    kernels::cross_entropy(logits, labels, smoothing)
}

/// How unlikely each of a few texts is: `logits [A, T, V]` and the token that follows each position, `A·T` of them (−100: not
/// counted) → `[A]`, the *sum* over a text's tokens of their negative log-probability (`reduction='none'` in the original's
/// `BertLMHeadModel`).
///
/// # Errors
/// If there is not one label a position, or a label is not below `V`.
pub fn text_costs(logits: &Tensor, labels: &[i64]) -> Result<Tensor> {
    let (a, t, v) = logits.dims3()?;
    if labels.len() != a * t {
        candle_core::bail!("text_costs: expected {} labels, found {}", a * t, labels.len());
    }
    if let Some(label) = labels.iter().find(|label| **label != kernels::IGNORE && !(0..v as i64).contains(label)) {
        candle_core::bail!("text_costs: expected labels below {v}, found {label}");
    }
    let classes: Vec<u32> = labels.iter().map(|&label| label.max(0) as u32).collect();
    let counted: Vec<f32> = labels.iter().map(|&label| if label < 0 { 0.0 } else { -1.0 }).collect();
    let shape = (a, t);
    let classes = Tensor::from_vec(classes, shape, logits.device())?.unsqueeze(2)?;
    let chosen = kernels::log_softmax(logits, D::Minus1)?.gather(&classes, 2)?.squeeze(2)?;
    let counted = Tensor::from_vec(counted, shape, logits.device())?.to_dtype(chosen.dtype())?;
    (chosen * counted)?.sum(1)
}

/// What a degenerate box, one of negative width or height, does to the GIoU term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoxRule {
    /// Its row has none. A batch in which no row counts has a loss of 0.
    Row,
    /// As in the original (`XVLM.get_bbox_loss`): no row of the batch has one. A batch in which no row counts has a loss that
    /// is not a number.
    Batch,
}

/// Box loss: `predicted [B, 4]` and `target [B, 4]`, both `(cx, cy, w, h)`; rows that are a whole image do not count.
/// Returns the L1 distance and `1 − GIoU`, each summed and divided by the number of rows that count.
///
/// # Errors
/// On a wrong shape.
pub fn boxes(predicted: &Tensor, target: &Tensor, is_image: &[bool], rule: BoxRule) -> Result<(Tensor, Tensor)> {
    let losses = kernels::box_losses(predicted, target)?;
    let counted = is_image.iter().filter(|whole| !**whole).count();
    let counted = if rule == BoxRule::Row { counted.max(1) } else { counted } as f32;
    let degenerate = degenerate_rows(predicted, target)?;
    let all = rule == BoxRule::Batch && degenerate.contains(&true);
    let weights: Vec<f32> = is_image
        .iter()
        .zip(degenerate)
        .flat_map(|(&whole, degenerate)| {
            let row = if whole { 0.0 } else { 1.0 } / counted;
            [row, if degenerate || all { 0.0 } else { row }]
        })
        .collect();
    let weights = Tensor::from_vec(weights, (is_image.len(), 2), losses.device())?.to_dtype(losses.dtype())?;
    let means = (losses * weights)?.sum(0)?;
    Ok((means.get(0)?, means.get(1)?))
}

/// Which rows have a box of negative width or height.
fn degenerate_rows(predicted: &Tensor, target: &Tensor) -> Result<Vec<bool>> {
    let smallest = |boxes: &Tensor| boxes.detach().narrow(1, 2, 2)?.to_dtype(DType::F32)?.min(1)?.to_vec1::<f32>();
    Ok(smallest(predicted)?.iter().zip(smallest(target)?).map(|(a, b)| a.min(b) < 0.0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn rows(values: &[f32], width: usize) -> Tensor {
        Tensor::from_slice(values, (values.len() / width, width), &Device::Cpu).unwrap()
    }

    #[test]
    fn contrastive_of_two_pairs_by_hand() {
        let concepts = rows(&[1.0, 0.0, 0.0, 1.0], 2);
        let temperature = Tensor::new(0.5f32, &Device::Cpu).unwrap();
        let (loss, _) = contrastive(&concepts, &concepts, &temperature, &[1, 2]).unwrap();
        // Each row is softmax(2, 0): −ln(e² / (e² + 1)).
        let expected = (1.0 + (-2f32).exp()).ln();
        assert!((loss.to_scalar::<f32>().unwrap() - expected).abs() < 1e-6);
        let (loss, _) = contrastive(&concepts, &concepts, &temperature, &[7, 7]).unwrap();
        assert!((loss.to_scalar::<f32>().unwrap() - (expected + 1.0)).abs() < 1e-6, "equal keys share the target");
        assert!(contrastive(&concepts, &concepts, &temperature, &[1]).is_err());
    }

    #[test]
    fn negatives_follow_their_weights_and_never_share_a_key() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let keys = [1, 2, 1, 3];
        let similarities = rows(&[9., 0., 9., 2., 0., 9., 0., 1., 9., 0., 9., 2., 0., 3., 0., 9.], 4);
        let mut hard = 0u32;
        for _ in 0..500 {
            let pairs = hard_negatives(&similarities, &keys, &mut rng).unwrap();
            assert_eq!(pairs.len(), 8);
            assert!(pairs.iter().all(|p| keys[p.text as usize] != keys[p.concept as usize]));
            assert!(pairs[..4].iter().enumerate().all(|(i, p)| p.text == i as u32));
            assert!(pairs[4..].iter().enumerate().all(|(i, p)| p.concept == i as u32));
            hard += u32::from(pairs[4].text == 3);
        }
        // Concept 0 against texts 1 and 3: e⁰ to e², plus 1e-5 each over a total of 2·e⁹ + e² + 1.
        let total = 2.0 * 9f64.exp() + 2f64.exp() + 1.0;
        let (near, far) = (2f64.exp() / total + 1e-5, 1.0 / total + 1e-5);
        let expected = 500.0 * near / (near + far);
        assert!((f64::from(hard) - expected).abs() < 40.0, "{hard} against {expected}");
    }

    #[test]
    fn a_batch_of_equal_texts_has_no_negatives() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let similarities = rows(&[1.0; 9], 3);
        assert_eq!(hard_negatives(&similarities, &[5, 5, 5], &mut rng).unwrap(), []);
    }

    #[test]
    fn whole_images_do_not_count_for_boxes() {
        let predicted = rows(&[0.5, 0.5, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1], 4);
        let target = rows(&[0.5, 0.5, 0.4, 0.2, 0.5, 0.5, 1.0, 1.0], 4);
        let (l1, giou) = boxes(&predicted, &target, &[false, true], BoxRule::Row).unwrap();
        assert!((l1.to_scalar::<f32>().unwrap() - 0.2).abs() < 1e-6);
        assert!((giou.to_scalar::<f32>().unwrap() - 0.5).abs() < 1e-6);
        let (l1, giou) = boxes(&predicted, &target, &[true, true], BoxRule::Row).unwrap();
        assert_eq!((l1.to_scalar::<f32>().unwrap(), giou.to_scalar::<f32>().unwrap()), (0.0, 0.0));
    }

    #[test]
    fn a_degenerate_box_spoils_its_row_or_its_batch() {
        let predicted = rows(&[0.5, 0.5, 0.2, 0.2, 0.5, 0.5, 0.2, 0.2], 4);
        let target = rows(&[0.5, 0.5, 0.4, 0.2, 0.5, 0.5, -0.2, 0.2], 4);
        let giou = |rule| boxes(&predicted, &target, &[false; 2], rule).unwrap().1.to_scalar::<f32>().unwrap();
        assert!((giou(BoxRule::Row) - 0.25).abs() < 1e-6);
        assert_eq!(giou(BoxRule::Batch), 0.0);
        let (l1, _) = boxes(&predicted, &target, &[true; 2], BoxRule::Batch).unwrap();
        assert!(l1.to_scalar::<f32>().unwrap().is_nan());
    }

    #[test]
    fn a_text_costs_the_sum_of_its_tokens() {
        let logits = rows(&[0.0, 1.0, 2.0, 0.0, 0.0, 3.0, 5.0, 5.0], 2).reshape((2, 2, 2)).unwrap();
        let costs = text_costs(&logits, &[1, 0, kernels::IGNORE, 1]).unwrap().to_vec1::<f32>().unwrap();
        let expected = [(1.0 + (-1f32).exp()).ln() + (1.0 + (-2f32).exp()).ln(), 2f32.ln()];
        assert!(costs.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{costs:?}");
        // Against central differences, in f64.
        let logits = logits.to_dtype(DType::F64).unwrap();
        let labels = [1, 0, kernels::IGNORE, 1];
        let total = |logits: &Tensor| text_costs(logits, &labels).unwrap().sum_all().unwrap();
        let var = candle_core::Var::from_tensor(&logits).unwrap();
        let gradients = total(&var).backward().unwrap();
        let found = gradients.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for (i, found) in found.into_iter().enumerate() {
            let moved = |by: f64| {
                let mut numbers = logits.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                numbers[i] += by;
                let moved = Tensor::from_vec(numbers, logits.shape(), &Device::Cpu).unwrap();
                total(&moved).to_scalar::<f64>().unwrap()
            };
            let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((found - difference).abs() < 1e-8, "{i}: {found} for {difference}");
        }
        assert!(text_costs(&logits, &[1]).is_err());
        assert!(text_costs(&logits, &[2, 0, 0, 0]).is_err());
    }

    #[test]
    fn matching_counts_all_rows() {
        let loss = matching(&rows(&[0.0, 2.0, 0.0, 2.0, 0.0, 2.0], 2), 1).unwrap().to_scalar::<f32>().unwrap();
        let log_sum = (1.0 + 2f32.exp()).ln();
        assert!((loss - (3.0 * log_sum - 2.0) / 3.0).abs() < 1e-6);
    }
}
