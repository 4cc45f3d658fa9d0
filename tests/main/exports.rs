//! The drop-in as a client of NBD servers: QEMU's, and one that wants whole blocks.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::host::{Done, Running, Work};
use crate::require::{Need, have};
use crate::twin::{noise, same_bytes};

const SIZE: usize = 3 << 20;

/// The drop-in.
pub fn ours(work: &Work, words: &str) -> Done {
    work.vdisk(&format!("qemu-img {words}"))
}

/// A server that goes with the test.
pub struct Server(Running);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.signal(Signal::SIGTERM);
    }
}

/// Starts a server at a socket in the test's directory, where its words say `SOCKET`.
pub fn serve(work: &Work, program: &str, words: &str, socket: &str) -> Server {
    // QEMU's server wants the whole path.
    let path = work.path(socket).display().to_string();
    let words = words.split_whitespace().map(|w| if w == "SOCKET" { &path } else { w });
    let server = Server(work.command(program, words));
    let until = Instant::now() + Duration::from_secs(20);
    while !Path::new(&work.path(socket)).exists() {
        assert!(Instant::now() < until, "{program} does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    server
}

#[test]
fn an_export_of_qemus_is_told_read_and_written_as_qemu_img_does() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.put("flat", [noise(1, SIZE / 3), vec![0; SIZE / 3], noise(2, SIZE / 3)].concat());
    work.qemu_img("convert -f raw -O qcow2 flat disk.qcow2").succeeds();
    work.qemu_img("bitmap --add disk.qcow2 dirty").succeeds();
    work.qemu_io("disk.qcow2", &["write -P 9 1500k 100k"]).succeeds();
    let mut want = work.bytes("flat");
    want[1500 << 10..1600 << 10].fill(9);
    {
        let words = "-r -e 4 -t -k SOCKET -x disk -B dirty -f qcow2 disk.qcow2";
        let _server = serve(&work, "qemu-nbd", words, "in");
        let uri = "nbd+unix:///disk?socket=in";
        let place = "driver=nbd,server.type=unix,server.path=in,export=disk";
        for words in [
            format!("info {uri}"),
            "info --output=json nbd:unix:in:exportname=disk".to_owned(),
            format!("map {uri}"),
            format!("map --output=json --image-opts {place}"),
            format!(
                "map --output=json --image-opts {place},x-dirty-bitmap=qemu:dirty-bitmap:dirty"
            ),
            format!("measure -O qcow2 {uri}"),
        ] {
            let told = work.qemu_img(&words).succeeds().out();
            assert_eq!(ours(&work, &words).succeeds().out(), told, "{words}");
        }
        for words in [
            "info nbd:unix:in".to_owned(),
            "info nbd:unix:nowhere".to_owned(),
            format!("resize -f raw {uri} 5M"),
            format!("map --image-opts {place},x-dirty-bitmap=qemu:dirty-bitmap:clean"),
        ] {
            let told = work.qemu_img(&words).fails(&["qemu-img: "]).err();
            assert_eq!(ours(&work, &words).fails(&[]).err(), told, "{words}");
        }
        ours(&work, &format!("convert {uri} -O raw back")).succeeds();
        same_bytes("the export", &work.bytes("back"), &want);
        ours(&work, &format!("compare -f raw {uri} -F qcow2 -U disk.qcow2")).succeeds();
    }
    work.qemu_img("create -q -f qcow2 target.qcow2 3M").succeeds();
    work.qemu_io("target.qcow2", &["write -P 1 0 3M"]).succeeds();
    {
        let _server = serve(&work, "qemu-nbd", "-t -e 4 -k SOCKET -f qcow2 target.qcow2", "out");
        ours(&work, "convert -n -f raw -O raw back nbd:unix:out").succeeds();
        ours(&work, "compare -f raw -F raw back nbd:unix:out").succeeds();
        ours(&work, "bench -w -c 20 -s 3000 --pattern 5 -f raw nbd:unix:out").succeeds();
    }
    want[..60_000].fill(5);
    work.qemu_img("convert -O raw target.qcow2 written").succeeds();
    same_bytes("the target", &work.bytes("written"), &want);
}

#[test]
fn a_server_that_wants_whole_blocks_gets_them() {
    if !have(Need::Qemu) || !have(Need::Nbdkit) {
        return;
    }
    let work = Work::new();
    work.put("flat", noise(5, SIZE));
    work.put("disk", vec![7; SIZE]);
    let words = "-f -U SOCKET --filter=blocksize-policy file disk blocksize-minimum=4096 \
                 blocksize-preferred=4096 blocksize-maximum=64K blocksize-error-policy=error";
    let _server = serve(&work, "nbdkit", words, "sock");
    ours(&work, "convert -n -f raw -O raw flat nbd:unix:sock").succeeds();
    same_bytes("the disk", &work.bytes("disk"), &work.bytes("flat"));
    ours(&work, "bench -w -d 7 -c 40 -o 1000 -s 5000 --pattern 3 -f raw nbd:unix:sock").succeeds();
    let mut want = work.bytes("flat");
    want[1000..201_000].fill(3);
    same_bytes("the disk", &work.bytes("disk"), &want);
    ours(&work, "convert -f raw -O raw nbd:unix:sock back").succeeds();
    same_bytes("the copy", &work.bytes("back"), &want);
}

#[test]
fn a_server_that_hangs_up_or_babbles_is_an_error_at_once() {
    let work = Work::new();
    for said in ["", "NBDMAGIC", "NBDMAGICIHAVEOPT", "HTTP/1.1 400 Bad Request\r\n\r\n"] {
        let socket = work.path("sock");
        let _ = std::fs::remove_file(&socket);
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            std::io::Write::write_all(&mut stream, said.as_bytes()).unwrap();
        });
        ours(&work, "info nbd:unix:sock").fails(&["Could not open 'nbd:unix:sock'"]);
        server.join().unwrap();
    }
}
