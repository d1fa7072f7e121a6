//! Files of fine-tuning and evaluation sets, in X-VLM's own form and as published.

mod common;

use std::path::{Path, PathBuf};

use common::{Folder, gzip};
use serde_json::{Value, json};
use xvlm_data::DataError;
use xvlm_data::annotations::{
    CaptionItem, Loaded, Reading, Reason, VqaSource, read_captions, read_grounding, read_nlvr, read_proposals,
    read_retrieval, read_vqa,
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn count<T>(loaded: &Loaded<T>, reason: Reason) -> u64 {
    loaded.report.count(reason)
}

#[test]
fn retrieval_lists_number_their_images_across_files() {
    let folder = Folder::new();
    let train = folder.json(
        "coco_train.json",
        &json!([
            {"image": "train2014/a.jpg", "caption": "one", "image_id": 57870},
            {"image": "train2014/b.jpg", "caption": "two", "image_id": "b"},
            {"image": "train2014/a.jpg", "caption": "three", "image_id": 57870},
        ]),
    );
    let more = folder.json(
        "more.json",
        &json!([
            {"image": "flickr/c.jpg", "caption": ["four", "five"]},
            {"image": "train2014/b.jpg", "text": "a phrase", "image_id": "b", "ref_id": 3},
            {"image": "x.jpg", "caption": []},
            {"image": "x.jpg"},
            {"caption": "y"},
            7,
        ]),
    );
    let reading = Reading { images: Some(PathBuf::from("/images")), ..Reading::default() };
    let loaded = reading.retrieval(&[&train, &more]).unwrap();
    let told: Vec<_> = loaded.items.iter().map(|item| (item.image_index, item.captions.join("|"))).collect();
    let expected = [(0, "one"), (1, "two"), (0, "three"), (2, "four|five"), (1, "a phrase")];
    assert_eq!(told, expected.map(|(index, text)| (index, text.to_owned())));
    assert_eq!(loaded.items[3].image, Path::new("/images/flickr/c.jpg"));
    assert_eq!(loaded.items[3].image_id, "flickr/c.jpg");
    assert_eq!(count(&loaded, Reason::Malformed), 4);
    assert_eq!(read_retrieval(&train).unwrap()[1].image, folder.path("train2014/b.jpg"));
    assert_eq!(read_retrieval(gzip(&train)).unwrap().len(), 3);
    let error = read_retrieval(&more).unwrap_err().to_string();
    let expected = format!("{} item 2: caption: expected a string or a list of strings, found nothing", more.display());
    assert_eq!(error, expected);
}

#[test]
fn retrieval_and_captions_from_karpathy_and_coco() {
    let folder = Folder::new();
    let karpathy = folder.json("dataset_flickr30k.json", &json!({"dataset": "flickr30k", "images": [
        {"sentids": [0], "imgid": 4, "filename": "1.jpg", "split": "train", "sentences": [{"raw": "One."}, {"raw": "Two."}]},
        {"sentids": [1], "imgid": 5, "filename": "2.jpg", "split": "test", "sentences": [{"raw": "Three."}]},
        {"sentids": [1], "imgid": 5, "filename": "2.jpg", "split": "test", "sentences": [{"raw": "Four."}]},
    ]}));
    let reading = Reading { splits: vec!["test".to_owned()], ..Reading::default() };
    let loaded = reading.retrieval(&[&karpathy]).unwrap();
    assert_eq!(loaded.items.len(), 1);
    assert_eq!(
        (loaded.items[0].image_id.as_str(), loaded.items[0].captions.as_slice()),
        ("5", &["Three.".to_owned()][..])
    );
    assert_eq!((count(&loaded, Reason::OtherSplit), count(&loaded, Reason::DuplicateId)), (1, 1));
    assert!(
        read_captions(&karpathy).unwrap_err().to_string().contains("item 2: id: expected an identifier of its own")
    );

    let coco = folder.json(
        "captions_val2014.json",
        &json!({
            "annotations": [
                {"id": 1, "image_id": 42, "caption": "A cup."},
                {"id": 2, "image_id": 42, "caption": "A table."},
                {"id": 3, "image_id": 7, "caption": "Whose?"},
            ],
            "images": [{"id": 42, "file_name": "a.jpg"}, {"id": 43, "file_name": "b.jpg"}],
        }),
    );
    let loaded = Reading::default().captions(&[&coco]).unwrap();
    assert_eq!(loaded.items[0].captions, ["A cup.", "A table."]);
    assert_eq!((loaded.items.len(), loaded.items[1].captions.len()), (2, 0));
    assert_eq!(count(&loaded, Reason::UnknownImage), 1);
    let loaded = Reading::default().retrieval(&[&coco]).unwrap();
    assert_eq!((loaded.items.len(), count(&loaded, Reason::NoText)), (1, 1));
}

#[test]
fn caption_lists_have_ids_in_their_file_names() {
    let folder = Folder::new();
    let val = folder.json(
        "coco_karpathy_val.json",
        &json!([
            {"image": "val2014/COCO_val2014_000000184613.jpg", "caption": ["A child", "A boy"]},
        ]),
    );
    let train = folder.json(
        "coco_karpathy_train.json",
        &json!([
            {"image": "train2014/COCO_train2014_000000000009.jpg", "caption": "one", "image_id": "coco_9"},
            {"image": "train2014/COCO_train2014_000000000025.jpg", "caption": "two", "image_id": "coco_25"},
            {"image": "train2014/COCO_train2014_000000000009.jpg", "caption": "three", "image_id": "coco_9"},
        ]),
    );
    assert_eq!(read_captions(&val).unwrap()[0].id, "184613");
    let items = read_captions(&train).unwrap();
    assert_eq!(items.iter().map(|item| item.image_index).collect::<Vec<_>>(), [0, 1, 0]);
    let merged = CaptionItem::by_image(items);
    assert_eq!(merged.len(), 2);
    assert_eq!(merged[0].captions, ["one", "three"]);
}

#[test]
fn vqa_lists_weigh_answers_by_data_set() {
    let folder = Folder::new();
    let list = folder.json(
        "vqa.json",
        &json!([
            {"question_id": 1, "image": "train2014/a.jpg", "question": "What?", "dataset": "vqa",
             "answer": ["cup", "mug", "cup", "cup", "glass", "cup", "cup", "mug", "cup", "cup"]},
            {"image": "image/1.jpg", "question": "Where?", "answer": "on the table", "dataset": "vg"},
            {"question_id": "g", "image": "b.jpg", "question": "Who?", "answer": ["man", "boy"], "dataset": "gqa"},
            {"question_id": 2, "image": "c.jpg", "question": "When?"},
            {"question_id": 1, "image": "c.jpg", "question": "Again?"},
            {"question_id": 3, "image": "c.jpg", "question": "Which?", "dataset": "okvqa"},
            {"image": "c.jpg", "question": "Whose?"},
            {"question_id": 4, "image": "c.jpg", "question": " "},
        ]),
    );
    let roots = |name: &str| Some(PathBuf::from("/").join(name));
    let reading =
        Reading { images: roots("coco"), vg_images: roots("vg"), gqa_images: roots("gqa"), ..Reading::default() };
    let loaded = reading.vqa(&[&list]).unwrap();
    assert_eq!(loaded.items.len(), 4);
    let weights = loaded.items[0].weighted_answers();
    assert_eq!(weights.iter().map(|(answer, _)| *answer).collect::<Vec<_>>(), ["cup", "mug", "glass"]);
    for ((_, weight), expected) in weights.iter().zip([0.7, 0.2, 0.1]) {
        assert!((weight - expected).abs() < 1e-6);
    }
    assert_eq!(loaded.items[1].weighted_answers(), [("on the table", 0.5)]);
    assert_eq!(loaded.items[2].weighted_answers(), [("man", 0.5), ("boy", 0.5)]);
    assert!(loaded.items[3].weighted_answers().is_empty());
    let places: Vec<_> = loaded.items.iter().map(|item| item.image.to_str().unwrap()).collect();
    assert_eq!(places, ["/coco/train2014/a.jpg", "/vg/image/1.jpg", "/gqa/b.jpg", "/coco/c.jpg"]);
    assert_eq!(loaded.items[1].source, VqaSource::VisualGenome);
    assert_eq!(loaded.items[1].question_id, "vqa#1");
    assert_eq!((count(&loaded, Reason::DuplicateId), count(&loaded, Reason::Malformed)), (1, 3));
    let text = loaded.report.to_string();
    assert!(text.contains("vqa.json item 5: dataset: expected vqa, vg or gqa, found \"okvqa\""), "{text}");
}

fn vqa_v2(folder: &Folder) -> (PathBuf, PathBuf) {
    let answer = |text: &str, id: u32| json!({"answer": text, "answer_confidence": "yes", "answer_id": id});
    let questions = json!({"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "train2014",
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 458752, "question": "What position?", "question_id": 458752001},
        {"image_id": 5, "question": "No annotation?", "question_id": 5000},
        {"image_id": 458752, "question": "Twice?", "question_id": 458752000},
        {"image_id": 458752, "question_id": 458752002},
    ]});
    let annotations = json!({"data_subtype": "train2014", "annotations": [
        {"question_type": "what", "multiple_choice_answer": "net", "image_id": 458752, "answer_type": "other",
         "question_id": 458752000, "answers": [answer("net", 1), answer("netting", 2), answer("net", 3), answer("mesh", 4)]},
        {"image_id": 7, "answer_type": "other", "question_id": 458752001, "answers": [answer("pitcher", 1)]},
        {"image_id": 8, "answer_type": "yes/no", "question_id": 8000, "answers": []},
    ]});
    (
        folder.json("v2_OpenEnded_mscoco_train2014_questions.json", &questions),
        folder.json("v2_mscoco_train2014_annotations.json", &annotations),
    )
}

#[test]
fn vqa_v2_questions_meet_their_annotations() {
    let folder = Folder::new();
    let (questions, annotations) = vqa_v2(&folder);
    let reading = Reading { images: Some(PathBuf::from("/coco")), ..Reading::default() };
    for files in [[&questions, &annotations], [&annotations, &questions]] {
        let loaded = reading.vqa(&files).unwrap();
        assert_eq!(loaded.items.len(), 1, "{}", loaded.report);
        let item = &loaded.items[0];
        assert_eq!(item.image, Path::new("/coco/train2014/COCO_train2014_000000458752.jpg"));
        assert_eq!(item.weighted_answers(), [("net", 0.5), ("netting", 0.25), ("mesh", 0.25)]);
        assert_eq!((item.question_id.as_str(), item.kind.as_str()), ("458752000", "other"));
        for (reason, times) in [
            (Reason::Malformed, 1),
            (Reason::OtherImage, 1),
            // One has none, and of one asked twice the annotation is taken.
            (Reason::QuestionWithoutAnnotation, 2),
            (Reason::AnnotationWithoutQuestion, 1),
        ] {
            assert_eq!(count(&loaded, reason), times, "{reason}\n{}", loaded.report);
        }
    }
    let alone = reading.vqa(&[&questions]).unwrap();
    assert_eq!((alone.items.len(), count(&alone, Reason::DuplicateId)), (3, 1));
    assert!(alone.items.iter().all(|item| item.answers.is_empty()));
    let test = folder.json(
        "test.json",
        &json!({"data_subtype": "test-dev2015", "questions": [
        {"image_id": 1, "question": "What?", "question_id": 1000}]}),
    );
    assert_eq!(
        reading.vqa(&[&test]).unwrap().items[0].image,
        Path::new("/coco/test2015/COCO_test2015_000000000001.jpg")
    );
    let no_subset =
        folder.json("none.json", &json!({"questions": [{"image_id": 1, "question": "What?", "question_id": 1}]}));
    let error = reading.vqa(&[&no_subset]).unwrap_err().to_string();
    assert!(error.contains("data_subtype: expected a subset such as train2014, found nothing"), "{error}");
    assert!(read_vqa(folder.json("empty.json", &json!({}))).is_err());
}

#[test]
fn nlvr_in_both_forms() {
    let folder = Folder::new();
    let list = folder.json(
        "nlvr_dev.json",
        &json!([
            {"images": ["dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"], "sentence": "Two dogs.", "label": "True"},
            {"images": ["a.png", "b.png"], "sentence": "No dogs.", "label": "False"},
            {"images": ["a.png"], "sentence": "No dogs.", "label": "False"},
            {"images": ["a.png", "b.png"], "sentence": "No dogs.", "label": "maybe"},
        ]),
    );
    let loaded = Reading::default().nlvr(&[&list]).unwrap();
    assert_eq!(loaded.items.iter().map(|item| item.label).collect::<Vec<_>>(), [true, false]);
    assert_eq!(loaded.items[0].images[1], folder.path("dev/dev-850-0-img1.png"));
    assert_eq!(count(&loaded, Reason::Malformed), 2);

    let lines = [
        json!({"sentence": "One dog.", "left_url": "http://a/b.jpg", "right_url": "http://c/d.jpg", "label": "True",
               "identifier": "train-10171-0-0", "directory": 32, "synset": "dog", "query": "dogs4"}),
        json!({"sentence": "One cat.", "left_url": "x", "right_url": "y", "label": "False", "identifier": "dev-850-0-3"}),
        json!({"sentence": "One cat.", "left_url": "x", "right_url": "y", "label": "False", "identifier": "dev-850-0-3"}),
        json!({"sentence": "One cat.", "label": "False", "identifier": "train-1-0-3"}),
        json!({"sentence": "One cat.", "label": "False", "identifier": "../../x"}),
    ]
    .map(|line| line.to_string())
    .join("\n");
    let path = folder.write("train.json", format!("{lines}\nno json\n"));
    let reading = Reading { images: Some(PathBuf::from("/nlvr2")), ..Reading::default() };
    let loaded = reading.nlvr(&[&path]).unwrap();
    let images: Vec<_> = loaded.items.iter().map(|item| item.images[1].to_str().unwrap()).collect();
    assert_eq!(images, ["/nlvr2/images/train/32/train-10171-0-img1.png", "/nlvr2/dev/dev-850-0-img1.png"]);
    assert_eq!((count(&loaded, Reason::DuplicateId), count(&loaded, Reason::Malformed)), (1, 3), "{}", loaded.report);
    assert!(loaded.report.to_string().contains("train.json:4: directory: expected"), "{}", loaded.report);
    assert!(read_nlvr(&path).is_err());
}

fn refcoco(folder: &Folder, pickle: &str) -> PathBuf {
    let path = folder.write("refcoco+/refs(unc).p", std::fs::read(golden(pickle)).unwrap());
    folder.json(
        "refcoco+/instances.json",
        &json!({
            "images": [
                {"id": 42, "file_name": "COCO_train2014_000000000042.jpg", "height": 80, "width": 100},
                {"id": 43, "file_name": "COCO_train2014_000000000043.jpg", "height": 80, "width": 100},
            ],
            "annotations": [
                {"id": 7, "image_id": 42, "bbox": [10.5, 20, 30, 40], "category_id": 47, "segmentation": [[1.0]]},
                {"id": 8, "image_id": 43, "bbox": [0, 0, 100, 80], "category_id": 1},
            ],
            "categories": [{"id": 1, "name": "person"}],
        }),
    );
    path
}

#[test]
fn refcoco_pickles_of_each_python() {
    for name in ["refs_python2_0.p", "refs_python2_2.p", "refs_python3.p"] {
        let folder = Folder::new();
        let path = refcoco(&folder, name);
        let reading = Reading { images: Some(PathBuf::from("/coco")), ..Reading::default() };
        let loaded = reading.grounding(&[&path]).unwrap();
        assert!(loaded.report.is_empty(), "{}", loaded.report);
        let told: Vec<_> =
            loaded.items.iter().map(|item| (item.ref_id.as_str(), item.text.as_str(), item.image_index)).collect();
        assert_eq!(told[..2], [("11", "the red cup", 0), ("11", "left cup", 0)]);
        assert_eq!((told[2].0, told[2].2), ("12", 1));
        assert!(told[2].1.starts_with("caf") && told[2].1.ends_with(" man"));
        let item = &loaded.items[0];
        assert_eq!(item.image, Path::new("/coco/train2014/COCO_train2014_000000000042.jpg"));
        assert_eq!((item.bbox, item.width, item.height), ([10.5, 20.0, 30.0, 40.0], 100, 80));
        assert_eq!((item.image_id.as_str(), item.split.as_deref()), ("42", Some("train")));
        let test = Reading { splits: vec!["testA".to_owned()], ..reading }.grounding(&[&path]).unwrap();
        assert_eq!((test.items.len(), count(&test, Reason::OtherSplit)), (1, 1));
    }
}

#[test]
fn lists_without_boxes_get_theirs_from_refcoco() {
    let folder = Folder::new();
    let path = refcoco(&folder, "refs_python2_2.p");
    let list = folder.json(
        "refcoco+_val.json",
        &json!([
            {"image": "train2014/COCO_train2014_000000000042.jpg", "text": "the cup", "ref_id": 11},
            {"image": "train2014/COCO_train2014_000000000042.jpg", "text": "what", "ref_id": 99},
            {"image": "train2014/COCO_train2014_000000000043.jpg", "text": "the cup", "ref_id": 11},
        ]),
    );
    let loaded = Reading::default().grounding(&[&list, &path]).unwrap();
    assert_eq!((loaded.items.len(), count(&loaded, Reason::Malformed)), (1, 2));
    assert_eq!((loaded.items[0].bbox, loaded.items[0].image_id.as_str()), ([10.5, 20.0, 30.0, 40.0], "42"));
    assert_eq!(loaded.items[0].split.as_deref(), Some("train"));
    let report = loaded.report.to_string();
    assert!(report.contains("item 1: bbox: expected a box"), "{report}");
    assert!(report.contains("item 2: image: expected the image of reference 11, "), "{report}");
    // Without boxes they train weak grounding, as retrieval does.
    let weak = Reading::default().retrieval(&[&list]).unwrap();
    assert_eq!(weak.items.iter().map(|item| item.image_index).collect::<Vec<_>>(), [0, 0, 1]);
}

#[test]
fn vlue_lists_bring_proposals() {
    let folder = Folder::new();
    let item = |bbox: Value, dets: Value| {
        json!({"ref_id": 5, "image": "a.jpg", "text": "a cup", "bbox": bbox, "height": 80,
                                                 "width": 100, "dets": dets})
    };
    let list = folder.json(
        "refcoco+_vlue_test.json",
        &json!([
            item(json!([1, 2, 3, 4]), json!([[1, 2, 3.5, 4], [5, 6, 7, 8, 0.9]])),
            item(json!([1, 2, 3, 4]), json!([[1, 2, 3]])),
            item(json!([90, 2, 30, 4]), json!([])),
            item(json!([1, 2, 0, 4]), json!([])),
            item(json!(["1", 2, 5, 4]), json!([])),
        ]),
    );
    let loaded = Reading::default().grounding(&[&list]).unwrap();
    assert_eq!((loaded.items.len(), count(&loaded, Reason::Malformed)), (1, 4));
    assert_eq!(loaded.items[0].proposals, [[1.0, 2.0, 3.5, 4.0], [5.0, 6.0, 7.0, 8.0]]);
    assert_eq!(loaded.items[0].image_id, "a.jpg");
    assert!(loaded.report.to_string().contains("item 2: bbox: expected a box [x, y, w, h] inside the 100x80 image"));
    assert!(matches!(read_grounding(&list), Err(DataError::Field { .. })));
    assert!(read_grounding(folder.json("o.json", &json!({"a": []}))).is_err());

    // Phrases of one object share a reference; one of two objects could not be scored.
    let item = |image: &str, x: u32| json!({"ref_id": 7, "image": image, "text": "a cup", "bbox": [x, 2, 3, 4], "height": 80, "width": 100});
    let list =
        folder.json("twice.json", &json!([item("a.jpg", 1), item("a.jpg", 1), item("a.jpg", 5), item("b.jpg", 1)]));
    let loaded = Reading::default().grounding(&[&list]).unwrap();
    assert_eq!((loaded.items.len(), count(&loaded, Reason::DuplicateId)), (2, 2), "{}", loaded.report);
    let expected = "item 2: ref_id: expected one object, as before: [1.0, 2.0, 3.0, 4.0] of a.jpg, found \"7\" again";
    assert!(loaded.report.to_string().contains(expected), "{}", loaded.report);

    let dets = folder.json("dets.json", &json!({"42": [[1, 2, 3, 4, 0.5]], "43": []}));
    let proposals = read_proposals(&dets).unwrap();
    assert_eq!((proposals["42"].as_slice(), proposals["43"].len()), (&[[1.0, 2.0, 3.0, 4.0]][..], 0));
    assert!(read_proposals(folder.json("d.json", &json!({"42": [[1, 2]]}))).is_err());
}

/// The forms of VLUE's release (`data/*_vlue_test.json`; the boxes are in X-VLM's own data): pictures of MaRVL, by language, of
/// which two have one file name.
#[test]
fn vlue_loads_as_published() {
    let folder = Folder::new();
    let (mugs, bowls) = ("id/images/5-Cangkir/5-1.jpg", "sw/extra/5-Bakuli/5-1.jpg");
    let pretty = |name: &str, value: Value| folder.write(name, serde_json::to_vec_pretty(&value).unwrap());
    let reading = Reading { images: Some(PathBuf::from("/marvl")), strict: true, ..Reading::default() };
    let at = |image: &str| Path::new("/marvl").join(image);

    let list = pretty(
        "itr_vlue_test.json",
        json!([
            {"image": mugs, "caption": ["Two mugs.", "A mug beside a mug.", "Mugs on a table.", "Mugs", "Cups."]},
            {"image": bowls, "caption": ["A bowl  of rice .", "Rice.", "A bowl.", "Food."]},
        ]),
    );
    let items = reading.retrieval(&[&list]).unwrap().items;
    let told: Vec<_> = items.iter().map(|item| (item.image_index, item.captions.len(), item.image.clone())).collect();
    assert_eq!(told, [(0, 5, at(mugs)), (1, 4, at(bowls))]);

    let list = pretty(
        "vqa_vlue_test.json",
        json!([
            {"question_id": 0, "question": "Is there only one mug here?", "image": mugs, "answer": "no"},
            {"question_id": 5, "question": "What is in the bowl？", "image": bowls, "answer": "white rice"},
        ]),
    );
    let items = reading.vqa(&[&list]).unwrap().items;
    assert_eq!((items[1].question_id.as_str(), items[1].image.as_path()), ("5", at(bowls).as_path()));
    assert_eq!(items[1].weighted_answers(), [("white rice", 1.0)]);

    let list = pretty(
        "nlvr2_vlue_test.json",
        json!([
            {"sentence": "Both pictures show mugs.", "images": [mugs, bowls], "label": "False"},
            {"sentence": "One picture shows a bowl", "images": [mugs, bowls], "label": "True"},
        ]),
    );
    let items = reading.nlvr(&[&list]).unwrap().items;
    assert_eq!(items.iter().map(|item| item.label).collect::<Vec<_>>(), [false, true]);
    assert_eq!(items[0].images, [at(mugs), at(bowls)]);

    let item = |ref_id: u32, image: &str, more: Value| {
        let mut item = json!({"ref_id": ref_id, "image": image, "text": "the left mug", "bbox": [10, 20.5, 30, 40],
                              "height": 80, "width": 100});
        item.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        item
    };
    let boxes = pretty(
        "refcoco+_vlue_test.json",
        json!([item(0, mugs, json!({})), item(1, mugs, json!({})), item(2, bowls, json!({}))]),
    );
    let items = reading.grounding(&[&boxes]).unwrap().items;
    assert_eq!(items.iter().map(|item| item.image_index).collect::<Vec<_>>(), [0, 0, 1]);
    assert_eq!((items[2].image.as_path(), items[2].bbox), (at(bowls).as_path(), [10.0, 20.5, 30.0, 40.0]));
    let dets = json!({"dets": [[0, 0, 99.5, 79.9], [10.2, 20, 30, 40]]});
    let weak = pretty("refcoco+_bbox100_vlue_test.json", json!([item(0, mugs, dets)]));
    let items = reading.grounding(&[&weak]).unwrap().items;
    assert_eq!(items[0].proposals, [[0.0, 0.0, 99.5, 79.9], [10.2, 20.0, 30.0, 40.0]]);
}

#[test]
fn missing_images_are_counted_if_asked() {
    let folder = Folder::new();
    folder.image("there.png", 4, 4);
    let list = folder.json(
        "r.json",
        &json!([
        {"image": "there.png", "caption": "a"}, {"image": "gone.png", "caption": "b"}]),
    );
    let reading = Reading { check_images: true, ..Reading::default() };
    let loaded = reading.retrieval(&[&list]).unwrap();
    assert_eq!((loaded.items.len(), count(&loaded, Reason::MissingImage)), (1, 1));
    let strict = Reading { strict: true, ..reading }.retrieval(&[&list]).unwrap_err().to_string();
    assert!(strict.contains("item 1: image: expected an image file, found"), "{strict}");
}

#[test]
fn damaged_pickles_are_errors() {
    let folder = Folder::new();
    let whole = std::fs::read(golden("refs_python2_2.p")).unwrap();
    let path = refcoco(&folder, "refs_python2_2.p");
    for end in 0..whole.len() - 1 {
        std::fs::write(&path, &whole[..end]).unwrap();
        assert!(Reading::default().grounding(&[&path]).is_err(), "{end}");
    }
    for place in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[place] ^= 0x55;
        std::fs::write(&path, &bytes).unwrap();
        // Whatever it reads as: no panic, no more items than there were.
        assert!(Reading::default().grounding(&[&path]).map_or(0, |loaded| loaded.items.len()) <= 3);
    }
    std::fs::write(&path, b"cos\nsystem\n(S'true'\ntR.").unwrap();
    assert!(Reading::default().grounding(&[&path]).is_err());
}

#[test]
fn no_item_leads_out_of_the_folder_of_images() {
    let folder = Folder::new();
    folder.image("set/a.png", 4, 4);
    folder.image("b.png", 4, 4);
    let absolute = |name: &str| folder.path(name).to_str().unwrap().to_owned();
    let paths = |field: &str, more: Value| -> Value {
        let item = |path: String| {
            let mut item = more.clone();
            item[field] = match field {
                "images" => json!([path, "a.png"]),
                _ => json!(path),
            };
            item
        };
        let inside = ["a.png".to_owned(), "x/../a.png".to_owned(), absolute("set/a.png")];
        let outside = ["../b.png".to_owned(), "/etc/passwd".to_owned(), absolute("b.png"), "x/../../b.png".to_owned()];
        inside.into_iter().chain(outside).map(item).collect()
    };
    let (inside, outside) = (3, 4);
    let reading = Reading { check_images: true, ..Reading::default() };
    let any = Reading { images: Some(PathBuf::from("/")), ..Reading::default() };
    let message = |field: &str| {
        let root = folder.path("set");
        format!("item 3: {field}: expected a path inside {} (a root of / permits any), found ../b.png", root.display())
    };
    // Counts and says what is outside; below `/` only what leads out of that by dots is.
    let check = |field: &str, [kept, left_out]: [usize; 2], any: usize, report: &str| {
        assert_eq!((kept, left_out), (inside, outside), "{report}");
        assert!(report.contains(&message(field)), "{report}");
        assert_eq!(any, inside + outside - 2);
    };
    macro_rules! list {
        ($read:ident, $field:literal, $name:literal, $more:tt) => {
            let path = folder.json("set/list.json", &paths($field, json!($more)));
            let loaded = reading.$read(&[&path]).unwrap();
            let counts = [loaded.items.len(), count(&loaded, Reason::Malformed) as usize];
            check($name, counts, any.$read(&[&path]).unwrap().items.len(), &loaded.report.to_string());
        };
    }
    list!(retrieval, "image", "image", {"caption": "a cup"});
    list!(captions, "image", "image", {"caption": "a cup"});
    list!(vqa, "image", "image", {"question": "What?", "dataset": "gqa"});
    list!(fill, "image", "image", {"text": "a [MASK]", "answers": "cup"});
    list!(nlvr, "images", "images[0]", {"sentence": "Two.", "label": "True"});
    list!(grounding, "image", "image", {"ref_id": 1, "text": "a cup", "bbox": [0, 0, 2, 2], "width": 4, "height": 4});
    let karpathy = |value: Value| folder.json("set/dataset.json", &json!({"images": [value]}));
    let sentences = json!([{"raw": "a cup"}]);
    for (item, field) in [
        (json!({"id": 1, "file_name": "../b.png", "sentences": sentences}), "file_name"),
        (json!({"cocoid": 1, "filename": "/etc/passwd", "sentences": sentences}), "filename"),
        (json!({"cocoid": 1, "filepath": "..", "filename": "b.png", "sentences": sentences}), "filepath"),
        (json!({"cocoid": 1, "filepath": "x", "filename": "../a.png", "sentences": sentences}), "filename"),
    ] {
        let error = Reading::strict().captions(&[karpathy(item)]).unwrap_err().to_string();
        assert!(error.contains(&format!("item 0: {field}: expected a path inside")), "{error}");
    }
    let questions = json!({"data_subtype": "../x", "questions": [{"image_id": 1, "question": "?", "question_id": 1}]});
    let error = Reading::strict().vqa(&[folder.json("set/q.json", &questions)]).unwrap_err().to_string();
    assert!(error.contains("data_subtype: expected a subset such as train2014, found ../x"), "{error}");

    let refs = refcoco(&folder, "refs_python3.p");
    let instances = std::fs::read_to_string(folder.path("refcoco+/instances.json")).unwrap();
    folder.write("refcoco+/instances.json", instances.replace("COCO_train2014_000000000042", "../../b"));
    let loaded = Reading::default().grounding(&[&refs]).unwrap();
    let text = loaded.report.to_string();
    assert!(text.contains("instances.json item 0: file_name: expected a path inside"), "{text}");
    assert!(loaded.items.iter().all(|item| item.image_id == "43"));
}

#[test]
fn references_are_named_by_their_place_in_the_file() {
    let folder = Folder::new();
    // As a pickle of protocol 0: the first item is none, the second has no annotation.
    let pickle = "(lp0\nI5\na(dp1\nS'ref_id'\nI11\nsS'ann_id'\nI99\nsS'image_id'\nI42\nsS'split'\nS'train'\nsS'sentences'\n(lsa.";
    let path = refcoco(&folder, "refs_python3.p");
    std::fs::write(&path, pickle).unwrap();
    let loaded = Reading::default().grounding(&[&path]).unwrap();
    let text = loaded.report.to_string();
    assert_eq!((loaded.items.len(), count(&loaded, Reason::Malformed)), (0, 2), "{text}");
    assert!(text.contains("item 1: ann_id: expected an annotation of instances.json, found \"99\""), "{text}");
}

#[test]
fn captions_of_coco_lie_in_the_folders_of_their_subsets() {
    let folder = Folder::new();
    let images = json!([
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"},
        {"id": 43, "file_name": "000000000043.jpg", "coco_url": "http://images.cocodataset.org/val2017/000000000043.jpg"},
        {"id": 44, "file_name": "COCO_train2014_000000000044.jpg"},
    ]);
    let captions: Vec<Value> = (42..45).map(|id| json!({"image_id": id, "caption": "a cup"})).collect();
    let path = folder.json("captions.json", &json!({"images": images, "annotations": captions}));
    for name in ["val2014", "val2017"] {
        std::fs::create_dir(folder.path(name)).unwrap();
    }
    let files: Vec<PathBuf> = read_captions(&path).unwrap().into_iter().map(|item| item.image).collect();
    let expected =
        ["val2014/COCO_val2014_000000000042.jpg", "val2017/000000000043.jpg", "COCO_train2014_000000000044.jpg"];
    assert_eq!(files, expected.map(|name| folder.path(name)));
    let retrieval = read_retrieval(&path).unwrap();
    assert_eq!(retrieval[0].image, folder.path(expected[0]));
}
