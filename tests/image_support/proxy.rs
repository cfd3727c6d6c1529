//! An HTTP/1.1 proxy before a registry that does to chosen answers what networks and overloaded servers do.
//!
//! One request a connection. Answers are read whole before they are passed on, spoilt or not.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// What happens to one answer. Numbers count bytes of its body.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Nothing.
    Pass,
    /// The connection ends after so many.
    Cut(usize),
    /// Nothing comes after so many.
    Stall(usize),
    /// One byte at a time, with such pauses.
    Drip(Duration),
    /// This one is another.
    Flip(usize),
    /// The promised length is off by so many.
    Length(i64),
    /// A status in place of the answer, with these header lines.
    Status(u16, &'static str),
    /// A redirection to another host name of the same machine.
    Redirect,
    /// The whole blob, whatever part was asked for.
    IgnoreRange,
    /// A part that starts so many earlier and, if so, is as long as the right one.
    Shift { earlier: u64, same_length: bool },
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

#[derive(Default)]
struct Script {
    /// For requests whose path has this in it: what to do to the next ones, then to all others.
    rules: Vec<(String, VecDeque<Fault>, Fault)>,
    seen: Vec<Seen>,
}

/// A running proxy; it ends with the runtime, or when dropped.
pub struct Proxy {
    pub address: String,
    script: Arc<Mutex<Script>>,
    _task: JoinSet<()>,
}

impl Proxy {
    pub async fn before(registry: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let script = Arc::new(Mutex::new(Script::default()));
        let mut task = JoinSet::new();
        let (registry, shared) = (registry.to_owned(), Arc::clone(&script));
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(serve(client, registry.clone(), Arc::clone(&shared)));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { address, script, _task: task }
    }

    /// What shall happen to the answers for paths with `part` in them: one fault after another, then none.
    pub fn fault(&self, part: &str, faults: &[Fault]) -> &Self {
        self.rule(part, faults, Fault::Pass)
    }

    /// The same fault every time.
    pub fn always(&self, part: &str, fault: Fault) -> &Self {
        self.rule(part, &[], fault)
    }

    fn rule(&self, part: &str, faults: &[Fault], then: Fault) -> &Self {
        let rule = (part.to_owned(), faults.iter().cloned().collect(), then);
        let mut script = self.script.lock().unwrap();
        script.rules.retain(|(part, _, _)| *part != rule.0);
        script.rules.push(rule);
        self
    }

    /// The requests so far for paths with `part` in them.
    pub fn seen(&self, part: &str) -> Vec<Seen> {
        self.script.lock().unwrap().seen.iter().filter(|seen| seen.path.contains(part)).cloned().collect()
    }

    /// Their ranges; "" for a whole.
    pub fn ranges(&self, part: &str) -> Vec<String> {
        self.seen(part).into_iter().map(|seen| seen.range.unwrap_or_default()).collect()
    }
}

async fn serve(mut client: TcpStream, registry: String, script: Arc<Mutex<Script>>) {
    let Some(head) = read_head(&mut client).await else { return };
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let (range, authorization) = (header(&head, "range"), header(&head, "authorization"));
    let fault = {
        let mut script = script.lock().unwrap();
        script.seen.push(Seen { path: path.clone(), range: range.clone(), authorization });
        let rule = script.rules.iter_mut().find(|(part, _, _)| path.contains(part.as_str()));
        rule.map_or(Fault::Pass, |(_, faults, then)| faults.pop_front().unwrap_or_else(|| then.clone()))
    };
    let port = client.local_addr().unwrap().port();
    let answer = match &fault {
        Fault::Status(status, lines) => {
            format!("HTTP/1.1 {status} Fault\r\ncontent-length: 0\r\nconnection: close\r\n{lines}\r\n").into_bytes()
        }
        Fault::Redirect if !path.starts_with("/moved") => {
            let target = format!("http://localhost:{port}/moved{path}");
            format!("HTTP/1.1 307 Moved\r\nlocation: {target}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").into()
        }
        _ => ask(&registry, &forwarded(&head, &fault)).await,
    };
    answer_with(&mut client, answer, &fault).await;
}

async fn answer_with(client: &mut TcpStream, mut answer: Vec<u8>, fault: &Fault) {
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    match *fault {
        Fault::Cut(after) | Fault::Stall(after) => answer.truncate(body + after),
        Fault::Flip(at) => answer[body + at] ^= 0xff,
        Fault::Length(by) => {
            let head = String::from_utf8(answer[..body].to_vec()).unwrap();
            let length: i64 = header(&head, "content-length").unwrap().parse().unwrap();
            let lines: String = without(&head, "content-length");
            let head = format!(
                "{}content-length: {}\r\n\r\n",
                lines.trim_end_matches("\r\n").to_owned() + "\r\n",
                length + by
            );
            answer = [head.as_bytes(), &answer[body..]].concat();
            if by < 0 {
                answer.truncate(answer.len() - usize::try_from(-by).unwrap());
            }
        }
        _ => {}
    }
    if let Fault::Drip(pause) = fault {
        let _ = client.write_all(&answer[..body]).await;
        for byte in &answer[body..] {
            if client.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(*pause).await;
        }
        return;
    }
    let _ = client.write_all(&answer).await;
    if matches!(fault, Fault::Stall(_)) {
        // Until the client gives up and closes.
        let _ = client.read(&mut [0; 16]).await;
    }
}

/// The request as the registry gets it.
fn forwarded(head: &str, fault: &Fault) -> String {
    let mut head = without(head, "connection").replacen(" /moved", " ", 1);
    let start =
        header(&head, "range").and_then(|range| range.strip_prefix("bytes=")?.trim_end_matches('-').parse().ok());
    match (fault, start) {
        (Fault::IgnoreRange, _) => head = without(&head, "range"),
        (Fault::Shift { earlier, same_length }, Some(start)) => {
            let start: u64 = start;
            let range = format!("bytes={}-", start - earlier);
            head = without(&head, "range");
            let end = if *same_length { format!("{range}END-{earlier}") } else { range };
            head = format!("{}range: {end}\r\n\r\n", head.trim_end_matches("\r\n").to_owned() + "\r\n");
        }
        _ => {}
    }
    format!("{}connection: close\r\n\r\n", head.trim_end_matches("\r\n").to_owned() + "\r\n")
}

async fn ask(registry: &str, request: &str) -> Vec<u8> {
    let mut request = request.to_owned();
    // The end of a shifted part needs the blob's size, which the registry tells.
    if let Some(at) = request.find("END-") {
        let shift: u64 = request[at + 4..].split("\r\n").next().unwrap().parse().unwrap();
        let whole = without(&request, "range").replacen("GET ", "HEAD ", 1);
        let head = String::from_utf8(exchange(registry, &whole).await).unwrap();
        let size: u64 = header(&head, "content-length").unwrap().parse().unwrap();
        request = request.replace(&format!("END-{shift}"), &(size - 1 - shift).to_string());
    }
    exchange(registry, &request).await
}

async fn exchange(registry: &str, request: &str) -> Vec<u8> {
    let mut answer = Vec::new();
    let Ok(mut upstream) = TcpStream::connect(registry).await else { return answer };
    let _ = upstream.write_all(request.as_bytes()).await;
    let _ = upstream.read_to_end(&mut answer).await;
    answer
}

async fn read_head(client: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = client.read_u8().await.ok()?;
        head.push(byte);
    }
    String::from_utf8(head).ok()
}

fn header(head: &str, name: &str) -> Option<String> {
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
}

fn without(head: &str, name: &str) -> String {
    let is_other = |line: &&str| !line.split(':').next().is_some_and(|key| key.eq_ignore_ascii_case(name));
    head.split_inclusive("\r\n").filter(is_other).collect()
}
