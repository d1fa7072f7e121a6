//! What is written.

use super::*;

// --- files --------------------------------------------------------------------------------------

fn options(embed_images: bool) -> SynthOptions {
    SynthOptions { scenes: 24, seed: 5, split: Split::Unseen, embed_images }
}

/// All files below a folder with what is in them.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            found.push((name, std::fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn files_are_what_the_readers_expect() {
    let folder = tempfile::tempdir().unwrap();
    for embed_images in [false, true] {
        let out = folder.path().join(format!("deep/scenes-{embed_images}"));
        let mut done = Vec::new();
        write(&out, &options(embed_images), &mut |count| done.push(count)).unwrap();
        assert_eq!(done.last(), Some(&24));

        let all = read_scenes(out.join("scenes.json")).unwrap();
        let expected: Vec<Scene> = (0..24).map(|i| Scene::generate(5, i, Split::Unseen)).collect();
        assert_eq!(all, expected);

        let records = read_jsonl(out.join("pretrain.jsonl")).unwrap();
        let retrieval = annotations::read_retrieval(out.join("retrieval.json")).unwrap();
        let captions = annotations::read_captions(out.join("captions.json")).unwrap();
        assert_eq!([records.len(), retrieval.len(), captions.len()], [24; 3]);
        for (i, scene) in all.iter().enumerate() {
            assert_eq!(records[i].captions[0], scene.canonical_caption());
            assert_eq!(captions[i].captions[0], scene.canonical_caption());
            assert_eq!([captions[i].captions.len(), retrieval[i].captions.len()], [5, 5]);
            assert_eq!(records[i].elems.len(), scene.objects.len());
            assert!(!records[i].questions.is_empty());
            for (element, object) in records[i].elems.iter().zip(&scene.objects) {
                assert_eq!(element.bbox, object.bbox);
                assert_eq!(element.attributes.len(), 3);
                assert!(element.texts.len() >= 3);
            }
            let picture = image::open(&retrieval[i].image).unwrap().into_rgb8();
            assert_eq!(picture.into_raw(), scene.render());
        }
        let vqa = annotations::read_vqa(out.join("vqa.json")).unwrap();
        assert!(vqa.len() > 24 * 8);
        let fill = annotations::read_fill(out.join("fill.json")).unwrap();
        assert!(fill.len() > 24 * 3);
        let grounding = annotations::read_grounding(out.join("grounding.json")).unwrap();
        assert!(grounding.len() > 24 * 2);
        let images = vqa.iter().map(|item| &item.image).chain(grounding.iter().map(|i| &i.image));
        assert!(images.chain(fill.iter().map(|item| &item.image)).all(|image| image.is_file()));
        let ids: BTreeSet<&String> = grounding.iter().map(|item| &item.ref_id).collect();
        assert_eq!(ids.len(), grounding.len());
        let json = |name: &str| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(out.join(name)).unwrap()).unwrap()
        };
        assert_eq!(json("answer_list.json").as_array().unwrap().len(), answers().len());
        for pair in json("nlvr.json").as_array().unwrap() {
            assert!(pair["label"] == "True" || pair["label"] == "False");
            assert!(out.join(pair["images"][1].as_str().unwrap()).is_file());
        }
    }
}

#[test]
fn writing_is_repeatable_and_all_or_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    std::fs::create_dir(&one).unwrap();
    write(&one, &options(true), &mut |_| ()).unwrap();
    write(&two, &options(true), &mut |_| ()).unwrap();
    assert_eq!(contents(&one), contents(&two));

    // Written already, or in the way: refused, and nothing is left behind.
    let error = write(&one, &options(true), &mut |_| ()).unwrap_err();
    assert!(matches!(error, DataError::Config { field: "out", .. }), "{error}");
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(write(&file, &options(true), &mut |_| ()).is_err());
    assert!(write(Path::new("/"), &options(true), &mut |_| ()).is_err());
    assert_eq!(contents(&one), contents(&two));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);

    let none = SynthOptions { scenes: 0, ..options(true) };
    let out = folder.path().join("none");
    write(&out, &none, &mut |_| ()).unwrap();
    assert!(read_scenes(out.join("scenes.json")).unwrap().is_empty());
    assert!(read_scenes(folder.path().join("nowhere")).is_err());
    assert!(read_scenes(&file).is_err());
}
