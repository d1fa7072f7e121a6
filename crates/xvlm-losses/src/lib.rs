//! The training losses of X-VLM (Zeng, Zhang and Li 2022, §3.2–3.3): tensors in, a scalar out.
//!
//! - [`contrastive`]: image–text contrastive loss (ITC), and the similarities it is made of;
//! - [`hard_negatives`] and [`matching`]: image–text matching (ITM);
//! - [`masked_language`]: masked language modelling (MLM); [`generation`]: the next token of a caption or an answer;
//!   [`text_costs`]: how unlikely each of several answers is; [`policy_gradient`]: texts that were drawn and rewarded;
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
/// directions, and the similarities over the temperature `[B, B]`, a row for each concept. Both are `f32` for half types.
///
/// With `weights`, one a row, the mean is a weighted one, and rows of weight 0 are not there at all: neither have they a
/// target, nor is anything compared with them. So a batch that was filled up to a fixed size by repeats of weight 0 has the
/// loss it would have without them. The similarities are those of all rows. If no row has a weight, the loss is 0.
///
/// # Errors
/// If shapes differ, there is not one key and one weight a row, or a weight is negative or no number.
pub fn contrastive(
    concepts: &Tensor,
    texts: &Tensor,
    temperature: &Tensor,
    keys: &[i64],
    weights: Option<&[f32]>,
) -> Result<(Tensor, Tensor)> {
    let (b, _) = concepts.dims2()?;
    if texts.dims() != concepts.dims() || keys.len() != b {
        candle_core::bail!(
            "contrastive: expected texts of shape {:?} and {b} keys, found {:?} and {}",
            concepts.dims(),
            texts.dims(),
            keys.len()
        );
    }
    let similarities = wide(concepts)?.matmul(&wide(texts)?.t()?)?;
    let similarities = similarities.broadcast_div(&temperature.to_dtype(similarities.dtype())?)?;
    let kept = kept_rows(keys.len(), weights)?;
    let total: f32 = kept.iter().map(|(_, weight)| weight).sum();
    let compared = if kept.len() == b {
        similarities.clone()
    } else if kept.is_empty() {
        return Ok(((similarities.sum_all()? * 0.0)?, similarities));
    } else {
        let rows = Tensor::from_iter(kept.iter().map(|(row, _)| *row as u32), similarities.device())?;
        similarities.index_select(&rows, 0)?.index_select(&rows, 1)?
    };
    let targets: Vec<f32> = kept
        .iter()
        .flat_map(|&(row, weight)| {
            let belongs = move |other: usize| keys[other] == keys[row];
            let share = weight / total / kept.iter().filter(|(other, _)| belongs(*other)).count() as f32;
            kept.iter().map(move |&(other, _)| if belongs(other) { share } else { 0.0 })
        })
        .collect();
    let targets = Tensor::from_vec(targets, compared.dims(), concepts.device())?;
    let direction = |logits: &Tensor| {
        let log_probabilities = kernels::log_softmax(logits, D::Minus1)?;
        log_probabilities.mul(&targets.to_dtype(log_probabilities.dtype())?)?.sum_all()
    };
    let both = (direction(&compared)? + direction(&compared.t()?.contiguous()?)?)?;
    Ok(((both / -2.0)?, similarities))
}

/// Half types in `f32`: a loss is not to lose digits that its inputs have.
fn wide(x: &Tensor) -> Result<Tensor> {
    if matches!(x.dtype(), DType::BF16 | DType::F16) { x.to_dtype(DType::F32) } else { Ok(x.clone()) }
}

/// The rows of a weight above 0, with it; all rows, with 1, if there are no weights.
fn kept_rows(rows: usize, weights: Option<&[f32]>) -> Result<Vec<(usize, f32)>> {
    let Some(weights) = weights else { return Ok((0..rows).map(|row| (row, 1.0)).collect()) };
    if weights.len() != rows || !weights.iter().all(|weight| (0.0..f32::INFINITY).contains(weight)) {
        candle_core::bail!("row weights: expected {rows} numbers from 0 on, found {weights:?}");
    }
    Ok(weights.iter().copied().enumerate().filter(|(_, weight)| *weight > 0.0).collect())
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
/// 1e-5, and 0 for every column whose key equals the row's (`XVLM.get_matching_loss`). Columns whose row weight is 0 are not
/// part of the softmax either.
pub fn negative_weights(similarities: &[f32], keys: &[i64], weights: Option<&[f32]>) -> Vec<f32> {
    let b = keys.len();
    let is_candidate = |row: usize| weights.and_then(|weights| weights.get(row)).is_none_or(|weight| *weight > 0.0);
    let candidates: Vec<bool> = (0..b).map(is_candidate).collect();
    let mut weights = similarities.to_vec();
    for (row, key) in weights.chunks_exact_mut(b.max(1)).zip(keys) {
        row.iter_mut().zip(&candidates).filter(|(_, there)| !**there).for_each(|(w, _)| *w = f32::NEG_INFINITY);
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|w| *w = (*w - top).exp());
        let total: f32 = row.iter().sum();
        for ((w, other), there) in row.iter_mut().zip(keys).zip(&candidates) {
            *w = if other == key || !there { 0.0 } else { *w / total + 1e-5 };
        }
    }
    weights
}

/// Hard negatives for ITM: for each text a concept that is not its own, then for each concept a text that is not its own,
/// drawn in proportion to [`negative_weights`]. `similarities [B, B]` has a row for each concept. A row that the batch
/// has no negative for is left out, so there are at most `2·B` pairs. Rows of weight 0 have negatives, but are none.
///
/// # Errors
/// If `similarities` is not `[B, B]`, or there is not one weight a row.
pub fn hard_negatives(
    similarities: &Tensor,
    keys: &[i64],
    weights: Option<&[f32]>,
    rng: &mut impl Rng,
) -> Result<Vec<Pair>> {
    kept_rows(keys.len(), weights)?;
    let by_concept = similarities.detach().to_dtype(DType::F32)?;
    let mut draw = |rows: &Tensor| -> Result<Vec<(u32, u32)>> {
        let weights = negative_weights(&rows.flatten_all()?.to_vec1()?, keys, weights);
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

/// REINFORCE (Rennie et al. 2017, eq. 11): `logits [K, V]`, the token that was drawn from each row and its weight, the reward
/// above the baseline times the row's share of the mean → `−Σ weight · log p(token)`; `f32` for half types.
///
/// # Errors
/// If there is not one token and one weight a row, or a token is not below `V`.
pub fn policy_gradient(logits: &Tensor, tokens: &[u32], weights: &[f32]) -> Result<Tensor> {
    let (k, v) = logits.dims2()?;
    if tokens.len() != k || weights.len() != k {
        candle_core::bail!(
            "policy_gradient: expected {k} tokens and weights, found {} and {}",
            tokens.len(),
            weights.len()
        );
    }
    if let Some(token) = tokens.iter().find(|token| **token as usize >= v) {
        candle_core::bail!("policy_gradient: expected tokens below {v}, found {token}");
    }
    let device = logits.device();
    let tokens = Tensor::new(tokens, device)?.unsqueeze(1)?;
    let chosen = kernels::log_softmax(&wide(logits)?, D::Minus1)?.gather(&tokens, 1)?.squeeze(1)?;
    let weights = Tensor::new(weights, device)?.to_dtype(chosen.dtype())?;
    (chosen * weights)?.sum_all()?.neg()
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
/// Returns the L1 distance and `1 − GIoU`, each summed and divided by the number of rows that count; `f32` for half types.
///
/// # Errors
/// On a wrong shape.
pub fn boxes(predicted: &Tensor, target: &Tensor, is_image: &[bool], rule: BoxRule) -> Result<(Tensor, Tensor)> {
    let predicted = &wide(predicted)?;
    let losses = kernels::box_losses(predicted, &target.to_dtype(predicted.dtype())?)?;
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
        let (loss, _) = contrastive(&concepts, &concepts, &temperature, &[1, 2], None).unwrap();
        // Each row is softmax(2, 0): −ln(e² / (e² + 1)).
        let expected = (1.0 + (-2f32).exp()).ln();
        assert!((loss.to_scalar::<f32>().unwrap() - expected).abs() < 1e-6);
        let (loss, _) = contrastive(&concepts, &concepts, &temperature, &[7, 7], None).unwrap();
        assert!((loss.to_scalar::<f32>().unwrap() - (expected + 1.0)).abs() < 1e-6, "equal keys share the target");
        assert!(contrastive(&concepts, &concepts, &temperature, &[1], None).is_err());
    }

    /// Unit vectors that nothing is special about.
    fn features(rows: usize, seed: u64) -> Tensor {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let numbers: Vec<f64> = (0..rows * 5).map(|_| rng.random::<f64>() - 0.5).collect();
        let numbers = Tensor::from_vec(numbers, (rows, 5), &Device::Cpu).unwrap();
        let length = numbers.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap();
        numbers.broadcast_div(&length).unwrap()
    }

    #[test]
    fn rows_of_weight_0_are_not_there() {
        let temperature = Tensor::new(0.2f64, &Device::Cpu).unwrap();
        let itc = |concepts: &Tensor, texts: &Tensor, keys: &[i64], weights: Option<&[f32]>| {
            contrastive(concepts, texts, &temperature, keys, weights).unwrap()
        };
        let scalar = |loss: &Tensor| loss.to_scalar::<f64>().unwrap();
        let (concepts, texts, keys) = (features(4, 1), features(4, 2), [1, 2, 1, 3]);
        let (alone, _) = itc(&concepts, &texts, &keys, None);
        // Filled up by repeats, between and after the others.
        let order = [0u32, 1, 1, 2, 3, 0, 0];
        let weights = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0];
        let rows = Tensor::new(&order, &Device::Cpu).unwrap();
        let padded = |x: &Tensor| candle_core::Var::from_tensor(&x.index_select(&rows, 0).unwrap()).unwrap();
        let padded_keys = order.map(|row| keys[row as usize]);
        let (more_concepts, more_texts) = (padded(&concepts), padded(&texts));
        let (loss, similarities) = itc(&more_concepts, &more_texts, &padded_keys, Some(&weights));
        assert_eq!(scalar(&loss), scalar(&alone));
        assert_eq!(similarities.dims(), [7, 7]);
        let (spoilt, _) = itc(&more_concepts, &more_texts, &padded_keys, None);
        assert!((scalar(&spoilt) - scalar(&alone)).abs() > 1e-2);
        // The gradient is that without repeats, and 0 at repeats.
        let gradients = loss.backward().unwrap();
        let var = candle_core::Var::from_tensor(&concepts).unwrap();
        let expected = itc(&var, &texts, &keys, None).0.backward().unwrap();
        let rows = |gradient: &Tensor| gradient.to_vec2::<f64>().unwrap();
        let (found, expected) = (rows(gradients.get(&more_concepts).unwrap()), rows(expected.get(&var).unwrap()));
        for (i, found) in found.iter().enumerate() {
            let expected = if weights[i] > 0.0 { &expected[order[i] as usize] } else { &vec![0.0; 5] };
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{i}: {found:?}, {expected:?}");
        }
        assert!(gradients.get(&more_texts).is_some());
    }

    #[test]
    fn the_contrastive_mean_is_weighted() {
        let temperature = Tensor::new(0.3f64, &Device::Cpu).unwrap();
        let (concepts, texts, keys) = (features(5, 3), features(5, 4), [4, 9, 4, 7, 9]);
        let weights = [0.5, 2.0, 0.0, 1.0, 0.25];
        let (loss, similarities) = contrastive(&concepts, &texts, &temperature, &keys, Some(&weights)).unwrap();
        // Pair by pair.
        let s = similarities.to_vec2::<f64>().unwrap();
        let there = [0usize, 1, 3, 4];
        let mut expected = 0.0;
        for i in there {
            let equal: Vec<usize> = there.into_iter().filter(|&j| keys[i] == keys[j]).collect();
            for direction in
                [|s: &[Vec<f64>], i: usize, j: usize| s[i][j], |s: &[Vec<f64>], i: usize, j: usize| s[j][i]]
            {
                let total: f64 = there.iter().map(|&j| direction(&s, i, j).exp()).sum();
                let mean = equal.iter().map(|&j| total.ln() - direction(&s, i, j)).sum::<f64>() / equal.len() as f64;
                expected += f64::from(weights[i]) * mean / (2.0 * 3.75);
            }
        }
        let found = loss.to_scalar::<f64>().unwrap();
        // Shares are f32.
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        let (none, _) = contrastive(&concepts, &texts, &temperature, &keys, Some(&[0.0; 5])).unwrap();
        assert_eq!(none.to_scalar::<f64>().unwrap(), 0.0);
        for wrong in [&[1.0; 4][..], &[1.0, 1.0, -1.0, 1.0, 1.0], &[1.0, f32::NAN, 1.0, 1.0, 1.0]] {
            let error = contrastive(&concepts, &texts, &temperature, &keys, Some(wrong)).unwrap_err().to_string();
            assert!(error.contains("row weights: expected 5"), "{error}");
        }
    }

    #[test]
    fn rows_of_weight_0_are_no_negatives() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        // Row 3 repeats row 1, which would be everybody's hardest negative twice over.
        let similarities = rows(&[0., 9., 1., 9., 9., 0., 1., 0., 1., 9., 0., 9., 9., 0., 1., 0.], 4);
        let (keys, weights) = ([1, 2, 3, 2], [1.0, 1.0, 1.0, 0.0]);
        let without = negative_weights(&[0., 9., 1., 9., 0., 1., 1., 9., 0.], &[1, 2, 3], None);
        let with = similarities.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let with = negative_weights(&with, &keys, Some(&weights));
        for row in 0..3 {
            assert_eq!(with[4 * row..][..3], without[3 * row..][..3], "row {row}");
            assert_eq!(with[4 * row + 3], 0.0);
        }
        for _ in 0..200 {
            let pairs = hard_negatives(&similarities, &keys, Some(&weights), &mut rng).unwrap();
            assert_eq!(pairs.len(), 8, "repeats have negatives");
            assert!(pairs[..4].iter().all(|pair| pair.concept != 3) && pairs[4..].iter().all(|pair| pair.text != 3));
        }
        assert!(hard_negatives(&similarities, &keys, Some(&[1.0]), &mut rng).is_err());
    }

    #[test]
    fn negatives_follow_their_weights_and_never_share_a_key() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let keys = [1, 2, 1, 3];
        let similarities = rows(&[9., 0., 9., 2., 0., 9., 0., 1., 9., 0., 9., 2., 0., 3., 0., 9.], 4);
        let mut hard = 0u32;
        for _ in 0..500 {
            let pairs = hard_negatives(&similarities, &keys, None, &mut rng).unwrap();
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
        assert_eq!(hard_negatives(&similarities, &[5, 5, 5], None, &mut rng).unwrap(), []);
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
    fn drawn_tokens_are_rewarded() {
        let logits = rows(&[0.0, 1.0, 2.0, 0.0, 0.5, 3.0], 3).to_dtype(DType::F64).unwrap();
        let (tokens, weights) = ([1, 2], [0.5, -2.0]);
        let loss = |logits: &Tensor| policy_gradient(logits, &tokens, &weights).unwrap();
        let first = 1.0 - (1.0 + 1f64.exp() + 2f64.exp()).ln();
        let second = 3.0 - (1.0 + 0.5f64.exp() + 3f64.exp()).ln();
        assert!((loss(&logits).to_scalar::<f64>().unwrap() - (-0.5 * first + 2.0 * second)).abs() < 1e-12);
        // The gradient of each row: weight · (softmax − what was drawn).
        let var = candle_core::Var::from_tensor(&logits).unwrap();
        let found = loss(&var).backward().unwrap().get(&var).unwrap().to_vec2::<f64>().unwrap();
        for (row, logits) in logits.to_vec2::<f64>().unwrap().iter().enumerate() {
            let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
            for (token, logit) in logits.iter().enumerate() {
                let drawn = if tokens[row] as usize == token { 1.0 } else { 0.0 };
                let expected = f64::from(weights[row]) * (logit.exp() / total - drawn);
                assert!((found[row][token] - expected).abs() < 1e-12, "{row}, {token}: {found:?}");
            }
        }
        assert!(policy_gradient(&logits, &[1], &weights).is_err());
        assert!(policy_gradient(&logits, &[1, 3], &weights).is_err());
    }

    #[test]
    fn matching_counts_all_rows() {
        let loss = matching(&rows(&[0.0, 2.0, 0.0, 2.0, 0.0, 2.0], 2), 1).unwrap().to_scalar::<f32>().unwrap();
        let log_sum = (1.0 + 2f32.exp()).ln();
        assert!((loss - (3.0 * log_sum - 2.0) / 3.0).abs() < 1e-6);
    }
}
