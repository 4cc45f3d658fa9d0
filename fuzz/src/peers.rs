//! What other programs say over sockets: clients and a server of NBD, and a virtual machine's side of
//! vhost-user. One body for each target.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vdisk::internals::block::BlockDevice;
use vdisk::internals::nbd::{Address, Client, Target};
use vdisk::internals::serve::nbd::{Contexts, Export, Server, Tls};
use vdisk::internals::serve::socket::{Listener, UnixSocket};
use vdisk::internals::serve::vhost;
use vdisk::internals::storage::Storage;
use vdisk::internals::virtio::Id;

use crate::inside::Ram;

/// Bytes of the disk that is served.
const DISK: u64 = 1 << 20;
/// How long who has been answered may take to say so.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a guest's memory.
const MEMORY: u64 = 256 << 10;

fn disk() -> Arc<dyn BlockDevice> {
    Arc::new(Ram::new(Arc::new(vec![0x5a; 64 << 10]), DISK))
}

/// Who leaves early makes an error, and no signal that ends this process: libFuzzer's does not ignore it. Threads
/// that are started from here inherit it.
fn leave_early() {
    SigSet::from(Signal::SIGPIPE).thread_block().unwrap();
}

/// A path of this process's own.
pub fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("vdisk-fuzz-{}-{name}", std::process::id()))
}

/// What a server that this process runs for ever listens at.
static NBD: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = path("nbd");
    let depth = |_, len| Ok((len, 1));
    let contexts = Contexts { depth: Some(Arc::new(depth)), bitmaps: Vec::new() };
    let (name, description) = (String::new(), String::new());
    let export = Export { device: disk(), name, description, contexts };
    let listener = Listener::unix(&path).unwrap();
    std::mem::forget(Server::start(export, listener, Tls::Off).unwrap());
    path
});

/// Bytes as what a client says: the first says how far it is when it goes astray.
pub fn nbd_client_says(bytes: &[u8]) {
    leave_early();
    let [how, rest @ ..] = bytes else { return };
    let mut said = Vec::new();
    if how & 1 != 0 {
        // Fixed newstyle, and no zeroes.
        said.extend(3u32.to_be_bytes());
    }
    if how & 3 == 3 {
        let option = |number: u32, data: &[u8]| {
            let head =
                [&b"IHAVEOPT"[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes()];
            [&head.concat(), data].concat()
        };
        let structured = if how & 4 != 0 { option(8, b"") } else { Vec::new() };
        let context = b"base:allocation";
        let query = [&[0; 4][..], &1u32.to_be_bytes(), &15u32.to_be_bytes(), context].concat();
        let metadata = if how & 12 == 12 { option(10, &query) } else { Vec::new() };
        said.extend([structured, metadata, option(7, &[0; 6])].concat());
        for record in rest.chunks_exact(12) {
            let number = |at: usize| u16::from_be_bytes([record[at], record[at + 1]]);
            let (flags, command) = (number(0) & 0x3f, number(2) & 0xf);
            let offset = u64::from(number(4)) << (record[6] & 15);
            let len = u32::from(number(7)) << (record[9] & 7);
            said.extend(0x2560_9513u32.to_be_bytes());
            said.extend([flags.to_be_bytes(), command.to_be_bytes()].concat());
            said.extend(u64::from(record[10]).to_be_bytes());
            said.extend(offset.to_be_bytes());
            said.extend(len.to_be_bytes());
            if command == 1 {
                said.resize(said.len() + (len as usize).min(128 << 10), record[11]);
            }
        }
    } else {
        said.extend(rest);
    }
    let mut stream = UnixStream::connect(&*NBD).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let told = std::thread::spawn(move || {
        let _ = writer.write_all(&said);
        let _ = writer.shutdown(Shutdown::Write);
    });
    answered(&mut stream);
    told.join().unwrap();
}

/// Reads to the end, which has to come.
fn answered(stream: &mut UnixStream) {
    let mut buf = [0; 65536];
    loop {
        match stream.read(&mut buf) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return,
            // By libFuzzer's clock.
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => panic!("nobody answers: {e}"),
        }
    }
}

/// Bytes as what a server says, to a client that agrees on the export and reads and writes.
pub fn nbd_server_says(bytes: &[u8]) {
    leave_early();
    static LISTENER: LazyLock<(UnixListener, PathBuf)> = LazyLock::new(|| {
        let path = path("server");
        let _ = std::fs::remove_file(&path);
        (UnixListener::bind(&path).unwrap(), path)
    });
    let [how, rest @ ..] = bytes else { return };
    let mut said = Vec::new();
    if how & 1 != 0 {
        said.extend([&b"NBDMAGICIHAVEOPT"[..], &3u16.to_be_bytes()].concat());
    }
    if how & 3 == 3 {
        let reply = |option: u32, kind: u32, data: &[u8]| {
            let numbers = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
            [&0x0003_e889_0455_65a9u64.to_be_bytes()[..], &numbers, data].concat()
        };
        let structured = if how & 4 != 0 { 1 } else { 0x8000_0001 };
        said.extend(reply(8, structured, b""));
        if how & 4 != 0 {
            said.extend(reply(10, 4, &[&[0, 0, 0, 1][..], b"base:allocation"].concat()));
            said.extend(reply(10, 1, b""));
        }
        let info = [&[0, 0][..], &DISK.to_be_bytes(), &0x7fu16.to_be_bytes()].concat();
        said.extend(reply(7, 3, &info));
        said.extend(reply(7, 1, b""));
        // Answers, whose magics and cookies are those that are awaited.
        for (cookie, record) in (1u64..).zip(rest.chunks(16)) {
            let structured =
                [&0x668e_33efu32.to_be_bytes()[..], record.get(..4).unwrap_or(b"\0\x01\0\x05")];
            let simple = [&0x6744_6698u32.to_be_bytes()[..], &[0, 0, 0, record[0] & 5]];
            said.extend(if how & 4 != 0 { structured.concat() } else { simple.concat() });
            said.extend(cookie.to_be_bytes());
            said.extend(record.get(4..).unwrap_or_default());
        }
    } else {
        said.extend(rest);
    }
    let (listener, path) = &*LISTENER;
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(&said);
        let _ = stream.shutdown(Shutdown::Write);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        answered(&mut stream);
    });
    let address = Address::Unix(path.clone());
    let target = Target { address, export: None, context: None, tls: None };
    if let Ok(client) = Client::connect(&target, how & 8 != 0) {
        let mut buf = vec![0; 8192];
        let _ = client.stretch(0, client.size().min(1 << 30));
        let _ = client.read_at(512, &mut [IoSliceMut::new(&mut buf)]);
        let _ = client.write_at(512, &[IoSlice::new(&buf)]);
        let _ = client.write_zeroes(0, 4096);
        let _ = client.read_at(0, &mut [IoSliceMut::new(&mut buf)]);
        let _ = client.sync();
    }
    server.join().unwrap();
}

static VHOST: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = path("vhost");
    let socket = UnixSocket::bind(&path).unwrap();
    std::mem::forget(vhost::Server::start(disk(), Id::new("fuzz"), 2, socket).unwrap());
    path
});

/// One message: its number, what goes with it, and whether a descriptor does.
fn say(stream: &UnixStream, number: u32, payload: &[u8], file: Option<&OwnedFd>) {
    let head = [number, 1, payload.len() as u32].map(u32::to_le_bytes).concat();
    let whole = [&head, payload].concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    let file = file.map(AsFd::as_fd);
    if let Some(file) = &file {
        with.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(file)));
    }
    let _ = sendmsg(stream, &[IoSlice::new(&whole)], &mut with, SendFlags::NOSIGNAL);
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Bytes as what a virtual machine's program says: each record a message, a word in the guest's memory, or a
/// kick. The first byte says whether all is set up before.
pub fn vhost_says(bytes: &[u8]) {
    leave_early();
    let [how, rest @ ..] = bytes else { return };
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, MEMORY).unwrap();
    let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let mut stream = UnixStream::connect(&*VHOST).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    if how & 1 != 0 {
        say(&stream, 3, b"", None);
        say(&stream, 2, &words(&[1 << 30 | 1 << 32]), None);
        say(&stream, 16, &words(&[u64::from(*how) << 1]), None);
        let table =
            [&[1u8, 0, 0, 0, 0, 0, 0, 0][..], &words(&[0, MEMORY, 0x7000_0000, 0])].concat();
        say(&stream, 5, &table, Some(&memory));
        say(&stream, 8, &[0, 0, 0, 0, 16, 0, 0, 0], None);
        let rings = words(&[0x7000_0000, 0x7000_2000, 0x7000_1000, 0]);
        say(&stream, 9, &[&[0; 8][..], &rings].concat(), None);
        say(&stream, 10, &[0; 8], None);
        say(&stream, 13, &words(&[0]), Some(&kick));
        say(&stream, 12, &words(&[0]), Some(&kick));
        say(&stream, 18, &[0, 0, 0, 0, 1, 0, 0, 0], None);
    }
    let mut at = rest;
    while let [what, len, more @ ..] = at {
        let len = usize::from(*len).min(more.len());
        let (data, next) = more.split_at(len);
        at = next;
        match what {
            0..=0x7f => say(&stream, u32::from(*what), data, None),
            0x80..=0xbf => say(&stream, u32::from(what & 0x3f), data, Some(&memory)),
            0xc0..=0xdf => say(&stream, u32::from(what & 0x1f), data, Some(&kick)),
            0xe0..=0xef => {
                let [low, high, word @ ..] = data else { continue };
                let place = u64::from(u16::from_le_bytes([*low, *high]));
                let _ = rustix::io::pwrite(&memory, word, place % (MEMORY - 256));
            }
            _ => drop(rustix::io::write(&kick, &1u64.to_ne_bytes())),
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
    answered(&mut stream);
}
