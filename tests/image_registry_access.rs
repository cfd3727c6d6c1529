//! Who may pull, and from whom: credentials of every kind, from code and from Docker's configuration, and TLS. The
//! registry is a real one, and decides by itself.

mod image_support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image_support::LayerBlob;
use image_support::Layout;
use image_support::Place;
use image_support::Tar;
use image_support::certificates::Certificates;
use image_support::proxy::Fault;
use image_support::proxy::Proxy;
use image_support::registry::Registry;
use image_support::registry::USER;
use image_support::tokens::IDENTITY;
use image_support::tokens::TokenServer;
use kiln::image::CredentialsError;
use kiln::image::DockerConfig;
use kiln::image::HelperError;
use kiln::image::Image;
use kiln::image::Mirror;
use kiln::image::OciImageBuilder;
use kiln::image::PullError;
use kiln::image::RegistryAuth;
use kiln::image::RegistryTransport;
use kiln::image::Tls;
use serde_json::json;

fn layout() -> Layout {
    Layout::of(&[LayerBlob::gzip(&Tar::new().file("a", b"content").finish())])
}

fn credentials() -> String {
    format!("{}:{}", USER.0, USER.1)
}

fn builder(place: &Place, reference: &str) -> OciImageBuilder {
    Image::builder(reference).store(place.store.clone()).retries(1)
}

async fn refused(place: &Place, builder: OciImageBuilder) -> PullError {
    let error = builder.pull().await.expect_err("the pull must fail");
    assert_eq!(place.debris(), [""; 0]);
    assert!(!chain(&error).contains(USER.1), "{error:?}");
    error
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// A registry that wants a password, and a Docker configuration.
struct Private {
    registry: Registry,
    place: Place,
    folder: tempfile::TempDir,
}

impl Private {
    async fn new() -> Self {
        let registry = Registry::with_auth();
        registry.push(layout().folder.path(), "latest", "app:1", &["--dest-creds", &credentials()]);
        Self { registry, place: Place::new().await, folder: image_support::scratch() }
    }

    fn config(&self, content: &serde_json::Value) -> PathBuf {
        let path = self.folder.path().join("config.json");
        fs::write(&path, content.to_string()).unwrap();
        path
    }

    fn builder(&self) -> OciImageBuilder {
        builder(&self.place, &format!("{}/app:1", self.registry.address))
    }

    /// A helper called "test", and a configuration that names it for everything.
    fn helper(&self, script: &str) -> DockerConfig {
        let path = self.folder.path().join("docker-credential-test");
        // A new file each time: one that is running cannot be written.
        let _ = fs::remove_file(&path);
        image_support::run("sh", &["-c", &format!("cat > {} <<'END'\n#!/bin/sh\n{script}\nEND", path.display())]);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        DockerConfig::new(self.config(&json!({ "credsStore": "test" }))).helpers(self.folder.path())
    }
}

#[tokio::test]
async fn entries_of_a_docker_configuration() {
    let private = Private::new().await;
    let address = private.registry.address.clone();
    let encoded = STANDARD.encode(credentials());
    let entries = [
        json!({ address.clone(): { "auth": encoded } }),
        json!({ format!("http://{address}/v2/"): { "auth": encoded } }),
        json!({ address.clone(): { "username": USER.0, "password": USER.1 } }),
    ];
    for entry in entries {
        let path = private.config(&json!({ "auths": entry }));
        let other = Place::new().await;
        private.builder().store(other.store.clone()).docker_config(path).pull().await.unwrap();
    }
    let wrong = STANDARD.encode(format!("{}:wrong", USER.0));
    let path = private.config(&json!({ "auths": { address.clone(): { "auth": wrong } } }));
    let error = refused(&private.place, private.builder().docker_config(path)).await;
    assert!(matches!(&error, PullError::Unauthorized { registry, .. } if *registry == address), "{error:?}");
    // Of another registry, of none, and overruled.
    let path = private.config(&json!({ "auths": { "registry.example": { "auth": encoded } } }));
    let missing = private.folder.path().join("missing.json");
    let right = private.folder.path().join("right.json");
    fs::write(&right, json!({ "auths": { address: { "auth": encoded } } }).to_string()).unwrap();
    for nobody in [
        private.builder().docker_config(path),
        private.builder().docker_config(missing),
        private.builder().docker_config(right).auth(RegistryAuth::Anonymous),
    ] {
        assert!(matches!(refused(&private.place, nobody).await, PullError::Unauthorized { .. }));
    }
}

#[tokio::test]
async fn a_docker_configuration_that_cannot_be_used() {
    let private = Private::new().await;
    let path = private.config(&json!({ "auths": { "registry.example": USER.1 } }));
    let error = refused(&private.place, private.builder().docker_config(path.clone())).await;
    assert!(
        matches!(&error, PullError::Credentials(CredentialsError::Json { path: named, .. }) if *named == path),
        "{error:?}"
    );
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let error = refused(&private.place, private.builder().docker_config(path)).await;
    assert!(matches!(error, PullError::Credentials(CredentialsError::Io { .. })), "{error:?}");
    let fifo = private.folder.path().join("fifo");
    image_support::run("mkfifo", &[fifo.to_str().unwrap()]);
    let error = refused(&private.place, private.builder().docker_config(fifo)).await;
    assert!(matches!(error, PullError::Credentials(CredentialsError::Io { .. })), "{error:?}");
}

#[tokio::test]
async fn credential_helpers() {
    let private = Private::new().await;
    let answer = json!({ "ServerURL": private.registry.address, "Username": USER.0, "Secret": USER.1 });
    let log = private.folder.path().join("asked");
    let config = private.helper(&format!("cat > {}\necho '{answer}'", log.display()));
    private.builder().docker_config(config).pull().await.unwrap();
    assert_eq!(fs::read_to_string(log).unwrap().trim(), private.registry.address);

    // One that knows nothing leaves it to the entries.
    private.helper("echo credentials not found in native keychain; exit 1");
    let auths = json!({ private.registry.address.clone(): { "auth": STANDARD.encode(credentials()) } });
    let path = private.config(&json!({ "credsStore": "test", "auths": auths }));
    let config = DockerConfig::new(path).helpers(private.folder.path());
    private.builder().docker_config(config).pull().await.unwrap();
    let config = private.helper("echo credentials not found in native keychain; exit 1");
    let error = refused(&private.place, private.builder().docker_config(config)).await;
    assert!(matches!(error, PullError::Unauthorized { .. }), "{error:?}");
}

#[tokio::test]
async fn credential_helpers_that_fail() {
    fn helper(error: &PullError) -> &HelperError {
        match error {
            PullError::Credentials(CredentialsError::Helper { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    }
    let private = Private::new().await;
    let error = refused(&private.place, private.builder().docker_config(private.helper("echo locked; exit 1"))).await;
    assert!(matches!(helper(&error), HelperError::Failed { message } if message == "locked"), "{error:?}");
    let error = refused(&private.place, private.builder().docker_config(private.helper("yes"))).await;
    assert!(matches!(helper(&error), HelperError::TooLarge { .. }), "{error:?}");
    let error = refused(&private.place, private.builder().docker_config(private.helper("echo no"))).await;
    assert!(matches!(helper(&error), HelperError::Answer), "{error:?}");
    let config = DockerConfig::new(private.config(&json!({ "credsStore": "absent" }))).helpers(private.folder.path());
    let error = refused(&private.place, private.builder().docker_config(config)).await;
    assert!(
        matches!(helper(&error), HelperError::Start { program, .. } if program == "docker-credential-absent"),
        "{error:?}"
    );
    let config = DockerConfig::new(private.config(&json!({ "credsStore": "../evil" })));
    let error = refused(&private.place, private.builder().docker_config(config)).await;
    assert!(matches!(helper(&error), HelperError::Name), "{error:?}");
}

/// The default, which depends on the user's home and PATH; so the test is its own child, with others.
#[tokio::test]
async fn the_users_own_configuration_and_a_helper_on_the_path() {
    const REFERENCE: &str = "KILN_TEST_REFERENCE";
    if let Ok(reference) = std::env::var(REFERENCE) {
        let place = Place::new().await;
        builder(&place, &reference).pull().await.unwrap();
        return;
    }
    let private = Private::new().await;
    private.helper(&format!("echo '{}'", json!({ "Username": USER.0, "Secret": USER.1 })));
    let home = image_support::scratch();
    let pull = || {
        let path = format!("{}:{}", private.folder.path().display(), std::env::var("PATH").unwrap());
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_users_own_configuration_and_a_helper_on_the_path"])
            .env(REFERENCE, format!("{}/app:1", private.registry.address))
            .envs([("HOME", home.path().to_str().unwrap()), ("PATH", path.as_str())])
            .output()
            .unwrap()
    };
    let nobody = pull();
    assert!(String::from_utf8_lossy(&nobody.stdout).contains("Unauthorized"), "{nobody:?}");
    fs::create_dir(home.path().join(".docker")).unwrap();
    fs::copy(private.folder.path().join("config.json"), home.path().join(".docker/config.json")).unwrap();
    let user = pull();
    assert!(user.status.success(), "{user:?}");
}

/// What `look` finds, once it finds something; looks again and again for thirty seconds.
async fn eventually<T>(look: impl Fn() -> Option<T>) -> T {
    let looking = async {
        loop {
            match look() {
                Some(found) => return found,
                None => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), looking).await.expect("in time")
}

#[tokio::test]
async fn a_helper_does_not_outlive_the_pull_that_asks_it() {
    let private = Private::new().await;
    let note = private.folder.path().join("pid");
    let config = private.helper(&format!("echo $$ > {}\nsleep 600", note.display()));
    let pid = {
        let pull = std::pin::pin!(private.builder().docker_config(config).pull());
        tokio::select! {
            result = pull => panic!("the helper never answers: {result:?}"),
            pid = eventually(|| fs::read_to_string(&note).ok().filter(|text| text.ends_with('\n'))) => pid,
        }
    };
    // Killed when the pull was dropped; it is there until it has been waited for.
    let stat = format!("/proc/{}/stat", pid.trim());
    let is_running = || fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
    eventually(|| (!is_running()).then_some(())).await;
}

#[tokio::test]
async fn tokens_of_every_kind() {
    let server = TokenServer::start();
    let registry = Registry::with_tokens(&server.certificates, &server.realm);
    for name in ["public:1", "private:1"] {
        registry.push(layout().folder.path(), "latest", name, &["--dest-creds", &credentials()]);
    }
    let place = Place::new().await;
    let reference = |name: &str| format!("{}/{name}:1", registry.address);
    let public = builder(&place, &reference("public")).auth(RegistryAuth::Anonymous);
    public.pull().await.unwrap();
    let right = [
        RegistryAuth::basic(USER.0, USER.1),
        RegistryAuth::identity(IDENTITY),
        RegistryAuth::bearer(server.token("repository:private:pull")),
    ];
    for auth in right {
        let place = Place::new().await;
        let pull = builder(&place, &reference("private")).auth(auth.clone()).pull().await;
        assert!(pull.is_ok(), "{auth:?}: {pull:?}");
    }
    let wrong = [
        RegistryAuth::Anonymous,
        RegistryAuth::basic(USER.0, "wrong"),
        RegistryAuth::identity("wrong"),
        RegistryAuth::bearer(server.token("repository:public:pull")),
        RegistryAuth::bearer("no token at all"),
    ];
    for auth in wrong {
        let place = Place::new().await;
        let error = refused(&place, builder(&place, &reference("private")).auth(auth.clone())).await;
        assert!(matches!(error, PullError::Unauthorized { .. }), "{auth:?}: {error:?}");
    }
    // The same from a Docker configuration.
    let folder = image_support::scratch();
    let path = folder.path().join("config.json");
    let auths = json!({ registry.address.clone(): { "auth": "dTpw", "identitytoken": IDENTITY } });
    fs::write(&path, json!({ "auths": auths }).to_string()).unwrap();
    let other = Place::new().await;
    builder(&other, &reference("private")).docker_config(path).pull().await.unwrap();
    assert!(server.requests().iter().any(|request| request.starts_with("POST /token")));
}

#[tokio::test]
async fn a_token_server_in_trouble_is_waited_for() {
    let server = TokenServer::start();
    let registry = Registry::with_tokens(&server.certificates, &server.realm);
    registry.push(layout().folder.path(), "latest", "private:1", &["--dest-creds", &credentials()]);
    let reference = format!("{}/private:1", registry.address);
    for auth in [RegistryAuth::identity(IDENTITY), RegistryAuth::basic(USER.0, USER.1)] {
        let place = Place::new().await;
        let builder = || builder(&place, &reference).auth(auth.clone());
        server.refuse(&[503, 429]);
        builder().retries(2).pull().await.unwrap();
        server.refuse(&[503, 503]);
        let error = refused(&place, builder().retries(1)).await;
        assert!(matches!(&error, PullError::Server { status: 503, what, .. } if what == "a token"), "{error:?}");
    }
    server.refuse(&[429]);
    let place = Place::new().await;
    let error = refused(&place, builder(&place, &reference).auth(RegistryAuth::Anonymous).retries(0)).await;
    assert!(matches!(error, PullError::RateLimited { .. }), "{error:?}");
}

#[tokio::test]
async fn a_token_that_runs_out_is_renewed() {
    let server = TokenServer::start();
    let registry = Registry::with_tokens(&server.certificates, &server.realm);
    registry.push(layout().folder.path(), "latest", "private:1", &["--dest-creds", &credentials()]);
    let proxy = Proxy::before(&registry.address).await;
    let challenge = "www-authenticate: Bearer realm=\"unused\"\r\n";
    for auth in [RegistryAuth::basic(USER.0, USER.1), RegistryAuth::identity(IDENTITY)] {
        let place = Place::new().await;
        let before = server.requests().len();
        proxy.fault("/blobs/", &[Fault::Status(401, challenge)]);
        builder(&place, &format!("{}/private:1", proxy.address)).auth(auth).pull().await.unwrap();
        assert_eq!(server.requests().len() - before, 2);
    }
    // One that stays refused is not asked for for ever.
    proxy.always("/blobs/", Fault::Status(401, challenge));
    let (place, before) = (Place::new().await, proxy.seen("/blobs/").len());
    let pull = builder(&place, &format!("{}/private:1", proxy.address)).auth(RegistryAuth::basic(USER.0, USER.1));
    assert!(matches!(refused(&place, pull).await, PullError::Unauthorized { .. }));
    assert_eq!(proxy.seen("/blobs/").len() - before, 2);
}

#[tokio::test]
async fn certificates_are_trusted_by_authority_or_not_at_all() {
    let certificates = Certificates::new();
    let registry = Registry::with_tls(&certificates);
    registry.push(layout().folder.path(), "latest", "app:1", &[]);
    let reference = format!("{}/app:1", registry.address);
    let place = Place::new().await;
    let with =
        |transport: RegistryTransport| builder(&place, &reference).auth(RegistryAuth::Anonymous).transport(transport);
    let error = refused(&place, with(Tls::new().into())).await;
    assert!(matches!(&error, PullError::Certificate { registry: host, .. } if *host == registry.address), "{error:?}");
    assert!(error.to_string().contains("ca_certificate"), "it says what to do: {error}");
    let other = Certificates::new().read("ca.pem");
    let error = refused(&place, with(Tls::new().ca_certificate(other).into())).await;
    assert!(matches!(error, PullError::Certificate { .. }), "{error:?}");
    // The right one, made for another name of this machine.
    let by_name = reference.replace("127.0.0.1", "localhost");
    let right = Tls::new().ca_certificate(certificates.read("ca.pem"));
    let error = refused(&place, builder(&place, &by_name).auth(RegistryAuth::Anonymous).transport(right)).await;
    assert!(matches!(error, PullError::Certificate { .. }), "{error:?}");
    let error = refused(&place, with(Tls::new().ca_certificate("no certificate").into())).await;
    assert!(matches!(error, PullError::CaCertificate(_)), "{error:?}");
    // Plain HTTP, the usual for this machine, is not what this registry speaks.
    let error = refused(&place, with(RegistryTransport::Auto)).await;
    assert!(matches!(error, PullError::Registry { .. }), "{error:?}");

    with(Tls::new().ca_certificate(certificates.read("ca.pem")).into()).pull().await.unwrap();
    let other = Place::new().await;
    let trusting = builder(&other, &reference).transport(Tls::new().accept_invalid_certificates());
    trusting.pull().await.unwrap();
    // As a mirror, in its own way.
    let third = Place::new().await;
    let mirror =
        Mirror::new(registry.address.as_str()).transport(Tls::new().ca_certificate(certificates.read("ca.pem")));
    builder(&third, "registry.invalid/app:1").auth(RegistryAuth::Anonymous).mirror(mirror).pull().await.unwrap();
}

#[tokio::test]
async fn tls_to_a_registry_without() {
    let registry = Registry::open();
    let place = Place::new().await;
    let pull = builder(&place, &format!("{}/app:1", registry.address)).transport(Tls::new());
    let error = refused(&place, pull).await;
    assert!(matches!(error, PullError::Network { .. }), "{error:?}");
}
