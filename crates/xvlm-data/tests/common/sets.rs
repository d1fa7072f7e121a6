//! COCO and Visual Genome in a few items, some of them broken.

use std::path::PathBuf;

use serde_json::json;
use xvlm_data::annotations::VisualGenome;

use super::Folder;

pub(crate) fn coco(folder: &Folder) -> (PathBuf, PathBuf) {
    let images = json!([
        {"id": 42, "file_name": "COCO_train2014_000000000042.jpg", "width": 100, "height": 80, "license": 3},
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 50, "height": 40},
        {"id": 42, "file_name": "COCO_train2014_000000000077.jpg", "width": 50, "height": 40},
        {"id": 5, "file_name": "../../etc/passwd", "width": 50, "height": 40},
        {"file_name": "no_id.jpg"},
        {"id": 3, "file_name": "COCO_train2014_000000000003.jpg", "width": 10, "height": 10}
    ]);
    let captions = json!({
        "info": {"description": "]}\" {["},
        "images": images,
        "annotations": [
            {"id": 1, "image_id": 42, "caption": "A cup\non a table. "},
            {"id": 2, "image_id": 9, "caption": "Two dogs"},
            {"id": 3, "image_id": 42, "caption": "  ...  "},
            {"id": 4, "image_id": 42, "caption": "The table"},
            {"id": 5, "image_id": 1234, "caption": "An image that is not listed"},
            {"id": 6, "caption": "no image"}
        ]
    });
    let instances = json!({
        "images": images,
        "annotations": [
            {"id": 1, "image_id": 42, "category_id": 47, "bbox": [10.5, 20.25, 30, 40], "iscrowd": 0,
             "segmentation": [[1, 2, 3, "}"]]},
            {"id": 2, "image_id": 42, "category_id": 1, "bbox": [90, 60, 30, 40], "iscrowd": 0},
            {"id": 3, "image_id": 42, "category_id": 47, "bbox": [10.5, 20.25, 30, 40], "iscrowd": 0},
            {"id": 4, "image_id": 42, "category_id": 1, "bbox": [10, 20, 30, 40], "iscrowd": 1},
            {"id": 5, "image_id": 9, "category_id": 999, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"id": 6, "image_id": 9, "category_id": 1, "bbox": [49.5, 2, 3, 4], "iscrowd": 0},
            {"id": 7, "image_id": 9, "category_id": 1, "bbox": [1, 2, 3], "iscrowd": 0},
            {"id": 8, "image_id": 9, "category_id": 1, "bbox": [1, 2, -3, 4], "iscrowd": 0},
            {"id": 9, "image_id": 9, "category_id": 1, "bbox": [-1, -2, 3, 4], "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 47, "name": "cup", "supercategory": "kitchen"}]
    });
    (folder.json("captions_train2014.json", &captions), folder.json("instances_train2014.json", &instances))
}

pub(crate) fn visual_genome(folder: &Folder) -> VisualGenome {
    let url = |name: &str| format!("https://cs.stanford.edu/people/rak248/{name}");
    let image_data = json!([
        {"image_id": 1, "url": url("VG_100K_2/1.jpg"), "width": 800, "height": 600, "coco_id": null, "flickr_id": null},
        {"image_id": 2, "url": url("VG_100K/2.jpg"), "width": 80, "height": 60, "coco_id": 42, "flickr_id": 77},
        {"image_id": 2, "url": url("VG_100K/2.jpg"), "width": 80, "height": 60},
        {"image_id": 3, "url": url("VG_100K/3.jpg"), "height": 60},
    ]);
    let regions = json!([
        {"id": 1, "regions": [
            {"region_id": 1382, "image_id": 1, "phrase": "the clock is green in colour", "x": 421, "y": 57, "width": 82, "height": 139},
            {"region_id": 1383, "image_id": 1, "phrase": "The clock is green in colour ", "x": 421, "y": 57, "width": 82, "height": 139},
            {"region_id": 1384, "image_id": 1, "phrase": "a shade", "x": -3, "y": 590, "width": 50, "height": 50},
            {"region_id": 1385, "image_id": 1, "phrase": " ", "x": 1, "y": 1, "width": 50, "height": 50},
            {"region_id": 1386, "image_id": 1, "phrase": "no box", "x": 1, "y": 1, "width": 50},
        ]},
        {"id": 99, "regions": []},
        {"regions": []},
    ]);
    let objects = json!([
        {"image_id": 2, "objects": [
            {"object_id": 10, "x": 1, "y": 2, "w": 30, "h": 40, "names": ["traffic light", "light"],
             "synsets": ["traffic_light.n.01"], "merged_object_ids": [11]},
            {"object_id": 12, "x": 1, "y": 2, "w": 30, "h": 40, "name": "pole", "synsets": []},
            {"object_id": 13, "x": 1, "y": 2, "w": 30, "h": 40},
        ]},
        {"image_id": 1, "objects": [], "image_url": "x"},
    ]);
    let attributes = json!([
        {"image_id": 2, "attributes": [
            {"object_id": 10, "x": 1, "y": 2, "w": 30, "h": 40, "names": ["traffic light"], "synsets": ["traffic_light.n.01"],
             "attributes": ["red", " tall "]},
            {"object_id": 11, "x": 1, "y": 2, "w": 31, "h": 40, "names": ["signal"], "attributes": ["red", "lit"]},
            {"object_id": 12, "x": 1, "y": 2, "w": 30, "h": 40, "names": ["pole"], "synsets": []},
        ]},
    ]);
    let questions = json!([
        {"id": 1, "qas": [{"qa_id": 1, "image_id": 1, "question": "What color is the clock?", "answer": "Green.",
                           "a_objects": [], "q_objects": []},
                          {"qa_id": 2, "image_id": 1, "question": "What?"}]},
    ]);
    VisualGenome {
        image_data: folder.json("image_data.json", &image_data),
        images: folder.path("vg"),
        regions: Some(folder.json("region_descriptions.json", &regions)),
        objects: Some(folder.json("objects.json", &objects)),
        attributes: Some(folder.json("attributes.json", &attributes)),
        questions: Some(folder.json("question_answers.json", &questions)),
    }
}
