//! TLS from within: what was said before it, both directions at once, and its end.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::super::Tls;
use super::bench::{Bench, PATIENCE, Raw};
use super::certificates::{Authority, Wanted};
use super::request;
use crate::nbd::stream::{Hasty, Plain, Socket, Stream};
use crate::nbd::tls::{ClientCredentials, ServerCredentials, Side};
use crate::nbd::wire::{self, Request, command, error, option, reply};
use crate::require::{Need, have};

type Secure = Raw<StreamOwned<ClientConnection, UnixStream>>;

/// A server and what its clients know.
struct Known {
    bench: Bench,
    config: Arc<ClientConfig>,
    #[allow(dead_code, reason = "held for its lifetime")]
    dir: tempfile::TempDir,
}

impl Known {
    fn new(of: impl Fn(ServerCredentials) -> Tls) -> Known {
        let dir = tempfile::tempdir().unwrap();
        let certs = dir.path().join("certs");
        Authority::new(dir.path().join("authority")).fill(&certs, &[Wanted::SERVER]);
        let bench = Bench::with(false, of(ServerCredentials::load(&certs, false).unwrap()));
        let config = ClientCredentials { dir: certs, verify_peer: true }.config().unwrap();
        Known { bench, config, dir }
    }

    fn name() -> ServerName<'static> {
        ServerName::try_from("localhost").unwrap()
    }

    /// A connection that has begun TLS, after `said` in plain.
    fn secured(&self, said: impl Fn(&mut Raw)) -> Secure {
        let mut raw = Raw::greeted(&self.bench.path());
        said(&mut raw);
        assert_eq!(raw.option(option::STARTTLS, &[]), [(reply::ACK, vec![])]);
        let client = ClientConnection::new(self.config.clone(), Known::name()).unwrap();
        Raw(StreamOwned::new(client, raw.0))
    }

    fn agreed(&self) -> Secure {
        let mut raw = self.secured(|_| {});
        raw.option(option::GO, &go());
        raw
    }
}

fn go() -> Vec<u8> {
    [wire::counted("disk"), vec![0, 0]].concat()
}

#[test]
fn what_was_agreed_on_in_plain_is_forgotten_when_tls_begins() {
    if !have(Need::Tls) {
        return;
    }
    let known = Known::new(Tls::Offered);
    let query = [wire::counted("disk"), vec![0, 0, 0, 1], wire::counted("base:allocation")];
    let mut raw = known.secured(|raw| {
        assert_eq!(raw.option(option::STRUCTURED_REPLY, &[]), [(reply::ACK, vec![])]);
        assert_eq!(raw.option(option::SET_META_CONTEXT, &query.concat()).len(), 2);
    });
    assert_eq!(raw.option(option::STARTTLS, &[])[0].0, reply::INVALID);
    raw.option(option::GO, &go());
    raw.ask(request(command::READ, 1, 3));
    assert_eq!((raw.simple(), raw.bytes(3)), ((5, 0), vec![0; 3]));
    raw.ask(request(command::BLOCK_STATUS, 0, 4096));
    assert_eq!(raw.simple(), (5, error::INVAL));
    // In plain it is all as it was.
    let mut raw = known.bench.raw(true);
    raw.ask(request(command::BLOCK_STATUS, 0, 4096));
    assert_eq!(raw.part().0, 5);
}

#[test]
fn before_tls_that_is_asked_for_only_its_begin_and_the_end_are_heard() {
    if !have(Need::Tls) {
        return;
    }
    let known = Known::new(Tls::Required);
    let mut raw = Raw::greeted(&known.bench.path());
    for number in [3, 6, 7, 8, 9, 10, 99] {
        for data in [&go()[..], &[]] {
            assert_eq!(raw.option(number, data)[0].0, reply::TLS, "option {number}");
        }
    }
    assert_eq!(raw.option(option::STARTTLS, &[1])[0].0, reply::INVALID);
    assert_eq!(raw.option(option::ABORT, &[]), [(reply::ACK, vec![])]);
    assert!(raw.is_over());
    let mut raw = Raw::greeted(&known.bench.path());
    raw.send(&wire::option_bytes(option::EXPORT_NAME, b"disk"));
    assert_eq!(raw.0.read(&mut [0; 10]).unwrap_or(0), 0, "the export in plain");
}

#[test]
fn what_somebody_put_behind_the_begin_of_tls_is_not_heard() {
    if !have(Need::Tls) {
        return;
    }
    let known = Known::new(Tls::Offered);
    let begin = wire::option_bytes(option::STARTTLS, &[]);
    for put in [option::GO, option::EXPORT_NAME, option::LIST] {
        let mut raw = Raw::greeted(&known.bench.path());
        let data = if put == option::GO { go() } else { b"disk".to_vec() };
        raw.send(&[begin.clone(), wire::option_bytes(put, &data)].concat());
        let head: [u8; 20] = raw.receive();
        assert_eq!(head, wire::option_reply_bytes(option::STARTTLS, reply::ACK, &[])[..]);
        let mut rest = Vec::new();
        let _ = raw.0.read_to_end(&mut rest);
        // An alert at most, which is a record of TLS.
        assert!(rest.is_empty() || (rest[0] == 21 && rest.len() < 32), "{rest:?}");
    }
}

#[test]
fn a_client_that_reads_nothing_keeps_nothing_from_being_read() {
    if !have(Need::Tls) {
        return;
    }
    let known = Known::new(Tls::Required);
    known.bench.disk.bytes.lock().unwrap()[..4 << 20].fill(9);
    let mut raw = known.agreed();
    for cookie in 0..3 {
        raw.ask(Request { cookie, ..request(command::READ, 0, 4 << 20) });
    }
    raw.ask(Request { cookie: 3, ..request(command::WRITE, 5 << 20, 1 << 20) });
    raw.send(&vec![7; 1 << 20]);
    let until = Instant::now() + PATIENCE;
    while known.bench.disk.bytes.lock().unwrap()[(6 << 20) - 1] != 7 {
        assert!(Instant::now() < until, "the write waits for the reads");
        thread::sleep(Duration::from_millis(5));
    }
    let mut seen = [0; 4].map(|_: u64| {
        let (cookie, code) = raw.simple();
        assert_eq!(code, 0);
        if cookie < 3 {
            assert!(raw.bytes(4 << 20).iter().all(|b| *b == 9));
        }
        cookie
    });
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3]);
}

#[test]
fn new_keys_change_nothing_and_the_end_is_announced() {
    if !have(Need::Tls) {
        return;
    }
    let known = Known::new(Tls::Required);
    let mut raw = known.agreed();
    for n in 0..200u64 {
        if n % 50 == 0 {
            raw.0.conn.refresh_traffic_keys().unwrap();
        }
        raw.ask(Request { cookie: n, ..request(command::WRITE, n * 8, 8) });
        raw.send(&n.to_le_bytes());
        assert_eq!(raw.simple(), (n, 0));
        raw.ask(Request { cookie: n, ..request(command::READ, n * 8, 8) });
        assert_eq!((raw.simple(), raw.bytes(8)), ((n, 0), n.to_le_bytes().to_vec()));
    }
    known.bench.server.stop().unwrap();
    let mut rest = Vec::new();
    // Without a word of the end this fails.
    assert_eq!(raw.0.read_to_end(&mut rest).map_err(|e| e.kind()), Ok(0));
    // A client that leaves in good order, or without a word.
    let known = Known::new(Tls::Required);
    let mut raw = known.agreed();
    raw.ask(request(command::DISCONNECT, 0, 0));
    assert!(raw.0.read_to_end(&mut rest).is_ok());
    drop(known.agreed());
    known.bench.server.stop().unwrap();
}

#[test]
fn who_speaks_too_slowly_is_not_waited_for_however_steadily() {
    if !have(Need::Tls) {
        return;
    }
    let (here, there) = UnixStream::pair().unwrap();
    let drip = thread::spawn(move || {
        let mut there = there;
        // A record that is long in coming.
        let head = [22, 3, 1, 64, 0];
        for byte in head.iter().chain(std::iter::repeat(&0)) {
            if there.write_all(&[*byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let certs = dir.path().join("certs");
    Authority::new(dir.path().join("authority")).fill(&certs, &[Wanted::SERVER]);
    let config = ServerCredentials::load(&certs, false).unwrap().config();
    let stream = Stream::new(Socket::Unix(here));
    let began = Instant::now();
    let failed = Hasty::new(&stream, Duration::from_millis(300)).secure(Side::Server(config));
    assert_eq!(failed.map_err(|e| e.kind()), Err(ErrorKind::TimedOut));
    assert!(began.elapsed() < Duration::from_secs(10));
    drop(stream);
    drip.join().unwrap();
}
