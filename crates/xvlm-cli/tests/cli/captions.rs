//! `xvlm caption`, `xvlm eval captioning`, `xvlm alt`.

use std::fs;
use std::path::Path;

use serde_json::Value;
use xvlm::Picture;

use super::{folder, json, refused, stderr, text, xvlm};

#[test]
fn captions_can_be_drawn() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 2 --seed 5");
    let images = "--model model --image data/images/000000.png data/images/000001.png";
    let texts = |more: &str| -> Vec<Vec<String>> {
        let length = if more.contains("--max-tokens") { "" } else { "--max-tokens 6" };
        let found = json(dir, &format!("caption {images} {length} {more}"));
        let of = |about: &Value| {
            let results = about["results"].as_array().unwrap().iter();
            results.map(|written| written["text"].as_str().unwrap().to_owned()).collect()
        };
        found.as_array().unwrap().iter().map(of).collect()
    };
    let drawn = texts("--sample --samples 3 --seed 4");
    assert_eq!(drawn.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3]);
    assert_eq!(drawn, texts("--sample --samples 3 --seed 4"));
    assert_ne!(drawn, texts("--sample --samples 3 --seed 5"));
    assert_eq!(texts("--sample --top-k 1"), texts("--beams 1"));
    // A picture's captions depend on the seed and on its place, not on what is beside it.
    let of = |images: &[&str], seed: u64| -> Vec<Value> {
        let images: Vec<String> = images.iter().map(|image| format!("data/images/{image}.png")).collect();
        let sample = format!("--max-tokens 6 --sample --samples 3 --seed {seed}");
        let found = json(dir, &format!("caption --model model --image {} {sample}", images.join(" ")));
        found.as_array().unwrap().iter().map(|about| about["results"].clone()).collect()
    };
    let words = |results: &Value| -> Vec<String> {
        results.as_array().unwrap().iter().map(|written| written["text"].to_string()).collect()
    };
    let (pair, twice) = (of(&["000000", "000001"], 4), of(&["000001", "000001"], 4));
    assert_eq!(words(&pair[1]), words(&twice[1]));
    assert_ne!(words(&twice[0]), words(&twice[1]));
    let many = of(&["000001"; 34], 4);
    assert_ne!(words(&many[33]), words(&many[1]));
    assert_ne!(words(&many[32]), words(&of(&["000001"], 5)[0]));
    let words = |texts: &[Vec<String>]| texts.iter().flatten().map(|text| text.split(' ').count()).max().unwrap();
    assert!(words(&texts("--max-tokens 2 --prompt the~picture")) <= 2);
    let lines = text(dir, &format!("caption {images} --max-tokens 3 --sample --samples 2"));
    assert_eq!(lines.matches("data/images/000001.png: ").count(), 2, "{lines}");
    refused(dir, &format!("caption {images} --sample --top-p 0"), &["top_p: expected above 0"]);
    refused(dir, &format!("caption {images} --repetition-penalty 0"), &["repetition_penalty"]);
    assert_eq!(xvlm(dir, &format!("caption {images} --top-k 3")).status.code(), Some(2));
    assert_eq!(xvlm(dir, &format!("caption {images} --sample --beams 3")).status.code(), Some(2));
}

#[test]
fn captions_are_evaluated() {
    let dir = folder();
    let dir = dir.path();
    text(dir, "synth --out data --scenes 4 --seed 5");
    let scores = json(dir, "eval captioning --model model --data data --out answers --batch-size 3 --max-tokens 6");
    for key in ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "right"] {
        assert!(scores[key].as_f64().is_some_and(|score| score >= 0.0), "{key}: {scores}");
    }
    assert_eq!(scores["captions"], 4);
    let results: Value = serde_json::from_slice(&fs::read(dir.join("answers/captions.json")).unwrap()).unwrap();
    assert_eq!((results.as_array().unwrap().len(), &results[2]["image_id"]), (4, &json!(2)));
    // Once more, from the answers.
    let again = json(dir, "eval captioning --model model --data data --out answers --resume --max-tokens 6");
    assert_eq!(again, scores);
    refused(dir, "eval captioning --model model --data data --out answers", &["answers"]);

    // By a configuration, with references in a file of their own.
    let annotations: Vec<Value> =
        (0..4).map(|id| json!({"image_id": id, "caption": format!("A picture {id}."), "id": id})).collect();
    fs::write(dir.join("gt.json"), json!({"annotations": annotations, "images": []}).to_string()).unwrap();
    let list: Vec<Value> = (0..4).map(|id| json!({"image": format!("images/{id:06}.png"), "caption": []})).collect();
    fs::write(dir.join("data/list.json"), json!(list).to_string()).unwrap();
    for preset in ["captioning-coco", "captioning-scst"] {
        let sets = "--set task.test_file=[data/list.json] --set task.image_root=data --set task.test_gt_file=gt.json";
        let scores =
            json(dir, &format!("eval captioning --model model --preset {preset} {sets} --beams 1 --max-tokens 4"));
        assert_eq!((&scores["captions"], &scores["count"]), (&json!(4), &json!(4)));
        assert!(scores.get("right").is_none(), "{scores}");
    }
    assert!(text(dir, "eval captioning --model model --data data --max-tokens 4").contains("CIDEr"));
}

fn site(dir: &Path) {
    text(dir, "synth --out data --scenes 2 --seed 5");
    fs::create_dir_all(dir.join("site/posts")).unwrap();
    fs::rename(dir.join("data/images"), dir.join("site/images")).unwrap();
    let page = "<html>\r\n<img src=/images/000000.png>\r\n<img src='images/000001.png' alt=''>\r\n<img src=https://a.org/b.png>\r\n</html>";
    fs::write(dir.join("site/index.html"), page).unwrap();
    fs::write(dir.join("site/posts/one.md"), "# One\n\n![](../images/000000.png)\n").unwrap();
    fs::write(dir.join("site/posts/two.txt"), "![](../images/000000.png)").unwrap();
}

#[test]
fn documents_get_their_alternative_texts() {
    let dir = folder();
    let dir = dir.path();
    site(dir);
    let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap();
    let (page, note) = (read("site/index.html"), read("site/posts/one.md"));
    let alt = "alt documents --model model --max-tokens 6";

    let told = json(dir, &format!("{alt} site --dry-run"));
    assert_eq!((&told["outcomes"], &told["pictures"]), (&json!({"described": 2, "remote": 1}), &json!(1)));
    assert_eq!(read("site/index.html"), page);
    let first = &told["documents"][0];
    assert_eq!((&first["document"], &first["images"]), (&json!("site/index.html"), &json!(3)));
    assert_eq!((&first["decorative"], &first["written"]), (&json!(1), &json!(1)));
    let said = first["reports"][0]["text"].as_str().unwrap().to_owned();
    assert!(said.ends_with('.'), "{said}");

    text(dir, &format!("{alt} site --out described"));
    assert_eq!(read("site/index.html"), page);
    assert_eq!(read("described/index.html"), page.replace("<img src=/", &format!("<img alt=\"{said}\" src=/")));
    assert_eq!(read("described/posts/one.md"), note.replace("![]", &format!("![{said}]")));
    assert!(!dir.join("described/posts/two.txt").exists());
    text(dir, &format!("{alt} site/posts/one.md --out one.md"));
    assert_eq!(read("one.md"), read("described/posts/one.md"));

    let lines = text(dir, &format!("{alt} site --in-place"));
    assert!(lines.contains("site/index.html:4: https://a.org/b.png: not looked at"), "{lines}");
    assert!(lines.ends_with("2 descriptions written, of 1 picture, 1 remote\n"), "{lines}");
    assert_eq!(read("site/index.html"), read("described/index.html"));
    // Nothing is left to do but what is decoration.
    let again = json(dir, &format!("{alt} site --in-place --decorative --prefix \"Image:~ --plain"));
    assert_eq!((&again["outcomes"], &again["changed"]), (&json!({"described": 1, "remote": 1}), &json!(true)));
    assert!(
        read("site/index.html").contains("<img src='images/000001.png' alt=\"&quot;Image: "),
        "{}",
        read("site/index.html")
    );

    // What the model is not sure of is told, and not written.
    fs::write(dir.join("site/index.html"), &page).unwrap();
    let unsure = json(dir, &format!("{alt} site/index.html --root site --in-place --min-confidence 1"));
    assert_eq!((&unsure["changed"], &told["changed"]), (&json!(false), &json!(false)));
    assert_eq!(unsure["outcomes"], json!({"remote": 1, "unsure": 1}));
    assert_eq!(read("site/index.html"), page);

    // What is broken does not keep the rest from being written.
    fs::write(dir.join("site/broken.html"), "<img src=none.png><img src=images/000001.png>").unwrap();
    fs::write(dir.join("site/other.md"), b"f\xfcr").unwrap();
    let output = xvlm(dir, &format!("{alt} site --in-place"));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("images and documents: 2 broken or missing"), "{}", stderr(&output));
    let said = String::from_utf8(output.stdout).unwrap();
    for part in ["site/broken.html:1: none.png: broken: ", "site/other.md: expected UTF-8"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(read("site/broken.html").starts_with("<img src=none.png><img alt=\""));

    refused(dir, &format!("{alt} none.html --dry-run"), &["none.html"]);
    refused(dir, &format!("{alt} site/posts/two.txt --dry-run"), &["two.txt: expected HTML or Markdown"]);
    refused(dir, &format!("{alt} site/images --dry-run"), &["site/images: expected a folder with HTML"]);
    let output = xvlm(dir, &format!("{alt} site --dry-run --min-confidence 2"));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("expected a number from 0 to 1, found 2"), "{}", stderr(&output));
    refused(dir, &format!("{alt} site/index.html described/index.html --out x"), &["--out", "index.html twice"]);
    assert_eq!(xvlm(dir, &format!("{alt} site")).status.code(), Some(2));
}

#[cfg(unix)]
#[test]
fn a_file_keeps_its_rights_and_a_link_stays_one() {
    use std::os::unix::fs::PermissionsExt;
    let dir = folder();
    let dir = dir.path();
    site(dir);
    let file = dir.join("site/posts/one.md");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("posts/one.md", dir.join("site/link.md")).unwrap();
    fs::write(&file, "![](images/000000.png)").unwrap();
    text(dir, "alt documents --model model --max-tokens 4 site/link.md --in-place");
    assert!(fs::symlink_metadata(dir.join("site/link.md")).unwrap().is_symlink());
    assert_ne!(fs::read_to_string(&file).unwrap(), "![](images/000000.png)");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
}

#[test]
fn pictures_of_a_folder_are_listed() {
    let dir = folder();
    let dir = dir.path();
    site(dir);
    fs::copy(dir.join("site/images/000000.png"), dir.join("site/images/again, twice.png")).unwrap();
    let alt = "alt pictures --model model --max-tokens 6";
    let list = json(dir, &format!("{alt} site"));
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 3);
    assert_eq!((&list[0]["picture"], &list[0]["outcome"]), (&json!("site/images/000000.png"), &json!("described")));
    assert_eq!(list[2]["text"], list[0]["text"]);
    let said = list[0]["text"].as_str().unwrap();

    let csv = text(dir, &format!("{alt} site/images --format csv"));
    assert!(csv.starts_with("picture,description,confidence,outcome,problem\r\n"), "{csv}");
    assert!(csv.contains("\"site/images/again, twice.png\","), "{csv}");
    // One is listed once, in the order given; with --json there is always one document.
    let [a, b] = ["site/images/000001.png", "site/images/000000.png"];
    let few = json(dir, &format!("{alt} {a} {b} {a} --out list.json"));
    let few: Vec<&Value> = few.as_array().unwrap().iter().map(|entry| &entry["picture"]).collect();
    assert_eq!(few, [a, b]);
    assert!(dir.join("list.json").is_file());
    text(dir, &format!("{alt} site/images --format markdown --out list.md"));
    let markdown = fs::read_to_string(dir.join("list.md")).unwrap();
    assert!(markdown.contains("](site/images/again%2C%20twice.png) | "), "{markdown}");

    text(dir, &format!("{alt} site/images --sidecar"));
    let beside = dir.join("site/images/000000.png.txt");
    assert_eq!(fs::read_to_string(&beside).unwrap(), format!("{said}\n"));
    fs::write(&beside, "My own words.").unwrap();
    let output = xvlm(dir, &format!("{alt} site/images --sidecar"));
    assert!(stderr(&output).contains("3 pictures have a file beside them already"), "{}", stderr(&output));
    assert_eq!(fs::read_to_string(&beside).unwrap(), "My own words.");
    text(dir, &format!("{alt} site/images --sidecar --replace"));
    assert_eq!(fs::read_to_string(&beside).unwrap(), format!("{said}\n"));

    fs::write(dir.join("site/images/broken.jpg"), "no picture").unwrap();
    let output = xvlm(dir, &format!("{alt} site/images"));
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stdout.clone()).unwrap().contains("broken.jpg: broken: "), "{output:?}");
    refused(dir, &format!("{alt} model"), &["model: expected a folder with pictures"]);
    assert!(Picture::open(&dir.join("site/images/000000.png")).is_ok());
}
