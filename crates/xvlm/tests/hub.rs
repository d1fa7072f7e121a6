//! Models from a stand-in for the Hugging Face hub that runs on this machine.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;

use xvlm::{Device, Error, Hub, Picture, Predictor};

const REPOSITORY: &str = "some-one/shapes_v1.0";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// An address where nothing answers.
const NOBODY: &str = "http://127.0.0.1:1";

type Files = Vec<(&'static str, &'static [u8])>;

fn model() -> Files {
    vec![
        ("config.json", include_bytes!("../model/config.json")),
        ("tokenizer.json", include_bytes!("../model/tokenizer.json")),
        ("model.safetensors", include_bytes!("../model/model.safetensors")),
    ]
}

/// Serves the files of one repository, at most so many bytes before a connection breaks; returns the address.
fn serve(files: Files, most: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for connection in listener.incoming() {
            answer(connection.unwrap(), &files, most).unwrap();
        }
    });
    endpoint
}

/// Answers one request, with the headers that the hub sends.
fn answer(mut connection: TcpStream, files: &Files, most: usize) -> io::Result<()> {
    let lines = BufReader::new(connection.try_clone()?).lines().map_while(Result::ok);
    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let path = head[0].split(' ').nth(1).unwrap();
    // As if the branch moved after the first file: the others are known by commit only.
    let at = |revision: &str, name: &str| path == format!("/{REPOSITORY}/resolve/{revision}/{name}");
    let asked =
        |name: &str| at(COMMIT, name) || (name == "config.json" && (at("main", name) || at("refs%2Fpr%2F1", name)));
    let Some((_, bytes)) = files.iter().find(|(name, _)| asked(name)) else {
        return write!(
            connection,
            "HTTP/1.1 404 Not Found\r\nX-Error-Message: Entry not found\r\nContent-Length: 0\r\n\r\n"
        );
    };
    let range = head.iter().find_map(|line| line.strip_prefix("Range: bytes=")).unwrap();
    let (first, last) = range.split_once('-').unwrap();
    let first: usize = first.parse().unwrap();
    let part = &bytes[first..last.parse().map_or(bytes.len(), |last: usize| last + 1)];
    write!(
        connection,
        "HTTP/1.1 206 Partial Content\r\nETag: \"{total}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: {length}\r\n\
         Content-Range: bytes {first}-{last}/{total}\r\nConnection: close\r\n\r\n",
        total = bytes.len(),
        length = part.len(),
        last = (first + part.len()).saturating_sub(1),
    )?;
    connection.write_all(&part[..part.len().min(most)])
}

fn hub(endpoint: String, cache: &Path) -> Hub {
    Hub { endpoint, cache: cache.to_owned(), token: None, offline: false }
}

/// What fetching fails with: of `file` of [`REPOSITORY`] at `main`.
fn failure(hub: &Hub, expected: &str) -> String {
    let error = hub.fetch(REPOSITORY, "main").unwrap_err();
    let Error::Fetch { repository, revision, file, cause } = &error else { panic!("{error}") };
    assert_eq!((repository.as_str(), revision.as_str(), file.as_str()), (REPOSITORY, "main", expected));
    for part in [REPOSITORY, "main", expected, cause] {
        assert!(error.to_string().contains(part), "{error}");
    }
    cause.clone()
}

#[test]
fn a_model_is_downloaded_once() {
    let cache = tempfile::tempdir().unwrap();
    let online = hub(serve(model(), usize::MAX) + "/", cache.path());
    let folder = online.fetch(REPOSITORY, "main").unwrap();
    assert!(folder.starts_with(cache.path()) && folder.ends_with(COMMIT), "{}", folder.display());
    let fetched = Predictor::from_folder(&folder, &Device::Cpu).unwrap();
    let bundled = Predictor::bundled(&Device::Cpu).unwrap();
    let picture = Picture::from_bytes(include_bytes!("../assets/example.png"), &"example.png").unwrap();
    let (fetched, bundled) = (fetched.look(&picture).unwrap(), bundled.look(&picture).unwrap());
    let texts = ["the red circle", "the shape on the left"];
    assert_eq!(fetched.ground(&texts).unwrap(), bundled.ground(&texts).unwrap());
    assert_eq!(fetched.caption().unwrap().text, bundled.caption().unwrap().text);

    // Again, with the hub gone: by branch and by commit, also if only the commit's folder tells that it is there.
    let gone = hub(NOBODY.to_owned(), cache.path());
    assert_eq!(gone.fetch(REPOSITORY, "main").unwrap(), folder);
    fs::remove_dir_all(folder.join("../../refs")).unwrap();
    let offline = Hub { offline: true, ..gone.clone() };
    assert_eq!(offline.fetch(REPOSITORY, COMMIT).unwrap(), folder);
    assert!(failure(&gone, "config.json").contains("refused"));

    // A branch with a slash in its name leads to the same commit.
    assert_eq!(online.fetch(REPOSITORY, "refs/pr/1").unwrap(), folder);
    assert_eq!(offline.fetch(REPOSITORY, "refs/pr/1").unwrap(), folder);
}

#[test]
fn offline_the_network_is_left_alone() {
    let cache = tempfile::tempdir().unwrap();
    let offline = Hub { offline: true, ..hub(serve(model(), usize::MAX), cache.path()) };
    let cause = failure(&offline, "config.json");
    assert!(cause.contains("HF_HUB_OFFLINE") && cause.contains(&cache.path().display().to_string()), "{cause}");
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_downloaded_is_named() {
    let cache = tempfile::tempdir().unwrap();
    assert!(failure(&hub(NOBODY.to_owned(), cache.path()), "config.json").contains("refused"));

    let no_weights = model().into_iter().filter(|(name, _)| *name != "model.safetensors").collect();
    let cause = failure(&hub(serve(no_weights, usize::MAX), cache.path()), "model.safetensors");
    assert!(cause.contains("404: Entry not found") && cause.contains(COMMIT), "{cause}");

    let missing = hub(serve(model(), usize::MAX), cache.path()).fetch("some-one/else", "main").unwrap_err();
    assert!(missing.to_string().contains("config.json of some-one/else"), "{missing}");

    // What is no model is refused when it is opened, by its place in the cache.
    let mut files = model();
    files[0].1 = b"{";
    let cache = tempfile::tempdir().unwrap();
    let folder = hub(serve(files, usize::MAX), cache.path()).fetch(REPOSITORY, "main").unwrap();
    let broken = Predictor::from_folder(&folder, &Device::Cpu).err().unwrap().to_string();
    let path = format!("{COMMIT}/config.json: expected a JSON object");
    assert!(broken.contains("some-one--shapes_v1.0") && broken.contains(&path), "{broken}");
}

#[test]
fn a_broken_download_is_resumed() {
    let cache = tempfile::tempdir().unwrap();
    let cause = failure(&hub(serve(model(), 10_000), cache.path()), "model.safetensors");
    assert!(cause.contains("closed before all bytes"), "{cause}");
    let folder = hub(serve(model(), 2_000_000), cache.path()).fetch(REPOSITORY, "main").unwrap();
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == include_bytes!("../model/model.safetensors"));
}

#[test]
fn names_that_are_paths_are_refused() {
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(NOBODY.to_owned(), cache.path());
    for repository in [
        "", "name", "/", "a/", "/b", "a/b/", "a//b", "a/b/c", "../b", "a/..", "a/b..c", "a--b/c", "a/b?c", "a b/c",
        "a\\b/c",
    ] {
        let error = hub.fetch(repository, "main").unwrap_err().to_string();
        assert!(error.contains("expected owner/name") && error.contains(&format!("{repository:?}")), "{error}");
    }
    for revision in ["", "..", "a/../b", "/a", "a/", "a//b", "a#b", "a%2Fb", "-a", ".a", "a b"] {
        let error = hub.fetch(REPOSITORY, revision).unwrap_err().to_string();
        assert!(error.contains("expected a branch") && error.contains(&format!("{revision:?}")), "{error}");
    }
}
