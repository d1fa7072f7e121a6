//! Many pictures: embedded, searched, matched, and exercises about them graded.

use std::fs;

use serde_json::Value;

use super::{folder, is_probability, json, names, refused, stderr, text, xvlm};

#[test]
fn pictures_are_embedded_and_searched() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 4 --seed 5");
    fs::write(dir.join("data/images/broken.jpg"), "no picture").unwrap();
    let embedded = json(dir, "embed --model model --images data/images --out plain");
    assert_eq!((&embedded["images"], &embedded["regions"]), (&json!(4), &json!(0)));
    assert!(embedded["left_out"][0].as_str().unwrap().starts_with("broken.jpg: "), "{embedded}");
    assert_eq!(names(&dir.join("plain")), ["embeddings.jsonl", "index.json", "parts"]);
    refused(dir, "embed --model model --images data/images --out plain", &["plain/embeddings.jsonl"]);
    let shards = "embed --model model --shards data/pretrain.jsonl --format safetensors --f16 --kinds image,region";
    let table = text(dir, &format!("{shards} --out filed"));
    assert!(table.contains("regions") && table.contains("left out"), "{table}");
    assert_eq!(names(&dir.join("filed/parts")), ["000000-0000.safetensors"]);
    fs::write(dir.join("list.txt"), "data/images/000001.png\n\ndata/images/none.png\n").unwrap();
    let listed = json(dir, "embed --model model --list list.txt --out listed");
    assert!(listed["left_out"][0].as_str().unwrap().contains("none.png"), "{listed}");
    let annotated = json(dir, "embed --model model --annotations data/captions.json --out annotated");
    assert!(annotated["texts"].as_u64().unwrap() >= 4, "{annotated}");

    let asked = "--text a~star --like data/images/000002.png --top 3";
    for index in ["--index plain", "--index filed", "--images data/images", "--shards data/pretrain.jsonl"] {
        let found = json(dir, &format!("search --model model {index} {asked} --rerank 4"));
        assert_eq!((&found[0]["query"], found[0]["hits"].as_array().unwrap().len()), (&json!("a star"), 3));
        assert!(is_probability(&found[0]["hits"][0]["probability"]), "{found}");
        let like = &found[1]["hits"][0];
        assert!(like["image"].as_str().unwrap().ends_with("000002.png"), "{found}");
        assert!(like["similarity"].as_f64().unwrap() > 0.999 && like.get("probability").is_none(), "{found}");
    }
    let regions = json(dir, "search --model model --index filed --kind region --text a~star --rerank 2");
    let hit = &regions[0]["hits"][0];
    let [xmin, ymin, xmax, ymax] = ["xmin", "ymin", "xmax", "ymax"].map(|edge| hit["box"][edge].as_f64().unwrap());
    assert!(xmin < xmax && ymin < ymax && xmax <= 193.0 && ymax <= 193.0, "{hit}");
    // What people read is what --box takes.
    let table = text(dir, "search --model model --index filed --kind region --text a~star --rerank 2 --top 1");
    let bounds = format!("{xmin:.1},{ymin:.1},{xmax:.1},{ymax:.1}");
    assert!(table.contains(&format!("  {bounds}  ")), "{table}");
    let matched =
        text(dir, &format!("match --model model --image {} --text a --box {bounds}", hit["image"].as_str().unwrap()));
    assert!(matched.contains(&bounds), "{matched}");
    // Only as many are ranked again as was asked for; the others come after them.
    let hits = json(dir, "search --model model --index plain --text a~star --rerank 2");
    let hits = hits[0]["hits"].as_array().unwrap();
    let ranked: Vec<bool> = hits.iter().map(|hit| hit.get("probability").is_some()).collect();
    assert_eq!(ranked, [true, true, false, false]);
    assert!(hits[2]["similarity"].as_f64() >= hits[3]["similarity"].as_f64(), "{hits:?}");
    assert!(text(dir, "search --model model --index plain --text a~star").contains("cosine"));

    refused(dir, "search --model model --index plain --kind text --text a~star", &["plain", "kind text"]);
    refused(dir, "search --model model --index none --text a~star", &["none/index.json"]);
    for wrong in ["search --model model --text a~star", "embed --model model --out x"] {
        let output = xvlm(dir, wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong}");
        assert!(stderr(&output).contains("--images"), "{}", stderr(&output));
    }
    refused(dir, "embed --model model --images model --out x", &["model", "at least one item"]);
    fs::write(dir.join("plain/parts/000000-0000.parquet"), "damage").unwrap();
    refused(dir, "search --model model --index plain --text a~star", &["000000-0000.parquet", "a file of embeddings"]);
}

#[test]
fn boxes_are_matched() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 2 --seed 5");
    let images = "--model model --image data/images/000000.png data/images/000001.png --text a~star --text a~ring";
    let found = json(dir, &format!("match {images} --box 0,0,50,60 --box 20,20,120,110.5"));
    let results = found[1]["results"].as_array().unwrap();
    assert_eq!(results.len(), 4);
    let edges = json!({"xmin": 20.0, "ymin": 20.0, "xmax": 120.0, "ymax": 110.5});
    assert_eq!((&results[2]["box"], &results[3]["text"]), (&edges, &json!("a ring")));
    assert!(is_probability(&results[3]["probability"]));
    for wrong in ["60,0,50,60", "0,60,50,60", "0,0,inf,60", "0,0,50"] {
        let output = xvlm(dir, &format!("match {images} --box {wrong}"));
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("expected xmin,ymin,xmax,ymax"), "{}", stderr(&output));
    }
}

#[test]
fn exercises_are_graded() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 2 --seed 5");
    let image = "--model model --image data/images/000000.png";
    let grade = json(dir, &format!("fill {image} --text a~___~and~a~___ --answer star --answer red~ring --words 2"));
    let grade = &grade[0]["results"][0];
    assert!(grade["accepted"].is_boolean() && is_probability(&grade["probability"]), "{grade}");
    assert_eq!((&grade["blanks"][1]["answer"], grade["blanks"].as_array().unwrap().len()), (&json!("red ring"), 2));
    assert!(grade["blanks"][0]["rank"].as_u64().unwrap() >= 1 && grade["blanks"][0]["proposals"].is_array());
    let table = text(dir, &format!("fill {image} --text a~___ --answer star"));
    assert!(table.contains("answer: star") && table.contains("place"), "{table}");

    let rows = "id,image,text,answer\n1,data/images/000000.png,a ___ star,red\n2,data/images/000001.png,a ___ ___,red | ring\n\
                3,data/images/none.png,a ___,red\n4,data/images/000000.png,a ___,red | ring\n";
    fs::write(dir.join("exercises.csv"), rows).unwrap();
    let report = json(dir, "fill --model model --file exercises.csv --out grades");
    assert_eq!((&report["exercises"], report["left_out"].as_array().unwrap().len()), (&json!(2), 2));
    assert_eq!(report["result_file"], "grades/grades.json");
    let graded: Value = serde_json::from_slice(&fs::read(dir.join("grades/grades.json")).unwrap()).unwrap();
    assert_eq!(graded.as_array().unwrap().len(), 2);
    assert_eq!((&graded[1]["id"], &graded[1]["text"]), (&json!("2"), &json!("a ___ ___")));
    assert!(graded[0]["blanks"][0]["share"].is_number(), "{graded}");
    let refusal = ["grades/grades.jsonl"];
    refused(dir, "fill --model model --file exercises.csv --out grades", &refusal);
    // Numbers are told as they were given.
    let other = "fill --model model --file exercises.csv --out grades --resume --accept 0.05";
    refused(dir, other, &["0.03", "0.05"]);
    assert!(!stderr(&xvlm(dir, other)).contains("0.0299"));
    assert!(xvlm(dir, "fill --model model --file exercises.csv --out grades --resume").status.success());
    refused(dir, "fill --model model --file exercises.csv --out strict --max-bad-fraction 0.1", &["are broken"]);
    fs::write(dir.join("broken.csv"), "id,image,text,answer\n1,none.png,a ___,red\n").unwrap();
    let output = xvlm(dir, "fill --model model --file broken.csv --out none");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("exercises: 1 broken or missing"), "{}", stderr(&output));
    assert_eq!(fs::read_to_string(dir.join("none/grades.json")).unwrap().trim(), "[]");
}

#[test]
fn retrieval_is_evaluated_on_files() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 4 --seed 5");
    let whole = json(dir, "eval retrieval --model model --data data --out whole");
    assert_eq!(whole["left_out"], json!([]));
    let found: Value = serde_json::from_slice(&fs::read(dir.join("whole/retrieval.json")).unwrap()).unwrap();
    assert_eq!(found["image_to_text"].as_object().unwrap().len(), 4);
    assert_eq!(found["text_to_image"]["19"].as_array().unwrap().len(), 4);
    let judged = json(dir, "score retrieval --refs data/retrieval.json --hyps whole/retrieval.json");
    for key in ["text_r1", "text_r5", "image_r1", "image_r10", "r_mean"] {
        assert_eq!(judged[key], whole[key], "{key}");
    }

    // The original's configuration, with its files in two parts.
    let items: Value = serde_json::from_slice(&fs::read(dir.join("data/retrieval.json")).unwrap()).unwrap();
    let items = items.as_array().unwrap();
    fs::write(dir.join("one.json"), json!(items[..2]).to_string()).unwrap();
    fs::write(dir.join("two.json"), json!(items[2..]).to_string()).unwrap();
    let preset = "eval retrieval --model model --preset retrieval-coco --k-test 16 --set task.image_root=data";
    let parts = json(dir, &format!("{preset} --set task.test_file=[one.json,two.json]"));
    assert_eq!(parts["r_mean"], whole["r_mean"]);

    fs::remove_file(dir.join("data/images/000001.png")).unwrap();
    refused(dir, "eval retrieval --model model --data data", &["data/images/000001.png"]);
    let part = json(dir, "eval retrieval --model model --data data --max-bad-fraction 0.5");
    assert!(part["left_out"][0]["problem"].as_str().unwrap().contains("000001.png"), "{part}");
}
