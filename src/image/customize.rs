//! An image made from another: other configuration, some more files.
//!
//! The result is an image like any other, with a configuration, a manifest and a digest of its own in the store; the
//! layers below are shared. The same changes to the same image give the same digest: files get a fixed time, and nothing
//! of this host gets in but their content.

use std::io;
use std::io::Cursor;
use std::io::Read;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;

use bytes::Bytes;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use crate::image::Image;
use crate::image::config::ConfigError;
use crate::image::config::HOSTNAME_LABEL;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::image::error::ManifestError;
use crate::image::layout::open_regular;
use crate::image::manifest::Manifest;
use crate::image::manifest::OCI_CONFIG;
use crate::image::manifest::OCI_LAYER;
use crate::image::manifest::OCI_MANIFEST;
use crate::image::store::ImageStore;
use crate::image::store::Lease;
use crate::image::store::StoreError;

type Object = Map<String, Value>;

/// A file to add to an image. Replaces what is at its path; folders on the way are made, as root's, where missing.
///
/// ```
/// use kiln::image::ImageFile;
/// let file = ImageFile::new("/etc/app.conf", "debug = true\n").mode(0o600).owner(1000, 1000);
/// # drop(file);
/// ```
#[derive(Clone, Debug)]
#[must_use = "a file is added by `OciImageBuilder::file`"]
pub struct ImageFile {
    path: String,
    mode: u32,
    owner: (u32, u32),
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Bytes(Bytes),
    Host(PathBuf),
}

impl ImageFile {
    /// A file with this content at the absolute path `path` of the image; root's, mode 0644.
    pub fn new(path: impl Into<String>, content: impl Into<Bytes>) -> Self {
        Self::from_source(path.into(), Source::Bytes(content.into()))
    }

    /// A file with the content that the file `host` of this machine has when the image is made; root's, mode 0644.
    pub fn from_host(path: impl Into<String>, host: impl Into<PathBuf>) -> Self {
        Self::from_source(path.into(), Source::Host(host.into()))
    }

    const fn from_source(path: String, source: Source) -> Self {
        Self { path, mode: 0o644, owner: (0, 0), source }
    }

    /// Permission bits, with setuid, setgid and sticky.
    pub const fn mode(mut self, mode: u32) -> Self {
        self.mode = mode & 0o7777;
        self
    }

    /// Owner and group, by number.
    pub const fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.owner = (uid, gid);
        self
    }
}

/// Why an image could not be changed as asked. Nothing half-written is left in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CustomizeError {
    /// The configuration that would result is not acceptable.
    #[error("the changed configuration is not acceptable")]
    Config(#[from] ConfigError),
    /// The working folder is not an absolute path.
    #[error("working folder {0:?} is not an absolute path")]
    Workdir(String),
    /// A variable's name is empty or contains `=`.
    #[error("{0:?} is not the name of an environment variable")]
    Variable(String),
    /// Not a name that a host can have (RFC 1123, section 2.1).
    #[error("{0:?} is not a host name")]
    Hostname(String),
    /// Not an absolute path of a file, or one with `..`.
    #[error("{0:?} is not the absolute path of a file in the image")]
    FilePath(String),
    /// A file of this machine cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The image to be changed is not whole in the store any more.
    #[error("image {0} is not in the store any more")]
    Gone(Digest),
    /// The manifest or configuration of the image cannot be used.
    #[error("the image cannot be used")]
    Manifest(#[source] Box<ManifestError>),
    /// The store failed.
    #[error("the image store failed")]
    Store(#[from] StoreError),
}

/// What to change about an image; [`Image::changed`] makes the image that results.
///
/// ```
/// use kiln::image::{ImageChanges, ImageFile};
/// let changes = ImageChanges::new()
///     .env("MODE", "test")
///     .user("nobody")
///     .file(ImageFile::new("/etc/motd", "hello\n"));
/// # drop(changes);
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "changes do nothing until they are applied"]
pub struct ImageChanges {
    entrypoint: Option<Vec<String>>,
    command: Option<Vec<String>>,
    env: Vec<(String, String)>,
    user: Option<String>,
    workdir: Option<String>,
    hostname: Option<String>,
    files: Vec<ImageFile>,
}

impl ImageChanges {
    /// No change.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces ENTRYPOINT; CMD is dropped then, as arguments for another program, unless [`ImageChanges::command`] sets it.
    pub fn entrypoint<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.entrypoint = Some(argv.into_iter().map(Into::into).collect());
        self
    }

    /// Replaces CMD: the arguments of ENTRYPOINT or, without one, the whole command.
    pub fn command<S: Into<String>>(mut self, argv: impl IntoIterator<Item = S>) -> Self {
        self.command = Some(argv.into_iter().map(Into::into).collect());
        self
    }

    /// Sets an environment variable, in place of the image's own of that name.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Replaces USER: `user`, `uid`, `user:group`, `uid:gid`.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Replaces WORKDIR; an absolute path, made in the guest where it is missing.
    pub fn workdir(mut self, folder: impl Into<String>) -> Self {
        self.workdir = Some(folder.into());
        self
    }

    /// The host name of the image's guests, unless [`VmConfig::hostname`](crate::vm::VmConfig::hostname) says another.
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = Some(name.into());
        self
    }

    /// Adds a file, over the image's layers. Of several at one path the last counts.
    pub fn file(mut self, file: ImageFile) -> Self {
        self.files.push(file);
        self
    }

    pub(super) fn is_empty(&self) -> bool {
        let Self { entrypoint, command, env, user, workdir, hostname, files } = self;
        entrypoint.is_none()
            && command.is_none()
            && user.is_none()
            && workdir.is_none()
            && hostname.is_none()
            && env.is_empty()
            && files.is_empty()
    }

    /// What can be told to be wrong before anything is fetched.
    pub(super) fn check(&self) -> Result<(), CustomizeError> {
        if let Some(folder) = self.workdir.as_ref().filter(|folder| !folder.starts_with('/')) {
            return Err(CustomizeError::Workdir(folder.clone()));
        }
        if let Some((name, _)) = self.env.iter().find(|(name, _)| name.is_empty() || name.contains('=')) {
            return Err(CustomizeError::Variable(name.clone()));
        }
        if let Some(name) = self.hostname.as_ref().filter(|name| !is_host_name(name)) {
            return Err(CustomizeError::Hostname(name.clone()));
        }
        match self.files.iter().find(|file| !is_file_path(&file.path)) {
            Some(file) => Err(CustomizeError::FilePath(file.path.clone())),
            None => Ok(()),
        }
    }
}

/// Labels of letters, digits and inner hyphens, within Linux's 64 bytes.
fn is_host_name(name: &str) -> bool {
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.len() <= 64 && name.split('.').all(is_label)
}

fn is_file_path(path: &str) -> bool {
    let is_plain = |part: &str| !part.is_empty() && part != "." && part != ".." && part.len() <= 255;
    path.len() <= 4096
        && !path.contains('\0')
        && path.strip_prefix('/').is_some_and(|path| path.split('/').all(is_plain))
}

/// Makes the changed image. Blocking.
pub(super) fn customize(store: &ImageStore, image: &Image, changes: &ImageChanges) -> Result<Image, CustomizeError> {
    changes.check()?;
    let (mut manifest, mut config) = documents(store, image)?;
    let mut kept = None;
    if !changes.files.is_empty() {
        let (digest, size, lease) = write_layer(store, &changes.files)?;
        kept = Some(lease);
        let layer = json!({ "mediaType": OCI_LAYER, "digest": digest, "size": size });
        list(&mut manifest, "layers").push(layer);
        list(object(&mut config, "rootfs"), "diff_ids").push(json!(digest));
    }
    configure(object(&mut config, "config"), changes);
    if let Some(Value::Array(history)) = config.get_mut("history") {
        history.push(json!({ "created_by": "kiln", "empty_layer": changes.files.is_empty() }));
    }
    let config = Value::Object(config).to_string().into_bytes();
    // Nothing gets into the store that could not be read back.
    ImageConfig::parse(&config)?;
    let config_digest = Digest::of(&config);
    manifest.insert("mediaType".to_owned(), json!(OCI_MANIFEST));
    let descriptor = json!({ "mediaType": OCI_CONFIG, "digest": config_digest, "size": config.len() });
    manifest.insert("config".to_owned(), descriptor);
    let manifest = Value::Object(manifest).to_string().into_bytes();
    let digest = Digest::of(&manifest);
    // Until the image keeps its blobs itself.
    let _lease = (store.lease(&[config_digest, digest])?, kept);
    store.put_small(&config_digest, &config)?;
    store.put_small(&digest, &manifest)?;
    store.load(&digest).map_err(manifest_error)?.ok_or(CustomizeError::Gone(digest))
}

/// The image's manifest and configuration, with all that is in them.
fn documents(store: &ImageStore, image: &Image) -> Result<(Object, Object), CustomizeError> {
    let gone = || CustomizeError::Gone(*image.digest());
    let json = |error: serde_json::Error| manifest_error(ManifestError::Json(error.into()));
    let manifest = store.read_small(image.digest(), Manifest::MAX_SIZE)?.ok_or_else(gone)?;
    let parsed: Manifest = serde_json::from_slice(&manifest).map_err(json)?;
    let config = store.read_small(&parsed.config.digest, ImageConfig::MAX_SIZE)?.ok_or_else(gone)?;
    let manifest = serde_json::from_slice(&manifest).map_err(json)?;
    Ok((manifest, serde_json::from_slice(&config).map_err(json)?))
}

fn manifest_error(error: ManifestError) -> CustomizeError {
    match error {
        ManifestError::Store(error) => CustomizeError::Store(error),
        error => CustomizeError::Manifest(Box::new(error)),
    }
}

/// The object at `key`, made if there is `null` or nothing: both are what builders write for an empty one.
fn object<'a>(parent: &'a mut Object, key: &str) -> &'a mut Object {
    let value = parent.entry(key).or_insert(Value::Null);
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("it was just made one")
}

fn list<'a>(parent: &'a mut Object, key: &str) -> &'a mut Vec<Value> {
    let value = parent.entry(key).or_insert(Value::Null);
    if !value.is_array() {
        *value = Value::Array(Vec::new());
    }
    value.as_array_mut().expect("it was just made one")
}

fn configure(config: &mut Object, changes: &ImageChanges) {
    let mut set = |key: &str, value: Value| drop(config.insert(key.to_owned(), value));
    if let Some(entrypoint) = &changes.entrypoint {
        set("Entrypoint", json!(entrypoint));
        // The image's own arguments were meant for its own program.
        set("Cmd", Value::Null);
    }
    if let Some(command) = &changes.command {
        set("Cmd", json!(command));
    }
    if let Some(user) = &changes.user {
        set("User", json!(user));
    }
    if let Some(workdir) = &changes.workdir {
        set("WorkingDir", json!(workdir));
    }
    if let Some(hostname) = &changes.hostname {
        object(config, "Labels").insert(HOSTNAME_LABEL.to_owned(), json!(hostname));
    }
    if !changes.env.is_empty() {
        let env = list(config, "Env");
        for (name, value) in &changes.env {
            let is_other = |entry: &Value| {
                entry.as_str().and_then(|entry| entry.split_once('=')).is_none_or(|(other, _)| other != name)
            };
            env.retain(is_other);
            env.push(json!(format!("{name}={value}")));
        }
    }
}

/// Writes the files as a layer; returns its digest and size, and what keeps it.
fn write_layer(store: &ImageStore, files: &[ImageFile]) -> Result<(Digest, u64, Lease), CustomizeError> {
    store.put_written(|out, path| {
        let mut archive = tar::Builder::new(out);
        files.iter().try_for_each(|file| append(&mut archive, file, path))?;
        archive.into_inner().map(drop).map_err(|source| StoreError::io(path)(source).into())
    })
}

fn append(archive: &mut tar::Builder<&mut dyn Write>, file: &ImageFile, to: &Path) -> Result<(), CustomizeError> {
    let (content, size): (Box<dyn Read + '_>, u64) = match &file.source {
        Source::Bytes(bytes) => (Box::new(Cursor::new(bytes)), bytes.len() as u64),
        Source::Host(path) => {
            let read = |source| CustomizeError::Read { path: path.clone(), source };
            let file = open_regular(path).map_err(read)?;
            let size = file.metadata().map_err(read)?.len();
            (Box::new(file), size)
        }
    };
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(file.mode);
    header.set_uid(u64::from(file.owner.0));
    header.set_gid(u64::from(file.owner.1));
    header.set_mtime(0);
    header.set_size(size);
    let mut content = Exactly { input: content, left: size, failed: false };
    let appended = archive.append_data(&mut header, file.path.trim_start_matches('/'), &mut content);
    appended.map_err(|source| match &file.source {
        Source::Host(path) if content.failed => CustomizeError::Read { path: path.clone(), source },
        _ => StoreError::io(to)(source).into(),
    })
}

/// As many bytes as the header promises: a file that shrinks while it is read would tear the archive.
struct Exactly<R> {
    input: R,
    left: u64,
    /// Whether it was reading that failed, rather than writing what had been read.
    failed: bool,
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let count = match self.input.read(&mut buffer[..want]) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was read")),
            result => result,
        };
        self.failed = count.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::Interrupted);
        let count = count?;
        self.left -= count as u64;
        Ok(count)
    }
}
