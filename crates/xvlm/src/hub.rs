//! Model folders on the Hugging Face hub.

use std::env;
use std::path::PathBuf;

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use crate::{ConfigProblem, Error};

/// The files of a model folder, the weights last: what is wrong with a repository shows before the long download.
const FILES: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];

/// Where published models come from, and where they are kept.
///
/// [`Predictor::from_hub`](crate::Predictor::from_hub) asks the environment; this is for programs that know better:
///
/// ```no_run
/// use xvlm::{Device, Hub, Predictor};
///
/// # fn main() -> Result<(), xvlm::Error> {
/// let hub = Hub { offline: true, ..Hub::from_env()? };
/// let predictor = Predictor::from_folder(hub.fetch("owner/name", "main")?, &Device::Cpu)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Hub {
    /// Address of the hub.
    pub endpoint: String,
    /// Folder of what was downloaded, laid out as by all tools of the hub.
    pub cache: PathBuf,
    /// Access token, for repositories that are not public.
    pub token: Option<String>,
    /// Whether to use the cache alone, and never the network.
    pub offline: bool,
}

impl Hub {
    /// The hub of the environment, as the hub's Python tools understand it:
    ///
    /// | variable | says | if it is not set |
    /// |---|---|---|
    /// | `HF_ENDPOINT` | address | `https://huggingface.co` |
    /// | `HF_HUB_CACHE` | folder of what was downloaded | `hub` in `HF_HOME` |
    /// | `HF_TOKEN` | access token | the content of the file `token` in `HF_HOME` |
    /// | `HF_HUB_OFFLINE` | `1`, `on`, `yes` or `true`: never use the network | the network is used |
    /// | `HF_HOME` | folder of the two defaults above | `huggingface` in `XDG_CACHE_HOME`, else in `~/.cache` |
    ///
    /// # Errors
    /// If no variable names a folder, and there is no home directory.
    pub fn from_env() -> Result<Self, Error> {
        Self::from_variables(|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let home = variable("HF_HOME").map(PathBuf::from).or_else(|| {
            let caches = variable("XDG_CACHE_HOME").map(PathBuf::from);
            Some(caches.or_else(|| Some(env::home_dir()?.join(".cache")))?.join("huggingface"))
        });
        let hub = home.map(|home| home.join("hub"));
        let token = variable("HF_TOKEN").or_else(|| Cache::new(hub.clone()?).token());
        let cache = variable("HF_HUB_CACHE").map(PathBuf::from).or(hub);
        let no_cache = || problem("HF_HOME", "expected a folder, found neither this variable nor a home directory");
        let offline = variable("HF_HUB_OFFLINE").map(|value| value.to_lowercase());
        Ok(Self {
            endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()),
            cache: cache.ok_or_else(no_cache)?,
            token,
            offline: offline.is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.as_str())),
        })
    }

    /// The folder of a model: repository `owner/name` at a revision, which is a branch (most often `main`), a tag or a
    /// commit.
    ///
    /// A file that the cache has for the revision is used as it is, without asking the hub whether there is a newer
    /// one; another is downloaded into the cache. All files are of one commit.
    ///
    /// # Errors
    /// If the repository or the revision is no such name, or a file can neither be found in the cache nor downloaded.
    pub fn fetch(&self, repository: &str, revision: &str) -> Result<PathBuf, Error> {
        check(repository, revision)?;
        let mut folder = PathBuf::new();
        // The first file says the commit, and the others are of it: a branch may move meanwhile.
        let mut commit = revision.to_owned();
        for file in FILES {
            folder = self.folder_with(file, repository, &commit).map_err(|cause| Error::Fetch {
                repository: repository.to_owned(),
                revision: revision.to_owned(),
                file: file.to_owned(),
                cause,
            })?;
            commit = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        }
        Ok(folder)
    }

    /// The folder of a revision's commit, with one file in it; or why there is none.
    fn folder_with(&self, file: &str, repository: &str, revision: &str) -> Result<PathBuf, String> {
        let repo = Repo::with_revision(repository.to_owned(), RepoType::Model, revision.to_owned());
        let cache = Cache::new(self.cache.clone());
        // Branches and tags stand in the cache with their commits; a commit may have its folder only.
        let of_commit = self.cache.join(repo.folder_name()).join("snapshots").join(revision).join(file);
        let cached = cache.repo(repo.clone()).get(file).or_else(|| of_commit.exists().then_some(of_commit));
        let mut path = match cached {
            Some(path) => path,
            None if self.offline => {
                let cache = self.cache.display();
                return Err(format!(
                    "expected it in the cache {cache}, as HF_HUB_OFFLINE keeps off the network, found none"
                ));
            }
            None => {
                let api = ApiBuilder::from_cache(cache)
                    .with_endpoint(self.endpoint.trim_end_matches('/').to_owned())
                    .with_token(self.token.clone())
                    .with_retries(3)
                    .with_progress(false);
                api.build().and_then(|api| api.repo(repo).download(file)).map_err(cause)?
            }
        };
        path.pop();
        Ok(path)
    }
}

/// The cause of a failed download, with what the hub itself says of it.
fn cause(error: ApiError) -> String {
    let text = error.to_string();
    let response = if let ApiError::RequestError(error) = error { error.into_response() } else { None };
    match response.as_ref().and_then(|response| response.header("x-error-message")) {
        Some(said) => format!("{text}: {said}"),
        None => text,
    }
}

/// Refuses names that would be another path in an address or in the cache.
fn check(repository: &str, revision: &str) -> Result<(), Error> {
    let plain = |part: &str| {
        let known = part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        known && !part.is_empty() && !part.starts_with(['-', '.']) && !part.ends_with('.') && !part.contains("..")
    };
    let pair = repository.split_once('/').is_some_and(|(owner, name)| plain(owner) && plain(name));
    // In the cache, `--` stands for `/`.
    if !pair || repository.contains("--") {
        let expected = "expected owner/name, both of letters, digits and single `-`, `_` and `.`";
        return Err(problem("repository", &format!("{expected}, found {repository:?}")));
    }
    if !revision.split('/').all(plain) {
        let expected = "expected a branch, tag or commit of letters, digits, `-`, `_`, `.` and `/`";
        return Err(problem("revision", &format!("{expected}, found {revision:?}")));
    }
    Ok(())
}

fn problem(option: &str, message: &str) -> Error {
    ConfigProblem { file: option.to_owned(), message: message.to_owned() }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        let value = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string());
        Hub::from_variables(value).unwrap()
    }

    #[test]
    fn the_environment_is_understood() {
        let plain = hub(&[("HF_HOME", "home")]);
        assert_eq!((plain.endpoint.as_str(), plain.offline), ("https://huggingface.co", false));
        assert_eq!(plain.cache, PathBuf::from("home/hub"));
        assert_eq!(plain.token, None);
        assert!(hub(&[]).cache.ends_with(".cache/huggingface/hub"));
        assert_eq!(hub(&[("XDG_CACHE_HOME", "caches")]).cache, PathBuf::from("caches/huggingface/hub"));
        assert_eq!(hub(&[("HF_HOME", "home"), ("HF_HUB_CACHE", "big disk")]).cache, PathBuf::from("big disk"));
        assert_eq!(hub(&[("HF_TOKEN", "hf_secret")]).token.as_deref(), Some("hf_secret"));
        assert_eq!(hub(&[("HF_ENDPOINT", "http://mirror")]).endpoint, "http://mirror");
        let offline = |value| hub(&[("HF_HUB_OFFLINE", value)]).offline;
        assert!(offline("1") && offline("TRUE") && offline("yes") && !offline("0") && !offline("no"));
    }
}
