//! `xvlm score`: result files in their published forms, right and wrong.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{json as run, refused, text};

fn write(dir: &TempDir, name: &str, content: &Value) {
    fs::write(dir.path().join(name), content.to_string()).unwrap();
}

fn close(found: &Value, expected: f64) {
    let found = found.as_f64().unwrap_or(f64::NAN);
    assert!((found - expected).abs() < 1e-6, "expected {expected}, found {found}");
}

/// The expected numbers are those of pycocoevalcap 1.2.
#[test]
fn captions() {
    let dir = tempfile::tempdir().unwrap();
    let annotation = |image: u32, caption: &str| json!({"image_id": image, "id": 1, "caption": caption});
    let annotations = [
        annotation(42, "A red circle to the left of a blue square."),
        annotation(7, "a small green triangle"),
        annotation(42, "The red circle is left of the blue square!"),
        annotation(7, "One small triangle in green, on a white ground."),
        annotation(9, "Two dogs are running on the beach."),
    ];
    write(&dir, "refs.json", &json!({"images": [{"id": 42}, {"id": 7}, {"id": 9}], "annotations": annotations}));
    let hyps = json!([
        {"image_id": 7, "caption": "The small green triangle"},
        {"image_id": 9, "caption": "two dogs run on the the beach"},
        {"image_id": 42, "caption": "a red circle left of a blue square."},
    ]);
    write(&dir, "hyps.json", &hyps);
    let scores = run(dir.path(), "score captions --refs refs.json --hyps hyps.json --save-df df.json --each each.json");
    for (name, expected) in EXPECTED {
        close(&scores[name], expected);
    }
    assert_eq!((&scores["images"], &scores["references"], &scores["missing"]), (&json!(3), &json!(5), &json!(0)));
    // With the table of its own references CIDEr-D is CIDEr.
    let again = run(dir.path(), "score captions --refs refs.json --hyps hyps.json --df df.json");
    close(&again["cider_d"], scores["cider"].as_f64().unwrap());
    let each: Value = serde_json::from_slice(&fs::read(dir.path().join("each.json")).unwrap()).unwrap();
    assert_eq!((&each[0]["image_id"], &each[1]["words"]), (&json!("42"), &json!("the small green triangle")));
    let table = text(dir.path(), "score captions --refs refs.json --hyps hyps.json");
    assert!(table.contains("CIDEr") && table.contains("BLEU-4"), "{table}");

    // A caption that is only punctuation is scored, and told of.
    let mut silent = hyps.clone();
    silent[0]["caption"] = json!("...");
    write(&dir, "silent.json", &silent);
    let scores = run(dir.path(), "score captions --refs refs.json --hyps silent.json");
    assert_eq!((&scores["without_words"], &scores["without_words_ids"]), (&json!(1), &json!(["7"])));

    // Missing, unknown, double.
    write(&dir, "few.json", &json!([hyps[0], {"image_id": 1, "caption": "a dog"}]));
    refused(
        dir.path(),
        "score captions --refs refs.json --hyps few.json",
        &["few.json: image_id: expected a result of each of 3 images, found none of 2 of them (42, 9)"],
    );
    let scores = run(dir.path(), "score captions --refs refs.json --hyps few.json --partial");
    assert_eq!((&scores["images"], &scores["missing"], &scores["unknown"]), (&json!(1), &json!(2), &json!(1)));
    assert_eq!(scores["missing_ids"], json!(["42", "9"]));
    write(&dir, "double.json", &json!([hyps[0], hyps[1], hyps[2], hyps[0]]));
    refused(
        dir.path(),
        "score captions --refs refs.json --hyps double.json",
        &["double.json item 3: image_id: expected an identifier of its own, found 7, which item 0 has"],
    );
    fs::write(dir.path().join("broken.json"), "[{\"image_id\": 7,").unwrap();
    refused(dir.path(), "score captions --refs refs.json --hyps broken.json", &["broken.json", "expected JSON"]);
    write(&dir, "without.json", &json!({"images": [{"id": 42}, {"id": 7}], "annotations": [annotation(42, "a")]}));
    refused(
        dir.path(),
        "score captions --refs without.json --hyps hyps.json",
        &["without.json: annotations: expected at least one caption of each image, found none of image 7"],
    );
    refused(
        dir.path(),
        "score captions --refs refs.json --hyps hyps.json --df hyps.json",
        &["hyps.json: file: expected a pickle or JSON of document_frequency and ref_len"],
    );
    refused(dir.path(), "score captions --refs refs.json --hyps hyps.json --meteor-jar no.jar", &["no.jar"]);
}

const EXPECTED: [(&str, f64); 6] = [
    ("bleu_1", 0.7989300883507965),
    ("bleu_2", 0.7218748939063119),
    ("bleu_3", 0.5750394513303057),
    ("bleu_4", 0.43582920456458507),
    ("rouge_l", 0.7785714285714286),
    ("cider", 3.5734110697773147),
];

/// The expected numbers are those of `vqaEval.py`, the official one and X-VLM's.
#[test]
fn questions() {
    let dir = tempfile::tempdir().unwrap();
    let annotation = |id: u32, kind: &str, answers: [&str; 10]| {
        let answers: Vec<_> =
            answers.iter().enumerate().map(|(at, answer)| json!({"answer": answer, "answer_id": at + 1})).collect();
        json!({"question_id": id, "image_id": 1, "answer_type": kind, "question_type": "what", "answers": answers})
    };
    let mut of_two = ["2"; 10];
    of_two[0] = "two";
    let mut of_dogs = ["dog"; 10];
    of_dogs[..3].fill("a dog");
    let annotations = json!([
        annotation(1, "number", of_two),
        annotation(2, "other", of_dogs),
        annotation(3, "yes/no", ["yes"; 10]),
        annotation(4, "other", ["The cat"; 10]),
    ]);
    write(&dir, "refs.json", &json!({"annotations": annotations}));
    let questions: Vec<_> = (1..5).map(|id| json!({"question_id": id, "image_id": 1, "question": "?"})).collect();
    write(&dir, "questions.json", &json!({"questions": questions}));
    let answer = |id: u32, answer: &str| json!({"question_id": id, "answer": answer});
    let hyps = json!([answer(4, "cat"), answer(1, "two"), answer(2, "the dog"), answer(3, "yes")]);
    write(&dir, "hyps.json", &hyps);
    let scores = run(dir.path(), "score vqa --refs refs.json --hyps hyps.json --questions questions.json");
    close(&scores["accuracy"], 75.0);
    close(&scores["answer_types"]["other"]["accuracy"], 50.0);
    close(&scores["answer_types"]["number"]["accuracy"], 100.0);
    assert_eq!((&scores["question_types"]["what"]["count"], &scores["other_than_ten_answers"]), (&json!(4), &json!(0)));
    let original = run(dir.path(), "score vqa --refs refs.json --hyps hyps.json --as-original");
    close(&original["accuracy"], 75.0);

    refused(
        dir.path(),
        "score vqa --refs refs.json --hyps refs.json",
        &["refs.json: results: expected a list of objects, found an object of 1 fields"],
    );
    write(&dir, "other.json", &json!([hyps[0], hyps[1], hyps[2], hyps[3], answer(99, "yes")]));
    refused(
        dir.path(),
        "score vqa --refs refs.json --hyps other.json",
        &["other.json: question_id: expected results of questions of the references only, found 1 of others (99)"],
    );
    close(&run(dir.path(), "score vqa --refs refs.json --hyps other.json --partial")["accuracy"], 75.0);
    let mut none = annotations;
    none[2]["answers"] = json!([]);
    write(&dir, "none.json", &json!({"annotations": none}));
    refused(
        dir.path(),
        "score vqa --refs none.json --hyps hyps.json",
        &["none.json item 2: answers: expected a list of at least one, found a list of 0"],
    );
    write(&dir, "list.json", &json!([{"question_id": "q", "answer": "red", "kind": "colour"}]));
    write(&dir, "red.json", &json!([answer(1, "red")]));
    refused(dir.path(), "score vqa --refs list.json --hyps red.json", &["expected a result of each of 1 questions"]);
    write(&dir, "red.json", &json!([{"question_id": "q", "answer": "red"}]));
    let scores = run(dir.path(), "score vqa --refs list.json --hyps red.json");
    close(&scores["answer_types"]["colour"]["accuracy"], 100.0);
    assert_eq!(scores["other_than_ten_answers"], json!(1));
}

#[test]
fn sentences() {
    let dir = tempfile::tempdir().unwrap();
    let example = |id: &str, left: &str, label: &str| json!({"identifier": id, "left_url": left, "right_url": "r", "label": label, "sentence": "s"});
    let lines = [
        example("dev-1-0-0", "a", "True"),
        example("dev-1-1-0", "b", "False"),
        example("dev-2-0-1", "a", "False"),
        example("dev-3-0-0", "c", "True"),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    fs::write(dir.path().join("dev.json"), text).unwrap();
    fs::write(dir.path().join("p.csv"), "dev-1-0-0,True\ndev-1-1-0,false\ndev-2-0-1,True\ndev-3-0-0,true\n").unwrap();
    let scores = run(dir.path(), "score nlvr --refs dev.json --hyps p.csv");
    close(&scores["accuracy"], 75.0);
    close(&scores["consistency"], 200.0 / 3.0);
    close(&scores["balanced"]["accuracy"], 50.0);
    assert_eq!((&scores["balanced"]["count"], &scores["unbalanced"]["count"]), (&json!(2), &json!(0)));
    fs::write(dir.path().join("few.csv"), "dev-1-0-0,True\n").unwrap();
    refused(
        dir.path(),
        "score nlvr --refs dev.json --hyps few.csv",
        &[
            "few.csv: identifier: expected a result of each of 4 examples, found none of 3 of them (dev-1-1-0, dev-2-0-1",
        ],
    );
    fs::write(dir.path().join("bad.csv"), "dev-1-0-0,True\ndev-1-1-0,perhaps\n").unwrap();
    refused(dir.path(), "score nlvr --refs dev.json --hyps bad.csv", &["bad.csv:2: line: expected identifier,true"]);
    // X-VLM's lists have no identifiers.
    write(&dir, "list.json", &json!([{"images": ["a", "b"], "sentence": "s", "label": true}]));
    fs::write(dir.path().join("list.csv"), "0,true\n").unwrap();
    let scores = run(dir.path(), "score nlvr --refs list.json --hyps list.csv");
    assert_eq!((&scores["accuracy"], &scores["consistency"]), (&json!(100.0), &Value::Null));
}

#[test]
fn rankings() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir, "refs.json", &json!([{"image": "a.jpg", "caption": ["x", "y"]}, {"image": "b.jpg", "caption": ["z"]}]));
    let hyps = json!({
        "image_to_text": {"a.jpg": [2, 1, 0], "b.jpg": [2, 0, 1]},
        "text_to_image": {"0": ["a.jpg", "b.jpg"], "1": ["b.jpg", "a.jpg"], "2": ["a.jpg", "b.jpg"]},
    });
    write(&dir, "hyps.json", &hyps);
    let scores = run(dir.path(), "score retrieval --refs refs.json --hyps hyps.json");
    close(&scores["text_r1"], 50.0);
    close(&scores["image_r1"], 100.0 / 3.0);
    assert_eq!((&scores["images"], &scores["texts"], &scores["short"]), (&json!(2), &json!(3), &json!(0)));
    let wrong = |change: &dyn Fn(&mut Value), expected: &str| {
        let mut hyps = hyps.clone();
        change(&mut hyps);
        write(&dir, "wrong.json", &hyps);
        refused(dir.path(), "score retrieval --refs refs.json --hyps wrong.json", &[expected]);
    };
    wrong(
        &|hyps| hyps["image_to_text"]["a.jpg"] = json!([2, 7]),
        "image_to_text.a.jpg[1]: expected an item of the references, found 7",
    );
    wrong(
        &|hyps| hyps["image_to_text"]["a.jpg"] = json!([2, 2]),
        "image_to_text.a.jpg[1]: expected each item once, found 2 again",
    );
    wrong(
        &|hyps| hyps["image_to_text"]["a.jpg"] = json!([2]),
        "expected rankings of at least 3 items, found 1 shorter ones (a.jpg)",
    );
    wrong(
        &|hyps| drop(hyps["text_to_image"].as_object_mut().unwrap().remove("1")),
        "text_to_image: expected a result of each of 3 texts, found none of 1 of them (1)",
    );
    fs::write(
        dir.path().join("twice.json"),
        r#"{"image_to_text": {"a.jpg": [2, 1, 0], "a.jpg": [0, 1, 2], "b.jpg": [2, 0, 1]}, "text_to_image": {}}"#,
    )
    .unwrap();
    refused(
        dir.path(),
        "score retrieval --refs refs.json --hyps twice.json",
        &["expected an identifier of its own, found a.jpg twice"],
    );
}

#[test]
fn boxes() {
    let dir = tempfile::tempdir().unwrap();
    let phrase = |id: u32, split: &str| json!({"ref_id": id, "image": "a.jpg", "text": "t", "bbox": [10, 20, 30, 40], "width": 100, "height": 200, "split": split});
    write(&dir, "refs.json", &json!([phrase(1, "val"), phrase(1, "val"), phrase(2, "testA")]));
    let hyps = json!([
        {"ref_id": 1, "bbox": [10, 20, 30, 40], "point": [15, 25]},
        {"ref_id": 2, "pred": [0.25, 0.2, 0.3, 0.2], "point": [80, 25]},
        {"ref_id": 1, "bbox": [50, 20, 30, 40]},
    ]);
    write(&dir, "hyps.json", &hyps);
    let scores = run(dir.path(), "score grounding --refs refs.json --hyps hyps.json");
    close(&scores["accuracy@0.5"], 200.0 / 3.0);
    close(&scores["mean_iou"], 200.0 / 3.0);
    close(&scores["pointing"], 50.0);
    close(&scores["splits"]["val"]["accuracy@0.5"], 50.0);
    close(&scores["splits"]["testA"]["accuracy@0.5"], 100.0);
    write(&dir, "few.json", &json!([hyps[0], hyps[1]]));
    refused(
        dir.path(),
        "score grounding --refs refs.json --hyps few.json",
        &["few.json: ref_id: expected a result of each of 3 phrases, found none of 1 of them (1)"],
    );
    write(&dir, "many.json", &json!([hyps[0], hyps[1], hyps[2], hyps[2]]));
    refused(
        dir.path(),
        "score grounding --refs refs.json --hyps many.json",
        &["many.json item 3: ref_id: expected no more results than phrases of this identifier, found 1"],
    );
    write(&dir, "bad.json", &json!([hyps[0], hyps[1], {"ref_id": 1, "bbox": [1, 2, 3]}]));
    refused(
        dir.path(),
        "score grounding --refs refs.json --hyps bad.json",
        &["bad.json item 2: bbox: expected 4 numbers"],
    );
    write(&dir, "bad.json", &json!([hyps[0], hyps[1], {"ref_id": 1}]));
    refused(dir.path(), "score grounding --refs refs.json --hyps bad.json", &["bad.json item 2: bbox: expected a box"]);
}
