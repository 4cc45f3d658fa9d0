//! vhost-user-blk against qemu-storage-daemon's export of the same kind, the same driver at both: requests of
//! 4 KiB anywhere and of 1 MiB in a row, on a delta over a base. Both ends share this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::driver::{Driver, Job};
use super::peers::{Running, Side, place, raw, row};

/// The disk. A write is the first one of its cluster only before anything is measured.
const SIZE: u64 = 256 << 20;
const QUEUES: u16 = 4;
const SMALL: Job =
    Job { write: false, len: 4096, depth: 1, requests: 20_000, size: SIZE, random: true };
const LARGE: Job =
    Job { write: false, len: 1 << 20, depth: 4, requests: 1024, size: SIZE, random: false };

/// A server under way.
struct Server {
    _running: Running,
    socket: PathBuf,
}

impl Server {
    fn start(side: Side, dir: &Path) -> Server {
        let name = side.name();
        let (program, words) = match side {
            Side::Ours => (
                env!("CARGO_BIN_EXE_vdisk"),
                format!("serve vhost-user {name}.qcow2 --socket {name}.sock --queues {QUEUES}"),
            ),
            Side::Peer => (
                "qemu-storage-daemon",
                format!(
                    "--blockdev driver=file,node-name=file,filename={name}.qcow2,discard=unmap \
                     --blockdev driver=qcow2,node-name=disk,file=file \
                     --export type=vhost-user-blk,id=e,node-name=disk,writable=on,num-queues={QUEUES},\
                     addr.type=unix,addr.path={name}.sock"
                ),
            ),
        };
        let mut command = Command::new(program);
        command.args(words.split_whitespace()).current_dir(dir).stdout(Stdio::null());
        let running = Running(command.stdin(Stdio::null()).spawn().unwrap());
        Server { _running: running, socket: dir.join(format!("{name}.sock")) }
    }
}

/// Prints the rows; without qemu-storage-daemon there are none.
pub fn table() {
    if Command::new("qemu-storage-daemon").arg("--version").output().is_err() {
        eprintln!("SKIPPED: the table of vhost-user needs qemu-storage-daemon");
        return;
    }
    let (dir, _) = place();
    let dir = dir.path();
    raw(dir, "source.raw", SIZE, 1);
    Side::Peer.run(dir, &["convert", "-f", "raw", "-O", "qcow2", "source.raw", "base.qcow2"]);
    fs::remove_file(dir.join("source.raw")).unwrap();
    let servers = [Side::Ours, Side::Peer].map(|side| {
        let name = format!("{}.qcow2", side.name());
        Side::Peer
            .run(dir, &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &name]);
        Server::start(side, dir)
    });
    let mut seed = 0;
    let mut measure = |what: &str, queues: u16, job: Job| {
        row(&format!("vhost-user: {what}"), "storage-daemon", |side| {
            let server = if side == Side::Ours { &servers[0] } else { &servers[1] };
            // Both sides of a pair have the same one.
            let of_pair = seed / 2 * 31;
            seed += 1;
            Driver::connect(&server.socket, queues).run(job, of_pair)
        });
    };
    for write in [false, true] {
        let verb = if write { "write" } else { "read" };
        for queues in [1, 4] {
            for depth in [1, 16, 64] {
                let what = format!("{verb} 4 KiB, {queues} queues, depth {depth}");
                measure(&what, queues, Job { write, depth, ..SMALL });
            }
        }
        measure(&format!("{verb} 1 MiB in a row"), 1, Job { write, ..LARGE });
    }
}
