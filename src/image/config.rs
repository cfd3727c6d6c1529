//! The image's configuration (image-spec, config.md): what to run, as whom, where, with what.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;

use crate::image::digest::Digest;
use crate::image::platform::Platform;

/// The label by which an image says what its guests are called: the specification has no field for it, and the one that
/// Docker writes into configurations is the name of the container that the image was built in.
pub(super) const HOSTNAME_LABEL: &str = "io.kiln.hostname";

/// Longest single text: the kernel's `MAX_ARG_STRLEN`, 32 pages, beyond which `execve` refuses.
const MAX_STRING: usize = 128 << 10;

/// All arguments and environment together: the kernel's default limit (a quarter of an 8 MiB stack).
const MAX_STRINGS_TOTAL: usize = 2 << 20;

/// Longest name of a system, processor or variant; real ones have a dozen letters.
const MAX_PLATFORM_NAME: usize = 64;

/// What the image's author configured. Every field may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageConfig {
    /// `ENTRYPOINT`: the program and its first arguments.
    pub entrypoint: Vec<String>,
    /// `CMD`: the default arguments, or the program if there is no entrypoint.
    pub cmd: Vec<String>,
    /// `ENV`: `NAME=value` texts, in order.
    pub env: Vec<String>,
    /// `WORKDIR`: absolute path of the working folder.
    pub working_dir: Option<String>,
    /// `USER`: `user`, `uid`, `user:group`, `uid:gid`...
    pub user: Option<String>,
    /// `STOPSIGNAL`, e.g. `SIGTERM`.
    pub stop_signal: Option<String>,
    /// `EXPOSE`: e.g. `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// `LABEL`.
    pub labels: BTreeMap<String, String>,
    /// The system and processor that the image is made for.
    pub platform: Platform,
}

/// Why a configuration was not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not the JSON of an image configuration.
    #[error("configuration is not valid json of the expected form")]
    Json(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The image is made for another processor or system.
    #[error("image is for {found}, not {wanted}")]
    Platform {
        /// What its configuration says.
        found: Box<Platform>,
        /// What was asked for.
        wanted: Box<Platform>,
    },
    /// A text contains a NUL byte, which no process can receive.
    #[error("{field} contains a nul byte")]
    Nul {
        /// Which field.
        field: &'static str,
    },
    /// Texts that no process could be started with.
    #[error("{field} is longer than {limit} bytes")]
    TooLong {
        /// Which field.
        field: &'static str,
        /// The limit, in bytes.
        limit: usize,
    },
}

#[derive(Deserialize)]
struct RawDocument {
    #[serde(default, deserialize_with = "null_as_default")]
    architecture: String,
    #[serde(default, deserialize_with = "null_as_default")]
    os: String,
    #[serde(default, deserialize_with = "null_as_default")]
    variant: String,
    #[serde(default, deserialize_with = "null_as_default")]
    config: RawConfig,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default, deserialize_with = "null_as_default")]
    diff_ids: Vec<Digest>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    #[serde(deserialize_with = "null_as_default")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    env: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    working_dir: String,
    #[serde(deserialize_with = "null_as_default")]
    user: String,
    #[serde(deserialize_with = "null_as_default")]
    stop_signal: String,
    #[serde(deserialize_with = "null_as_default")]
    exposed_ports: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(deserialize_with = "null_as_default")]
    labels: BTreeMap<String, String>,
}

/// Whether an `ENV` text sets anything; Docker ignores one that does not, so it is dropped here.
fn is_assignment(entry: &str) -> bool {
    entry.split_once('=').is_some_and(|(name, _)| !name.is_empty())
}

/// Builders written in Go write `null` for an empty list.
pub(super) fn null_as_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    input: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(input)?.unwrap_or_default())
}

impl ImageConfig {
    /// Largest accepted configuration, in bytes; real ones have a few KiB.
    pub(super) const MAX_SIZE: u64 = 4 << 20;

    /// The command the image runs by default: `ENTRYPOINT` followed by `CMD`.
    ///
    /// ```
    /// let mut config = kiln::image::ImageConfig::default();
    /// config.entrypoint = vec!["python3".into()];
    /// config.cmd = vec!["-V".into()];
    /// assert_eq!(config.command(), ["python3", "-V"]);
    /// ```
    #[must_use]
    pub fn command(&self) -> Vec<String> {
        self.entrypoint.iter().chain(&self.cmd).cloned().collect()
    }

    /// The host name that [`OciImageBuilder::hostname`](crate::image::OciImageBuilder::hostname) gave the image.
    #[must_use]
    pub fn hostname(&self) -> Option<&str> {
        self.labels.get(HOSTNAME_LABEL).map(String::as_str)
    }

    /// Parses a configuration; also returns the digests of the uncompressed layers, lowest first.
    pub(super) fn parse(bytes: &[u8]) -> Result<(Self, Vec<Digest>), ConfigError> {
        let raw: RawDocument = serde_json::from_slice(bytes).map_err(|error| ConfigError::Json(error.into()))?;
        let some = |text: String| (!text.is_empty()).then_some(text);
        let platform = Platform { architecture: raw.architecture, os: raw.os, variant: some(raw.variant) };
        let config = Self {
            entrypoint: raw.config.entrypoint,
            cmd: raw.config.cmd,
            env: raw.config.env.into_iter().filter(|entry| is_assignment(entry)).collect(),
            working_dir: some(raw.config.working_dir),
            user: some(raw.config.user),
            stop_signal: some(raw.config.stop_signal),
            exposed_ports: raw.config.exposed_ports.into_keys().collect(),
            labels: raw.config.labels,
            platform,
        };
        config.check()?;
        Ok((config, raw.rootfs.diff_ids))
    }

    /// Refuses an image for another system or processor than `wanted`. Which generation of the processor is the index's
    /// to say: configurations leave it out, or name one that the image does not need.
    pub(super) fn require(&self, wanted: &Platform) -> Result<(), ConfigError> {
        let found = &self.platform;
        if found.os == wanted.os && found.architecture == wanted.architecture {
            return Ok(());
        }
        Err(ConfigError::Platform { found: Box::new(found.clone()), wanted: Box::new(wanted.clone()) })
    }

    fn check(&self) -> Result<(), ConfigError> {
        let names = [("architecture", &self.platform.architecture), ("os", &self.platform.os)];
        for (field, name) in names.into_iter().chain(self.platform.variant.as_ref().map(|name| ("variant", name))) {
            if name.len() > MAX_PLATFORM_NAME {
                return Err(ConfigError::TooLong { field, limit: MAX_PLATFORM_NAME });
            }
        }
        let lists = [("entrypoint", &self.entrypoint), ("cmd", &self.cmd), ("env", &self.env)];
        let single = [("working dir", &self.working_dir), ("user", &self.user), ("stop signal", &self.stop_signal)];
        let mut total = 0_usize;
        let listed = lists.into_iter().flat_map(|(field, list)| list.iter().map(move |text| (field, text)));
        let singles = single.into_iter().filter_map(|(field, text)| text.as_ref().map(|text| (field, text)));
        for (field, text) in listed.chain(singles) {
            total = total.saturating_add(text.len());
            if text.len() >= MAX_STRING {
                return Err(ConfigError::TooLong { field, limit: MAX_STRING });
            }
            if total > MAX_STRINGS_TOTAL {
                return Err(ConfigError::TooLong { field, limit: MAX_STRINGS_TOTAL });
            }
            if text.contains('\0') {
                return Err(ConfigError::Nul { field });
            }
        }
        Ok(())
    }

    /// The document that [`ImageConfig::parse`] reads back.
    pub(super) fn to_json(&self, diff_ids: &[Digest]) -> Vec<u8> {
        #[derive(Serialize)]
        struct Document<'a> {
            architecture: &'a str,
            os: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            variant: Option<&'a str>,
            config: Config<'a>,
            rootfs: Rootfs<'a>,
        }
        #[derive(Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Config<'a> {
            entrypoint: &'a [String],
            cmd: &'a [String],
            env: &'a [String],
            working_dir: &'a Option<String>,
            user: &'a Option<String>,
            stop_signal: &'a Option<String>,
            exposed_ports: BTreeMap<&'a str, Empty>,
            labels: &'a BTreeMap<String, String>,
        }
        #[derive(Serialize)]
        struct Empty {}
        #[derive(Serialize)]
        struct Rootfs<'a> {
            r#type: &'a str,
            diff_ids: &'a [Digest],
        }
        let config = Config {
            entrypoint: &self.entrypoint,
            cmd: &self.cmd,
            env: &self.env,
            working_dir: &self.working_dir,
            user: &self.user,
            stop_signal: &self.stop_signal,
            exposed_ports: self.exposed_ports.iter().map(|port| (port.as_str(), Empty {})).collect(),
            labels: &self.labels,
        };
        let rootfs = Rootfs { r#type: "layers", diff_ids };
        let Platform { architecture, os, variant } = &self.platform;
        let document = Document { architecture, os, variant: variant.as_deref(), config, rootfs };
        serde_json::to_vec(&document).expect("texts and maps with text keys always serialise")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(config: &str) -> Result<ImageConfig, ConfigError> {
        let document =
            format!(r#"{{"architecture":"amd64","os":"linux","config":{config},"rootfs":{{"diff_ids":null}}}}"#);
        ImageConfig::parse(document.as_bytes()).map(|(config, _)| config)
    }

    #[test]
    fn nulls_and_absent_fields_are_empty() {
        assert_eq!(parse("null").unwrap(), ImageConfig::default());
        assert_eq!(parse(r#"{"Cmd":null,"Env":null,"Labels":null,"User":""}"#).unwrap(), ImageConfig::default());
    }

    #[test]
    fn environment_entries_that_set_nothing_are_dropped() {
        assert_eq!(parse(r#"{"Env":["A=","B","=c","D=e=f"]}"#).unwrap().env, ["A=", "D=e=f"]);
    }

    #[test]
    fn what_no_process_could_receive_is_refused() {
        assert!(matches!(parse(r#"{"Cmd":["a\u0000b"]}"#), Err(ConfigError::Nul { field: "cmd" })));
        let long = "x".repeat(MAX_STRING);
        assert!(matches!(parse(&format!(r#"{{"Env":["A={long}"]}}"#)), Err(ConfigError::TooLong { field: "env", .. })));
        let many = vec![format!("\"{}\"", "x".repeat(1 << 16)); 40].join(",");
        assert!(matches!(parse(&format!(r#"{{"Cmd":[{many}]}}"#)), Err(ConfigError::TooLong { field: "cmd", .. })));
    }

    #[test]
    fn another_platform_is_refused() {
        let document = br#"{"architecture":"arm64","os":"linux","rootfs":{"diff_ids":[]}}"#;
        let (config, _) = ImageConfig::parse(document).unwrap();
        let wanted = |text: &str| config.require(&text.parse().unwrap());
        assert!(matches!(wanted("linux/amd64"), Err(ConfigError::Platform { .. })));
        wanted("linux/arm64").unwrap();
        wanted("linux/arm64/v8").unwrap();
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            cmd in proptest::collection::vec("[^\0]{0,20}", 0..5),
            user in proptest::option::of("[a-z]{1,9}"),
            label in "\\PC{0,30}",
        ) {
            let mut config = ImageConfig { cmd, user, ..ImageConfig::default() };
            config.labels.insert("label".into(), label);
            let diff_ids = vec![Digest::of(b"layer")];
            let (read, read_ids) = ImageConfig::parse(&config.to_json(&diff_ids)).unwrap();
            prop_assert_eq!((read, read_ids), (config, diff_ids));
        }

        #[test]
        fn damaged_configurations_are_parsed_or_refused(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let config = ImageConfig { cmd: vec!["a".into()], env: vec!["B=c".into()], ..ImageConfig::default() };
            let mut bytes = config.to_json(&[Digest::of(b"")]);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = ImageConfig::parse(&bytes);
        }
    }
}
