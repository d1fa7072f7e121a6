//! Questions from a list of answers, and statements about two pictures.

use std::fs;
use std::path::Path;

use serde_json::Value;
use xvlm::data::{TextTokenizer, scenes};
use xvlm::encoders::{Task, XvlmConfig};
use xvlm::tasks::finetune::initial_weights;
use xvlm::tasks::{Model, ModelConfig};
use xvlm::weights::{ModelFolder, StoredType};

use super::{folder, is_probability, json, names, refused, sizes, stderr, text, xvlm};

/// A model for statements about two pictures, `judge`, made of the untrained one.
fn judge(dir: &Path) {
    let tokenizer = TextTokenizer::from_vocabulary(&scenes::vocabulary()).unwrap();
    let model: XvlmConfig = serde_json::from_value(sizes(tokenizer.vocab_size())).unwrap();
    let model = XvlmConfig { task: Task::Nlvr, ..model };
    let files = ModelFolder::open(&dir.join("model")).unwrap();
    let weights = initial_weights(&files, &model, 7).unwrap().tensors;
    let config = ModelConfig { max_words: 40, ..ModelConfig::of(model) };
    Model::write(&dir.join("judge"), &config, weights, &tokenizer, StoredType::F32).unwrap();
}

#[test]
fn answers_come_from_a_list() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 2 --seed 5");
    fs::write(dir.join("list.txt"), "red\ngreen\nblue\nred\n").unwrap();
    let ask = "answer --model model --image data/images/000000.png --text which~colour --answers";
    let answers = json(dir, &format!("{ask} list.txt --top 2"));
    let likely = answers[0]["results"][0]["answers"].as_array().unwrap();
    assert!(likely.len() == 2 && likely.iter().all(|answer| is_probability(&answer["probability"])), "{answers}");
    assert!(stderr(&xvlm(dir, &format!("{ask} list.txt"))).contains("entry 3"));
    fs::write(dir.join("none.txt"), "\n").unwrap();
    refused(dir, &format!("{ask} none.txt"), &["none.txt", "expected at least one item"]);

    let eval = "eval vqa --model model --data data";
    let ranked = format!("{eval} --answers data/answer_list.json");
    let scores = json(dir, &format!("{ranked} --k-test 5 --out ranked"));
    assert_eq!(names(&dir.join("ranked")), ["vqa.json", "vqa.jsonl"]);
    assert_eq!(scores["result_file"], "ranked/vqa.json");
    let results: Value = serde_json::from_slice(&fs::read(dir.join("ranked/vqa.json")).unwrap()).unwrap();
    assert_eq!(json!(results.as_array().unwrap().len()), scores["count"]);
    refused(dir, &format!("{ranked} --k-test 5 --out ranked"), &["vqa.jsonl", "resume the work"]);
    assert_eq!(json(dir, &format!("{ranked} --k-test 5 --out ranked --resume")), scores);
    refused(dir, &format!("{ranked} --k-test 6 --out ranked --resume"), &["vqa.jsonl", "expected 6", "found 5"]);
    refused(dir, &format!("{eval} --as-original"), &["--answers", "found none"]);
    // The answers are those of these weights, wherever they lie.
    fs::rename(dir.join("model"), dir.join("moved")).unwrap();
    let moved = ranked.replace("--model model", "--model moved");
    assert_eq!(json(dir, &format!("{moved} --k-test 5 --out ranked --resume"))["right"], scores["right"]);
    let other = "eval vqa --data data --answers data/answer_list.json --k-test 5 --out ranked --resume";
    refused(dir, other, &["vqa.jsonl", "about.weights"]);
    fs::rename(dir.join("moved"), dir.join("model")).unwrap();

    // A configuration's files, as well as a folder's.
    let preset = "eval vqa --model model --preset scenes-vqa --set task.test_file=[data/vqa.json] --set task.vqa_root=data \
                  --set task.answer_list=data/answer_list.json --set task.k_test=5";
    assert_eq!(json(dir, preset)["right"], scores["right"]);
    refused(dir, &preset.replace("scenes-vqa", "scenes-nlvr2"), &["scenes-nlvr2"]);

    // Questions alone: there is nothing to score, so the answers must go somewhere.
    let questions = fs::read_to_string(dir.join("data/vqa.json")).unwrap();
    let mut questions: Vec<Value> = serde_json::from_str(&questions).unwrap();
    questions.truncate(3);
    questions.iter_mut().for_each(|question| drop(question.as_object_mut().unwrap().remove("answer")));
    fs::write(dir.join("data/vqa.json"), json!(questions).to_string()).unwrap();
    refused(dir, eval, &["--out", "no answers to score against"]);
    let alone = json(dir, &format!("{eval} --out alone"));
    assert_eq!(alone["without_answers"].as_array().unwrap().len(), 3);
    questions.push(questions[0].clone());
    fs::write(dir.join("data/vqa.json"), json!(questions).to_string()).unwrap();
    refused(dir, &format!("{eval} --out twice"), &["data/vqa.json", "question_id", "again"]);
    let skipped = json(dir, &format!("{eval} --out twice --max-bad-fraction 0.5"));
    assert_eq!(skipped["skipped"]["duplicate_id"]["count"], 1, "{skipped}");
}

#[test]
fn statements_are_about_two_pictures() {
    let dir = folder();
    let dir = dir.path();
    judge(dir);
    text(dir, "synth --out data --scenes 3 --seed 5");
    let ask = "judge --images data/images/000000.png data/images/000001.png --text both~images~have~a~star --text it";
    let judged = json(dir, &format!("{ask} --model judge"));
    let results = judged["results"].as_array().unwrap();
    assert!(results.len() == 2 && results.iter().all(|judged| is_probability(&judged["probability"])), "{judged}");
    assert!(text(dir, &format!("{ask} --model judge")).contains("both images have a star"));
    refused(dir, &format!("{ask} --model model"), &["expected a model for nlvr, found one for pretrain"]);

    let eval = "eval nlvr --model judge --data data";
    let scores = json(dir, &format!("{eval} --out judged"));
    assert!(scores["accuracy"].is_number() && scores["balanced"]["accuracy"].is_number(), "{scores}");
    let csv = fs::read_to_string(dir.join("judged/nlvr.csv")).unwrap();
    assert_eq!(json!(csv.lines().count()), scores["count"]);
    assert!(csv.lines().all(|line| line.ends_with(",True") || line.ends_with(",False")), "{csv}");

    let preset = "eval nlvr --model judge --preset scenes-nlvr2 --set task.test_file=[data/nlvr.json] --set task.image_root=data";
    assert_eq!(json(dir, preset)["accuracy"], scores["accuracy"]);

    fs::remove_file(dir.join("data/images/000002.png")).unwrap();
    refused(dir, eval, &["000002.png"]);
    let left = json(dir, &format!("{eval} --max-bad-fraction 0.99"));
    assert!(left["left_out"][0]["problem"].as_str().unwrap().contains("000002.png"), "{left}");
}
