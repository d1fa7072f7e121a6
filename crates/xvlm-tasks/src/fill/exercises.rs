//! Files of exercises, graded.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;
use xvlm_data::{DataError, Place};

use super::grading::check;
use super::{Checked, Completing, Exercise, Grade, grade};
use crate::error::{ConfigProblem, TaskError, wrong_data};
use crate::model::{ImageTokens, Model};
use crate::sweep::{LeftOut, Sweep, Work};
use crate::{BATCH, Item};

/// An exercise of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExerciseItem {
    /// Its identifier; the number of its line if it has none.
    pub id: String,
    /// The image file.
    pub image: PathBuf,
    /// The phrase and its answers.
    pub exercise: Exercise,
    /// The same, as one text.
    asked: String,
}

/// The grade of an exercise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Graded {
    /// The exercise's identifier.
    pub id: String,
    /// The image file.
    pub image: PathBuf,
    /// The phrase.
    pub text: String,
    /// The grade.
    #[serde(flatten)]
    pub grade: Grade,
}

impl Item for ExerciseItem {
    fn image(&self) -> &Path {
        &self.image
    }

    fn text(&self) -> &str {
        &self.asked
    }
}

/// One answer, or one for each blank.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected an answer or a list of them, one for each blank")]
enum AnswersField {
    One(String),
    Several(Vec<String>),
}

/// A number or a string.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number or a string")]
enum Id {
    Number(u64),
    Text(String),
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    id: Option<Id>,
    image: String,
    text: String,
    #[serde(alias = "answers")]
    answer: AnswersField,
}

/// Reads exercises: JSON lines `{"id", "image", "text", "answer"}`, of which `answer` is a string or, for several blanks, a list
/// of them; or, if the file's name ends in `.csv`, the same as columns, several answers separated by `|`. Paths of images
/// are relative to the folder of the file, or to `images`. Without an `id`, an exercise is known by the number of its line.
///
/// # Errors
/// If the file cannot be read, a line is no exercise, or an identifier comes twice; each named.
pub fn read_exercises(path: &Path, images: Option<&Path>) -> Result<Vec<ExerciseItem>, TaskError> {
    let text = std::fs::read_to_string(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
    let is_csv = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
    let raw = if is_csv { from_csv(path, &text)? } else { from_lines(path, &text)? };
    let root = images.or_else(|| path.parent()).unwrap_or(Path::new(""));
    let (mut items, mut ids) = (Vec::with_capacity(raw.len()), HashSet::new());
    for (line, raw) in raw {
        let id = match raw.id {
            Some(Id::Text(text)) => text,
            Some(Id::Number(number)) => number.to_string(),
            None => line.to_string(),
        };
        if !ids.insert(id.clone()) {
            let found = format!("{id:?} again");
            return Err(wrong_data(path, Place::Line(line), "id", "an identifier of its own", found));
        }
        let answers = match raw.answer {
            AnswersField::One(answer) => vec![answer],
            AnswersField::Several(answers) => answers,
        };
        let asked = json!([raw.text, answers]).to_string();
        items.push(ExerciseItem {
            id,
            image: root.join(raw.image),
            exercise: Exercise { text: raw.text, answers },
            asked,
        });
    }
    match items.is_empty() {
        true => Err(TaskError::Empty { what: path.display().to_string() }),
        false => Ok(items),
    }
}

fn from_lines(path: &Path, text: &str) -> Result<Vec<(usize, Raw)>, TaskError> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let read = |(at, line): (usize, &str)| match serde_json::from_str(line) {
        Ok(raw) => Ok((at + 1, raw)),
        Err(source) if source.is_data() => {
            let expected = "{\"id\", \"image\", \"text\", \"answer\"}";
            Err(wrong_data(path, Place::Line(at + 1), "exercise", expected, source.to_string()))
        }
        Err(source) => {
            let (path, place) = (path.to_owned(), Place::Line(at + 1));
            Err(DataError::Json { path, place, source }.into())
        }
    };
    lines.map(read).collect()
}

fn from_csv(path: &Path, text: &str) -> Result<Vec<(usize, Raw)>, TaskError> {
    let broken = |error: csv::Error| {
        let line = error.position().map_or(1, |position| position.line() as usize);
        wrong_data(path, Place::Line(line), "row", "a row of the table", error.to_string())
    };
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let columns = reader.headers().map_err(broken)?.clone();
    let column = |names: &[&str]| columns.iter().position(|column| names.contains(&column.trim()));
    let needed = |name: &'static str, names: &[&str]| {
        let found = || columns.iter().collect::<Vec<_>>().join(", ");
        column(names).ok_or_else(|| wrong_data(path, Place::Line(1), name, "a column of this name", found()))
    };
    let (id, image) = (column(&["id"]), needed("image", &["image"])?);
    let (text, answer) = (needed("text", &["text"])?, needed("answer", &["answer", "answers"])?);
    let mut rows = Vec::new();
    for row in reader.records() {
        let row = row.map_err(broken)?;
        let line = row.position().map_or(0, |position| position.line() as usize);
        let field = |at: usize| row.get(at).unwrap_or_default().to_owned();
        rows.push((
            line,
            Raw {
                id: id.map(field).filter(|id| !id.is_empty()).map(Id::Text),
                image: field(image),
                text: field(text),
                answer: AnswersField::Several(field(answer).split('|').map(|part| part.trim().to_owned()).collect()),
            },
        ));
    }
    Ok(rows)
}

/// Grades exercises, as [`grade`] does. Left out, and so without a grade: exercises whose image cannot be read, whose phrase has
/// no blank, or whose answers are not one for each blank, have no words, or have words that the tokenizer cannot write.
///
/// # Errors
/// If more than [`Sweep::max_bad_fraction`] of the exercises are left out, or the model is made for another task.
pub fn grade_all(
    model: &Model,
    items: Vec<ExerciseItem>,
    search: Completing,
    accept: f32,
    sweep: &mut Sweep,
) -> Result<(Vec<Graded>, Vec<LeftOut>), TaskError> {
    let problem = |item: &ExerciseItem| Some(check(model, &item.exercise, search).err()?.to_string());
    let checked = Checked::new(items, sweep.max_bad_fraction, problem)?;
    // Through text: as values of JSON, numbers would get digits that nobody wrote.
    let options = serde_json::to_string(&(search, accept)).and_then(|text| serde_json::from_str(&text));
    let problem = |error: serde_json::Error| ConfigProblem { file: "options".to_owned(), message: error.to_string() };
    let work = Work { name: "grades", options: options.map_err(problem)?, batch: BATCH };
    let ask = |images: &ImageTokens, asked: &[(u32, &str)]| {
        // What stands for an exercise among questions about images, as it was written.
        let exercises: Vec<(u32, Exercise)> = asked
            .iter()
            .map(|&(image, asked)| {
                let (text, answers) = serde_json::from_str(asked)
                    .map_err(|error| ConfigProblem { file: "exercise".to_owned(), message: error.to_string() })?;
                Ok((image, Exercise { text, answers }))
            })
            .collect::<Result<_, TaskError>>()?;
        let exercises: Vec<(u32, &Exercise)> = exercises.iter().map(|(image, exercise)| (*image, exercise)).collect();
        grade(model, images, &exercises, search, accept)
    };
    let answers = sweep.by_image(&work, model, &checked.items, |_, _| Ok(()), ask)?;
    let (items, grades, left_out) = checked.split(answers);
    let graded = items.into_iter().zip(grades).map(|(item, grade)| {
        let ExerciseItem { id, image, exercise, .. } = item;
        Graded { id, image, text: exercise.text, grade }
    });
    Ok((graded.collect(), left_out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str) -> Result<Vec<ExerciseItem>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_exercises(&path, Some(Path::new("pictures"))).map_err(|error| error.to_string())
    }

    #[test]
    fn lines_and_tables_say_the_same() {
        let lines = r#"{"id": 7, "image": "a.png", "text": "a ___, red", "answer": "dog"}

{"image": "b.png", "text": "a ___ and a ___", "answers": ["dog", "red cat"]}
"#;
        let table = "image,text,answer,id\na.png,\"a ___, red\",dog,7\n\nb.png,a ___ and a ___,dog | red cat,\n";
        let items = read("e.jsonl", lines).unwrap();
        let [one, two] = items.as_slice() else { panic!("{items:?}") };
        assert_eq!((one.id.as_str(), one.image.as_path()), ("7", Path::new("pictures/a.png")));
        assert_eq!(
            (two.id.as_str(), two.exercise.answers.as_slice()),
            ("3", ["dog", "red cat"].map(String::from).as_slice())
        );
        let table = read("e.csv", table).unwrap();
        assert_eq!(table[0], *one);
        assert_eq!(table[1].exercise, two.exercise);
    }

    #[test]
    fn what_is_no_exercise_is_named() {
        let line = r#"{"id": "a", "image": "a.png", "text": "a ___", "answer": "dog"}"#;
        let refused = |name: &str, text: &str| read(name, text).unwrap_err();
        assert!(
            refused("e.jsonl", &format!("{line}\n{line}")).contains("e.jsonl:2: id: expected an identifier of its own")
        );
        assert!(refused("e.jsonl", &format!("{line}\n{{\"image\": 1}}")).contains("e.jsonl:2: exercise: "));
        assert!(refused("e.jsonl", &format!("{line}\n{{\"image\"")).contains("e.jsonl:2: expected JSON, found "));
        assert!(
            refused("e.jsonl", "{\"image\":\"a\",\"text\":\"b\",\"answer\":3}")
                .contains("expected an answer or a list")
        );
        assert!(
            refused("e.csv", "image,text\na,b\n")
                .contains("e.csv:1: answer: expected a column of this name, found image, text")
        );
        assert!(
            refused("e.csv", "image,text,answer\na,b\n").contains("e.csv:2: row: expected a row of the table, found ")
        );
        assert!(refused("e.jsonl", "\n").contains("at least one item"));
    }
}
