//! A disk that is served over NBD: what QEMU's and libnbd's clients make of it, and what can be done
//! to it meanwhile.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::{Done, VDISK, Work};
use crate::mount::soon;
use crate::require::{Need, have};
use crate::twin::{noise, same_bytes};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// A server under way; killed with this guard.
pub struct Served {
    child: Child,
    /// Where clients connect.
    pub uri: String,
}

impl Served {
    /// Starts `vdisk serve` with these words, and waits until clients can connect.
    pub fn start(work: &Work, words: &str) -> Served {
        let mut child = Command::new(VDISK)
            .arg("serve")
            .args(words.split_whitespace())
            .current_dir(work.dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        let mut served = Served { child, uri: String::new() };
        let (told, heard) = mpsc::channel();
        thread::spawn(move || {
            let mut line = String::new();
            let _ = BufReader::new(out).read_line(&mut line);
            let _ = told.send(line);
        });
        let line = heard.recv_timeout(PATIENCE).expect("a server that says that it is ready");
        let uri = line.trim_end().strip_prefix("ready ");
        served.uri = uri.unwrap_or_else(|| panic!("'{line}' from serve {words}")).to_owned();
        served
    }

    /// The process that serves.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    /// Ends it as an administrator does; it has to end well.
    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "the server ended with {status}");
                return;
            }
            assert!(Instant::now() < until, "the server does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The files that it has open.
    pub fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Has QEMU read and write what is served.
    pub fn qemu_io(&self, work: &Work, commands: &[&str]) -> Done {
        let options = commands.iter().flat_map(|command| ["-c", command]);
        let words = ["-f", "raw", &self.uri].into_iter().chain(options);
        let mut done = work.run("qemu-io", words);
        if done.text().contains("verification failed") {
            done.code = Some(1);
        }
        done
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A test's directory with `disk.qcow2`, an empty disk of 64 MiB.
fn with_disk() -> Work {
    let work = Work::new();
    work.vdisk("create disk.qcow2 64M").succeeds();
    work
}

fn flat(work: &Work, image: &str) -> Vec<u8> {
    work.qemu_img(&format!("convert -O raw {image} flat.raw")).succeeds();
    let bytes = work.bytes("flat.raw");
    fs::remove_file(work.path("flat.raw")).unwrap();
    bytes
}

/// What a snapshot shows, through a server of its own.
fn snapshot(work: &Work, name: &str) -> Vec<u8> {
    let served = Served::start(work, &format!("nbd disk.qcow2 --socket past --snapshot {name}"));
    work.qemu_img(&format!("convert -f raw -O raw {} past.raw", served.uri)).succeeds();
    served.stop();
    work.bytes("past.raw")
}

#[test]
fn qemu_writes_reads_zeroes_and_discards_a_served_disk() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_disk();
    let mut want = vec![0; 64 * MIB];
    want[..20 * MIB].copy_from_slice(&noise(1, 20 * MIB));
    work.put("source", &want);
    let served = Served::start(&work, "nbd disk.qcow2 --socket sock");
    assert_eq!(fs::metadata(work.path("sock")).unwrap().mode() & 0o777, 0o600);
    let uri = served.uri.clone();
    work.qemu_img(&format!("convert -n -f raw -O raw source {uri}")).succeeds();
    work.qemu_img(&format!("compare -f raw -F raw source {uri}")).succeeds();
    let map = work.qemu_img(&format!("map --output=json -f raw {uri}")).succeeds().out();
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    assert_eq!(map[0]["length"], 20 * MIB);
    assert_eq!((&map[1]["zero"], &map[1]["data"]), (&true.into(), &false.into()));
    served
        .qemu_io(
            &work,
            &[
                "write -P 7 1000 3M",
                "write -z 4M 1M",
                "write -zu 6000k 2M",
                "write -f -P 9 40M 5k",
                "discard 16M 1M",
                "read -P 7 1000 3M",
                "read -P 0 4M 1M",
                "read -P 9 40M 5k",
                "flush",
            ],
        )
        .succeeds();
    want[1000..1000 + 3 * MIB].fill(7);
    want[4 * MIB..5 * MIB].fill(0);
    want[6000 << 10..(6000 << 10) + 2 * MIB].fill(0);
    want[40 * MIB..40 * MIB + 5120].fill(9);
    want[16 * MIB..17 * MIB].fill(0);
    work.qemu_img(&format!("convert -f raw -O raw {uri} back")).succeeds();
    same_bytes("the served disk", &work.bytes("back"), &want);
    served.stop();
    assert!(!work.path("sock").exists(), "the socket is left behind");
    work.qemu_img("check disk.qcow2").succeeds();
    same_bytes("the disk", &flat(&work, "disk.qcow2"), &want);
}

#[test]
fn nbdcopy_writes_over_several_connections_and_nbdinfo_tells_the_disk() {
    if !have(Need::Nbd) || !have(Need::Qemu) {
        return;
    }
    let work = with_disk();
    let mut want = vec![0; 64 * MIB];
    want[3 * MIB..30 * MIB].copy_from_slice(&noise(2, 27 * MIB));
    work.put("source", &want);
    let served = Served::start(&work, "nbd disk.qcow2 --listen 0 --export web");
    let uri = &served.uri;
    assert!(uri.starts_with("nbd://127.0.0.1:") && uri.ends_with("/web"), "{uri}");
    let said = work.run("nbdinfo", ["--json", uri]).succeeds().out();
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let export = &said["exports"][0];
    assert_eq!((&export["export-name"], &export["export-size"]), (&"web".into(), &67108864.into()));
    for can in ["can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero", "can_df"] {
        assert_eq!(export[can], true, "{can}");
    }
    work.run("nbdinfo", ["--json", uri.trim_end_matches("web")]).fails(&["default export"]);
    work.run("nbdcopy", ["--connections=4", "--flush", "source", uri]).succeeds();
    let map = work.run("nbdinfo", ["--map", "--totals", uri]).succeeds().out();
    assert!(map.contains(&(27 * MIB).to_string()), "{map}");
    work.run("nbdcopy", ["--connections=4", "--request-size=33554432", uri, "back"]).succeeds();
    same_bytes("the copy", &work.bytes("back"), &want);
    work.run("nbdcopy", ["--no-extents", uri, "again"]).succeeds();
    same_bytes("the other copy", &work.bytes("again"), &want);
    served.stop();
    same_bytes("the disk", &flat(&work, "disk.qcow2"), &want);
    // A client that never asks for it leaves a disk whose tables are written all the same.
    let served = Served::start(&work, "nbd disk.qcow2 --socket sock");
    want[MIB..60 * MIB].copy_from_slice(&noise(3, 59 * MIB));
    work.put("source", &want);
    work.run("nbdcopy", ["source", &served.uri]).succeeds();
    served.signal(Signal::SIGKILL);
    drop(served);
    same_bytes("the disk of a killed server", &flat(&work, "disk.qcow2"), &want);
}

/// Requests of a round of [`disturb`]: they stay within the 16 MiB of their writer.
const COUNT: usize = 1300;

/// Writes with several clients, each at a place of its own and over and over, until told.
fn disturb(work: &Work, served: &Served, over: &AtomicBool) -> [usize; 3] {
    thread::scope(|scope| {
        let writers = [0, 1, 2].map(|n: usize| {
            scope.spawn(move || {
                let mut rounds = 0;
                while !over.load(Ordering::Relaxed) {
                    rounds += 1;
                    let at = 16 * (n + 1);
                    let step = 4096 * (n + 1);
                    let words = format!(
                        "bench -w -c {COUNT} -d 8 -f raw -o {at}M -s {step} --pattern {} {}",
                        rounds % 200 + 1,
                        served.uri
                    );
                    work.qemu_img(&words).succeeds();
                }
                rounds
            })
        });
        writers.map(|writer| writer.join().unwrap())
    })
}

#[test]
fn a_served_disk_takes_snapshots_merges_grows_and_compacts_under_its_clients() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_disk();
    let served = Served::start(&work, "nbd disk.qcow2 --socket sock");
    let over = AtomicBool::new(false);
    let rounds = thread::scope(|scope| {
        let writers = scope.spawn(|| disturb(&work, &served, &over));
        // What fails here must not leave the writers at work.
        let judged = scope.spawn(|| {
            for (number, name) in ["one", "two", "three"].into_iter().enumerate() {
                let pattern = format!("write -P {} 1M 3M", number + 1);
                served.qemu_io(&work, &[&pattern]).succeeds();
                work.vdisk(&format!("snapshot create disk.qcow2 {name}")).succeeds();
            }
            served.qemu_io(&work, &["write -P 4 1M 1M"]).succeeds();
            let diff = work.vdisk("snapshot diff disk.qcow2 one two").succeeds().out();
            assert!(!diff.is_empty());
            let told = work.vdisk("info disk.qcow2").succeeds().out();
            assert!(told.contains("held as: served at nbd+unix:///?socket="), "{told}");
            work.vdisk("snapshot merge disk.qcow2 two").succeeds();
            work.vdisk("resize disk.qcow2 80M").succeeds();
            work.vdisk("compact disk.qcow2").succeeds();
            served.qemu_io(&work, &["write -P 5 70M 1M", "read -P 5 70M 1M"]).succeeds();
            work.vdisk("snapshot create disk.qcow2 four --freeze").fails(&["its client"]);
            work.vdisk("snapshot revert disk.qcow2 one --yes").fails(&["the server"]);
            work.vdisk("write disk.qcow2 0").fails(&["in use", "vdisk"]);
        });
        let judged = judged.join();
        over.store(true, Ordering::Relaxed);
        judged.unwrap();
        writers.join().unwrap()
    });
    served.stop();
    for name in work.files().iter().filter(|n| n.ends_with(".qcow2")) {
        work.qemu_img(&format!("check {name}")).succeeds();
    }
    let list = work.vdisk("snapshot list disk.qcow2").succeeds().out();
    assert!(list.contains("one") && !list.contains("two") && list.contains("* three"), "{list}");
    let uniform = |bytes: &[u8], value: u8| bytes.iter().all(|b| *b == value);
    let one = snapshot(&work, "one");
    assert!(uniform(&one[MIB..4 * MIB], 1) && uniform(&one[..MIB], 0));
    let three = snapshot(&work, "three");
    assert!(uniform(&three[MIB..4 * MIB], 3) && three.len() == 64 * MIB);
    let now = flat(&work, "disk.qcow2");
    assert!(uniform(&now[MIB..2 * MIB], 4) && uniform(&now[2 * MIB..4 * MIB], 3));
    assert!(uniform(&now[70 * MIB..71 * MIB], 5) && now.len() == 80 * MIB);
    for (n, rounds) in rounds.into_iter().enumerate() {
        assert!(rounds > 0);
        let (at, len) = (16 * (n + 1) * MIB, COUNT * 4096 * (n + 1));
        let last = (rounds % 200 + 1) as u8;
        assert!(uniform(&now[at..at + len], last), "the last round of writer {n} is not all there");
    }
}

#[test]
fn what_was_flushed_outlives_a_server_that_is_killed() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.vdisk("create disk.qcow2 2G").succeeds();
    let served = Served::start(&work, "nbd disk.qcow2 --socket sock");
    served.qemu_io(&work, &["write -P 3 0 5M", "write -f -P 4 8M 64k", "flush"]).succeeds();
    thread::scope(|scope| {
        let (uri, work) = (&served.uri, &work);
        let writer = scope.spawn(move || {
            work.qemu_img(&format!("bench -w -c 450000 -d 16 -f raw -o 16M -s 4096 {uri}"))
        });
        thread::sleep(Duration::from_millis(300));
        work.vdisk("snapshot create disk.qcow2 one").succeeds();
        thread::sleep(Duration::from_millis(300));
        served.signal(Signal::SIGKILL);
        assert_ne!(writer.join().unwrap().code, Some(0), "it wrote on without a server");
    });
    drop(served);
    assert!(work.path("sock").exists(), "nobody was left to remove the socket");
    for name in work.files().iter().filter(|n| n.ends_with(".qcow2")) {
        let code = work.qemu_img(&format!("check {name}")).code;
        assert!(matches!(code, Some(0 | 3)), "{name}: qemu-img check ends with {code:?}");
    }
    // The socket that was left is nobody's.
    let served = Served::start(&work, "nbd disk.qcow2 --socket sock");
    served.qemu_io(&work, &["read -P 3 0 5M", "read -P 4 8M 64k"]).succeeds();
    served.stop();
    let past = Served::start(&work, "nbd disk.qcow2 --socket sock --snapshot one --ephemeral");
    past.qemu_io(&work, &["read -P 3 0 5M", "read -P 4 8M 64k"]).succeeds();
    past.stop();
}

#[test]
fn a_server_that_is_ended_under_its_clients_leaves_a_clean_disk() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_disk();
    let served = Served::start(&work, "nbd disk.qcow2 --socket sock");
    thread::scope(|scope| {
        let uri = served.uri.clone();
        let work = &work;
        let writer = scope.spawn(move || {
            work.qemu_img(&format!("bench -w -c 1000000 -d 16 -f raw -s 70000 {uri}"))
        });
        thread::sleep(Duration::from_millis(300));
        served.stop();
        assert_ne!(writer.join().unwrap().code, Some(0), "it wrote on without a server");
    });
    work.qemu_img("check disk.qcow2").succeeds();
    assert!(!work.path("sock").exists());
}

#[test]
fn a_disk_is_served_for_reading_at_a_snapshot_or_for_writes_that_are_thrown_away() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_disk();
    let fill = |value: u8| work.vdisk_fed("write disk.qcow2 1M", &vec![value; MIB]).succeeds();
    fill(1);
    work.vdisk("snapshot create disk.qcow2 past").succeeds();
    fill(2);
    let before = work.bytes("disk.qcow2");
    let served = Served::start(&work, "nbd disk.qcow2 --socket sock --read-only");
    served.qemu_io(&work, &["write 0 1k"]).fails(&["permission denied"]);
    let words = ["-r", "-f", "raw", "-c", "read -P 2 1M 1M", &served.uri];
    assert!(!work.run("qemu-io", words).succeeds().text().contains("failed"));
    // Others may read it meanwhile.
    let other = Served::start(&work, "nbd disk.qcow2 --socket other --snapshot past");
    let words = ["-r", "-f", "raw", "-c", "read -P 1 1M 1M", &other.uri];
    assert!(!work.run("qemu-io", words).succeeds().text().contains("failed"));
    other.stop();
    served.stop();
    for (words, value) in [("", 2), ("--snapshot past", 1)] {
        let words = format!("nbd disk.qcow2 --socket sock --ephemeral {words}");
        let served = Served::start(&work, &words);
        let read = format!("read -P {value} 1M 1M");
        let write = ["write -P 9 1536k 1M", "flush", "read -P 9 1536k 1M"];
        served.qemu_io(&work, &[&[read.as_str()][..], &write].concat()).succeeds();
        served.stop();
    }
    assert!(work.bytes("disk.qcow2") == before, "the disk was changed");
    work.vdisk("serve nbd disk.qcow2 --socket sock --snapshot none").fails(&["none"]);
}

#[test]
fn wrong_words_and_places_are_refused_before_anything_is_served() {
    let work = with_disk();
    work.vdisk("serve nbd disk.qcow2").ends(64);
    work.vdisk("serve nbd disk.qcow2 --socket a --listen 1").ends(64);
    work.vdisk("serve nbd disk.qcow2 --listen host:port").ends(64);
    work.vdisk("serve nbd disk.qcow2 --socket a --read-only --ephemeral").ends(64);
    work.vdisk("serve nbd none.qcow2 --socket a").fails(&["none.qcow2"]);
    work.vdisk("serve nbd disk.qcow2 --socket none/a").fails(&["none"]);
    work.put("file", "precious");
    work.vdisk("serve nbd disk.qcow2 --socket file").fails(&["file", "no socket"]);
    assert_eq!(work.bytes("file"), b"precious");
    let served = Served::start(&work, "nbd disk.qcow2 --socket sock");
    work.vdisk("serve nbd disk.qcow2 --socket other").fails(&["in use"]);
    work.vdisk("create disk2.qcow2 1M").succeeds();
    work.vdisk("serve nbd disk2.qcow2 --socket sock").fails(&["sock", "listens"]);
    let port = {
        let tcp = Served::start(&work, "nbd disk2.qcow2 --listen 127.0.0.1:0");
        let port = tcp.uri.trim_end_matches('/').rsplit(':').next().unwrap().to_owned();
        work.vdisk("create disk3.qcow2 1M").succeeds();
        work.vdisk(&format!("serve nbd disk3.qcow2 --listen {port}")).fails(&[&port]);
        tcp.stop();
        port
    };
    // The port is free again at once.
    Served::start(&work, &format!("nbd disk2.qcow2 --listen {port}")).stop();
    UnixStream::connect(work.path("sock")).unwrap();
    served.stop();
}

#[test]
fn hostile_clients_do_not_keep_others_from_the_disk() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_disk();
    let served = Served::start(&work, "nbd disk.qcow2 --listen 0");
    let address = served.uri.strip_prefix("nbd://").unwrap().trim_end_matches('/').to_owned();
    let connect = || {
        let stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let silent: Vec<_> = (0..8).map(|_| connect()).collect();
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 1000], &[255; 1000]] {
        let mut stream = connect();
        // It may be cut off before it has said all, or heard all.
        let _ = stream.write_all(nonsense);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    served.qemu_io(&work, &["write -P 5 0 1M", "read -P 5 0 1M"]).succeeds();
    drop(silent);
    // Nobody keeps the places of those that left.
    let crowd: Vec<_> = (0..200).map(|_| connect()).collect();
    drop(crowd);
    soon("a place for another client", || {
        served.qemu_io(&work, &["read -P 5 0 1M"]).code == Some(0)
    });
    served.stop();
    work.qemu_img("check disk.qcow2").succeeds();
}
