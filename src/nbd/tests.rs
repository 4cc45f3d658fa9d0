//! Servers that say what no server should: every script of bytes ends in an error, none in a panic,
//! a hang or a large allocation. Real servers are met in the black-box tests.

use std::io::{self, Cursor, Read, Write};

use super::handshake::{Export, negotiate};
use super::replies::{self, Wanted};
use super::stream::Plain;
use super::tls::Side;
use super::wire::{self, chunk, option, reply};
use super::{Address, Target};

/// A server that says what it was told to, whatever it hears.
struct Script(Cursor<Vec<u8>>);

impl Read for Script {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Script {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Plain for Script {
    fn secure(&mut self, _: Side) -> io::Result<()> {
        unreachable!("TLS was not asked for")
    }
}

fn target(context: Option<&str>) -> Target {
    Target {
        address: Address::Unix("/nowhere".into()),
        export: Some("disk".into()),
        context: context.map(str::to_owned),
        tls: None,
    }
}

fn greeting() -> Vec<u8> {
    let mut bytes = wire::GREETING.to_be_bytes().to_vec();
    bytes.extend(wire::HAVE_OPTIONS.to_be_bytes());
    bytes.extend((wire::FIXED | wire::NO_ZEROES).to_be_bytes());
    bytes
}

fn answer(option: u32, code: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_REPLY.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(code.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn about(size: u64, flags: u16) -> Vec<u8> {
    [&wire::INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn good(size: u64) -> Vec<u8> {
    let context = [&7u32.to_be_bytes()[..], b"base:allocation"].concat();
    let blocks: Vec<u8> = [512u32, 4096, 1 << 20].iter().flat_map(|n| n.to_be_bytes()).collect();
    let blocks = [&wire::INFO_BLOCK_SIZE.to_be_bytes()[..], &blocks].concat();
    [
        greeting(),
        answer(option::STRUCTURED_REPLY, reply::ACK, &[]),
        answer(option::SET_META_CONTEXT, reply::META_CONTEXT, &context),
        answer(option::SET_META_CONTEXT, reply::ACK, &[]),
        answer(option::GO, reply::INFO, &about(size, 1)),
        answer(option::GO, reply::INFO, &blocks),
        answer(option::GO, reply::ACK, &[]),
    ]
    .concat()
}

fn haggle(bytes: Vec<u8>, context: Option<&str>) -> crate::Result<Export> {
    negotiate(&mut Script(Cursor::new(bytes)), &target(context), None)
}

#[test]
fn a_good_handshake_says_all_there_is_to_know() {
    let want = Export {
        size: 1 << 20,
        flags: 1,
        min_block: 512,
        max_block: 1 << 20,
        structured: true,
        context: Some(7),
    };
    assert_eq!(haggle(good(1 << 20), None).unwrap(), want);
    let error = haggle(good(1 << 20), Some("qemu:dirty-bitmap:b")).unwrap_err();
    assert_eq!(error.message(), "Could not open image: Invalid argument");
}

#[test]
fn an_old_server_is_asked_the_old_way() {
    let refuse = |option| answer(option, reply::UNSUPPORTED, b"what?");
    let mut bytes = [greeting(), refuse(option::STRUCTURED_REPLY), refuse(option::GO)].concat();
    bytes.extend(4096u64.to_be_bytes());
    bytes.extend(3u16.to_be_bytes());
    let export = haggle(bytes, None).unwrap();
    assert_eq!((export.size, export.flags, export.structured), (4096, 3, false));
}

#[test]
fn a_refusal_is_told_with_the_servers_words() {
    let bytes = [
        greeting(),
        answer(option::STRUCTURED_REPLY, reply::UNSUPPORTED, &[]),
        answer(option::GO, reply::UNKNOWN, b"export 'disk' not present"),
    ];
    let error = haggle(bytes.concat(), None).unwrap_err();
    let want = "Requested export not available\nserver reported: export 'disk' not present";
    assert_eq!(error.message(), want);
}

#[test]
fn a_handshake_that_ends_anywhere_or_lies_fails() {
    let whole = good(1 << 20);
    for len in 0..whole.len() {
        assert!(haggle(whole[..len].to_vec(), None).is_err(), "cut at {len}");
    }
    // A size past 2^63, one that is no multiple of the unit, and every byte changed.
    assert!(haggle(good(1 << 63), None).is_err());
    assert!(haggle(good((1 << 20) + 1), None).is_err());
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        let _ = haggle(bytes, None);
    }
    let endless: Vec<u8> =
        (0..10_000).flat_map(|_| answer(option::STRUCTURED_REPLY, reply::INFO, &[])).collect();
    assert!(haggle([greeting(), endless].concat(), None).is_err());
}

fn part(flags: u16, kind: u16, len: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::STRUCTURED_REPLY.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(1u64.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(data);
    bytes
}

fn data(flags: u16, at: u64, bytes: &[u8]) -> Vec<u8> {
    let all = [&at.to_be_bytes()[..], bytes].concat();
    part(flags, chunk::DATA, all.len() as u32, &all)
}

fn hole(flags: u16, at: u64, len: u32) -> Vec<u8> {
    part(flags, chunk::HOLE, 12, &[&at.to_be_bytes()[..], &len.to_be_bytes()].concat())
}

fn read(bytes: Vec<u8>) -> crate::Result<crate::Result<[u8; 16]>> {
    let mut got = [9; 16];
    let done = replies::read(&mut Cursor::new(bytes), 1, true, Wanted::Bytes(100, &mut got))?;
    Ok(done.map(|()| got))
}

#[test]
fn a_read_is_put_together_from_its_parts() {
    let whole = [hole(0, 108, 8), data(chunk::DONE, 100, &[5; 8])].concat();
    assert_eq!(
        read(whole.clone()).unwrap().unwrap(),
        [5, 5, 5, 5, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    for len in 0..whole.len() {
        assert!(read(whole[..len].to_vec()).is_err(), "cut at {len}");
    }
}

#[test]
fn parts_that_do_not_belong_to_a_read_end_the_connection() {
    for (bytes, why) in [
        (data(chunk::DONE, 99, &[5; 16]), "before what was asked for"),
        (data(chunk::DONE, 101, &[5; 16]), "past what was asked for"),
        (data(chunk::DONE, u64::MAX, &[5; 16]), "at the end of all numbers"),
        (data(chunk::DONE, 100, &[5; 15]), "too little"),
        ([data(0, 100, &[5; 16]), data(chunk::DONE, 100, &[5; 1])].concat(), "too much"),
        (hole(chunk::DONE, 100, u32::MAX), "a hole of 4 GiB"),
        (part(chunk::DONE, chunk::DATA, u32::MAX, &[0; 8]), "4 GiB of data"),
        (part(chunk::DONE, chunk::DATA, 3, &[0; 3]), "shorter than its offset"),
        (part(chunk::DONE, chunk::NONE, 0, &[]), "nothing"),
        (part(chunk::DONE, chunk::BLOCK_STATUS, 12, &[0; 12]), "block status"),
        (part(chunk::DONE, chunk::ERRORS + 1, u32::MAX, &[]), "an error of 4 GiB"),
        (part(chunk::DONE, chunk::ERRORS + 1, 6, &[0, 0, 0, 5, 0, 9]), "an error cut short"),
        (part(chunk::DONE, 77, 0, &[]), "an unknown part"),
    ] {
        assert!(read(bytes).is_err(), "{why}");
    }
}

#[test]
fn a_failure_that_the_server_reports_leaves_the_connection_alone() {
    let report = [&[0, 0, 0, 28, 0, 4][..], b"full"].concat();
    let bytes = part(chunk::DONE, chunk::ERRORS + 1, report.len() as u32, &report);
    let error = read(bytes).unwrap().unwrap_err();
    assert_eq!((error.message(), error.kind()), ("full", crate::ErrorKind::NoSpace));
}

#[test]
fn block_status_is_bounded_and_of_the_right_context() {
    let ask = |bytes: Vec<u8>| {
        let mut found = Vec::new();
        let wanted = Wanted::Stretches(7, &mut found);
        replies::read(&mut Cursor::new(bytes), 1, true, wanted).map(|done| done.map(|()| found))
    };
    let list = |words: &[u32]| -> Vec<u8> {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
        part(chunk::DONE, chunk::BLOCK_STATUS, bytes.len() as u32, &bytes)
    };
    assert_eq!(ask(list(&[7, 512, 3, 1024, 0])).unwrap().unwrap(), [(512, 3), (1024, 0)]);
    for bad in [&[8, 512, 3][..], &[7, 0, 3], &[7], &[7, 512], &[]] {
        assert!(ask(list(bad)).is_err(), "{bad:?}");
    }
    assert!(ask(part(chunk::DONE, chunk::BLOCK_STATUS, u32::MAX, &[])).is_err());
    assert!(ask(part(chunk::DONE, chunk::NONE, 0, &[])).is_err());
}
