//! The built-in model on pictures, texts and blanks of the built-in world: retrieval, search, matching, filling and grading.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;
use xvlm::data::annotations::{RetrievalItem, read_fill, read_retrieval};
use xvlm::data::scenes::{self, Scene, Split, SynthOptions};
use xvlm::tasks::Sweep;
use xvlm::tasks::embed::{Format, Kind, Numbers, Options, Pictures, embed};
use xvlm::tasks::fill::{self, ACCEPT};
use xvlm::tasks::retrieval::{self, Evaluation};
use xvlm::{
    Bundled, Completing, Compute, Device, Exercise, Index, Picture, PixelBox, Precision, Predictor, Query,
    SearchOptions,
};

fn bundled() -> Predictor {
    Predictor::bundled(&Device::Cpu).unwrap()
}

/// A folder with scenes that the model has not been trained on.
fn folder(scenes: usize) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let options = SynthOptions { scenes, seed: 2022, split: Split::Seen, embed_images: false };
    scenes::write(&dir.path().join("data"), &options, &mut |_| ()).unwrap();
    dir
}

fn scene() -> (Scene, Picture) {
    let scene = Scene::generate(2022, 1, Split::Seen);
    let side = scenes::SIDE as u32;
    let picture = Picture::from_rgb(side, side, scene.render()).unwrap();
    (scene, picture)
}

fn evaluate(predictor: &Predictor, items: &[RetrievalItem], options: retrieval::Options, bad: f64) -> Evaluation {
    let mut counter = |_, _| ();
    let mut sweep = Sweep { max_bad_fraction: bad, ..Sweep::new(&mut counter) };
    retrieval::evaluate(predictor.model(), items, options, &mut sweep).unwrap()
}

#[test]
fn retrieval_finds_and_leaves_out_what_is_broken() {
    let (predictor, dir) = (bundled(), folder(8));
    let mut items = read_retrieval(dir.path().join("data/retrieval.json")).unwrap();
    let options = retrieval::Options::new(12);
    let whole = evaluate(&predictor, &items, options, 0.0);
    assert_eq!((whole.images.len(), whole.texts.len(), whole.left_out.len()), (8, 40, 0));
    assert_eq!((whole.scores.text_r1, whole.scores.image_r1), (100.0, 100.0));
    assert!(whole.image_to_text.iter().all(|found| found.len() == 12));
    assert!(whole.text_to_image.iter().all(|found| found.len() == 8 && found.is_sorted_by(|a, b| a.1 >= b.1)));

    // Without room for encoded texts they are encoded again, and in other batches: what is found stays.
    let narrow = retrieval::Options { memory_mib: 0, batch_size: 3, batch_size_text: 7, ..options };
    let again = evaluate(&predictor, &items, narrow, 0.0);
    assert_eq!(again.results(), whole.results());
    let close = |a: &[(u32, f32)], b: &[(u32, f32)]| a.iter().zip(b).all(|(a, b)| (a.1 - b.1).abs() < 1e-3);
    assert!(whole.image_to_text.iter().zip(&again.image_to_text).all(|(a, b)| close(a, b)));

    // Image 2 is missing, image 4 comes with a second file, a text of image 5 is none, image 6 has none at all.
    let missing = items[2].image.with_file_name("missing.png");
    items[2].image = missing;
    let mut second = items[4].clone();
    second.image = items[0].image.clone();
    items.push(second);
    items[5].captions[0] = " .,; ".to_owned();
    items[6].captions = vec!["...".to_owned()];
    let part = evaluate(&predictor, &items, options, 0.6);
    assert_eq!((part.images.len(), part.texts.len()), (6, 29));
    assert_eq!((part.scores.text_r1, part.scores.image_r1), (100.0, 100.0));
    let named: Vec<(usize, &str)> = part.left_out.iter().map(|out| (out.item, out.problem.as_str())).collect();
    let [missing, wordless, none, without, second] = named.as_slice() else { panic!("{named:?}") };
    assert!(missing.0 == 2 && missing.1.contains("missing.png"), "{missing:?}");
    assert!(wordless.0 == 5 && wordless.1.contains("at least one word"), "{wordless:?}");
    assert!(none.0 == 6 && none.1.contains("at least one word"), "{none:?}");
    assert!(without.0 == 6 && without.1.contains("expected at least one text"), "{without:?}");
    assert!(second.0 == 8 && second.1.contains("expected one file"), "{second:?}");
    // Texts keep the numbers that they have among all captions of the file.
    assert_eq!(part.texts[10].number, 15);
    let results = part.results();
    assert!(results["text_to_image"].get("10").is_none() && results["text_to_image"].get("15").is_some());

    let mut counter = |_, _| ();
    let error = retrieval::evaluate(predictor.model(), &items, options, &mut Sweep::new(&mut counter)).err().unwrap();
    assert!(error.to_string().contains("are broken"), "{error}");
}

#[test]
fn embeddings_are_filed_and_searched() {
    let (predictor, dir) = (bundled(), folder(6));
    let data = dir.path().join("data");
    std::fs::write(data.join("images/broken.png"), "no picture").unwrap();
    let model = predictor.model();
    let pictures = Pictures::folder(&data.join("images")).unwrap();
    let shards = Pictures::shards(&[data.join("pretrain.jsonl").display().to_string()], None).unwrap();
    let embedded = |pictures: &Pictures, out: &Path, options: &Options, resume: bool| {
        let mut counter = |_, _| ();
        let mut sweep = Sweep { resume, ..Sweep::new(&mut counter) };
        embed(model, pictures, options, out, &mut sweep)
    };
    let plain = dir.path().join("plain");
    let summary = embedded(&pictures, &plain, &Options::default(), false).unwrap();
    assert_eq!((summary.images, summary.regions, summary.left_out.len()), (6, 0, 1));
    assert!(summary.left_out[0].starts_with("broken.png: "), "{:?}", summary.left_out);
    let error = embedded(&pictures, &plain, &Options::default(), false).unwrap_err().to_string();
    assert!(error.contains("embeddings.jsonl"), "{error}");
    // Nothing is left to do, and the folder says the same.
    assert_eq!(embedded(&pictures, &plain, &Options::default(), true).unwrap(), summary);

    let filed = dir.path().join("filed");
    let options = Options { format: Format::Safetensors, numbers: Numbers::F16, ..Options::default() };
    let summary = embedded(&shards, &filed, &options, false).unwrap();
    assert!(summary.regions > 6 && summary.texts > 30 && summary.left_out.is_empty(), "{summary:?}");

    let items = read_retrieval(data.join("retrieval.json")).unwrap();
    let queries: Vec<Query> = items.iter().map(|item| Query::Text(item.captions[0].clone())).collect();
    // Boxes refer to pixels as they are stored; a folder's pictures are turned upright. Ranking again has to know.
    let upright = |dir: &Path| {
        let about = std::fs::read(dir.join("index.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&about).unwrap()["upright"].as_bool()
    };
    assert_eq!([&plain, &filed].map(|dir| upright(dir)), [Some(true), Some(false)]);
    for index in [&plain, &filed].map(|dir| Index::open(dir).unwrap()) {
        for rerank in [0, 3] {
            let options = SearchOptions { top: 2, rerank, ..SearchOptions::default() };
            let found = predictor.search(&index, &queries, options).unwrap();
            for (found, item) in found.iter().zip(&items) {
                let name = item.image.file_name().unwrap().to_str().unwrap();
                assert!(found.hits[0].row.image.ends_with(name), "{found:?}");
                assert_eq!((found.hits.len(), found.hits[0].probability.is_some()), (2, rerank > 0));
            }
        }
        assert_eq!(index.count(Kind::Image), 6);
    }
    let index = Index::open(&filed).unwrap();
    let options = SearchOptions { kind: Kind::Region, top: 1, rerank: 0 };
    let like = Picture::open(&items[3].image).unwrap();
    let found = predictor.search(&index, &[Query::Text("a circle".to_owned()), Query::Like(like)], options).unwrap();
    assert!(found[0].hits[0].row.bounds.is_some() && found[0].hits[0].row.text.is_some(), "{found:?}");

    // A picture that has gone is named, and comes last.
    std::fs::remove_file(&items[0].image).unwrap();
    let index = Index::open(&plain).unwrap();
    let options = SearchOptions { top: 6, rerank: 6, ..SearchOptions::default() };
    let found = predictor.search(&index, &queries[..1], options).unwrap().remove(0);
    assert_eq!(found.problems.len(), 1);
    assert!(found.hits[5].probability.is_none() && items[0].image.ends_with(&found.hits[5].row.id), "{found:?}");

    // Bytes change an embedding more than half precision does; an index that does not say what made it is of f32.
    let about = plain.join("index.json");
    let mut content: serde_json::Value = serde_json::from_slice(&std::fs::read(&about).unwrap()).unwrap();
    assert_eq!(content.as_object_mut().unwrap().remove("precision"), Some("f32".into()));
    std::fs::write(&about, content.to_string()).unwrap();
    let compute = Compute::on(&Device::Cpu).with(Precision::Int8);
    let bytes = Predictor::bundled_for(Bundled::General, compute).unwrap();
    bytes.search(&Index::open(&plain).unwrap(), &queries[1..], SearchOptions::default()).unwrap();

    // Embeddings of another model are of no use.
    content["probe"].as_array_mut().unwrap().reverse();
    std::fs::write(&about, content.to_string()).unwrap();
    let error = predictor.search(&Index::open(&plain).unwrap(), &queries, options).unwrap_err().to_string();
    assert!(error.contains("that searches (in f32), found those of another (in f32)"), "{error}");
}

#[test]
fn embedding_goes_on_where_it_was_stopped() {
    let (predictor, dir) = (bundled(), folder(2));
    let shards: Vec<String> = (0..3)
        .map(|i| {
            let path = dir.path().join(format!("data/{i}.jsonl"));
            std::fs::copy(dir.path().join("data/pretrain.jsonl"), &path).unwrap();
            path.display().to_string()
        })
        .collect();
    let pictures = Pictures::shards(&shards, None).unwrap();
    let out = dir.path().join("out");
    let stop = Arc::new(AtomicBool::new(false));
    let options = Options { regions: false, texts: false, ..Options::default() };
    let mut counter = |_, _| stop.store(true, Ordering::Relaxed);
    let mut sweep = Sweep { stop: Arc::clone(&stop), ..Sweep::new(&mut counter) };
    let error = embed(predictor.model(), &pictures, &options, &out, &mut sweep).unwrap_err().to_string();
    assert!(error.contains("1 of 3"), "{error}");
    assert!(Index::open(&out).err().unwrap().to_string().contains("index.json"));
    let written = std::fs::metadata(out.join("parts/000000-0000.parquet")).unwrap().modified().unwrap();
    let mut counter = |_, _| ();
    let mut sweep = Sweep { resume: true, ..Sweep::new(&mut counter) };
    let summary = embed(predictor.model(), &pictures, &options, &out, &mut sweep).unwrap();
    assert_eq!((summary.images, summary.files.len()), (6, 3));
    assert_eq!(std::fs::metadata(out.join("parts/000000-0000.parquet")).unwrap().modified().unwrap(), written);
    assert_eq!(Index::open(&out).unwrap().count(Kind::Image), 6);
}

#[test]
fn regions_are_matched() {
    let (predictor, (scene, picture)) = (bundled(), scene());
    let regions: Vec<PixelBox> = scene
        .objects
        .iter()
        .map(|object| {
            let [x, y, w, h] = object.bbox;
            PixelBox { xmin: x, ymin: y, xmax: x + w, ymax: y + h }
        })
        .collect();
    let names: Vec<String> =
        scene.objects.iter().map(|o| format!("a {} {}", o.colour.word(), o.shape.word())).collect();
    let texts: Vec<&str> = names.iter().map(String::as_str).collect();
    let matches = predictor.match_regions(&picture, &regions, &texts).unwrap();
    let likeliest = |row: &Vec<xvlm::Match>| {
        (0..row.len()).max_by(|&a, &b| row[a].probability.total_cmp(&row[b].probability)).unwrap()
    };
    let right = matches.iter().enumerate().filter(|(i, row)| names[likeliest(row)] == names[*i]).count();
    assert!(right + 1 >= regions.len(), "{matches:?}");

    // All of the picture is the picture.
    let side = scenes::SIDE as f32;
    let whole = PixelBox { xmin: 0.0, ymin: 0.0, xmax: side, ymax: side };
    let region = predictor.match_regions(&picture, &[whole], &texts).unwrap().remove(0);
    let image = predictor.match_images(std::slice::from_ref(&picture), &texts).unwrap().remove(0);
    for (a, b) in region.iter().zip(&image) {
        assert!(
            (a.probability - b.probability).abs() < 1e-4 && (a.similarity - b.similarity).abs() < 1e-4,
            "{a:?} {b:?}"
        );
    }
    let embedded = predictor.embed_regions(&picture, &[whole]).unwrap().remove(0);
    let expected = predictor.embed_images(std::slice::from_ref(&picture)).unwrap().remove(0);
    assert!(embedded.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4));

    let outside = PixelBox { xmin: 100.0, ymin: 0.0, xmax: side + 5.0, ymax: 10.0 };
    let error = predictor.match_regions(&picture, &[outside], &texts).unwrap_err().to_string();
    assert!(error.contains("box 0") && error.contains("192x192"), "{error}");
    assert!(predictor.match_images(&[picture], &["..."]).is_err());
}

#[test]
fn several_blanks_are_filled_together() {
    let (predictor, (_, picture)) = (bundled(), scene());
    let view = predictor.look(&picture).unwrap();
    let single = view.fill_with("a ___ cross", Completing { top: 500, ..Completing::default() }).unwrap();
    // Probabilities are those of all completions.
    let sum: f32 = single.iter().map(|found| found.probability).sum();
    assert!(sum > 0.5 && sum <= 1.0 + 1e-4, "{sum}");
    let both = view.fill("a ___ ___ and a ___", 4).unwrap();
    assert!(both.len() == 4 && both.iter().all(|found| found.words.len() == 3), "{both:?}");
    assert!(both.is_sorted_by(|a, b| a.probability >= b.probability));
    // The first of the blanks, with the others filled, is the completion of one blank.
    let [first, second, third] = both[0].words.as_slice() else { panic!("{both:?}") };
    let one = view.fill(&format!("a {first} {second} and a ___"), 5).unwrap();
    assert!(one.iter().any(|found| found.words == [third.clone()]), "{one:?} {both:?}");

    let long = view.fill_with("there is a ___", Completing { words: 2, pieces: 2, ..Completing::default() }).unwrap();
    assert!(long.iter().any(|found| found.text().contains(' ')), "{long:?}");
    let apart = format!("___ {} ___", "word ".repeat(60));
    assert!(view.fill(&apart, 1).unwrap_err().to_string().contains("further apart"));
}

#[test]
fn answers_are_graded() {
    let (predictor, dir) = (bundled(), folder(6));
    let items = read_fill(dir.path().join("data/fill.json")).unwrap();
    let colours = items.iter().filter(|item| item.kind == "colour");
    let (mut right, mut wrong, mut asked) = (0, 0, 0);
    for item in colours {
        let view = predictor.open(&item.image).unwrap();
        let grade = |answer: &str| {
            let exercise = Exercise { text: item.text.clone(), answers: vec![answer.to_owned()] };
            view.grade(&exercise, Completing::default(), ACCEPT).unwrap()
        };
        let (good, bad) = (grade(&item.answers[0]), grade("square"));
        asked += 1;
        right += usize::from(good.accepted && good.blanks[0].rank == 1 && good.better.is_empty());
        wrong += usize::from(!bad.accepted && bad.blanks[0].rank > 1 && !bad.better.is_empty());
        assert!(good.blanks[0].share >= bad.blanks[0].share);
        assert!((good.probability - good.blanks[0].probability).abs() < 1e-6);
        // What is proposed first has rank 1 when it is the answer.
        let best = grade(&bad.blanks[0].proposals[0].text);
        assert_eq!((best.blanks[0].rank, best.blanks[0].share), (1, 1.0));
        // A word of several pieces has a probability too.
        let pieces = grade("zebra");
        assert!(pieces.probability > 0.0 && pieces.probability < 1e-3 && !pieces.accepted, "{pieces:?}");
    }
    assert!(asked > 3 && right + 1 >= asked && wrong == asked, "{right} and {wrong} of {asked}");

    let (_, picture) = scene();
    let view = predictor.look(&picture).unwrap();
    let refused = |text: &str, answers: &[&str]| {
        let answers = answers.iter().map(|answer| (*answer).to_owned()).collect();
        let exercise = Exercise { text: text.to_owned(), answers };
        view.grade(&exercise, Completing::default(), ACCEPT).unwrap_err().to_string()
    };
    assert!(refused("a ___ and a ___", &["ring"]).contains("expected 2 answers"));
    assert!(refused("a ___", &[" .. "]).contains("at least one word"));
    assert!(refused("a ___", &["日"]).contains("the tokenizer can write"));
    assert!(refused("a ring", &[]).contains("at least one blank"));

    let found =
        fill::evaluate(predictor.model(), items, Completing::default(), &mut Sweep::new(&mut |_, _| ())).unwrap();
    assert!(found.scores.kinds["colour"].top1 > 75.0, "{:?}", found.scores);
}
