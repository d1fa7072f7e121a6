//! Shards on a server that speaks as S3 does, or plain HTTP: fetched, resumed where a connection drops, and given up on in
//! bounded time where nothing helps.
#![cfg(feature = "remote")]

mod shard_files;

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use shard_files::{gzip, img2dataset, lines, number, numbers, tar, visit};
use xvlm_data::storage::expand;
use xvlm_data::{DataError, Dataset, DatasetConfig, Need, Order, SourceConfig, StorageOptions};

/// What the server does wrong at one request of an object.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// Drops the connection after so many bytes of the content.
    Drop(usize),
    /// Says nothing more after so many bytes.
    Silence(usize),
    /// Status 503.
    Busy,
    /// Sends all of it, whatever part was asked for.
    NoRange,
    /// From now on it is another object.
    Change,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Vec<u8>>,
    /// What goes wrong at the next requests of an object; the last goes on for ever if there is an `always`.
    faults: BTreeMap<String, VecDeque<Fault>>,
    always: BTreeMap<String, Fault>,
    /// Method, path with query, and range of each request.
    log: Vec<(String, String, Option<usize>)>,
    tags: bool,
}

/// A server that ends with the test.
struct Server {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// `tags` are what tells versions of an object apart.
    fn start(tags: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State { tags, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || {
                    // A client that has gone away is not the server's concern.
                    let _ = answer(stream, &state);
                });
            }
        });
        Self { address, state }
    }

    fn put(&self, key: &str, content: Vec<u8>) {
        self.state.lock().unwrap().objects.insert(key.to_owned(), content);
    }

    fn fail(&self, key: &str, faults: &[Fault]) {
        self.state.lock().unwrap().faults.insert(key.to_owned(), faults.iter().copied().collect());
    }

    fn fail_always(&self, key: &str, fault: Fault) {
        self.state.lock().unwrap().always.insert(key.to_owned(), fault);
    }

    fn lose(&self, key: &str) {
        self.state.lock().unwrap().objects.remove(key);
    }

    /// The bytes at which requests of an object began.
    fn starts(&self, key: &str) -> Vec<usize> {
        let state = self.state.lock().unwrap();
        let of_key = state.log.iter().filter(|(_, path, _)| path.split('?').next() == Some(&format!("/{key}")));
        of_key.map(|(_, _, start)| start.unwrap_or(0)).collect()
    }

    fn settings(&self) -> Vec<(String, String)> {
        [
            ("aws_endpoint", format!("http://{}", self.address).as_str()),
            ("aws_allow_http", "true"),
            ("aws_access_key_id", "key"),
            ("aws_secret_access_key", "secret"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .to_vec()
    }

    fn options(&self) -> StorageOptions {
        StorageOptions { settings: self.settings(), retries: 3, timeout: Duration::from_millis(700) }
    }

    fn open(&self, entry: &str) -> Result<Dataset, DataError> {
        self.open_with(entry, &DatasetConfig::default())
    }

    fn open_with(&self, entry: &str, config: &DatasetConfig) -> Result<Dataset, DataError> {
        Dataset::open(&[SourceConfig::files([entry])], config, &self.options())
    }

    fn read(&self, entry: &str) -> (Vec<usize>, Vec<DataError>) {
        let (records, errors) = visit(&self.open(entry).unwrap());
        (numbers(&records), errors)
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut first, mut range) = (String::new(), None);
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        // The end, if there is one, is that of the object.
        if let Some((start, _)) = line.strip_prefix("range: bytes=").and_then(|range| range.split_once('-')) {
            range = start.parse::<usize>().ok();
        }
    }
    let mut words = first.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let key = path.trim_start_matches('/').to_owned();
    let (mut content, fault, tag) = {
        let mut state = state.lock().unwrap();
        state.log.push((method.to_owned(), target.to_owned(), range));
        if query.contains("list-type=2") {
            let body = list(&state.objects, &key, query);
            drop(state);
            return respond(&mut stream, "200 OK", &[], body.as_bytes(), None);
        }
        let next = state.faults.get_mut(&key).and_then(VecDeque::pop_front);
        let fault = next.or_else(|| state.always.get(&key).copied());
        if let (Some(Fault::Change), Some(content)) = (fault, state.objects.get_mut(&key)) {
            content.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
        }
        let content = state.objects.get(&key).cloned();
        let tag =
            content.as_ref().filter(|_| state.tags).map(|content| format!("\"{}-{}\"", content.len(), content[0]));
        (content, fault, tag)
    };
    if matches!(fault, Some(Fault::Busy)) {
        return respond(&mut stream, "503 Slow Down", &[], b"", None);
    }
    let Some(whole) = content.take() else {
        let body = b"<Error><Code>NoSuchKey</Code></Error>";
        return respond(&mut stream, "404 Not Found", &[], body, None);
    };
    let mut headers = vec!["Last-Modified: Wed, 01 Jan 2025 00:00:00 GMT".to_owned()];
    headers.extend(tag.map(|tag| format!("ETag: {tag}")));
    let range = range.filter(|_| !matches!(fault, Some(Fault::NoRange)));
    let start = range.unwrap_or(0);
    if range.is_some() {
        headers.push(format!("Content-Range: bytes {start}-{}/{}", whole.len() - 1, whole.len()));
    }
    let status = if range.is_some() { "206 Partial Content" } else { "200 OK" };
    respond(&mut stream, status, &headers, &whole[start..], fault)
}

fn respond(
    stream: &mut TcpStream,
    status: &str,
    headers: &[String],
    body: &[u8],
    fault: Option<Fault>,
) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n", body.len())?;
    headers.iter().try_for_each(|header| write!(stream, "{header}\r\n"))?;
    write!(stream, "\r\n")?;
    match fault {
        Some(Fault::Drop(after)) => stream.write_all(&body[..after.min(body.len())]),
        Some(Fault::Silence(after)) => {
            stream.write_all(&body[..after.min(body.len())])?;
            std::thread::sleep(Duration::from_secs(60));
            Ok(())
        }
        _ => stream.write_all(body),
    }
}

/// Two keys a page, so that listing has to go on.
fn list(objects: &BTreeMap<String, Vec<u8>>, bucket: &str, query: &str) -> String {
    let value = |name: &str| {
        let found = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        found.unwrap_or_default().replace("%2F", "/")
    };
    let (prefix, after) = (value("prefix"), value("continuation-token"));
    let bucket = format!("{}/", bucket.trim_end_matches('/'));
    let (mut entries, mut last) = (BTreeMap::new(), String::new());
    for (key, content) in objects.iter().filter_map(|(key, content)| Some((key.strip_prefix(&bucket)?, content))) {
        let Some(rest) = key.strip_prefix(&prefix) else { continue };
        let entry = match rest.split_once('/') {
            Some((folder, _)) => (format!("{prefix}{folder}/"), None),
            None => (key.to_owned(), Some(content.len())),
        };
        if entry.0 > after {
            entries.insert(entry.0, entry.1);
        }
    }
    let more = entries.len() > 2;
    let mut body = String::from("<?xml version=\"1.0\"?><ListBucketResult><Name>b</Name><MaxKeys>2</MaxKeys>");
    for (name, size) in entries.into_iter().take(2) {
        body += &match size {
            Some(size) => format!(
                "<Contents><Key>{name}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified><ETag>\"x\"</ETag>\
                 <Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            ),
            None => format!("<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>"),
        };
        last = name;
    }
    body += &format!("<IsTruncated>{more}</IsTruncated>");
    if more {
        body += &format!("<NextContinuationToken>{last}</NextContinuationToken>");
    }
    body + "</ListBucketResult>"
}

#[test]
fn shards_of_every_kind_are_read_from_a_bucket() {
    let server = Server::start(true);
    server.put("bucket/set/a.jsonl", lines(0..10).into_bytes());
    server.put("bucket/set/b.jsonl.gz", gzip(lines(10..20).as_bytes()));
    server.put("bucket/set/c.tar", tar(&[("20.jpg", b"image"), ("20.txt", b"text 20")]));
    server.put("bucket/set/d.parquet", img2dataset(21..30, 4));
    for other in ["_SUCCESS", ".hidden", "a.jsonl.idx", "sub/e.jsonl"] {
        server.put(&format!("bucket/set/{other}"), lines(90..91).into_bytes());
    }
    let names = |entry: &str| -> Vec<String> {
        let shards = expand(entry, &server.options()).unwrap();
        shards.iter().map(|shard| shard.name().display().to_string()).collect()
    };
    let all = ["a.jsonl", "b.jsonl.gz", "c.tar", "d.parquet"].map(|name| format!("s3://bucket/set/{name}"));
    assert_eq!(names("s3://bucket/set/"), all);
    assert_eq!(names("s3://bucket/set"), all);
    assert_eq!(names("s3://bucket/set/*.json*"), all[..2]);
    assert_eq!(names("s3://bucket/*/*/*.jsonl"), ["s3://bucket/set/sub/e.jsonl"]);
    assert_eq!(names("s3://bucket/set/{a.jsonl,c.tar}"), [&*all[0], &*all[2]]);
    let (numbers, errors) = server.read("s3://bucket/set/");
    assert_eq!(numbers, (0..30).collect::<Vec<_>>());
    assert!(errors.is_empty(), "{errors:?}");

    let dataset = server.open("s3://bucket/set").unwrap();
    let (records, _) = visit(&dataset);
    assert_eq!(records[3].origin.to_string(), "s3://bucket/set/a.jsonl:4");
    let order = Order::new(Arc::new(dataset), Need::Captions, 1).unwrap();
    let mut drawn: Vec<usize> = (0..30).map(|position| number(&order.record(position).unwrap())).collect();
    drawn.sort_unstable();
    assert_eq!(drawn, (0..30).collect::<Vec<_>>());
    for entry in ["s3://bucket/nothing/", "s3://bucket/set/*.png"] {
        let error = expand(entry, &server.options()).unwrap_err();
        assert!(error.to_string().contains(entry) && error.to_string().contains("at least one shard"), "{error}");
    }
}

#[test]
fn a_dropped_connection_is_resumed_where_it_dropped() {
    let content = gzip(lines(0..20_000).as_bytes());
    let size = content.len();
    for tags in [true, false] {
        let server = Server::start(tags);
        server.put("bucket/a.gz", content.clone());
        server.fail("bucket/a.gz", &[Fault::Drop(size / 3), Fault::Busy, Fault::Drop(size / 3), Fault::Silence(100)]);
        for url in ["s3://bucket/a.gz".to_owned(), format!("http://{}/bucket/a.gz", server.address)] {
            let (numbers, errors) = server.read(&url);
            assert_eq!(numbers.len(), 20_000, "{url}: {errors:?}");
            assert!(errors.is_empty(), "{url}: {errors:?}");
        }
        let starts = server.starts("bucket/a.gz");
        // What was written may be a little less than what was sent, but nothing is fetched again from the start, until the
        // second reading.
        assert_eq!(starts.iter().filter(|&&start| start == 0).count(), 2, "{starts:?}");
        assert!(starts.len() >= 6 && starts.is_sorted_by(|a, b| a <= b || *b == 0), "{starts:?}");
    }
}

#[test]
fn a_server_without_ranges_sends_it_again() {
    let server = Server::start(false);
    server.put("a.jsonl", lines(0..1000).into_bytes());
    server.fail("a.jsonl", &[Fault::Drop(500), Fault::NoRange]);
    let (numbers, errors) = server.read(&format!("http://{}/a.jsonl", server.address));
    assert_eq!(numbers, (0..1000).collect::<Vec<_>>(), "{errors:?}");
    assert!(errors.is_empty(), "{errors:?}");
}

#[test]
fn what_does_not_help_ends_in_bounded_time() {
    let server = Server::start(true);
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let cases =
        [("dropping", Fault::Drop(0)), ("stuck", Fault::Drop(7)), ("silent", Fault::Silence(5)), ("busy", Fault::Busy)];
    for (key, fault) in cases {
        server.put(&format!("bucket/{key}"), lines(0..10).into_bytes());
        server.fail_always(&format!("bucket/{key}"), fault);
    }
    let mut urls: Vec<String> = cases.iter().map(|(key, _)| format!("s3://bucket/{key}")).collect();
    urls.push("s3://bucket/missing.jsonl".to_owned());
    urls.extend(cases.iter().map(|(key, _)| format!("http://{}/bucket/{key}", server.address)));
    urls.push(format!("http://{closed}/a.jsonl"));
    urls.push("hdfs://path/to/coco.jsonl".to_owned());
    let start = Instant::now();
    std::thread::scope(|scope| {
        for url in &urls {
            let server = &server;
            scope.spawn(move || {
                let (records, errors) = match server.open(url) {
                    Ok(dataset) => visit(&dataset),
                    Err(error) => (Vec::new(), vec![error]),
                };
                assert!(records.is_empty(), "{url}");
                assert!(errors.len() == 1 && errors[0].to_string().contains(url), "{url}: {errors:?}");
            });
        }
    });
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[test]
fn an_object_that_changes_underway_is_not_mixed() {
    let server = Server::start(true);
    server.put("bucket/a.jsonl", lines(0..1000).into_bytes());
    server.fail("bucket/a.jsonl", &[Fault::Drop(500), Fault::Change]);
    let (numbers, errors) = server.read("s3://bucket/a.jsonl");
    assert!(numbers.is_empty(), "{numbers:?}");
    assert!(errors.iter().any(|error| error.to_string().contains("s3://bucket/a.jsonl")), "{errors:?}");
}

#[test]
fn a_lost_object_costs_its_records_only() {
    /// Of windows as small as these, so many are kept, and the shard that was opened last.
    const KEPT: usize = 16;
    let server = Server::start(true);
    for shard in 0..40 {
        server.put(&format!("bucket/{shard:02}.jsonl"), lines(10 * shard..10 * shard + 10).into_bytes());
    }
    let config = DatasetConfig { window: Some(1), ..DatasetConfig::default() };
    let dataset = Arc::new(server.open_with("s3://bucket/{00..39}.jsonl", &config).unwrap());
    assert_eq!(dataset.count(Need::Captions), None);
    let order = Order::new(Arc::clone(&dataset), Need::Captions, 1).unwrap();
    let epoch =
        |epoch: u64| -> Vec<_> { (400 * epoch..400 * (epoch + 1)).map(|position| order.record(position)).collect() };
    let mut first: Vec<usize> = epoch(0).into_iter().map(|record| number(&record.unwrap())).collect();
    first.sort_unstable();
    assert_eq!(first, (0..400).collect::<Vec<_>>());
    assert_eq!(dataset.count(Need::Captions), Some(400));
    // Once, and those that begin the next epoch again.
    let fetched: usize = (0..40).map(|shard| server.starts(&format!("bucket/{shard:02}.jsonl")).len()).sum();
    assert!((40..=41).contains(&fetched), "{fetched}");
    (0..30).for_each(|shard| server.lose(&format!("bucket/{shard:02}.jsonl")));
    let second = epoch(1);
    let good = second.iter().flatten().count();
    assert!((100..=100 + 10 * KEPT).contains(&good), "{good}");
    for error in second.iter().filter_map(|record| record.as_ref().err()) {
        assert!(error.to_string().contains("s3://bucket/"), "{error}");
    }
    // It is not asked for anew for each of its records.
    assert!((0..40).all(|shard| server.starts(&format!("bucket/{shard:02}.jsonl")).len() <= 3));
}

#[test]
fn the_next_window_is_fetched_while_one_is_drawn_from() {
    let server = Server::start(true);
    for shard in 0..9 {
        server.put(&format!("bucket/{shard}.jsonl"), lines(10 * shard..10 * shard + 10).into_bytes());
    }
    let config = DatasetConfig { window: Some(3), ..DatasetConfig::default() };
    let dataset = Arc::new(server.open_with("s3://bucket/{0..8}.jsonl", &config).unwrap());
    let order = Order::new(dataset, Need::Captions, 1).unwrap();
    let fetched = || (0..9).filter(|shard| !server.starts(&format!("bucket/{shard}.jsonl")).is_empty()).count();
    order.record(0).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while fetched() < 6 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(fetched(), 6);
}

#[test]
fn queries_are_kept_and_not_shown() {
    let server = Server::start(false);
    server.put("a%20b.jsonl", lines(0..3).into_bytes());
    let url = format!("http://{}/a%20b.jsonl?signature=secret&x=1", server.address);
    let (numbers, errors) = server.read(&url);
    assert_eq!(numbers, [0, 1, 2], "{errors:?}");
    let log = server.state.lock().unwrap().log.clone();
    assert!(log.iter().all(|(_, path, _)| path == "/a%20b.jsonl?signature=secret&x=1"), "{log:?}");
    server.lose("a%20b.jsonl");
    let (_, errors) = server.read(&url);
    assert!(errors.len() == 1 && !errors[0].to_string().contains("secret"), "{errors:?}");
    let error = server.open(&format!("http://{}/folder/", server.address)).unwrap_err();
    assert!(error.to_string().contains("no list"), "{error}");
}

#[test]
fn each_process_fetches_its_own_shards() {
    let server = Server::start(true);
    for shard in 0..4 {
        server.put(&format!("bucket/{shard}.jsonl"), lines(10 * shard..10 * shard + 10).into_bytes());
    }
    let dataset = Arc::new(server.open("s3://bucket/{0..3}.jsonl").unwrap());
    let order = Order::new(dataset, Need::Captions, 1).unwrap().for_rank(1, 2);
    let mut drawn: Vec<usize> = (0..20).map(|position| number(&order.record(position).unwrap())).collect();
    drawn.sort_unstable();
    assert_eq!(drawn, (10..20).chain(30..40).collect::<Vec<_>>());
    let requests: Vec<usize> = (0..4).map(|shard| server.starts(&format!("bucket/{shard}.jsonl")).len()).collect();
    assert_eq!(requests, [0, 1, 0, 1]);
}

#[test]
fn a_resumed_run_does_not_fetch_what_comes_before() {
    let server = Server::start(true);
    for shard in 0..12 {
        server.put(&format!("bucket/{shard:02}.jsonl"), lines(10 * shard..10 * shard + 10).into_bytes());
    }
    let folder = tempfile::tempdir().unwrap();
    let index_dir = Some(folder.path().join("indices"));
    let order = |index_dir| {
        let config = DatasetConfig { window: Some(2), index_dir, ..DatasetConfig::default() };
        let dataset = Arc::new(server.open_with("s3://bucket/{00..11}.jsonl", &config).unwrap());
        Order::new(dataset, Need::Captions, 1).unwrap()
    };
    let drawn = |order: &Order, positions: std::ops::Range<u64>| -> Vec<usize> {
        positions.map(|position| number(&order.record(position).unwrap())).collect()
    };
    let first = order(index_dir.clone());
    let expected = drawn(&first, 0..240);
    drop(first);
    // What is fetched ahead may still be under way.
    let requests = || server.state.lock().unwrap().log.len();
    loop {
        let before = requests();
        std::thread::sleep(Duration::from_millis(300));
        if requests() == before {
            break;
        }
    }
    server.state.lock().unwrap().log.clear();
    let resumed = order(index_dir);
    assert_eq!(resumed.len(), Some(120));
    assert_eq!(drawn(&resumed, 90..95), expected[90..95]);
    assert_eq!(drawn(&resumed, 215..220), expected[215..220]);
    let fetched: usize = (0..12).map(|shard| server.starts(&format!("bucket/{shard:02}.jsonl")).len()).sum();
    assert!((4..=8).contains(&fetched), "two windows, and perhaps the next of each: {fetched}");
    // Without the folder it goes on with the same.
    assert_eq!(drawn(&order(None), 215..220), expected[215..220]);
}

/// Reads a shard as the environment tells; run by the test below.
#[test]
fn child_that_reads_by_its_environment() {
    let Ok(entry) = std::env::var("XVLM_TEST_ENTRY") else { return };
    let dataset = Dataset::open(&[SourceConfig::files([entry])], &DatasetConfig::default(), &StorageOptions::default());
    let (records, errors) = visit(&dataset.unwrap());
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(numbers(&records), [0, 1, 2]);
}

#[test]
fn the_environment_tells_where_the_store_is() {
    let server = Server::start(true);
    server.put("bucket/x.jsonl", lines(0..3).into_bytes());
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "child_that_reads_by_its_environment"]).env("XVLM_TEST_ENTRY", "s3://bucket/x.jsonl");
    for (key, value) in server.settings() {
        child.env(key.to_uppercase(), value);
    }
    let output = child.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(server.starts("bucket/x.jsonl"), [0]);
}
