//! Clients of all kinds against a server of a disk in memory: this project's own, ones that say
//! what no client should, and ones that ask for much at a time. Real clients are met in the black-box
//! tests.

use std::io::{IoSlice, IoSliceMut, Read, Write};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};

use super::*;
use crate::nbd::wire::{self, Fields, Request, chunk, command, error, flag, option, reply};
use crate::storage::Storage;

mod bench;
#[allow(dead_code, reason = "the black-box tests use the rest")]
#[path = "../../../../tests/main/certificates.rs"]
mod certificates;
mod tls;

use bench::{BAD, Bench, DOOR, PATIENCE, Raw, SIZE};

fn request(command: u16, offset: u64, len: u32) -> Request {
    Request { flags: 0, command, cookie: 5, offset, len }
}

#[test]
fn our_client_reads_back_what_it_wrote() {
    let bench = Bench::new(false);
    let client = bench.client();
    assert_eq!(client.size(), SIZE as u64);
    let bytes: Vec<u8> = (0..3 << 20).map(|n: u32| (n / 7) as u8).collect();
    client.write_at(4096, &[IoSlice::new(&bytes)]).unwrap();
    client.write_zeroes(1 << 20, 1 << 20).unwrap();
    client.punch_hole(100_000, 5000).unwrap();
    client.sync().unwrap();
    assert!(bench.disk.flushes.load(Ordering::SeqCst) > 0);
    let mut want = [vec![0; 4096], bytes, vec![0; SIZE]].concat();
    want.truncate(6 << 20);
    want[1 << 20..2 << 20].fill(0);
    want[100_000..105_000].fill(0);
    let mut back = vec![1; want.len()];
    client.read_at(0, &mut [IoSliceMut::new(&mut back)]).unwrap();
    assert!(back == want, "it reads something else");
    let first = client.stretch(0, SIZE as u64).unwrap();
    assert_eq!((first.len, first.stored, first.zero), (4096, false, true));
    drop(client);
    bench.server.stop().unwrap();
    assert!(!bench.dir.path().join("s").exists(), "the socket is left behind");
}

#[test]
fn a_disk_that_grew_is_seen_by_who_connects_then() {
    let bench = Bench::new(false);
    let early = bench.client();
    bench.disk.bytes.lock().unwrap().resize(2 * SIZE, 0);
    assert_eq!(early.size(), SIZE as u64);
    let late = bench.client();
    assert_eq!(late.size(), 2 * SIZE as u64);
    late.write_at(2 * SIZE as u64 - 1, &[IoSlice::new(&[9])]).unwrap();
}

#[test]
fn what_a_client_wrote_is_durable_when_it_has_left() {
    let bench = Bench::new(false);
    let flushes = || bench.disk.flushes.load(Ordering::SeqCst);
    let leave = |mut raw: Raw| {
        raw.ask(request(command::DISCONNECT, 0, 0));
        assert!(raw.is_over());
    };
    let mut raw = bench.raw(false);
    raw.ask(request(command::READ, 0, 1));
    leave(raw);
    assert_eq!(flushes(), 0, "nothing was written");
    for (number, writing) in [command::WRITE_ZEROES, command::TRIM].into_iter().enumerate() {
        let mut raw = bench.raw(false);
        raw.ask(request(writing, 0, 1));
        assert_eq!(raw.simple(), (5, 0));
        leave(raw);
        assert_eq!(flushes() as usize, number + 1);
    }
    let mut raw = bench.raw(false);
    raw.ask(request(command::WRITE, 0, 3 << 20));
    raw.send(&vec![1; 3 << 20]);
    raw.ask(request(command::FLUSH, 0, 0));
    assert_eq!((raw.simple(), raw.simple()), ((5, 0), (5, 0)));
    let before = flushes();
    leave(raw);
    assert!(flushes() <= before + 1);
    // One that is gone without a word is no exception.
    let mut raw = bench.raw(false);
    raw.ask(request(command::WRITE, 0, 1));
    raw.send(&[1]);
    assert_eq!(raw.simple(), (5, 0));
    let before = flushes();
    drop(raw);
    let until = Instant::now() + PATIENCE;
    while flushes() == before {
        assert!(Instant::now() < until, "it is never durable");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn options_are_answered_by_the_letter() {
    let bench = Bench::new(false);
    let mut raw = Raw::greeted(&bench.path());
    let code = |replies: &[(u32, Vec<u8>)]| replies.last().unwrap().0;
    let go = |name: &str, infos: &[u8]| [wire::counted(name), infos.to_vec()].concat();
    assert_eq!(raw.option(option::LIST, &[])[0], (reply::SERVER, wire::counted("disk")));
    assert_eq!(code(&raw.option(option::LIST, &[1])), reply::INVALID);
    assert_eq!(code(&raw.option(option::STARTTLS, &[])), reply::POLICY);
    // A length that NBD does not know yet, and nonsense.
    for unknown in [11, 12345] {
        assert_eq!(code(&raw.option(unknown, &[7; 100])), reply::UNSUPPORTED);
    }
    assert_eq!(code(&raw.option(option::INFO, &go("other", &[0, 0]))), reply::UNKNOWN);
    for bad in [&[][..], &[0], &[0, 1], &[0, 0, 0], &[255, 255]] {
        assert_eq!(code(&raw.option(option::INFO, &go("disk", bad))), reply::INVALID, "{bad:?}");
    }
    assert_eq!(code(&raw.option(option::INFO, &[255; 20])), reply::INVALID);
    let infos = raw.option(option::INFO, &go("disk", &[0, 2, 0, 1, 0, 2]));
    let texts: Vec<_> = infos.iter().filter(|(_, data)| data.len() < 8).collect();
    assert_eq!(texts[0].1, b"\0\x01disk");
    assert_eq!(texts[1].1, b"\0\x02words");
    let context = |queries: &[&str]| {
        let all: Vec<u8> = queries.iter().flat_map(|q| wire::counted(q)).collect();
        [wire::counted("disk"), (queries.len() as u32).to_be_bytes().to_vec(), all].concat()
    };
    let allocation = context(&["base:allocation"]);
    assert_eq!(code(&raw.option(option::SET_META_CONTEXT, &allocation)), reply::INVALID);
    assert_eq!(code(&raw.option(option::STRUCTURED_REPLY, &[1])), reply::INVALID);
    assert_eq!(code(&raw.option(option::STRUCTURED_REPLY, &[])), reply::ACK);
    let chosen =
        [(reply::META_CONTEXT, b"\0\0\0\x01base:allocation".to_vec()), (reply::ACK, vec![])];
    for known in [&["base:allocation"][..], &["qemu:x", "base:allocation", "base:"]] {
        assert_eq!(raw.option(option::SET_META_CONTEXT, &context(known)), chosen);
    }
    for none in [&["base:"][..], &["base:allocatio"], &[]] {
        assert_eq!(raw.option(option::SET_META_CONTEXT, &context(none)), chosen[1..]);
    }
    for all in [&["base:"][..], &[], &["base:allocation"]] {
        assert_eq!(raw.option(option::LIST_META_CONTEXT, &context(all)), chosen);
    }
    let short = &allocation[..allocation.len() - 1];
    assert_eq!(code(&raw.option(option::SET_META_CONTEXT, short)), reply::INVALID);
    let many = [wire::counted("disk"), vec![255; 4]].concat();
    assert_eq!(code(&raw.option(option::LIST_META_CONTEXT, &many)), reply::INVALID);
    assert_eq!(raw.option(option::ABORT, &[]), [(reply::ACK, vec![])]);
    assert!(raw.is_over());
}

#[test]
fn the_old_way_to_an_export_works() {
    let bench = Bench::new(true);
    let mut raw = Raw::greeted(&bench.path());
    raw.send(&wire::option_bytes(option::EXPORT_NAME, b"disk"));
    let told: [u8; 10] = raw.receive();
    let mut fields = Fields(&told);
    assert_eq!(fields.u64(), Some(SIZE as u64));
    let flags = fields.u16().unwrap();
    assert!(flags & flag::READ_ONLY != 0 && flags & (flag::TRIM | flag::WRITE_ZEROES) == 0);
    raw.ask(request(command::READ, 1, 3));
    assert_eq!(raw.simple(), (5, 0));
    assert_eq!(raw.bytes(3), [0; 3]);
    raw.ask(request(command::DISCONNECT, 0, 0));
    assert!(raw.is_over());
    let mut raw = Raw::greeted(&bench.path());
    raw.send(&wire::option_bytes(option::EXPORT_NAME, b"other"));
    assert!(raw.is_over());
}

#[test]
fn who_does_not_speak_the_protocol_is_cut_off_and_harms_nobody() {
    let bench = Bench::new(false);
    let client = bench.client();
    let flags = 3u32.to_be_bytes();
    let go = wire::option_bytes(option::GO, &[wire::counted("disk"), vec![0, 0]].concat());
    let agreed = [&flags[..], &go].concat();
    let wrong = Request { flags: 0, command: 0, cookie: 0, offset: 0, len: 0 }.encode().map(|b| !b);
    for said in [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        vec![255; 4],
        [&flags[..], &[0; 16]].concat(),
        [&flags[..], &wire::option_bytes(option::GO, &[])[..12], &[255; 4]].concat(),
        // Not the fixed newstyle: it understands no reply.
        [&0u32.to_be_bytes()[..], &go].concat(),
        [&agreed[..], &wrong].concat(),
        agreed.iter().copied().chain([0; 28]).collect(),
    ] {
        let mut stream = UnixStream::connect(bench.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&said).unwrap();
        assert!(Raw(stream).is_over(), "{said:?}");
    }
    let silent: Vec<_> = (0..10).map(|_| UnixStream::connect(bench.path()).unwrap()).collect();
    client.write_at(0, &[IoSlice::new(&[1])]).unwrap();
    drop(silent);
}

#[test]
fn bad_requests_are_refused_and_the_next_one_is_served() {
    let bench = Bench::new(false);
    let mut raw = bench.raw(true);
    let end = SIZE as u64;
    for (bad, code) in [
        (request(99, 0, 0), error::INVAL),
        (request(command::READ, end, 1), error::INVAL),
        (request(command::READ, u64::MAX, u32::MAX), error::INVAL),
        (request(command::READ, BAD, 512), error::IO),
        (request(command::TRIM, end - 1, 2), error::INVAL),
        (request(command::WRITE_ZEROES, end - 1, 2), error::NOSPC),
        (request(command::WRITE_ZEROES, BAD, 1), error::IO),
        (request(command::BLOCK_STATUS, 0, 0), error::INVAL),
        (request(command::BLOCK_STATUS, end, 1), error::INVAL),
        (request(command::CACHE, BAD, 1), error::IO),
        (Request { flags: wire::NO_HOLE, ..request(command::READ, 0, 1) }, error::INVAL),
        (Request { flags: wire::DF, ..request(command::TRIM, 0, 1) }, error::INVAL),
        (Request { flags: 1 << 4, ..request(command::WRITE_ZEROES, 0, 1) }, error::INVAL),
        (Request { flags: wire::DF, ..request(command::READ, 0, 5 << 20) }, error::OVERFLOW),
    ] {
        raw.ask(bad);
        assert_eq!(raw.failure(), code, "{bad:?}");
    }
    // What is refused is taken off the socket all the same.
    for (bad, code) in [
        (request(command::WRITE, end - 1, 4096), error::NOSPC),
        (request(command::WRITE, u64::MAX - 1, 5 << 20), error::NOSPC),
        (request(command::WRITE, BAD - 100, 4 << 20), error::NOSPC),
        (request(command::WRITE, 4 << 20, 4 << 20), error::IO),
        (Request { flags: wire::NO_HOLE, ..request(command::WRITE, 0, 10) }, error::INVAL),
        (request(command::WRITE, 0, (32 << 20) + 1), error::NOSPC),
    ] {
        raw.ask(bad);
        raw.send(&vec![1; bad.len as usize]);
        assert_eq!(raw.failure(), code, "{bad:?}");
    }
    raw.ask(Request { flags: wire::FUA, ..request(command::WRITE, 10, 3) });
    raw.send(b"abc");
    assert_eq!(raw.simple(), (5, 0));
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 1);
    raw.ask(Request { flags: wire::DF, ..request(command::READ, 10, 3) });
    assert_eq!(raw.part(), (5, chunk::DATA, true, b"\0\0\0\0\0\0\0\x0aabc".to_vec()));
    raw.ask(request(command::READ, 10, 0));
    assert_eq!(raw.part(), (5, chunk::NONE, true, vec![]));
}

#[test]
fn a_read_only_export_refuses_all_that_writes() {
    let bench = Bench::new(true);
    let mut raw = bench.raw(false);
    for writing in [command::TRIM, command::WRITE_ZEROES] {
        raw.ask(request(writing, 0, 4096));
        assert_eq!(raw.simple(), (5, error::PERM));
    }
    raw.ask(request(command::WRITE, 0, 4));
    raw.send(&[1; 4]);
    assert_eq!(raw.simple(), (5, error::PERM));
    raw.ask(request(command::FLUSH, 0, 0));
    assert_eq!(raw.simple(), (5, 0));
    raw.ask(request(command::BLOCK_STATUS, 0, 4096));
    assert_eq!(raw.simple(), (5, error::INVAL), "no context was chosen");
    bench.server.stop().unwrap();
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 0);
}

#[test]
fn a_read_tells_holes_as_such_and_one_that_fails_midway_says_so() {
    let bench = Bench::new(false);
    bench.disk.bytes.lock().unwrap()[4096..8192].fill(3);
    let mut raw = bench.raw(true);
    raw.ask(request(command::READ, 0, 3 << 20));
    let hole = |at: u64, len: u32| [&at.to_be_bytes()[..], &len.to_be_bytes()].concat();
    assert_eq!(raw.part(), (5, chunk::HOLE, false, hole(0, 4096)));
    let data = [&4096u64.to_be_bytes()[..], &[3; 4096]].concat();
    assert_eq!(raw.part(), (5, chunk::DATA, false, data));
    assert_eq!(raw.part(), (5, chunk::HOLE, false, hole(8192, (2 << 20) - 8192)));
    assert_eq!(raw.part(), (5, chunk::HOLE, true, hole(2 << 20, 1 << 20)));
    bench.disk.bytes.lock().unwrap()[5 << 20..].fill(4);
    bench.disk.open();
    raw.ask(request(command::READ, 5 << 20, 3 << 20));
    assert_eq!(raw.part().3.len(), (2 << 20) + 8);
    assert_eq!(raw.failure(), error::IO);
    raw.ask(Request { flags: wire::REQ_ONE, ..request(command::BLOCK_STATUS, 0, 1 << 20) });
    let status = [1u32, 4096, wire::STATE_HOLE | wire::STATE_ZERO].map(u32::to_be_bytes).concat();
    assert_eq!(raw.part(), (5, chunk::BLOCK_STATUS, true, status));
    // Without parts there is no way to say it but the end.
    let mut plain = bench.raw(false);
    plain.ask(request(command::READ, 5 << 20, 3 << 20));
    assert_eq!(plain.simple(), (5, 0));
    plain.bytes(2 << 20);
    assert!(plain.is_over());
}

#[test]
fn a_request_that_waits_for_the_disk_lets_others_pass() {
    let bench = Bench::new(false);
    let mut raw = bench.raw(false);
    raw.ask(Request { cookie: 1, ..request(command::READ, DOOR, 1) });
    raw.ask(Request { cookie: 2, ..request(command::READ, DOOR, 1) });
    raw.ask(Request { cookie: 3, ..request(command::FLUSH, 0, 0) });
    assert_eq!(raw.simple(), (3, 0));
    // A server that stops answers what it has begun.
    let disk = bench.disk.clone();
    let stopped = thread::spawn(move || bench.server.stop());
    thread::sleep(Duration::from_millis(100));
    assert!(!stopped.is_finished());
    disk.open();
    let mut seen = [0; 2].map(|_: u8| {
        let (cookie, code) = raw.simple();
        assert_eq!((code, raw.bytes(1)), (0, vec![0]));
        cookie
    });
    seen.sort_unstable();
    assert_eq!(seen, [1, 2]);
    assert!(raw.is_over());
    stopped.join().unwrap().unwrap();
}

#[test]
fn a_client_that_waits_for_each_answer_gets_what_it_asks_for_and_others_still_pass() {
    let bench = Bench::new(false);
    let mut raw = bench.raw(false);
    // The disk is known to be quick by then.
    for n in 0..500u64 {
        raw.ask(Request { cookie: n, ..request(command::WRITE, n * 8, 8) });
        raw.send(&n.to_le_bytes());
        assert_eq!(raw.simple(), (n, 0));
        raw.ask(Request { cookie: n, ..request(command::READ, n * 8, 8) });
        assert_eq!(raw.simple(), (n, 0));
        assert_eq!(raw.bytes(8), n.to_le_bytes());
    }
    // Requests that come together are not carried out one after the other.
    let both = [DOOR, 0].map(|at| Request { cookie: at, ..request(command::READ, at, 1) }.encode());
    raw.send(&both.concat());
    assert_eq!((raw.simple(), raw.bytes(1)), ((0, 0), vec![0]));
    bench.disk.open();
    assert_eq!((raw.simple(), raw.bytes(1)), ((DOOR, 0), vec![0]));
}

#[test]
fn clients_beyond_the_bound_are_turned_away_and_places_become_free() {
    let bench = Bench::new(false);
    let mut clients: Vec<Raw> = (0..MAX_CONNECTIONS).map(|_| bench.raw(false)).collect();
    let mut late = Raw(UnixStream::connect(bench.path()).unwrap());
    late.0.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(late.is_over());
    drop(clients.pop());
    let until = Instant::now() + PATIENCE;
    loop {
        let mut raw = Raw(UnixStream::connect(bench.path()).unwrap());
        raw.0.set_read_timeout(Some(PATIENCE)).unwrap();
        if raw.0.read(&mut [0; 18]).is_ok_and(|n| n > 0) {
            break;
        }
        assert!(Instant::now() < until, "the place does not become free");
    }
}

#[test]
fn a_client_that_reads_no_reply_is_left_when_the_server_stops() {
    let bench = Bench::new(false);
    bench.disk.bytes.lock().unwrap()[..4 << 20].fill(1);
    let mut raw = bench.raw(false);
    for _ in 0..20 {
        raw.ask(request(command::READ, 0, 4 << 20));
    }
    let client = bench.client();
    client.write_at(0, &[IoSlice::new(&[1])]).unwrap();
    let began = Instant::now();
    bench.server.stop().unwrap();
    assert!(began.elapsed() < GRACE + Duration::from_secs(5));
}

#[test]
fn random_requests_end_in_bounded_time_and_leave_the_server_well() {
    let seed = match std::env::var("VDISK_SEED").as_deref() {
        Ok("fresh") => u64::from(std::process::id()) << 32 | 77,
        Ok(text) => text.parse().unwrap(),
        Err(_) => 1,
    };
    eprintln!("seed {seed}");
    let bench = Bench::new(false);
    bench.disk.open();
    let config = Config {
        cases: 200,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..Config::default()
    };
    let one = (any::<u16>(), 0u16..12, any::<u64>(), any::<u64>(), any::<u32>(), any::<bool>());
    let requests = proptest::collection::vec(one, 1..20);
    let said = (any::<bool>(), requests, proptest::collection::vec(any::<u8>(), 0..200));
    let ran = TestRunner::new(config).run(&said, |(structured, requests, rest)| {
        let mut raw = bench.raw(structured);
        let mut bytes = Vec::new();
        for (flags, command, cookie, offset, len, near) in requests {
            let near = |n: u64| if near { n % (SIZE as u64 / 2) } else { n };
            let (offset, len) = (near(offset), near(u64::from(len)) as u32 % (1 << 20));
            let request = Request { flags: flags % 16, command, cookie, offset, len };
            bytes.extend(request.encode());
            if command == command::WRITE && cookie % 4 != 0 {
                bytes.extend(vec![cookie as u8; len as usize]);
            }
        }
        bytes.extend(rest);
        let mut reading = raw.0.try_clone().unwrap();
        // Whoever sends and does not read is waited for: here both go on.
        let reader = thread::spawn(move || io::copy(&mut reading, &mut io::sink()));
        // It may be cut off before it has said all.
        let _ = raw.0.write_all(&bytes);
        let _ = raw.0.shutdown(Shutdown::Write);
        let read = reader.join().map_err(|_| TestCaseError::fail("the reader panicked"))?;
        match read {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                Err(TestCaseError::fail("the server does not hang up"))
            }
            _ => Ok(()),
        }
    });
    ran.unwrap();
    let client = bench.client();
    client.write_at(0, &[IoSlice::new(&[1])]).unwrap();
    drop(client);
    bench.server.stop().unwrap();
}
