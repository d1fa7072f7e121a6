//! The small functions, with their corner cases.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use serde_json::Value;
use xvlm::data::{Picture, TextTokenizer, View, pre_caption, pre_question};
use xvlm::kernels::{self, BoxFormat};
use xvlm::losses::{BoxRule, boxes};
use xvlm::metrics::boxes::refer_iou;
use xvlm::weights::{geometric_grid, resize_positions, resize_relative_positions};

use super::case::{Case, Outcome};

/// Box arithmetic and the box losses, by the original's rule for degenerate boxes.
pub(super) fn box_operations(case: &Case) -> Outcome {
    const RTOL: f64 = 1e-5;
    if case.has("in.pred") {
        let (predicted, target) = (case.input("in.pred")?, case.input("in.target")?);
        let (a, b) = (kernels::cxcywh_to_xyxy(&predicted)?, kernels::cxcywh_to_xyxy(&target)?);
        case.check_within("out.pred_xyxy", &a, RTOL, 0.0)?;
        case.check_within("out.target_xyxy", &b, RTOL, 0.0)?;
        case.check_within("out.back", &kernels::xyxy_to_cxcywh(&a)?, RTOL, 0.0)?;
        let (n, m) = (a.dim(0)?, b.dim(0)?);
        // Every box with every box.
        let rows = a.unsqueeze(1)?.broadcast_as((n, m, 4))?.reshape((n * m, 4))?;
        let columns = b.unsqueeze(0)?.broadcast_as((n, m, 4))?.reshape((n * m, 4))?;
        let (iou, union) = kernels::iou(&rows, &columns)?;
        case.check_within("out.iou", &iou.reshape((n, m))?, RTOL, 0.0)?;
        case.check_within("out.union", &union.reshape((n, m))?, RTOL, 0.0)?;
        case.check_within("out.giou", &kernels::pairwise_giou(&a, &b, BoxFormat::Xyxy)?, RTOL, 0.0)?;
    }
    for name in case.json["cases"].as_object().ok_or("cases: expected a mapping")?.keys() {
        let of = |part: &str| format!("case.{name}.{part}");
        let predicted = Var::from_tensor(&case.input(&of("pred"))?)?;
        let target = case.input(&of("target"))?;
        let is_image = match case.has(&of("is_image")) {
            true => case.integers(&of("is_image"))?.into_iter().map(|whole| whole == 1).collect(),
            false => vec![false; target.dim(0)?],
        };
        let (l1, giou) = boxes(predicted.as_tensor(), &target, &is_image, BoxRule::Batch)?;
        let losses = Tensor::stack(&[&l1, &giou], 0)?;
        case.check_within(&of("loss"), &losses, RTOL, 0.0)?;
        let gradients = losses.sum_all()?.backward()?;
        let gradient = gradients.get(&predicted).ok_or_else(|| format!("{}: expected one", of("grad")))?;
        case.check_within(&of("grad"), gradient, RTOL, 0.0)?;
    }
    Ok(())
}

/// Absolute position embeddings for another grid: `in.gA_to_B`.
pub(super) fn positions(case: &Case) -> Outcome {
    /// What a few roundings of the largest number come to.
    const ROUNDINGS: f64 = 4.0 * f32::EPSILON as f64;
    for name in case.names("in.") {
        let resized = resize_positions(&case.input(&format!("in.{name}"))?, goal(&name, 'g')?)?;
        case.check_within(&format!("out.{name}"), &resized, ROUNDINGS, 1e-6)?;
    }
    Ok(())
}

/// Relative-position tables for another window: `in.wA_to_B`.
pub(super) fn relative_positions(case: &Case) -> Outcome {
    for name in case.names("in.") {
        let table = case.input(&format!("in.{name}"))?;
        let side = 2 * goal(&name, 'w')? - 1;
        case.check_within(&format!("out.{name}"), &resize_relative_positions(&table, side)?, 0.0, 1e-5)?;
        let (ratio, places) = geometric_grid(table.dim(0)?.isqrt(), side);
        let count = places.len();
        case.check_within(&format!("grid.{name}.q"), &Tensor::new(ratio, &Device::Cpu)?, 1e-6, 0.0)?;
        case.check_within(&format!("grid.{name}.x"), &Tensor::from_vec(places, count, &Device::Cpu)?, 1e-6, 0.0)?;
    }
    // What the original could not do must work here.
    for name in case.json["failed"].as_object().into_iter().flatten().map(|(name, _)| name) {
        let windows = name.split_once("_to_").and_then(|(from, to)| Some([from.parse().ok()?, to.parse().ok()?]));
        let windows: [usize; 2] = windows.filter(|windows| !windows.contains(&0)).ok_or("failed: expected A_to_B")?;
        let [from, to] = windows.map(|window| 2 * window - 1);
        let table = Tensor::ones((from * from, 1), DType::F32, &Device::Cpu)?;
        let resized = resize_relative_positions(&table, to)?.to_vec2::<f32>()?;
        case.check_equal(&format!("failed.{name}"), &[resized.iter().all(|x| (x[0] - 1.0).abs() < 1e-5)], &[true]);
    }
    Ok(())
}

/// B of a name such as `g14_to_g24`.
fn goal(name: &str, letter: char) -> Outcome<usize> {
    let goal = name.rsplit_once("_to_").and_then(|(_, goal)| goal.strip_prefix(letter)?.parse().ok());
    goal.filter(|goal| *goal > 0)
        .ok_or_else(|| format!("in.{name}: expected a name like {letter}7_to_{letter}12").into())
}

/// Resizing and normalising of images.
pub(super) fn images(case: &Case) -> Outcome {
    for name in case.names("in.") {
        let original = picture(&case.input(&format!("in.{name}"))?)?;
        let expected = case.input(&format!("out.{name}.resized"))?;
        let side = expected.dim(0)?;
        let resized = original.resized_square(side);
        let bytes = Tensor::from_vec(resized.rgb().to_vec(), expected.shape(), &Device::Cpu)?;
        case.check_within(&format!("out.{name}.resized"), &bytes, 0.0, 1.0)?;
        // From the resized bytes of the case: one of 255 would be far more than the rounding that is looked at here.
        let normalised = picture(&expected)?.normalised();
        let normalised = Tensor::from_vec(normalised, (3, side, side), &Device::Cpu)?;
        case.check_within(&format!("out.{name}.tensor"), &normalised, 0.0, 1e-6)?;
    }
    Ok(())
}

fn picture(bytes: &Tensor) -> Outcome<Picture> {
    let (height, width, _) = bytes.dims3()?;
    let picture = Picture::from_rgb(width as u32, height as u32, bytes.flatten_all()?.to_vec1::<u8>()?);
    picture.ok_or_else(|| format!("image: expected [H, W, 3], found {:?}", bytes.dims()).into())
}

/// The tokenizer of a case that tells a vocabulary.
pub(super) fn tokenizer(json: &Value) -> Outcome<Option<TextTokenizer>> {
    let Some(pieces) = json["vocab"].as_array() else { return Ok(None) };
    let pieces: Vec<&str> = pieces.iter().filter_map(Value::as_str).collect();
    Ok(Some(TextTokenizer::from_pieces("vocab", &pieces)?))
}

/// Results by the name of what was computed: what was found, and what was expected.
#[derive(Default)]
struct Table(BTreeMap<String, (Vec<Value>, Vec<Value>)>);

impl Table {
    fn add(&mut self, name: &str, found: impl Into<Value>, expected: &Value) {
        let (all, all_expected) = self.0.entry(name.to_owned()).or_default();
        all.push(found.into());
        all_expected.push(expected.clone());
    }
}

/// Cleaning, word pieces, the patches of boxes and overlaps.
pub(super) fn texts(case: &Case) -> Outcome {
    /// Longer than any text.
    const LONG: usize = 1 << 16;
    let tokenizer = tokenizer(&case.json)?.ok_or("vocab: expected a list of word pieces")?;
    let mut table = Table::default();
    for row in case.json["rows"].as_array().ok_or("rows: expected a list")? {
        let row = row.as_object().ok_or("rows: expected mappings")?;
        let text = row.get("text").and_then(Value::as_str).ok_or("rows.text: expected a text")?;
        let longest = row.keys().filter_map(|name| name.strip_prefix("pre_caption_")?.parse::<usize>().ok()).max();
        let cleaned = pre_caption(text, longest.unwrap_or(LONG))?;
        let encode = |text: &str, most: usize, sep: bool| -> Outcome<Value> {
            Ok(tokenizer.encode(text, most, sep)?.into_iter().map(Value::from).collect())
        };
        for (field, expected) in row {
            let number = |prefix: &str| field.strip_prefix(prefix).and_then(|number| number.parse::<usize>().ok());
            let found = match field.as_str() {
                "text" => continue,
                "tokens" => {
                    let pieces = tokenizer.tokens(&cleaned)?.into_iter().map(|id| tokenizer.id_to_token(id));
                    pieces.map(Value::from).collect()
                }
                "decode_hf" => tokenizer.decode(&tokenizer.tokens(&cleaned)?).into(),
                "ids_ref" => encode(&cleaned, LONG, false)?,
                "ids_hf" => encode(&cleaned, LONG, true)?,
                "raw_ids_ref" => encode(text, LONG, false)?,
                "raw_ids_hf" => encode(text, LONG, true)?,
                "sep_appended_ids_ref" => encode(&format!("{cleaned} [SEP]"), LONG, false)?,
                "sep_appended_ids_hf" => encode(&format!("{cleaned} [SEP]"), LONG, true)?,
                _ => {
                    match (number("pre_caption_"), number("pre_question_"), number("ids_ref_max"), number("ids_hf_max"))
                    {
                        (Some(words), ..) => pre_caption(text, words)?.into(),
                        (_, Some(words), ..) => pre_question(text, words).into(),
                        (.., Some(most), _) => encode(&cleaned, most, false)?,
                        (.., Some(most)) => encode(&cleaned, most, true)?,
                        _ => {
                            return Err(
                                format!("rows.{field}: expected a known result, found none of that name").into()
                            );
                        }
                    }
                }
            };
            table.add(field, found, expected);
        }
    }
    if case.json.get("pre_caption_of_only_punctuation").is_some() {
        table.add("pre_caption_of_only_punctuation", pre_caption(" .,!? ", LONG).is_err(), &true.into());
    }
    for given in case.json["image_attns"].as_array().into_iter().flatten() {
        let bounds: [f32; 4] = serde_json::from_value(given["box"].clone())?;
        let grid = given["atts"].as_array().map_or(0, Vec::len).saturating_sub(1).isqrt();
        table.add("image_attns", serde_json::to_value(covered(bounds, grid))?, &given["atts"]);
    }
    for (name, (found, expected)) in &table.0 {
        case.check_equal(name, found, expected);
    }
    for (i, given) in case.json["iou"].as_array().into_iter().flatten().enumerate() {
        let of = |name: &str| serde_json::from_value::<[f32; 4]>(given[name].clone());
        let expected = given["iou"].as_f64().ok_or("iou.iou: expected a number")?;
        let error = (f64::from(refer_iou(of("a")?, of("b")?)) - expected).abs();
        case.record(&format!("iou.{i}"), error, f64::from(f32::EPSILON), 1e-6);
    }
    let known = ["what", "name", "vocab", "rows", "pre_caption_of_only_punctuation", "image_attns", "iou", "versions"];
    match case.json.as_object().into_iter().flatten().find(|(name, _)| !known.contains(&name.as_str())) {
        Some((name, _)) => Err(format!("{name}: expected a known result, found none of that name").into()),
        None => Ok(()),
    }
}

/// Which patches of 32 pixels a box `(x, y, w, h)` covers, after the 1 of the pooled token.
fn covered(bounds: [f32; 4], grid: usize) -> Vec<u8> {
    let side = 32 * grid as u32;
    let mask = match View::whole(side, side).place(bounds, 0.0) {
        Some(placed) => placed.region_mask(grid),
        // Training leaves out what has no area; the original takes the nearest patch.
        None => {
            let [x, y, w, h] = bounds.map(|edge| edge / side as f32);
            let rectangle = kernels::patch_rectangle_mask([x + w / 2.0, y + h / 2.0, w, h], grid);
            [1.0].into_iter().chain(rectangle).collect()
        }
    };
    mask.into_iter().map(|covers| covers as u8).collect()
}
