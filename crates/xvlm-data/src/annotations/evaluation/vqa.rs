//! Questions: X-VLM's items, and VQA v2 as published.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Run, VqaItem, VqaSource, is_plain, optional_text};
use crate::annotations::report::Reason;
use crate::error::{DataError, Place, excerpt};
use crate::json::{Context, Object};

/// An item of X-VLM's lists.
pub(super) fn vqa_item(run: &Run<'_>, object: &Object<'_>, path: &Path, number: usize) -> Result<VqaItem, DataError> {
    let source = match optional_text(object, "dataset")?.as_deref() {
        None | Some("vqa") => VqaSource::Vqa,
        Some("vg") => VqaSource::VisualGenome,
        Some("gqa") => VqaSource::Gqa,
        Some(other) => {
            return Err(object.context.error(object.name("dataset"), "vqa, vg or gqa", format!("{other:?}")));
        }
    };
    let root = match source {
        VqaSource::Vqa => None,
        VqaSource::VisualGenome => run.reading.vg_images.clone(),
        VqaSource::Gqa => run.reading.gqa_images.clone(),
    };
    let question_id = match object.get("question_id") {
        Some(_) => object.id("question_id")?,
        // X-VLM's `vg_qa.json` has none.
        None if source != VqaSource::Vqa => {
            format!("{}#{number}", path.file_stem().unwrap_or_default().to_string_lossy())
        }
        None => return Err(object.missing("question_id", "a number or a string")),
    };
    Ok(VqaItem {
        question_id,
        image: object.file("image", &root.unwrap_or_else(|| run.root(path)))?,
        question: object.text("question")?,
        answers: object.texts("answer")?,
        kind: optional_text(object, "kind")?.unwrap_or_default(),
        question_type: optional_text(object, "question_type")?.unwrap_or_default(),
        source,
    })
}

/// VQA v2 as published: questions and annotations are matched when all files are read.
#[derive(Default)]
pub(super) struct Published {
    questions: Vec<Question>,
    annotations: HashMap<String, Answered>,
    order: Vec<String>,
    annotated: bool,
}

struct Question {
    id: String,
    image_id: u64,
    question: String,
    file: PathBuf,
    number: usize,
    subset: String,
}

struct Answered {
    image_id: u64,
    answers: Vec<String>,
    kind: String,
    question_type: String,
    file: PathBuf,
    number: usize,
}

impl Published {
    pub(super) fn read(&mut self, run: &mut Run<'_>, path: &Path) -> Result<(), DataError> {
        let first = self.questions.len();
        let mut subset = None;
        let count = run.each(path, &["questions", "annotations", "data_subtype"], |run, section, number, value| {
            let context = Context { path, place: Place::Item(number) };
            if section == 2 {
                subset = value.as_str().map(str::to_owned);
                return Ok(());
            }
            let object = context.object(value, "record")?;
            let id = object.id("question_id")?;
            let image_id = object.get("image_id").and_then(Value::as_u64);
            let image_id = image_id.ok_or_else(|| object.missing("image_id", "the number of an image"))?;
            if section == 0 {
                let (question, file, subset) = (object.text("question")?, path.to_owned(), String::new());
                self.questions.push(Question { id, image_id, question, file, number, subset });
                return Ok(());
            }
            let answer = |(i, value)| {
                let name = format!("answers[{i}]");
                object.context.object(value, &name)?.text("answer")
            };
            let answers = object.list("answers")?.iter().enumerate().map(answer).collect::<Result<_, _>>()?;
            let text = |field| Ok::<_, DataError>(optional_text(&object, field)?.unwrap_or_default());
            let (kind, question_type) = (text("answer_type")?, text("question_type")?);
            if self.annotations.contains_key(&id) {
                let error = context.error("question_id", "an identifier of its own", format!("{id:?} again"));
                return run.refuse(Reason::DuplicateId, error);
            }
            self.order.push(id.clone());
            self.annotations
                .insert(id, Answered { image_id, answers, kind, question_type, file: path.to_owned(), number });
            Ok(())
        })?;
        let context = Context { path, place: Place::Whole };
        if count == 0 {
            return Err(context.error("questions", "a list of questions, or `annotations`", "neither"));
        }
        if self.questions.len() == first {
            self.annotated = true;
            return Ok(());
        }
        // "test-dev2015" is a part of "test2015".
        let subset = subset.ok_or_else(|| context.error("data_subtype", "a subset such as train2014", "nothing"))?;
        if !is_plain(&subset) {
            return Err(context.error("data_subtype", "a subset such as train2014", excerpt(&subset)));
        }
        let subset = if subset == "test-dev2015" { "test2015".to_owned() } else { subset };
        self.questions[first..].iter_mut().for_each(|question| subset.clone_into(&mut question.subset));
        Ok(())
    }

    pub(super) fn items(mut self, run: &mut Run<'_>) -> Result<Vec<VqaItem>, DataError> {
        let mut found = Vec::with_capacity(self.questions.len());
        for Question { id, image_id, question, file, number, subset } in self.questions {
            let context = Context { path: &file, place: Place::Item(number) };
            let image = run.root(&file).join(&subset).join(format!("COCO_{subset}_{image_id:012}.jpg"));
            let answered = self.annotations.remove(&id);
            let (answers, kind, question_type) = match answered {
                Some(answered) if answered.image_id != image_id => {
                    let context = Context { path: &answered.file, place: Place::Item(answered.number) };
                    let found = format!("image {}", answered.image_id);
                    let error = context.error("image_id", format!("image {image_id}, as question {id}"), found);
                    run.refuse(Reason::OtherImage, error)?;
                    continue;
                }
                Some(answered) => (answered.answers, answered.kind, answered.question_type),
                None if self.annotated => {
                    let error = context.error("question_id", "a question with an annotation", format!("{id:?}"));
                    run.refuse(Reason::QuestionWithoutAnnotation, error)?;
                    continue;
                }
                None => (Vec::new(), String::new(), String::new()),
            };
            if run.accept(&context, Some(("question_id", &id)), &[&image])? {
                let source = VqaSource::Vqa;
                found.push(VqaItem { question_id: id, image, question, answers, kind, question_type, source });
            }
        }
        for id in self.order {
            if let Some(Answered { file, number, .. }) = self.annotations.remove(&id) {
                let context = Context { path: &file, place: Place::Item(number) };
                let error = context.error("question_id", "a question that is asked", format!("{id:?}"));
                run.refuse(Reason::AnnotationWithoutQuestion, error)?;
            }
        }
        Ok(found)
    }
}
