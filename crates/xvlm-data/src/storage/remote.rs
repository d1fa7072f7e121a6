//! Objects in S3, Google Cloud Storage, Azure and on web servers, through `object_store`.
//!
//! Its runtime is a pair of threads of this crate; callers wait for them as for a disk, wherever they are called from.

use std::fs::File;
use std::future::{Future, poll_fn};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ClientConfigKey, Error, GetOptions, GetRange, ObjectMeta, ObjectStore, RetryConfig};
use tokio::runtime::Runtime;
use tokio::time::{sleep, timeout};

use super::{StorageOptions, failure, shown, spool};
use crate::error::DataError;
use crate::shards::ShardLimits;

/// After so many bytes since the last failure a connection counts as one that works.
const PROGRESS: u64 = 8 << 20;
/// Longest pause before another attempt.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A store and an object, or a folder, in it.
struct Place {
    store: Box<dyn ObjectStore>,
    key: Key,
    /// What goes before a key to make a URL of it.
    base: String,
}

pub(super) fn fetch(url: &str, options: &StorageOptions, file: &File, limits: &ShardLimits) -> Result<(), DataError> {
    let place = place(url, options)?;
    let name = Path::new(shown(url));
    let spool = |source| spool::failed(limits.spool_dir.as_deref(), source);
    let file = file.try_clone().map_err(spool)?;
    let (options, limit) = (options.clone(), limits.max_spool_bytes);
    let result = wait(async move { Download { place, options, file, limit, reached: 0 }.run().await })
        .map_err(|message| failure(name, "a runtime for object storage", message))?;
    // What is behind the question mark may be a signature.
    let query = url.strip_prefix(shown(url)).filter(|query| !query.is_empty());
    let found = |found: String| query.map_or(found.clone(), |query| found.replace(query, "?…"));
    result.map_err(|broken| match broken {
        Broken::Dropped(message) | Broken::Lost(message) => {
            failure(name, "an object that can be fetched", found(message))
        }
        Broken::Spool(source) => spool(source),
    })
}

/// The URLs of the objects in a folder, and in its folders if `all`.
pub(super) fn list(folder: &str, options: &StorageOptions, all: bool) -> Result<Vec<String>, DataError> {
    let name = Path::new(folder);
    if folder.starts_with("http://") || folder.starts_with("https://") {
        let expected = "the names of files, with {000..123} for many, since a web server has no list of them";
        return Err(failure(name, expected, "a folder or a pattern".to_owned()));
    }
    let Place { store, key, base } = place(folder, options)?;
    let patience = options.timeout;
    let result = wait(async move {
        let (mut folders, mut names) = (vec![key], Vec::new());
        while let Some(folder) = folders.pop() {
            // The store asks again by itself, and page after page.
            let listed = timeout(patience * 20, store.list_with_delimiter(Some(&folder))).await;
            let listed =
                listed.map_err(|_| format!("no answer in {patience:?}"))?.map_err(|error| error.to_string())?;
            names.extend(listed.objects.into_iter().map(|object| format!("{base}{}", object.location)));
            if all {
                folders.extend(listed.common_prefixes);
            }
        }
        Ok(names)
    });
    let result = result.map_err(|message| failure(name, "a runtime for object storage", message))?;
    result.map_err(|found: String| failure(name, "a folder that can be listed", found))
}

/// Runs a future on this crate's threads; whatever thread waits may be one of another runtime.
fn wait<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, String> {
    static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let builder = builder.worker_threads(2).thread_name("object storage").enable_all();
        builder.build().map_err(|error| error.to_string())
    });
    let (sender, receiver) = mpsc::channel();
    runtime.as_ref().map_err(Clone::clone)?.spawn(async move {
        // Nobody waits any more if this fails.
        let _ = sender.send(work.await);
    });
    receiver.recv().map_err(|_| "a panic".to_owned())
}

fn place(url: &str, options: &StorageOptions) -> Result<Place, DataError> {
    let name = Path::new(shown(url));
    let wrong = |expected: &str, found: String| failure(name, expected, found);
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    let (host, key) = rest.split_once('/').unwrap_or((rest, ""));
    let store = |error: Error| failure(name, "storage that can be reached", error.to_string());
    let retry = RetryConfig {
        backoff: BackoffConfig { max_backoff: LONGEST_PAUSE, ..BackoffConfig::default() },
        max_retries: options.retries as usize,
        retry_timeout: options.timeout * (options.retries + 1),
    };
    let client = [
        // Of the whole object, which may be large; that it stands still is what the other two are about.
        (ClientConfigKey::Timeout, "7 days".to_owned()),
        (ClientConfigKey::ReadTimeout, format!("{} ms", options.timeout.as_millis())),
        (ClientConfigKey::ConnectTimeout, format!("{} ms", options.timeout.as_millis())),
    ];
    macro_rules! cloud {
        ($builder:ident, $keys:ident) => {{
            let mut builder = $builder::from_env().with_url(url).with_retry(retry);
            for (key, value) in client {
                builder = builder.with_config($keys::Client(key), value);
            }
            for (key, value) in &options.settings {
                // Settings may be those of several kinds of stores.
                if let Ok(key) = $keys::from_str(&key.to_ascii_lowercase()) {
                    builder = builder.with_config(key, value);
                }
            }
            Box::new(builder.build().map_err(store)?) as Box<dyn ObjectStore>
        }};
    }
    let built = match scheme {
        "s3" | "s3a" => cloud!(AmazonS3Builder, AmazonS3ConfigKey),
        "gs" => cloud!(GoogleCloudStorageBuilder, GoogleConfigKey),
        "az" | "azure" | "adl" | "abfs" | "abfss" => cloud!(MicrosoftAzureBuilder, AzureConfigKey),
        "http" | "https" => {
            let (path, query) = key.split_once('?').unwrap_or((key, ""));
            let base = if query.is_empty() { String::new() } else { format!("/?{query}") };
            let mut builder = HttpBuilder::new().with_url(format!("{scheme}://{host}{base}")).with_retry(retry);
            for (key, value) in client {
                builder = builder.with_config(key, value);
            }
            let plain = (scheme == "http").to_string();
            builder = builder.with_config(ClientConfigKey::AllowHttp, plain);
            let key = Key::from_url_path(path).map_err(|error| wrong("the path of an object", error.to_string()))?;
            let store = Box::new(builder.build().map_err(store)?);
            return Ok(Place { store, key, base: format!("{scheme}://{host}/") });
        }
        other => return Err(wrong("s3://, gs://, az:// or http(s)://", format!("{other}://"))),
    };
    let key = Key::parse(key).map_err(|error| wrong("the name of an object", error.to_string()))?;
    Ok(Place { store: built, key, base: format!("{scheme}://{host}/") })
}

/// An object on its way into a file.
struct Download {
    place: Place,
    options: StorageOptions,
    file: File,
    limit: u64,
    /// Bytes that are in the file.
    reached: u64,
}

/// Why a download broke off.
enum Broken {
    /// It may go on.
    Dropped(String),
    /// It would be no use.
    Lost(String),
    /// It has nowhere to go.
    Spool(std::io::Error),
}

impl Download {
    async fn run(&mut self) -> Result<(), Broken> {
        let (mut failures, mut version) = (0, None);
        // The store takes up requests again by itself, so counting attempts would be no bound on the time.
        let patience = self.options.timeout.saturating_mul(self.options.retries.saturating_add(2));
        let mut since = Instant::now();
        loop {
            let before = self.reached;
            let left = patience.saturating_sub(since.elapsed());
            let dropped = match self.part(&mut version, left).await {
                Ok(()) => return Ok(()),
                Err(Broken::Dropped(message)) => message,
                Err(other) => return Err(other),
            };
            if self.reached >= before.saturating_add(PROGRESS) {
                failures = 0;
            }
            if self.reached > before {
                since = Instant::now();
            }
            failures += 1;
            if failures > self.options.retries || since.elapsed() >= patience {
                let reached = self.reached;
                return Err(Broken::Lost(format!("{dropped}, after {reached} of its bytes, in {failures} attempts")));
            }
            let pause = Duration::from_millis(100) * 2u32.saturating_pow(failures - 1);
            sleep(pause.min(LONGEST_PAUSE)).await;
        }
    }

    /// Fetches what is missing, as far as the connection holds, if there is an answer in the time that is `left`.
    async fn part(&mut self, version: &mut Option<ObjectMeta>, left: Duration) -> Result<(), Broken> {
        let patience = self.options.timeout;
        let silent = || Broken::Dropped(format!("no answer in {patience:?}"));
        let options = GetOptions {
            range: (self.reached > 0).then_some(GetRange::Offset(self.reached)),
            // Of another object the rest would not fit. A weak tag never matches (RFC 9110, section 13.1.1).
            if_match: version.as_ref().and_then(|meta| meta.e_tag.clone()).filter(|tag| !tag.starts_with("W/")),
            ..GetOptions::default()
        };
        let answer = timeout(left, self.place.store.get_opts(&self.place.key, options)).await;
        let answer = match answer.map_err(|_| silent())? {
            Err(Error::NotSupported { .. }) if self.reached > 0 => {
                // The server knows of no parts, so it has to be from the start.
                self.write(|file| file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).map(|_| ()))?;
                self.reached = 0;
                return Err(Broken::Dropped("a connection that dropped, to a server that sends no parts".to_owned()));
            }
            answer => answer.map_err(broken)?,
        };
        let size = answer.meta.size;
        if size > self.limit {
            return Err(Broken::Lost(format!("{size} bytes, more than the {} allowed", self.limit)));
        }
        // Not every server heeds the condition.
        let same = |meta: &ObjectMeta| {
            (meta.size, &meta.e_tag, meta.last_modified)
                == (answer.meta.size, &answer.meta.e_tag, answer.meta.last_modified)
        };
        if !same(version.get_or_insert_with(|| answer.meta.clone())) {
            return Err(Broken::Lost("another one than when it was begun".to_owned()));
        }
        let mut stream = answer.into_stream();
        loop {
            let next = poll_fn(|context| stream.as_mut().poll_next(context));
            match timeout(patience, next).await.map_err(|_| silent())? {
                Some(Ok(bytes)) => {
                    self.write(|file| file.write_all(&bytes))?;
                    self.reached += bytes.len() as u64;
                    if self.reached > size {
                        return Err(Broken::Lost(format!("more than the {size} bytes that were announced")));
                    }
                }
                Some(Err(error)) => return Err(broken(error)),
                None if self.reached < size => return Err(Broken::Dropped("a connection that dropped".to_owned())),
                None => return Ok(()),
            }
        }
    }

    fn write(&mut self, work: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<(), Broken> {
        work(&mut self.file).map_err(Broken::Spool)
    }
}

fn broken(error: Error) -> Broken {
    // The whole chain: the outermost says little.
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    match error {
        Error::Generic { .. } | Error::JoinError { .. } => Broken::Dropped(text),
        _ => Broken::Lost(text),
    }
}
