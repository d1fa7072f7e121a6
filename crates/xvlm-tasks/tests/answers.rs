//! Questions and statements about two images, answered in bulk: ranking, broken data, result files.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use tempfile::TempDir;
use xvlm_data::annotations::{NlvrItem, Reading, VqaItem};
use xvlm_data::{Picture, TextTokenizer};
use xvlm_encoders::{Pass, Task, XvlmConfig};
use xvlm_metrics::nlvr::NlvrScores;
use xvlm_tasks::convert::layout;
use xvlm_tasks::vqa::{self, AnswerList, Answering, Ranked, Ranking};
use xvlm_tasks::{Compute, ImageTokens, Model, ModelConfig, Precision, Search, Source, Sweep, TaskError, Texts, nlvr};
use xvlm_weights::{ModelFiles, StoredTensors, StoredType};

const WORDS: [&str; 12] =
    ["red", "green", "blue", "and", "is", "it", "what", "the", "left", "right", "image", "circle"];

/// A tiny model of random weights.
fn model(task: Task) -> Model {
    let (config, tensors, tokenizer) = parts(task);
    let files = ModelFiles {
        name: "tiny".to_owned(),
        config: config.to_json().unwrap(),
        tokenizer: tokenizer.to_bytes().into(),
        weights: StoredTensors::of_tensors("tiny/model.safetensors", &tensors).unwrap(),
    };
    Model::from_files(&files, &Device::Cpu).unwrap()
}

fn parts(task: Task) -> (ModelConfig, BTreeMap<String, Tensor>, TextTokenizer) {
    let mut pieces: Vec<String> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(str::to_owned).to_vec();
    pieces.extend(WORDS.map(str::to_owned));
    let tokenizer = TextTokenizer::from_pieces("pieces", &pieces).unwrap();
    let config: XvlmConfig = serde_json::from_value(json!({
        "task": task,
        "vision_config": {
            "kind": "swin", "image_res": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2],
            "window_size": 4, "initializer_range": 0.4,
        },
        "text_config": {
            "vocab_size": tokenizer.vocab_size(), "hidden_size": 24, "num_hidden_layers": 4, "fusion_layer": 2,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 24, "initializer_range": 0.4,
        },
        "embed_dim": 8,
    }))
    .unwrap();
    let (layout, blueprint) = layout(&config, false).unwrap();
    let tensors = layout.parameters.keys().map(|name| (name.clone(), blueprint.draw(name, 5).unwrap())).collect();
    (ModelConfig { max_tokens: 12, max_words: 10, ..ModelConfig::of(config) }, tensors, tokenizer)
}

/// The first answers are computed from the file, later ones from what was laid out.
#[test]
fn answers_stay_the_same_until_the_file_is_written_to() {
    let (config, tensors, tokenizer) = parts(Task::Pretrain);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    for stored in [StoredType::F32, StoredType::Bf16, StoredType::F16] {
        Model::write(&dir, &config, tensors.clone(), &tokenizer, stored).unwrap();
        for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
            let model = Model::open(&dir, Compute::on(&Device::Cpu).with(precision)).unwrap();
            let answer = || -> Result<Vec<f32>, TaskError> {
                let images = model.encode(&[picture(1)])?;
                model.match_pairs(&images, &[(0, "the red circle is left")])
            };
            // A model that replaces it is another model.
            Model::write(&dir, &config, tensors.clone(), &tokenizer, stored).unwrap();
            let first = answer().unwrap();
            (0..4).for_each(|_| assert_eq!(answer().unwrap(), first, "{stored:?} {precision}"));
        }
        let model = Model::open(&dir, &Device::Cpu).unwrap();
        let file = dir.join("model.safetensors");
        std::fs::OpenOptions::new().append(true).open(&file).unwrap().write_all(b"more").unwrap();
        let told = model.encode(&[picture(1)]).and_then(|images| model.match_pairs(&images, &[(0, "red")]));
        let error = told.unwrap_err().to_string();
        assert!(error.contains(&file.display().to_string()) && error.contains("written to"), "{error}");
    }
}

fn picture(seed: usize) -> Picture {
    Picture::from_rgb(40, 30, (0..40 * 30 * 3).map(|i| ((i * (seed + 7)) % 251) as u8).collect()).unwrap()
}

fn list(model: &Model, answers: &[&str]) -> Result<AnswerList, TaskError> {
    AnswerList::new(model, answers.iter().map(|answer| (*answer).to_owned()).collect())
}

/// The log-probability of each answer and of its first token, each computed over the whole answer by itself.
fn likelihoods(
    model: &Model,
    images: &ImageTokens,
    (image, question): (u32, &str),
    list: &AnswerList,
) -> Vec<[f64; 2]> {
    let (tokenizer, pass) = (model.tokenizer(), Pass::inference());
    let row = tokenizer.encode(question, 12, false).unwrap();
    let texts = |ids: Vec<u32>| {
        let mask = vec![1f32; ids.len()];
        let tensor = candle_core::Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        Texts { ids: tensor, mask: candle_core::Tensor::new(mask, &Device::Cpu).unwrap().unsqueeze(0).unwrap() }
    };
    let images = Source::images(images).unwrap();
    let (source, index, prompt) = match model.config().model.task {
        Task::Vqa => {
            let states = vqa::question_states(model.xvlm(), &images, &texts(row), &[image], &pass).unwrap();
            (states, [0], vec![tokenizer.cls_id()])
        }
        _ => (images, [image], row),
    };
    let one = |tokens: &Vec<u32>| {
        let all: Vec<u32> = prompt.iter().chain(tokens).copied().collect();
        let Texts { ids, mask } = texts(all.clone());
        let decoded = source.look_at(&index, |looks| model.xvlm().decode(&ids, &mask, looks, &pass)).unwrap();
        let logits = model.xvlm().next_token_logits(&decoded).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        let log_probability = |at: usize| {
            let row: Vec<f64> = logits[at - 1].iter().map(|&logit| f64::from(logit)).collect();
            row[all[at] as usize] - row.iter().map(|logit| logit.exp()).sum::<f64>().ln()
        };
        let sum = (prompt.len()..all.len()).map(log_probability).sum();
        [sum, log_probability(prompt.len())]
    };
    list.tokens().iter().map(one).collect()
}

#[test]
fn answers_are_ranked_by_the_probability_of_their_tokens() {
    for task in [Task::Vqa, Task::Pretrain] {
        let model = model(task);
        let images = model.encode(&[picture(1), picture(2)]).unwrap();
        let questions = [(1, "what is it"), (0, "is it the red circle"), (1, "is it left")];
        // Several begin alike, and one is the beginning of others.
        let list = list(
            &model,
            &["red", "red and green", "green", "red and blue", "blue and green", "left", "red and green and blue"],
        )
        .unwrap();
        for (k, as_original) in [(7, false), (7, true), (3, false), (100, true)] {
            let ranking = Ranking { k, as_original };
            let ranked = vqa::rank_answers(&model, &images, &questions, &list, ranking).unwrap();
            for (question, ranked) in questions.iter().zip(&ranked) {
                let expected = likelihoods(&model, &images, *question, &list);
                let mut order: Vec<usize> = (0..expected.len()).collect();
                order.sort_by(|&a, &b| expected[b][1].total_cmp(&expected[a][1]));
                order.truncate(k);
                let score = |answer: usize| expected[answer][0] + if as_original { expected[answer][1] } else { 0.0 };
                let sum: f64 = order.iter().map(|&answer| score(answer).exp()).sum();
                assert_eq!(ranked.len(), order.len());
                assert!(ranked.windows(2).all(|pair| pair[0].probability >= pair[1].probability));
                for Ranked { answer, probability } in ranked {
                    assert!(order.contains(&(*answer as usize)), "{answer} is not among the {k} best");
                    let expected = score(*answer as usize).exp() / sum;
                    assert!((f64::from(*probability) - expected).abs() < 1e-5, "{probability} for {expected}");
                }
            }
        }
        // Alone or with others, a question gets the same answers.
        let together = vqa::rank_answers(&model, &images, &questions, &list, Ranking::default()).unwrap();
        let alone = vqa::rank_answers(&model, &images, &questions[2..], &list, Ranking::default()).unwrap();
        assert!((together[2][0].probability - alone[0][0].probability).abs() < 1e-5);
        assert_eq!(together[2][0].answer, alone[0][0].answer);
    }
}

#[test]
fn lists_of_answers_are_checked() {
    let model = model(Task::Vqa);
    let kept = list(&model, &["red", " ", "Red", "blue", "", "red"]).unwrap();
    assert_eq!(kept.texts(), ["red", "blue"]);
    let problems: Vec<(usize, &str)> = kept.left_out().iter().map(|out| (out.item, out.problem.as_str())).collect();
    assert_eq!(
        problems,
        [
            (1, "answer \" \": expected at least one token, found none"),
            (2, "answer \"Red\": expected one of its own, found answer 0 again"),
            (4, "answer \"\": expected at least one token, found none"),
            (5, "answer \"red\": expected one of its own, found answer 0 again"),
        ]
    );
    for none in [&[][..], &[" "]] {
        let error = list(&model, none).unwrap_err().to_string();
        assert_eq!(error, "list of answers: expected at least one item, found none");
    }
    let folder = TempDir::new().unwrap();
    let open = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        AnswerList::open(&model, &path).map(|list| list.texts().to_vec()).map_err(|error| error.to_string())
    };
    assert_eq!(open("list.json", "[\"red\", \"blue\"]").unwrap(), ["red", "blue"]);
    assert_eq!(open("list.txt", "red\n\n green \n").unwrap(), ["red", "green"]);
    for (name, text, expected) in
        [("a.json", "[]", "at least one item"), ("b.json", "[1]", "a string"), ("c.txt", "", "at least one item")]
    {
        let error = open(name, text).unwrap_err();
        assert!(error.contains(name) && error.contains(expected), "{error}");
    }
    assert!(AnswerList::open(&model, Path::new("no/such/list")).unwrap_err().to_string().contains("no/such/list"));
}

/// A folder with images `0.png` to `2.png`, and one that is none.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    for i in 0..3 {
        std::fs::write(folder.path().join(format!("{i}.png")), picture(i).to_png().unwrap()).unwrap();
    }
    std::fs::write(folder.path().join("broken.png"), "no image").unwrap();
    folder
}

fn write(folder: &TempDir, name: &str, content: &Value) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, content.to_string()).unwrap();
    path
}

fn sweep<'a>(counter: &'a mut dyn FnMut(usize, usize), max_bad_fraction: f64) -> Sweep<'a> {
    Sweep { max_bad_fraction, ..Sweep::new(counter) }
}

fn questions(folder: &TempDir, content: &Value) -> Vec<VqaItem> {
    Reading::strict().vqa(&[write(folder, "vqa.json", content)]).unwrap().items
}

#[test]
fn questions_of_a_data_set() {
    let (model, folder) = (model(Task::Vqa), folder());
    let ten: Vec<&str> = (0..10).map(|i| if i < 3 { "red" } else { "green" }).collect();
    let items = questions(
        &folder,
        &json!([
            {"question_id": 1, "image": "0.png", "question": "what is it", "answer": ten, "kind": "other",
             "question_type": "what is"},
            {"question_id": 2, "image": "broken.png", "question": "is it red", "answer": ["red"]},
            {"question_id": 30, "image": "1.png", "question": "is it the circle", "answer": "red", "kind": "colour"},
            {"question_id": 4, "image": "0.png", "question": "what is the image"},
            {"question_id": 5, "image": "1.png", "question": "what is it", "answer": "Red.", "kind": "colour"},
        ]),
    );
    let list = list(&model, &["red"]).unwrap();
    let options = vqa::Options { answering: Answering::Ranked(list, Ranking::default()), batch: 2 };
    let mut steps = Vec::new();
    let mut counter = |done, of| steps.push((done, of));
    let done = vqa::evaluate(&model, items.clone(), &options, &mut sweep(&mut counter, 0.5)).unwrap();
    // Three images: that of the first question is opened once for two.
    assert_eq!(steps, [(2, 3), (3, 3)]);
    assert_eq!(done.items.iter().map(|item| item.question_id.as_str()).collect::<Vec<_>>(), ["1", "30", "4", "5"]);
    assert!(done.answers.iter().all(|given| given.text == "red" && (given.score - 1.0).abs() < 1e-6));
    assert_eq!(done.left_out.len(), 1);
    assert!(done.left_out[0].item == 1 && done.left_out[0].problem.contains("broken.png"), "{:?}", done.left_out);
    let scores = json!(done.scores);
    assert_eq!(
        scores,
        json!({
            "consensus": {
                "accuracy": 90.0,
                "count": 1,
                "answer_types": {"other": {"accuracy": 90.0, "count": 1}},
                "question_types": {"what is": {"accuracy": 90.0, "count": 1}},
            },
            "right": 100.0,
            "count": 2,
            "kinds": {"colour": {"right": 100.0, "count": 2}},
            "without_answers": ["4"],
        })
    );
    let mut results = Vec::new();
    assert_eq!(vqa::write_results(&done, &mut results).unwrap(), None);
    let results: Value = serde_json::from_slice(&results).unwrap();
    assert_eq!(results[1], json!({"question_id": 30, "answer": "red"}));
    assert_eq!(results.as_array().unwrap().len(), 4);

    let error = vqa::evaluate(&model, items, &options, &mut Sweep::new(&mut |_, _| {})).unwrap_err().to_string();
    assert!(error.contains("1 of 5 are broken") && error.contains("broken.png"), "{error}");
    let none = vqa::evaluate(&model, Vec::new(), &options, &mut Sweep::new(&mut |_, _| {})).unwrap_err();
    assert_eq!(none.to_string(), "questions: expected at least one item, found none");
}

#[test]
fn identifiers_in_result_files() {
    let (model, folder) = (model(Task::Pretrain), folder());
    let items = questions(
        &folder,
        &json!([
            {"question_id": "q7", "image": "0.png", "question": "what is it"},
            {"question_id": "07", "image": "0.png", "question": "what is it"},
            {"question_id": "8", "image": "0.png", "question": "what is it"},
        ]),
    );
    let search = Search { max_tokens: 2, ..Search::answers() };
    let options = vqa::Options { answering: Answering::Open(search), batch: 2 };
    let mut done = vqa::evaluate(&model, items, &options, &mut Sweep::new(&mut |_, _| {})).unwrap();
    assert_eq!((done.scores.exact.is_none(), done.scores.without_answers.len()), (true, 3));
    let mut results = Vec::new();
    assert_eq!(vqa::write_results(&done, &mut results).unwrap().as_deref(), Some("q7"));
    let results: Value = serde_json::from_slice(&results).unwrap();
    let ids: Vec<&Value> = results.as_array().unwrap().iter().map(|result| &result["question_id"]).collect();
    assert_eq!(json!(ids), json!(["q7", "07", 8]));
    // One that two questions share is refused while reading, and while writing.
    let twice = json!([
        {"question_id": 1, "image": "0.png", "question": "what is it"},
        {"question_id": "1", "image": "0.png", "question": "is it red"},
    ]);
    let loaded = Reading::default().vqa(&[write(&folder, "twice.json", &twice)]).unwrap();
    assert!(loaded.items.len() == 1 && loaded.report.to_string().contains("\"1\" again"), "{}", loaded.report);
    done.items[1].question_id = "q7".to_owned();
    let error = vqa::write_results(&done, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("\"q7\" again"), "{error}");
}

#[test]
fn statements_are_judged_alike_alone_and_together() {
    let model = model(Task::Nlvr);
    let images = model.encode(&[picture(1), picture(2), picture(3)]).unwrap();
    let statements: [([u32; 2], &str); 4] = [
        ([0, 1], "the left image is red"),
        ([1, 0], "the left image is red"),
        ([2, 2], "it is the circle"),
        ([0, 1], "the right circle is blue"),
    ];
    let together = nlvr::judge(&model, &images, &statements).unwrap();
    assert!((together[0] - together[1]).abs() > 1e-4, "left and right are told apart: {together:?}");
    for (statement, judged) in statements.iter().zip(&together) {
        let alone = nlvr::judge(&model, &images, std::slice::from_ref(statement)).unwrap()[0];
        assert!((judged - alone).abs() < 1e-5, "{judged} {alone}");
    }
    // Images as training has them: the first of all statements, then the second of all.
    let pair = model.encode(&[picture(1), picture(3), picture(2), picture(3)]).unwrap();
    let rows =
        ["the left image is red", "it is the circle"].map(|text| model.tokenizer().encode(text, 12, false).unwrap());
    let longest = rows.iter().map(Vec::len).max().unwrap();
    let padded: Vec<Vec<u32>> = rows.iter().map(|row| [row.clone(), vec![0; longest - row.len()]].concat()).collect();
    let mask: Vec<Vec<f32>> =
        rows.iter().map(|row| (0..longest).map(|i| f32::from(u8::from(i < row.len()))).collect()).collect();
    let tensor = |rows: Vec<Vec<u32>>| candle_core::Tensor::new(rows, &Device::Cpu).unwrap();
    let texts = Texts { ids: tensor(padded), mask: candle_core::Tensor::new(mask, &Device::Cpu).unwrap() };
    let logits = nlvr::statement_logits(model.xvlm(), &pair, &texts, &Pass::inference()).unwrap();
    for (logits, judged) in logits.to_vec2::<f32>().unwrap().iter().zip([together[0], together[2]]) {
        let expected = 1.0 / (1.0 + (logits[0] - logits[1]).exp());
        assert!((judged - expected).abs() < 1e-5, "{judged} {expected}");
    }
    let other = self::model(Task::Vqa);
    let images = other.encode(&[picture(1)]).unwrap();
    let error = nlvr::judge(&other, &images, &[([0, 0], "it is red")]).unwrap_err().to_string();
    assert_eq!(error, "judgements: expected a model for nlvr, found one for vqa");
}

#[test]
fn statements_of_a_data_set() {
    let (model, folder) = (model(Task::Nlvr), folder());
    // Sentence 0 of set 1 is said of two pairs; the last of a pair of which one image is missing.
    let lines = json!([
        {"identifier": "dev-1-0-0", "images": ["0.png", "1.png"], "sentence": "it is red", "label": "True"},
        {"identifier": "dev-1-1-0", "images": ["1.png", "2.png"], "sentence": "it is red", "label": "False"},
        {"identifier": "dev-1-0-1", "images": ["0.png", "1.png"], "sentence": "it is blue", "label": "False"},
        {"identifier": "dev-2-0-0", "images": ["0.png", "gone.png"], "sentence": "it is red", "label": "True"},
        {"identifier": "dev-2-0-1", "images": ["gone.png", "2.png"], "sentence": "it is red", "label": "True"},
        {"identifier": "dev-2-1-0", "images": ["2.png", "1.png"], "sentence": "...", "label": "True"},
    ]);
    let mut items = Reading::strict().nlvr(&[write(&folder, "nlvr.json", &lines)]).unwrap().items;
    let options = nlvr::Options { batch: 4 };
    let evaluate =
        |items: &[NlvrItem]| nlvr::evaluate(&model, items.to_vec(), &options, &mut sweep(&mut |_, _| {}, 0.5)).unwrap();
    let first = evaluate(&items);
    assert_eq!(first.left_out.iter().map(|out| out.item).collect::<Vec<_>>(), [3, 4, 5]);
    assert!(first.left_out[..2].iter().all(|out| out.problem.contains("gone.png")), "{:?}", first.left_out);
    let answers = [0, 1, 2].map(|i| first.answers[i] > 0.5);
    // Labels that make the second of a sentence's two judgements wrong, and the other sentence right.
    (items[0].label, items[1].label, items[2].label) = (answers[0], !answers[1], answers[2]);
    let done = evaluate(&items);
    let expected = NlvrScores { accuracy: 200.0 / 3.0, consistency: Some(50.0), count: 3, sentences: 2 };
    assert_eq!(done.scores, expected);
    let mut csv = Vec::new();
    nlvr::write_results(&done, &mut csv).unwrap();
    let word = |judged: bool| if judged { "True" } else { "False" };
    let expected =
        format!("dev-1-0-0,{}\ndev-1-1-0,{}\ndev-1-0-1,{}\n", word(answers[0]), word(answers[1]), word(answers[2]));
    assert_eq!(String::from_utf8(csv).unwrap(), expected);

    let error = nlvr::evaluate(&model, items, &options, &mut Sweep::new(&mut |_, _| {})).unwrap_err().to_string();
    assert!(error.contains("3 of 6 are broken") && error.contains("gone.png"), "{error}");
    let none = nlvr::evaluate(&model, Vec::new(), &options, &mut Sweep::new(&mut |_, _| {})).unwrap_err();
    assert_eq!(none.to_string(), "statements: expected at least one item, found none");

    let broken = json!([
        {"identifier": "dev-1-0-0", "images": ["0.png"], "sentence": "it is red", "label": "True"},
        {"identifier": "dev-1-0-1", "images": ["0.png", "1.png"], "sentence": "it is red"},
        {"identifier": "dev-1-0-2", "images": ["0.png", "1.png"], "sentence": "it is red", "label": "maybe"},
        {"identifier": "dev-1-0-3", "images": ["0.png", "1.png"], "sentence": "it is red", "label": true},
        {"identifier": "dev-1-0-3", "images": ["0.png", "1.png"], "sentence": "it is blue", "label": true},
    ]);
    let loaded = Reading::default().nlvr(&[write(&folder, "broken.json", &broken)]).unwrap();
    assert_eq!(loaded.items.len(), 1);
    for part in ["two images", "label: expected True or False, found nothing", "maybe", "\"dev-1-0-3\" again"] {
        assert!(loaded.report.to_string().contains(part), "{part}: {}", loaded.report);
    }
}

#[test]
fn sentences_of_lists_without_identifiers() {
    let (model, folder) = (model(Task::Nlvr), TempDir::new().unwrap());
    for set in 1..=2 {
        for pair in 0..2 {
            for side in 0..2 {
                let name = format!("dev-{set}-{pair}-img{side}.png");
                std::fs::write(folder.path().join(name), picture(pair + side).to_png().unwrap()).unwrap();
            }
        }
    }
    let item = |set: usize, pair: usize, sentence: &str| {
        let images = [0, 1].map(|side| format!("dev-{set}-{pair}-img{side}.png"));
        json!({"images": images, "sentence": sentence, "label": true})
    };
    let all =
        json!([item(1, 0, "it is red"), item(1, 1, "it is red"), item(2, 0, "it is red"), item(2, 1, "it is blue")]);
    let items = Reading::strict().nlvr(&[write(&folder, "nlvr.json", &all)]).unwrap().items;
    let done = nlvr::evaluate(&model, items, &nlvr::Options::default(), &mut Sweep::new(&mut |_, _| {})).unwrap();
    assert_eq!((done.scores.count, done.scores.sentences), (4, 3));
}
