//! Credentials that `docker login`, `podman login` and others left in Docker's `config.json`.
//!
//! For each registry, in this order: the helper that `credHelpers` names for it; the one in `credsStore`, for all; an entry
//! of `auths`. Own code of a few dozen lines, because what there is for this on crates.io waits for helpers with the
//! thread it is called on, without a deadline, and reads the environment.

use std::collections::BTreeMap;
use std::io;
use std::io::Read;
use std::path::Path;
use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::image::layout::open_regular;
use crate::image::registry::auth::RegistryAuth;
use crate::image::registry::helper;
use crate::image::registry::helper::HelperError;
use crate::image::store::run_blocking;

/// Largest accepted file, in bytes; real ones have a few KiB.
const MAX_SIZE: u64 = 1 << 20;

/// What Docker calls Docker Hub, in its configuration and to its helpers.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// The names under which Docker Hub's credentials are found; Docker's own first.
const DOCKER_HUB_NAMES: [&str; 4] = [DOCKER_HUB, "index.docker.io", "docker.io", "registry-1.docker.io"];

/// The user name by which a helper says that the secret is an identity token.
const IDENTITY_USER: &str = "<token>";

/// A Docker configuration file, `~/.docker/config.json` as a rule.
///
/// ```
/// use kiln::image::{DockerConfig, Image};
/// let builder = Image::builder("registry.example/app").docker_config("/etc/ci/docker.json");
/// let other = DockerConfig::new("/etc/ci/docker.json").helpers("/opt/ci/bin");
/// # drop((builder, other));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DockerConfig {
    source: Source,
    helpers: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    User,
    File(PathBuf),
}

impl DockerConfig {
    /// The file at `path`. That there is none means no credentials.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { source: Source::File(path.into()), helpers: None }
    }

    /// The user's, `~/.docker/config.json`.
    #[must_use]
    pub const fn user() -> Self {
        Self { source: Source::User, helpers: None }
    }

    /// The folder of the credential helpers, `docker-credential-...`; without it they are looked up as any program is, in
    /// the folders of `PATH`.
    #[must_use]
    pub fn helpers(mut self, folder: impl Into<PathBuf>) -> Self {
        self.helpers = Some(folder.into());
        self
    }

    /// The credentials for a registry.
    pub(super) async fn credentials(&self, registry: &str) -> Result<RegistryAuth, CredentialsError> {
        let path = match &self.source {
            Source::File(path) => path.clone(),
            Source::User => match std::env::home_dir() {
                Some(home) => home.join(".docker/config.json"),
                None => return Ok(RegistryAuth::Anonymous),
            },
        };
        let read = {
            let path = path.clone();
            run_blocking(move || Ok::<_, crate::image::store::StoreError>(read(&path))).await
        };
        let Some(text) =
            read.map_err(|error| CredentialsError::Io { path: path.clone(), source: io::Error::other(error) })??
        else {
            return Ok(RegistryAuth::Anonymous);
        };
        let config = Config::parse(&path, &text)?;
        let names = names(registry);
        if let Some(name) = config.helper(&names) {
            let server = names.first().copied().unwrap_or(registry);
            let answer = helper::get(self.helpers.as_deref(), name, server).await;
            let answer = answer.map_err(|source| CredentialsError::Helper { name: name.to_owned(), source })?;
            if let Some(answer) = answer {
                return Ok(match answer.username.as_str() {
                    IDENTITY_USER => RegistryAuth::identity(answer.secret),
                    _ => RegistryAuth::basic(answer.username, answer.secret),
                });
            }
        }
        config.entry(&path, &names)
    }
}

impl From<&str> for DockerConfig {
    fn from(path: &str) -> Self {
        Self::new(path)
    }
}

impl From<&Path> for DockerConfig {
    fn from(path: &Path) -> Self {
        Self::new(path)
    }
}

impl From<PathBuf> for DockerConfig {
    fn from(path: PathBuf) -> Self {
        Self::new(path)
    }
}

/// Why credentials could not be read. No secret is in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// The file is there and cannot be read.
    #[error("docker configuration {} cannot be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is longer than any real one.
    #[error("docker configuration {} is longer than {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// What is accepted, in bytes.
        limit: u64,
    },
    /// The file is not JSON of the expected form.
    #[error("docker configuration {} is not valid at line {line}, column {column}: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// Where, from 1.
        column: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// The entry for the registry cannot be used.
    #[error("docker configuration {} has an entry for {registry:?} that cannot be used: {reason}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// The entry's name.
        registry: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The program that the configuration names for keeping credentials failed.
    #[error("credential helper {name:?} failed")]
    Helper {
        /// Its name, without `docker-credential-`.
        name: String,
        /// How it failed.
        #[source]
        source: HelperError,
    },
}

/// The file's text; `None` if there is none. Blocking.
fn read(path: &Path) -> Result<Option<Vec<u8>>, CredentialsError> {
    let mut text = Vec::new();
    match open_regular(path).and_then(|file| file.take(MAX_SIZE + 1).read_to_end(&mut text)) {
        Ok(_) if text.len() as u64 > MAX_SIZE => {
            Err(CredentialsError::TooLarge { path: path.to_owned(), limit: MAX_SIZE })
        }
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CredentialsError::Io { path: path.to_owned(), source }),
    }
}

/// The names under which a registry's credentials may be kept; the first is the one to ask helpers for.
fn names(registry: &str) -> Vec<&str> {
    if DOCKER_HUB_NAMES.contains(&registry) { DOCKER_HUB_NAMES.to_vec() } else { vec![registry] }
}

#[derive(Default, Deserialize)]
struct Config {
    auths: Option<BTreeMap<String, Option<Entry>>>,
    #[serde(rename = "credHelpers")]
    helpers: Option<BTreeMap<String, String>>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
}

#[derive(Default, Deserialize)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl Config {
    fn parse(path: &Path, text: &[u8]) -> Result<Self, CredentialsError> {
        // The parser's own words quote what they object to, and that may be a password.
        serde_json::from_slice(text).map_err(|error| CredentialsError::Json {
            path: path.to_owned(),
            line: error.line(),
            column: error.column(),
            reason: match error.classify() {
                serde_json::error::Category::Data => "a value of another type is expected",
                serde_json::error::Category::Eof => "it ends too early",
                _ => "it is not json",
            },
        })
    }

    fn helper(&self, names: &[&str]) -> Option<&str> {
        let own = self.helpers.as_ref().and_then(|helpers| names.iter().find_map(|name| helpers.get(*name)));
        own.or(self.store.as_ref()).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// The entry of `auths`: by its exact name, or else by the host in its name, as Docker does.
    fn entry(&self, path: &Path, names: &[&str]) -> Result<RegistryAuth, CredentialsError> {
        let Some(auths) = &self.auths else { return Ok(RegistryAuth::Anonymous) };
        let exact = names.iter().find_map(|name| auths.get_key_value(*name));
        let same_host = || auths.iter().find(|(key, _)| names.contains(&host(key)));
        match exact.or_else(same_host) {
            Some((key, Some(entry))) => entry.auth().map_err(|reason| CredentialsError::Entry {
                path: path.to_owned(),
                registry: key.clone(),
                reason,
            }),
            _ => Ok(RegistryAuth::Anonymous),
        }
    }
}

impl Entry {
    fn auth(&self) -> Result<RegistryAuth, &'static str> {
        let given = |field: &Option<String>| field.clone().filter(|text| !text.is_empty());
        if let Some(token) = given(&self.identitytoken) {
            return Ok(RegistryAuth::identity(token));
        }
        if let Some(token) = given(&self.registrytoken) {
            return Ok(RegistryAuth::bearer(token));
        }
        if let Some(encoded) = given(&self.auth) {
            let decoded = STANDARD.decode(encoded).map_err(|_| "auth is not base64")?;
            let decoded = String::from_utf8(decoded).map_err(|_| "auth is not utf-8")?;
            let (user, password) = decoded.split_once(':').ok_or("auth is not of the form user:password")?;
            return Ok(RegistryAuth::basic(user, password.trim_matches('\0')));
        }
        match (given(&self.username), given(&self.password)) {
            (Some(user), Some(password)) => Ok(RegistryAuth::basic(user, password)),
            (Some(_), None) => Err("it has a username and no password"),
            // What Docker leaves for registries whose credentials a helper keeps.
            _ => Ok(RegistryAuth::Anonymous),
        }
    }
}

/// The host, and port, of an entry's name, which may be an address.
fn host(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    key.split('/').next().unwrap_or(key)
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use proptest::prelude::*;

    use super::*;

    fn entry(config: &str, registry: &str) -> Result<RegistryAuth, CredentialsError> {
        let path = Path::new("config.json");
        Config::parse(path, config.as_bytes())?.entry(path, &names(registry))
    }

    #[test]
    fn entries_are_found_by_name_and_by_host() {
        let config = r#"{"auths":{
            "https://index.docker.io/v1/":{"username":"hub","password":"p"},
            "registry.example":{"username":"plain","password":"p"},
            "registry.example:5000":{"username":"port","password":"p"},
            "https://other.example/v2/":{"username":"path","password":"p"},
            "empty.example":{}, "null.example":null}}"#;
        let cases = [
            ("docker.io", "hub"),
            ("registry.example", "plain"),
            ("registry.example:5000", "port"),
            ("other.example", "path"),
        ];
        for (registry, user) in cases {
            assert_eq!(entry(config, registry).unwrap(), RegistryAuth::basic(user, "p"), "{registry}");
        }
        for registry in ["registry.example:5001", "unknown.example", "empty.example", "null.example"] {
            assert_eq!(entry(config, registry).unwrap(), RegistryAuth::Anonymous, "{registry}");
        }
    }

    #[test]
    fn every_kind_of_entry() {
        let with = |fields: &str| entry(&format!(r#"{{"auths":{{"r.example":{{{fields}}}}}}}"#), "r.example").unwrap();
        let encoded = STANDARD.encode("user:pass:word\0\0");
        assert_eq!(with(&format!(r#""auth":"{encoded}""#)), RegistryAuth::basic("user", "pass:word"));
        assert_eq!(
            with(&format!(r#""auth":"{encoded}","identitytoken":"t""#)),
            RegistryAuth::identity("t"),
            "the token is what a login left in place of a password"
        );
        assert_eq!(with(r#""registrytoken":"t""#), RegistryAuth::bearer("t"));
    }

    #[test]
    fn helpers_are_chosen_by_registry_then_for_all() {
        let text = br#"{"credsStore":"all","credHelpers":{"a.example":"one","docker.io":"hub"}}"#;
        let config = Config::parse(Path::new("c"), text).unwrap();
        for (registry, helper) in [("a.example", "one"), ("b.example", "all"), ("docker.io", "hub")] {
            assert_eq!(config.helper(&names(registry)), Some(helper), "{registry}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_the_secret() {
        let cases = [
            r#"{"auths":{"r.example":{"auth":"hunter2!"}}}"#,
            r#"{"auths":{"r.example":{"auth":["hunter2"]}}}"#,
            r#"{"auths":{"r.example":"hunter2"}}"#,
            r#"{"auths":{"r.example":{"username":"hunter2"}}}"#,
            r#"{"auths":hunter2}"#,
        ];
        for config in cases {
            let error = entry(config, "r.example").unwrap_err();
            let mut text = format!("{error} {error:?}");
            let mut cause = error.source();
            while let Some(error) = cause {
                text.push_str(&error.to_string());
                cause = error.source();
            }
            assert!(text.contains("config.json") && !text.contains("hunter2"), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_file_is_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), registry in ".{0,20}") {
            if let Ok(config) = Config::parse(Path::new("c"), &bytes) {
                let _ = config.entry(Path::new("c"), &names(&registry));
            }
        }

        #[test]
        fn any_entry_is_used_or_refused(key in "\\PC{0,30}", auth in "\\PC{0,30}") {
            let text = serde_json::json!({ "auths": { key.clone(): { "auth": auth } } }).to_string();
            let _ = entry(&text, host(&key));
        }
    }
}
