//! Published annotations of pre-training sets, each in a small file of its form.

mod common;

use std::path::PathBuf;

use common::sets::{coco, visual_genome};
use common::{Folder, gzip, zstd};
use serde_json::json;
use xvlm_data::annotations::{
    Annotated, Coco, Conceptual, Exclusions, Flickr30k, Karpathy, OpenImages, Reason, Records, Report, Sbu,
    SbuCaptions, VisualGenome,
};
use xvlm_data::{DataError, ImageSource, Place};

fn all(records: Result<Records, DataError>) -> (Vec<Annotated>, Report) {
    let mut records = records.unwrap();
    let found = records.by_ref().map(Result::unwrap).collect();
    (found, records.report().clone())
}

fn texts(annotated: &Annotated) -> Vec<(&str, [f32; 4])> {
    annotated.record.elems.iter().map(|element| (element.texts[0].as_str(), element.bbox)).collect()
}

fn file(annotated: &Annotated) -> PathBuf {
    match &annotated.record.image {
        ImageSource::Path(path) => path.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn coco_merges_captions_and_instances() {
    let folder = Folder::new();
    let (captions, instances) = coco(&folder);
    std::fs::create_dir_all(folder.path("coco/train2014")).unwrap();
    let set = Coco { annotations: vec![captions.clone(), instances], images: folder.path("coco"), crowds: false };
    let (found, report) = all(set.open());
    assert_eq!(found.iter().map(|image| image.id.as_str()).collect::<Vec<_>>(), ["42", "9"]);
    assert_eq!(file(&found[0]), folder.path("coco/train2014/COCO_train2014_000000000042.jpg"));
    assert_eq!(found[0].size, Some((100, 80)));
    assert_eq!(found[0].record.captions, ["A cup on a table.", "The table"]);
    let boxes = [("cup", [10.5, 20.25, 30.0, 40.0]), ("person", [90.0, 60.0, 10.0, 20.0])];
    assert_eq!(texts(&found[0]), boxes);
    assert_eq!(found[0].record.elems[0].labels, ["cup"]);
    assert_eq!(texts(&found[1]), [("person", [0.0, 0.0, 2.0, 2.0])]);
    for (reason, count) in [
        (Reason::DuplicateId, 1),
        (Reason::Malformed, 2 * 2 + 2),
        (Reason::UnknownImage, 1),
        (Reason::EmptyText, 1),
        (Reason::Crowd, 1),
        (Reason::UnknownCategory, 1),
        (Reason::DegenerateBox, 2),
        (Reason::DuplicateElement, 1),
        (Reason::NoText, 1),
    ] {
        assert_eq!(report.count(reason), count, "{reason}\n{report}");
    }
    let text = report.to_string();
    let name = captions.display();
    for part in [
        format!("{name} item 4: id: expected a number or a string, found nothing"),
        format!("{name} item 5: image_id: expected a number or a string, found nothing"),
        format!("{name} item 3: file_name: expected a path inside"),
        "item 6: bbox: expected a box".to_owned(),
        "image 9: category 999".to_owned(),
    ] {
        assert!(text.contains(&part), "{part}\n{text}");
    }
}

#[test]
fn coco_alone_and_compressed() {
    let folder = Folder::new();
    let (captions, instances) = coco(&folder);
    let read =
        |annotations: Vec<PathBuf>, crowds| all(Coco { annotations, images: folder.path("images"), crowds }.open()).0;
    let plain = read(vec![instances.clone()], true);
    assert_eq!(plain[0].record.elems.len(), 3);
    assert!(plain[0].record.captions.is_empty());
    assert_eq!(file(&plain[0]), folder.path("images/train2014/COCO_train2014_000000000042.jpg"));
    for packed in [gzip(&instances), zstd(&instances)] {
        let same = read(vec![packed], true);
        assert_eq!(same.len(), plain.len());
        assert_eq!(same[0].record.elems, plain[0].record.elems);
    }
    std::fs::create_dir_all(folder.path("images")).unwrap();
    assert_eq!(file(&read(vec![captions], false)[0]), folder.path("images/COCO_train2014_000000000042.jpg"));
}

#[test]
fn objects365_lies_in_patches() {
    let folder = Folder::new();
    let path = folder.json(
        "zhiyuan_objv2_train.json",
        &json!({
            "categories": [{"id": 1, "name": "Person"}, {"id": 60, "name": "Picture/Frame"}],
            "annotations": [{"id": 1, "iscrowd": 0, "isfake": 0, "image_id": 420917, "category_id": 60,
                             "bbox": [1.5, 2.5, 10.125, 20.0], "area": 1}],
            "images": [{"id": 420917, "file_name": "images/v1/patch8/objects365_v1_00420917.jpg", "width": 40, "height": 30}]
        }),
    );
    let set = Coco { annotations: vec![path.clone()], images: folder.path("train"), crowds: false };
    let published = "train/images/v1/patch8/objects365_v1_00420917.jpg";
    let (found, _) = all(set.open());
    assert_eq!(file(&found[0]), folder.path(published));
    assert_eq!(texts(&found[0]), [("Picture/Frame", [1.5, 2.5, 10.125, 20.0])]);
    std::fs::create_dir_all(folder.path("train/patch8")).unwrap();
    assert_eq!(file(&all(set.open()).0[0]), folder.path("train/patch8/objects365_v1_00420917.jpg"));
}

#[test]
fn files_that_are_no_coco_are_errors() {
    let folder = Folder::new();
    for (text, message) in [
        ("", "byte 0: expected JSON with a list or an object, found the end of the file"),
        ("{\"images\": [{\"id\": 1", "expected JSON with a whole value, found the end of the file"),
        ("{\"images\": [{\"id\": 1}", "expected JSON with"),
        ("{}", "expected COCO's form: lists `images` and `annotations`, found neither"),
        ("PK\u{3}\u{4}", "found 'P'"),
    ] {
        let path = folder.write("x.json", text);
        let set = Coco { annotations: vec![path], images: PathBuf::new(), crowds: false };
        let error = set.open().err().unwrap().to_string();
        assert!(error.contains(message) && error.contains("x.json"), "{error}");
    }
    let missing = Coco { annotations: vec![folder.path("missing.json")], ..Coco::default() };
    assert!(matches!(missing.open().err(), Some(DataError::Io { .. })));
}

#[test]
fn visual_genome_merges_its_files() {
    let folder = Folder::new();
    let set = visual_genome(&folder);
    std::fs::create_dir_all(folder.path("vg/VG_100K")).unwrap();
    std::fs::create_dir_all(folder.path("vg/VG_100K_2")).unwrap();
    let (found, report) = all(set.open());
    assert_eq!(found.len(), 2);
    assert_eq!(file(&found[0]), folder.path("vg/VG_100K_2/1.jpg"));
    assert_eq!(file(&found[1]), folder.path("vg/VG_100K/2.jpg"));
    let phrase = ("the clock is green in colour", [421.0, 57.0, 82.0, 139.0]);
    assert_eq!(texts(&found[0]), [phrase, ("a shade", [0.0, 590.0, 47.0, 10.0])]);
    assert_eq!(found[0].record.questions, [("What color is the clock?".to_owned(), "Green.".to_owned())]);
    let elems = &found[1].record.elems;
    assert_eq!(elems[0].texts, ["traffic light", "light"]);
    assert_eq!(elems[0].attributes, ["red", "tall", "lit"]);
    assert_eq!(elems[0].labels, ["traffic light"]);
    assert_eq!((elems[1].texts[0].as_str(), elems[1].attributes.len(), elems.len()), ("pole", 0, 2));
    for (reason, count) in [
        (Reason::DuplicateId, 1),
        // No width; a region without height; an object without name; a question without answer; an item without image.
        (Reason::Malformed, 5),
        (Reason::UnknownImage, 1),
        (Reason::EmptyText, 1),
        (Reason::DuplicateElement, 1),
    ] {
        assert_eq!(report.count(reason), count, "{reason}\n{report}");
    }
    let text = report.to_string();
    for part in [
        "region_descriptions.json item 0: regions[4].h: expected a number of pixels, found nothing",
        "image_data.json item 3: width: expected a positive whole number of pixels, found nothing",
        "objects.json item 0: objects[2].names: expected a string or a list of strings, found nothing",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn visual_genome_attributes_list_the_objects_too() {
    let folder = Folder::new();
    let set = VisualGenome { regions: None, objects: None, questions: None, ..visual_genome(&folder) };
    let (found, _) = all(set.open());
    assert_eq!(found.len(), 1);
    let elems = &found[0].record.elems;
    let told: Vec<_> = elems.iter().map(|element| (element.texts[0].as_str(), element.attributes.len())).collect();
    assert_eq!(told, [("traffic light", 2), ("signal", 2), ("pole", 0)]);
}

#[test]
fn excluded_images_are_left_out() {
    let folder = Folder::new();
    let karpathy = json!({"dataset": "coco", "images": [
        {"cocoid": 42, "filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "split": "test", "imgid": 0,
         "sentids": [1], "sentences": [{"raw": "x", "imgid": 0, "sentid": 1, "tokens": ["x"]}]},
        {"cocoid": 9, "filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "split": "restval", "imgid": 1,
         "sentids": [], "sentences": []},
    ]});
    let karpathy = folder.json("dataset_coco.json", &karpathy);
    let flickr = json!({"dataset": "flickr30k", "images": [
        {"sentids": [0], "imgid": 0, "sentences": [], "split": "val", "filename": "77.jpg"},
    ]});
    let mut exclude = Exclusions::default();
    exclude.read(&karpathy).unwrap();
    assert_eq!(exclude.len(), 2, "{exclude:?}");
    let ids = |set: Result<Records, DataError>, exclude: &Exclusions| {
        let mut records = set.unwrap().without(exclude.clone());
        let ids: Vec<String> = records.by_ref().map(|image| image.unwrap().id).collect();
        (ids.join(" "), records.report().count(Reason::Excluded))
    };
    let (captions, _) = coco(&folder);
    let set = Coco { annotations: vec![captions], images: PathBuf::new(), crowds: false };
    assert_eq!(ids(set.open(), &exclude), ("9".to_owned(), 1));
    let genome = visual_genome(&folder);
    assert_eq!(ids(genome.open(), &exclude), ("1".to_owned(), 1));

    let mut by_flickr = Exclusions::default();
    by_flickr.read(&folder.json("dataset_flickr30k.json", &flickr)).unwrap();
    assert_eq!(ids(genome.open(), &by_flickr), ("1".to_owned(), 1));

    // A photograph's number is not that of an image of Visual Genome, whose files are named after those.
    let mut numbers = Exclusions::default();
    numbers
        .read(&folder.json("flickr.json", &json!([{"image": "flickr30k-images/1.jpg"}, {"image": "flickr/2.jpg"}])))
        .unwrap();
    assert_eq!(ids(genome.open(), &numbers), ("1 2".to_owned(), 0));

    for (content, left) in [
        ("# comment\n\n 2 # an id\n", "1"),
        ("1.jpg", "2"),
        ("coco:42\r\n1", ""),
        ("42", "1 2"),
        ("[{\"image\": \"val2014/COCO_val2014_000000000042.jpg\", \"text\": \"x\"}]", "1"),
    ] {
        let mut exclude = Exclusions::default();
        exclude.read(&folder.write("ids.txt", content)).unwrap();
        assert_eq!(ids(genome.open(), &exclude).0, left, "{content}");
    }
    // Karpathy's documents are one line of up to 140 MB.
    let long = format!("\u{feff} \n{{\"dataset\": \"{}\", \"images\": [", "x".repeat(1 << 24));
    let long = folder
        .write("long.json", long + "{\"cocoid\": 42, \"filename\": \"a.jpg\", \"split\": \"val\", \"sentids\": []}]}");
    let mut exclude = Exclusions::default();
    exclude.read(&long).unwrap();
    assert_eq!(ids(genome.open(), &exclude), ("1".to_owned(), 1));
    let mut packed = Exclusions::default();
    packed.read(&gzip(&karpathy)).unwrap();
    assert_eq!(ids(genome.open(), &packed), ("1".to_owned(), 1));

    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/refs_python2_2.p");
    let mut refer = Exclusions::default();
    refer.read(&golden).unwrap();
    let mut expected = Exclusions::default();
    expected.add("coco:43");
    assert_eq!(refer, expected);
    assert!(Exclusions::default().read(&folder.write("bad.json", "[{\"no\": 1}]")).is_err());
}

#[test]
fn karpathy_splits_are_chosen() {
    let folder = Folder::new();
    let sentences = json!([{"raw": "Two dogs.", "tokens": ["two", "dogs"]}, {"raw": "Dogs"}]);
    let path = folder.json("dataset_coco.json", &json!({"dataset": "coco", "images": [
        {"cocoid": 9, "filepath": "train2014", "filename": "a.jpg", "split": "train", "imgid": 0, "sentences": sentences},
        {"cocoid": 7, "filepath": "val2014", "filename": "b.jpg", "split": "test", "imgid": 1, "sentences": sentences},
        {"cocoid": 6, "filepath": "..", "filename": "b.jpg", "split": "train", "imgid": 1, "sentences": sentences},
        {"cocoid": 5, "filepath": "val2014", "filename": "c.jpg", "split": "train", "sentences": [{"tokens": []}]},
    ]}));
    let set = Karpathy { file: path, images: folder.path("coco"), splits: vec!["train".to_owned()] };
    let (found, report) = all(set.open());
    assert_eq!(found.len(), 1);
    assert_eq!(file(&found[0]), folder.path("coco/train2014/a.jpg"));
    assert_eq!(found[0].record.captions, ["Two dogs.", "Dogs"]);
    assert_eq!((report.count(Reason::OtherSplit), report.count(Reason::Malformed)), (1, 2));
    assert!(
        report.to_string().contains("item 3: sentences[0].raw: expected a non-empty string, found nothing"),
        "{report}"
    );
}

#[test]
fn conceptual_captions_in_both_orders() {
    let folder = Folder::new();
    let set = |text: &str, names: &str| Conceptual {
        rows: folder.write("rows.tsv", text),
        images: folder.path("cc"),
        names: names.parse().unwrap(),
    };
    let cc3m = "a very typical bus station\thttp://lh6.com/a.jpg?x=1\nsierra looked\thttps://b.org/b.png\r\n";
    let (found, report) = all(set(cc3m, "{row:04}.jpg").open());
    assert!(report.is_empty());
    let rows: Vec<_> = found.iter().map(|image| (image.record.captions[0].as_str(), file(image))).collect();
    assert_eq!(
        rows,
        [("a very typical bus station", folder.path("cc/0000.jpg")), ("sierra looked", folder.path("cc/0001.jpg"))]
    );
    let cc12m = "http://lh6.com/a.jpg?x=1\ta very typical bus station\n\nno columns\nhttp://x.y/z\t\u{2026}\nhttps://b.org/b.png\tsierra\n";
    let (found, report) = all(set(cc12m, "{row}_{name}").open());
    let files: Vec<_> = found.iter().map(file).collect();
    assert_eq!(files, [folder.path("cc/0_a.jpg"), folder.path("cc/3_b.png")]);
    assert_eq!(found[1].record.origin.to_string(), format!("{}:5", folder.path("rows.tsv").display()));
    assert_eq!(
        (report.count(Reason::Malformed), report.count(Reason::EmptyText), report.count(Reason::NoText)),
        (1, 1, 1)
    );
    assert!(report.to_string().contains("rows.tsv:3: row: expected a caption and a URL"), "{report}");

    let (found, _) = all(set("caption\turl\n\na bus\thttp://h/a\n", "{row}").open());
    assert_eq!((found[0].id.as_str(), &found[0].record.origin.place), ("0", &Place::Line(3)));
    let (found, report) = all(set("caption\turl\na bus\thttp://h/..\n", "{name}").open());
    assert_eq!((found.len(), report.count(Reason::Malformed)), (0, 1));
    let (found, report) = all(set("a\u{0}b \thttp://h/a\n", "{md5}").open());
    assert_eq!((found.len(), report.is_empty()), (1, true));
    let bad = folder.write(
        "bad.tsv",
        [b"a bus\thttp://h/a\n".as_slice(), b"\xff\xfe\thttp://h/b\n", b"a car\thttp://h/c\n"].concat(),
    );
    let (found, report) = all(Conceptual { rows: bad, ..set("", "{row}") }.open());
    assert_eq!((found.len(), file(&found[1]), report.count(Reason::Malformed)), (2, folder.path("cc/2"), 1));
}

#[test]
fn sbu_in_both_forms() {
    let folder = Folder::new();
    let urls = "http://static.flickr.com/2723/4385058960_b0f291553e.jpg\nhttp://static.flickr.com/1/2_3.jpg\n";
    let captions = "A wooden chair in the living room\nthe plane in the sky\n";
    let lines = SbuCaptions::Lines {
        urls: folder.write("SBU_captioned_photo_dataset_urls.txt", urls),
        captions: folder.write("SBU_captioned_photo_dataset_captions.txt", captions),
    };
    let json = folder.json(
        "sbu-captions-all.json",
        &json!({
            "captions": captions.lines().collect::<Vec<_>>(),
            "user_ids": ["a", "b"],
            "image_urls": urls.lines().collect::<Vec<_>>(),
        }),
    );
    let set = |captions| Sbu { captions, images: folder.path("sbu"), names: "{name}".parse().unwrap() };
    for (captions, place) in [(lines, Place::Line(2)), (SbuCaptions::Json(json), Place::Item(1))] {
        let (found, report) = all(set(captions).open());
        assert!(report.is_empty());
        assert_eq!(found.len(), 2);
        assert_eq!(file(&found[0]), folder.path("sbu/4385058960_b0f291553e.jpg"));
        assert_eq!(found[1].record.captions, ["the plane in the sky"]);
        assert_eq!(found[1].record.origin.place, place);
    }
    let short =
        SbuCaptions::Lines { urls: folder.write("u.txt", "http://a/b\n"), captions: folder.write("c.txt", captions) };
    let mut records = set(short).open().unwrap();
    assert!(records.next().unwrap().is_ok());
    let error = records.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("as many URLs as captions, found more captions"), "{error}");
    assert!(records.next().is_none());
    let uneven = folder.json("uneven.json", &json!({"captions": ["a"], "image_urls": []}));
    assert!(set(SbuCaptions::Json(uneven)).open().is_err());
}

#[test]
fn open_images_merges_its_files() {
    let folder = Folder::new();
    let classes =
        folder.write("class-descriptions-boxable.csv", "/m/011k07,Tortoise\n/m/01,\"Girl, young\"\n/m/02,Chair\n");
    let attributes = folder.write("attributes.csv", "id,name\n/m/083vt,(made of)Wood\n");
    let header =
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside";
    let boxes = format!(
        "{header}\n\
        000002b66c9c498e,xclick,/m/011k07,1,0.25,0.75,0.1,0.5,0,1,0,0,0\n\
        000002b66c9c498e,xclick,/m/02,1,0.5,1.01,0.5,1,0,1,0,0,0\n\
        000002b66c9c498e,xclick,/m/02,1,0.5,0.8,0.5,1,0,1,1,0,0\n\
        000002b97e5471a0,xclick,/m/01,1,0,1,0,1,0,1,0,1,0\n\
        000002b97e5471a0,xclick,/m/nothing,1,0,1,0,1,0,1,0,0,0\n\
        000002b97e5471a0,xclick,/m/02,1,zero,1,0,1,0,1,0,0,0\n\
        0000048549557964,xclick,/m/02,1,0,1,0,1,0,0,0,0,0\n\
        ffffffffffffffff,xclick,/m/02,1,0,1,0,1,0,0,0,0,0\n\
        000002b66c9c498e,xclick,/m/01,1,0,0.5,0,0.5,0,0,0,0,0\n\n\
        ,xclick,/m/01,1,0,0.5,0,0.5,0,0,0,0,0\n"
    );
    let relations = "ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2,RelationshipLabel\n\
        000002b66c9c498e,/m/01,/m/02,0,0.5,0,0.5,0.5,1,0.5,1,inside_of\n\
        000002b66c9c498e,/m/011k07,/m/083vt,0.25,0.75,0.1,0.5,0.25,0.75,0.1,0.5,is\n";
    let narratives = [
        json!({"dataset_id": "openimages", "image_id": "000002b97e5471a0", "annotator_id": 1,
               "caption": "In this image there is a girl.", "timed_caption": [{"utterance": "x"}], "traces": [[]]}),
        json!({"image_id": "000002b66c9c498e", "caption": "A tortoise."}),
        json!({"image_id": "000002b66c9c498e", "caption": "One more tortoise."}),
        json!({"caption": "whose?"}),
    ]
    .map(|line| line.to_string())
    .join("\n");
    let set = OpenImages {
        classes: vec![classes, attributes],
        boxes: Some(folder.write("train-annotations-bbox.csv", &boxes)),
        relationships: Some(folder.write("train-annotations-vrd.csv", relations)),
        narratives: vec![folder.write("open_images_train_captions.jsonl", narratives)],
        images: folder.path("oi"),
        ..OpenImages::default()
    };
    let (found, report) = all(set.open());
    // Whether their images are there is not looked at.
    assert_eq!(found.len(), 4, "{report}");
    assert_eq!(found[0].record.captions, ["A tortoise.", "One more tortoise."]);
    assert!(found.iter().all(|image| image.size.is_none() && image.fractions));
    assert_eq!(
        texts(&found[0]),
        [
            ("Tortoise", [0.25, 0.1, 0.5, 0.4]),
            ("Chair", [0.5, 0.5, 0.5, 0.5]),
            ("Girl, young", [0.0, 0.0, 0.5, 0.5]),
            ("Girl, young inside of Chair", [0.0, 0.0, 1.0, 1.0]),
        ]
    );
    assert_eq!(found[0].record.elems[0].attributes, ["Wood"]);
    assert_eq!(found[1].record.captions, ["In this image there is a girl."]);
    for (reason, count) in [
        (Reason::Crowd, 1),
        (Reason::Depiction, 1),
        (Reason::UnknownCategory, 1),
        // A box, a narrative, and a row without image.
        (Reason::Malformed, 3),
    ] {
        assert_eq!(report.count(reason), count, "{reason}\n{report}");
    }
    assert!(report.to_string().contains("bbox.csv:7: XMin: expected a fraction of the image, found zero"), "{report}");
    let kept = OpenImages { groups: true, depictions: true, ..set.clone() };
    assert_eq!(all(kept.open()).0.iter().map(|image| image.record.elems.len()).sum::<usize>(), 8);
    let places = found.iter().map(|image| image.record.origin.to_string()).collect::<Vec<_>>();
    assert!(
        places[0].ends_with("annotations-bbox.csv:2") && places[1].ends_with("annotations-bbox.csv:5"),
        "{places:?}"
    );
    assert!(report.to_string().contains("bbox.csv:12: ImageID: expected an image's identifier"), "{report}");
    // What no parser of JSON takes for a number does not end the reading.
    let narratives = "{\"image_id\": \"a\", \"caption\": 1e999}\n{\"image_id\": \"b\", \"caption\": \"A cup.\"}\n";
    let narratives = vec![folder.write("narratives.jsonl", narratives)];
    let (told, report) = all(OpenImages { narratives, images: folder.path("oi"), ..OpenImages::default() }.open());
    assert_eq!((told.len(), report.count(Reason::Malformed)), (1, 1), "{report}");
    assert!(told[0].record.origin.to_string().ends_with("narratives.jsonl:2"));
    let wrong = OpenImages { boxes: Some(folder.write("x.csv", "ImageID,LabelName\n")), ..set };
    let error = wrong.open().err().unwrap().to_string();
    assert!(error.contains("x.csv:1: header: expected a column XMin"), "{error}");
}

#[test]
fn flickr30k_phrases_mean_boxes() {
    let folder = Folder::new();
    let object = |names: &[&str], bounds: &str| {
        let names: String = names.iter().map(|name| format!("<name>{name}</name>")).collect();
        format!("<object>{names}{bounds}</object>")
    };
    let bounds = |[a, b, c, d]: [u32; 4]| {
        format!("<bndbox>\n<xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>")
    };
    let xml = format!(
        "<annotation><filename>36979.jpg</filename><size><width>500</width><height>334</height><depth>3</depth></size>{}{}{}</annotation>",
        object(&["1", "2"], &bounds([1, 10, 100, 200])),
        object(&["1"], &bounds([90, 5, 300, 100])),
        object(&["3"], "<nobndbox>1</nobndbox><scene>1</scene>"),
    );
    folder.write("entities/Annotations/36979.xml", xml);
    let sentences = "[/EN#1/people Two men] meet [/EN#3/scene the street] .\n[/EN#2/people A man] and [/EN#1/people the group] [/EN#0/notvisual it]\n[broken\n";
    folder.write("entities/Sentences/36979.txt", sentences);
    let token = "36979.jpg#0\tTwo men meet .\n36979.jpg#1\tA man and the group .\n65567.jpg#0\tA dog .\n\nbroken\n";
    let csv = "image_name| comment_number| comment\n36979.jpg| 0| Two men meet .\n36979.jpg| 1| A man and the group .\n65567.jpg| 0| A dog .\n1.jpg| 4 broken\n";
    for (name, text) in [("results_20130124.token", token), ("results.csv", csv)] {
        let set = Flickr30k {
            captions: folder.write(name, text),
            images: folder.path("flickr30k-images"),
            entities: Some(folder.path("entities")),
        };
        // The second image has no entities: that is an error of the folder, so that it is named.
        let mut records = set.open().unwrap();
        let first = records.next().unwrap().unwrap();
        assert_eq!(first.id, "36979");
        assert_eq!(file(&first), folder.path("flickr30k-images/36979.jpg"));
        assert_eq!(first.record.captions, ["Two men meet .", "A man and the group ."]);
        assert_eq!(texts(&first), [("Two men", [0.0, 4.0, 300.0, 196.0]), ("A man", [0.0, 9.0, 100.0, 191.0])]);
        assert_eq!(first.record.elems[0].texts, ["Two men", "the group"]);
        let second = records.next().unwrap().unwrap();
        assert_eq!((second.record.captions.len(), second.record.elems.len()), (1, 0));
        assert!(records.next().is_none());
        // A broken line, a broken phrase, and missing entities.
        assert_eq!(records.report().count(Reason::Malformed), 3, "{}", records.report());
    }
}

/// Reads a set to its end or its first error, with each of its files damaged in turn: a byte changed, or the file cut.
fn survives(files: &[PathBuf], open: impl Fn() -> Result<Records, DataError>, most: usize) {
    let read = || match open() {
        Ok(records) => {
            let found = records.take(most + 1).filter(Result::is_ok).count();
            assert!(found <= most, "{found} images of {most}");
        }
        // Whatever it says names the file.
        Err(error) => assert!(files.iter().any(|file| error.to_string().contains(file.to_str().unwrap())), "{error}"),
    };
    for file in files {
        let whole = std::fs::read(file).unwrap();
        for place in (0..whole.len()).step_by(17) {
            for byte in [whole[place] ^ 0x55, b'"', b']', 0xff] {
                let mut damaged = whole.clone();
                damaged[place] = byte;
                std::fs::write(file, &damaged).unwrap();
                read();
            }
            std::fs::write(file, &whole[..place]).unwrap();
            read();
        }
        std::fs::write(file, &whole).unwrap();
    }
}

#[test]
fn damaged_files_end_in_errors_or_in_what_is_left() {
    let folder = Folder::new();
    let (captions, instances) = coco(&folder);
    let set = Coco { annotations: vec![captions, instances], images: folder.path("coco"), crowds: false };
    survives(&set.annotations, || set.open(), 6);

    let set = visual_genome(&folder);
    let parts = [&set.regions, &set.objects, &set.attributes, &set.questions];
    let files: Vec<PathBuf> = parts.into_iter().flatten().chain([&set.image_data]).cloned().collect();
    survives(&files, || set.open(), 4);

    let rows = folder.write("rows.tsv", "a bus\thttp://h/a.jpg\nhttps://h/b.jpg\ta car\n\u{e9}t\u{e9}\thttp://h/c\n");
    let set = Conceptual { rows: rows.clone(), images: folder.path("cc"), names: "{row}_{name}".parse().unwrap() };
    survives(&[rows], || set.open(), 8);

    let classes = folder.write("classes.csv", "/m/1,Cup\n/m/2,\"Dog, old\"\n");
    let header =
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside";
    let boxes = folder
        .write("bbox.csv", format!("{header}\na,x,/m/1,1,0.1,0.5,0.2,0.9,0,0,0,0,0\na,x,/m/2,1,0,1,0,1,0,0,0,0,0\n"));
    let set = OpenImages {
        classes: vec![classes.clone()],
        boxes: Some(boxes.clone()),
        images: folder.path("oi"),
        ..OpenImages::default()
    };
    survives(&[classes, boxes], || set.open(), 4);

    let xml = "<annotation><size><width>50</width><height>30</height></size><object><name>1</name><bndbox><xmin>1</xmin>\
               <ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>";
    let xml = folder.write("entities/Annotations/1.xml", xml);
    let sentences = folder.write("entities/Sentences/1.txt", "[/EN#1/people Two men] meet .\n");
    let token = folder.write("results.token", "1.jpg#0\tTwo men meet .\n");
    let entities = Some(folder.path("entities"));
    let set = Flickr30k { captions: token.clone(), images: folder.path("flickr"), entities };
    survives(&[xml, sentences, token], || set.open(), 4);
}
