//! NBD with TLS against qemu-nbd with the same certificates, the same client at both: `nbdcopy` of a
//! whole disk in large requests, and of a part of it in small ones. Both ends share this machine, so a
//! row shows how much of the whole way the servers' halves are.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::certificates::{Authority, Wanted};
use super::peers::{Running, Side, place, raw, row};
use super::seconds;

/// What is copied in small requests.
const PART: u64 = 64 << 20;

/// A server under way.
struct Server {
    _running: Running,
    port: u16,
}

impl Server {
    fn start(side: Side, dir: &Path) -> Server {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let disk = format!("{}.qcow2", side.name());
        let words = match side {
            Side::Ours => format!(
                "serve nbd {disk} --listen 127.0.0.1:{port} --tls-certs certs --tls-verify-peer"
            ),
            Side::Peer => format!(
                "-t -e 32 -b 127.0.0.1 -p {port} -f qcow2 --cache=writeback --discard=unmap --tls-creds s \
                 --object tls-creds-x509,id=s,dir=certs,endpoint=server {disk}"
            ),
        };
        let program = match side {
            Side::Ours => env!("CARGO_BIN_EXE_vdisk"),
            Side::Peer => "qemu-nbd",
        };
        let mut command = Command::new(program);
        command.args(words.split_whitespace()).current_dir(dir).stdout(Stdio::null());
        let server = Server { _running: Running(command.spawn().unwrap()), port };
        let until = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "{program} does not listen");
            thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// Copies the export to nowhere, or `source` into it.
    fn copy(&self, dir: &Path, options: &[&str], source: Option<&str>) -> f64 {
        let certs = dir.join("certs");
        let uri = format!("nbds://127.0.0.1:{}/?tls-certificates={}", self.port, certs.display());
        let ends = source.map_or([&*uri, "null:"], |source| [source, &*uri]);
        seconds(|| {
            let done = Command::new("nbdcopy").args(options).args(ends).current_dir(dir).status();
            assert!(done.unwrap().success(), "nbdcopy {options:?} {ends:?}");
        })
    }
}

/// Both servers of a disk of `size` bytes.
fn servers(dir: &Path, source: &str, size: u64) -> [Server; 2] {
    raw(dir, source, size, 1);
    let peer = "peer.qcow2";
    Side::Peer.run(dir, &["convert", "-f", "raw", "-O", "qcow2", source, peer]);
    fs::copy(dir.join(peer), dir.join("ours.qcow2")).unwrap();
    [Side::Ours, Side::Peer].map(|side| Server::start(side, dir))
}

/// Prints the rows; without the programs there are none.
pub fn table() {
    for program in ["qemu-nbd", "nbdcopy", "openssl"] {
        if Command::new(program).arg("--version").output().is_err() {
            eprintln!("SKIPPED: the table of NBD needs {program}");
            return;
        }
    }
    let (dir, size) = place();
    let dir = dir.path();
    let authority = Authority::new(dir.join("authority"));
    authority.fill(&dir.join("certs"), &[Wanted::SERVER, Wanted::CLIENT]);
    let peer = "qemu-nbd";
    let both = |servers: &[Server; 2], what: &str, options: &[&str], source: &str| {
        let at = |side: Side| if side == Side::Ours { &servers[0] } else { &servers[1] };
        let options = [options, &["--no-extents"]].concat();
        row(&format!("NBD, TLS: read {what}"), peer, |side| at(side).copy(dir, &options, None));
        let write = |side: Side| at(side).copy(dir, &options, Some(source));
        row(&format!("NBD, TLS: write {what}"), peer, write);
    };
    let whole = servers(dir, "source.raw", size);
    both(&whole, "all, 1 connection", &["--connections=1"], "source.raw");
    both(&whole, "all, 4 connections", &["--connections=4"], "source.raw");
    drop(whole);
    let part = servers(dir, "part.raw", PART);
    let small = ["--connections=1", "--request-size=4096", "--threads=1"];
    both(&part, "4 KiB at a time, depth 1", &[&small[..], &["--requests=1"]].concat(), "part.raw");
    both(
        &part,
        "4 KiB at a time, depth 16",
        &[&small[..], &["--requests=16"]].concat(),
        "part.raw",
    );
}
