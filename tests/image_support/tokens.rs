//! A token server for a registry (distribution, spec/auth/token.md): whoever shows the right credentials gets a token for
//! what is asked for, signed by `openssl`.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::net::TcpListener;
use std::net::TcpStream;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;

use super::certificates::Certificates;
use super::registry::USER;

pub const SERVICE: &str = "kiln-test";
pub const ISSUER: &str = "kiln-issuer";

/// What is exchanged for a token.
pub const IDENTITY: &str = "identity&of=kiln";

/// The repository that needs no credentials.
pub const PUBLIC: &str = "repository:public:pull";

/// A running token server; it ends with the process.
pub struct TokenServer {
    pub realm: String,
    pub certificates: Arc<Certificates>,
    requests: Arc<Mutex<Vec<String>>>,
    /// Statuses to answer with, before any token.
    refusals: Arc<Mutex<Vec<u16>>>,
}

impl TokenServer {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let realm = format!("http://{}/token", listener.local_addr().unwrap());
        let certificates = Arc::new(Certificates::new());
        let server = Self { realm, certificates, requests: Arc::default(), refusals: Arc::default() };
        let (certificates, requests) = (Arc::clone(&server.certificates), Arc::clone(&server.requests));
        let refusals = Arc::clone(&server.refusals);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some((request, body)) = read(&stream) else { continue };
                requests.lock().unwrap().push(request.clone());
                let refusal = refusals.lock().unwrap().pop();
                let answer = match (refusal, scope(&request, &body)) {
                    (Some(status), _) => {
                        format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                    }
                    (None, Some(scope)) => {
                        let token = json!({ "token": token(&certificates, &scope), "expires_in": 300 }).to_string();
                        let length = token.len();
                        format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{token}")
                    }
                    (None, None) => "HTTP/1.1 401 No\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}".to_owned(),
                };
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        server
    }

    /// Request lines and headers so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    /// Refuses the next requests with `statuses`.
    pub fn refuse(&self, statuses: &[u16]) {
        self.refusals.lock().unwrap().extend(statuses);
    }

    /// A token for a repository, as the registry takes it.
    pub fn token(&self, scope: &str) -> String {
        token(&self.certificates, scope)
    }
}

fn read(stream: &TcpStream) -> Option<(String, String)> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length = head.to_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    Some((head, String::from_utf8(body).ok()?))
}

/// What the request is allowed, if anything.
fn scope(request: &str, body: &str) -> Option<String> {
    let parameter = |text: &str, name: &str| {
        let value = text.split(['&', '?', ' ']).find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
        Some(value.replace("%3A", ":").replace("%2C", ",").replace("%2F", "/").replace("%26", "&").replace("%3D", "="))
    };
    if request.starts_with("POST ") {
        let is_right = parameter(body, "refresh_token")? == IDENTITY
            && parameter(body, "grant_type")? == "refresh_token"
            && parameter(body, "service")? == SERVICE;
        return is_right.then(|| parameter(body, "scope")).flatten();
    }
    let line = request.lines().next()?;
    // Docker's own clients ask for a token without a scope when they log in.
    let scope = parameter(line, "scope").unwrap_or_default();
    let basic = STANDARD.encode(format!("{}:{}", USER.0, USER.1));
    match request.lines().find_map(|line| line.strip_prefix("authorization: ").or(line.strip_prefix("Authorization: ")))
    {
        Some(shown) => (shown == format!("Basic {basic}")).then_some(scope),
        // A token that allows nothing, as Docker Hub's does.
        None => Some(if scope == PUBLIC { scope } else { String::new() }),
    }
}

fn token(certificates: &Certificates, scope: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let pem = certificates.read("cert.pem");
    let der: String = pem.lines().filter(|line| !line.starts_with("---")).collect();
    let access: Vec<_> = match scope.split(':').collect::<Vec<_>>()[..] {
        [kind, name, actions] => {
            vec![json!({ "type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>() })]
        }
        _ => Vec::new(),
    };
    let header = json!({ "typ": "JWT", "alg": "RS256", "x5c": [der] });
    let claims = json!({
        "iss": ISSUER, "sub": USER.0, "aud": SERVICE, "exp": now + 300, "nbf": now - 10, "iat": now,
        "jti": now.to_string(), "access": access,
    });
    let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let signed = format!("{}.{}", encode(header.to_string().as_bytes()), encode(claims.to_string().as_bytes()));
    let mut signer = Command::new("openssl")
        .args(["dgst", "-sha256", "-sign", &certificates.path("key.pem")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("openssl is needed by this test");
    signer.stdin.take().unwrap().write_all(signed.as_bytes()).unwrap();
    let signature = signer.wait_with_output().unwrap().stdout;
    format!("{signed}.{}", encode(&signature))
}
