//! Registries for tests: Debian's `docker-registry`, and one that lies as it is told.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::host::{Done, Running, VDISK, Work};

/// A registry on this host, which ends with it.
pub struct Server {
    /// `127.0.0.1:PORT`.
    pub host: String,
    log: std::path::PathBuf,
    #[allow(dead_code, reason = "held for its lifetime")]
    running: Running,
}

impl Server {
    /// One without https that lets everybody in.
    pub fn open(work: &Work) -> Server {
        Server::start(work, "")
    }

    /// One with https and a certificate of its own, `cert.pem`, that knows the user `u` with the password `p`.
    pub fn closed(work: &Work) -> Server {
        let words = "req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=test \
            -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE";
        work.run("openssl", words.split_whitespace()).succeeds();
        let known = work.run("htpasswd", ["-nbB", "u", "p"]).succeeds();
        work.put("known", known.stdout);
        let dir = work.dir().display();
        let more = format!(
            "  tls: {{certificate: {dir}/cert.pem, key: {dir}/key.pem}}\n\
             auth: {{htpasswd: {{realm: test, path: {dir}/known}}}}\n"
        );
        Server::start(work, &more)
    }

    fn start(work: &Work, more: &str) -> Server {
        // Another may take the port before the server does.
        for _ in 0..10 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let host = format!("127.0.0.1:{port}");
            let dir = work.dir().display();
            let config = format!(
                "version: 0.1\nlog: {{level: warn}}\n\
                 storage: {{filesystem: {{rootdirectory: {dir}/registry}}}}\n\
                 http:\n  addr: \"{host}\"\n{more}"
            );
            work.put("registry.yml", config);
            let log = work.path("registry.log");
            let script = "exec docker-registry serve registry.yml >registry.log 2>&1";
            let mut running = work.command("sh", ["-c", script]);
            let end = Instant::now() + Duration::from_secs(30);
            while Instant::now() < end && !running.has_ended() {
                if TcpStream::connect(&host).is_ok() {
                    return Server { host, log, running };
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        panic!(
            "docker-registry does not start: {:?}",
            fs::read_to_string(work.path("registry.log"))
        );
    }

    /// Lines of what was asked so far that hold `what`.
    pub fn asked(&self, what: &str) -> usize {
        let log = fs::read_to_string(&self.log).unwrap();
        log.lines().filter(|line| line.contains(what)).count()
    }
}

/// Runs `vdisk` with variables of its own.
pub fn vdisk_with(work: &Work, set: &[(&str, &str)], words: &str) -> Done {
    let set = set.iter().map(|(name, value)| format!("{name}={value}"));
    let words = words.split_whitespace().map(str::to_owned);
    work.run("env", set.chain([VDISK.to_owned()]).chain(words))
}

/// What a [`Liar`] is asked.
pub struct Asked {
    /// Method and path, such as `GET /v2/`.
    pub what: String,
    /// Headers, by their names in small letters.
    pub headers: HashMap<String, String>,
}

/// What it says.
#[derive(Clone, Default)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Headers, whole lines.
    pub headers: Vec<String>,
    /// What comes behind them.
    pub body: Vec<u8>,
    /// How much of that comes before the connection is closed.
    pub cut: Option<usize>,
    /// Whether it goes on for ever.
    pub endless: bool,
    /// Whether the connection stays open then, until the other side goes.
    pub hold: bool,
}

/// A registry that answers as `how` says, each request on a connection of its own.
pub struct Liar {
    /// `127.0.0.1:PORT`.
    pub host: String,
    /// All that was asked.
    pub asked: Arc<Mutex<Vec<Asked>>>,
    end: Arc<AtomicBool>,
}

impl Liar {
    pub fn new(how: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Liar {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let end = Arc::new(AtomicBool::new(false));
        let (all, ended, how) = (asked.clone(), end.clone(), Arc::new(how));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let (all, how) = (all.clone(), how.clone());
                thread::spawn(move || serve(stream.unwrap(), &*how, &all));
            }
        });
        Liar { host, asked, end }
    }

    /// The requests whose method and path hold `what`.
    pub fn count(&self, what: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|a| a.what.contains(what)).count()
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.host);
    }
}

fn serve(mut stream: TcpStream, how: &dyn Fn(&Asked) -> Answer, all: &Mutex<Vec<Asked>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(first)) = lines.next() else { return };
    let what = first.rsplit_once(' ').map_or(first.as_str(), |(what, _)| what).to_owned();
    let mut headers = HashMap::new();
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(": ") {
            headers.insert(name.to_lowercase(), value.to_owned());
        }
    }
    let asked = Asked { what, headers };
    let answer = how(&asked);
    all.lock().unwrap().push(asked);
    let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", answer.status);
    if !answer.endless && !answer.headers.iter().any(|h| h.starts_with("Content-Length")) {
        head += &format!("Content-Length: {}\r\n", answer.body.len());
    }
    for line in &answer.headers {
        head += &format!("{line}\r\n");
    }
    // Who has heard enough hangs up.
    let _ = stream.write_all((head + "\r\n").as_bytes());
    let body = &answer.body[..answer.cut.unwrap_or(answer.body.len())];
    let mut sent = stream.write_all(body);
    while answer.endless && sent.is_ok() {
        sent = stream.write_all(&[b' '; 65536]);
    }
    if answer.hold {
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    }
    let _ = stream.shutdown(Shutdown::Both);
}
