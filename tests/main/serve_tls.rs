//! A disk that is served over NBD with TLS: what QEMU's and libnbd's clients make of it, what is done
//! to it meanwhile, and all who may not connect.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::certificates::Wanted;
use crate::exports::ours;
use crate::mount::soon;
use crate::serve::Served;
use crate::tls_clients::{BOTH, Known, have_all, parts, with_certificates};
use crate::twin::{noise, same_bytes};

const MIB: usize = 1 << 20;

#[test]
fn qemu_and_libnbd_read_and_write_a_disk_over_tls() {
    if !have_all() {
        return;
    }
    let (work, _) = with_certificates();
    let mut want = vec![0; 64 * MIB];
    want[..20 * MIB].copy_from_slice(&noise(1, 20 * MIB));
    work.put("source", &want);
    let words = "nbd disk.qcow2 --listen 0 --export web --tls-certs certs --tls-verify-peer";
    let served = Served::start(&work, words);
    let uri = &served.uri;
    assert!(uri.starts_with("nbds://127.0.0.1:") && uri.ends_with("/web"), "{uri}");
    let known = Known::by("certs");
    for done in known.all(&work, uri) {
        done.succeeds();
    }
    let said = work.run("nbdinfo", ["--json", &known.uri(&work, uri)]).succeeds().out();
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&said["TLS"], &said["structured"]), (&true.into(), &true.into()));
    let (object, options) = (known.object(), known.options(uri));
    let convert = format!("convert -n {object} --target-image-opts -f raw source {options}");
    work.qemu_img(&convert).succeeds();
    let compare = format!(
        "compare {object} --image-opts driver=raw,file.filename=source driver=raw,{}",
        options.split(',').map(|o| format!("file.{o}")).collect::<Vec<_>>().join(",")
    );
    work.qemu_img(&compare).succeeds();
    want[MIB..60 * MIB].copy_from_slice(&noise(3, 59 * MIB));
    work.put("source", &want);
    let to = known.uri(&work, uri);
    work.run("nbdcopy", ["--connections=4", "--flush", "source", &to]).succeeds();
    for words in [&["--connections=4", "--request-size=33554432"][..], &["--no-extents"]] {
        let _ = fs::remove_file(work.path("back"));
        work.run("nbdcopy", words.iter().copied().chain([&*to, "back"])).succeeds();
        same_bytes("the copy", &work.bytes("back"), &want);
    }
    served.stop();
    // At a socket in the file system the server's name has to be said.
    let served = Served::start(&work, "nbd disk.qcow2 --socket sock --tls-certs certs");
    assert!(served.uri.starts_with("nbds+unix:///?socket="), "{}", served.uri);
    let tls = format!("&tls-certificates={}&tls-hostname=localhost", work.path("certs").display());
    work.run("nbdcopy", [&*format!("{}{tls}", served.uri), "again"]).succeeds();
    same_bytes("the other copy", &work.bytes("again"), &want);
    let place = "--image-opts driver=nbd,path=sock,tls-creds=t";
    work.qemu_img(&format!("info {object} {place},tls-hostname=127.0.0.1")).succeeds();
    ours(&work, &format!("info {object} {place},tls-hostname=127.0.0.1")).succeeds();
    for done in [
        work.qemu_img(&format!("info {object} {place}")),
        ours(&work, &format!("info {object} {place}")),
    ] {
        done.fails(&["No hostname for certificate validation"]);
    }
    served.stop();
    work.qemu_img("check disk.qcow2").succeeds();
}

#[test]
fn who_is_not_known_gets_nothing_of_a_disk_and_others_go_on() {
    if !have_all() {
        return;
    }
    let (work, authority) = with_certificates();
    authority.fill(&work.path("nobody"), &[]);
    authority.fill(&work.path("old"), &[Wanted { expired: true, ..Wanted::CLIENT }]);
    authority.fill(&work.path("server-only"), &[Wanted::SERVER]);
    for (from, to) in [("server-cert", "client-cert"), ("server-key", "client-key")] {
        let at = |name: &str| work.path(format!("server-only/{name}.pem"));
        fs::copy(at(from), at(to)).unwrap();
    }
    // The right authority, and a certificate of another one.
    fs::create_dir(work.path("mixed")).unwrap();
    for (from, name) in
        [("certs", "ca-cert.pem"), ("other", "client-cert.pem"), ("other", "client-key.pem")]
    {
        fs::copy(work.path(from).join(name), work.path("mixed").join(name)).unwrap();
    }
    let words = "nbd disk.qcow2 --listen 0 --export web --tls-certs certs --tls-verify-peer";
    let served = Served::start(&work, words);
    let uri = &served.uri;
    for dir in ["nobody", "old", "server-only", "mixed", "other"] {
        for (n, done) in Known::by(dir).all(&work, uri).into_iter().enumerate() {
            let done = done.fails(&[]);
            assert!(!done.text().contains("64 MiB"), "{dir}, client {n}: {}", done.text());
        }
    }
    let [.., last] = Known::by("nobody").all(&work, uri);
    last.fails(&["asks for a certificate"]);
    let [.., last] = Known::by("other").all(&work, uri);
    last.fails(&["signed by none of the authorities"]);
    // Whoever takes this server for another.
    let known = Known { hostname: Some("elsewhere"), ..Known::by("certs") };
    for done in known.all_with_hostname(&work, uri) {
        done.fails(&["elsewhere"]);
    }
    // Without TLS there is no word of the export.
    let (_, port, _) = parts(uri);
    let plain = format!("nbd://localhost:{port}/web");
    let done = work.run("nbdinfo", ["--list", &plain]).fails(&[]);
    assert!(!done.text().contains("web\""), "{}", done.text());
    work.qemu_img(&format!("info {plain}")).fails(&["TLS"]);
    ours(&work, &format!("info {plain}")).fails(&["TLS negotiation required"]);
    for done in Known::by("certs").all(&work, uri) {
        done.succeeds();
    }
    served.stop();
    // A server that has no TLS is no server for who asks for it.
    let served = Served::start(&work, "nbd disk.qcow2 --listen 0 --export web");
    for done in Known::by("certs").all(&work, &served.uri) {
        done.fails(&[]);
    }
    served.stop();
}

#[test]
fn a_certificate_that_was_revoked_is_refused_by_both_ends() {
    if !have_all() {
        return;
    }
    let (work, authority) = with_certificates();
    authority.fill(&work.path("good"), &BOTH);
    authority.revoke(&work.path("certs/client-cert.pem"), &work.path("good"));
    let words = "nbd disk.qcow2 --listen 0 --tls-certs good --tls-verify-peer";
    let served = Served::start(&work, words);
    for done in Known::by("certs").all(&work, &served.uri) {
        done.fails(&[]);
    }
    for done in Known::by("good").all(&work, &served.uri) {
        done.succeeds();
    }
    served.stop();
    authority.revoke(&work.path("certs/server-cert.pem"), &work.path("good"));
    let served = Served::start(&work, "nbd disk.qcow2 --listen 0 --tls-certs certs");
    let [_, _, options, uri] = Known::by("good").all(&work, &served.uri);
    for done in [options, uri] {
        done.fails(&["was revoked"]);
    }
    served.stop();
}

#[test]
fn a_server_says_who_is_served_without_tls() {
    if !have_all() {
        return;
    }
    let (work, _) = with_certificates();
    for (words, plain, secure) in
        [("--tls on", true, true), ("--tls require", false, true), ("--tls off", true, false)]
    {
        let words = format!("nbd disk.qcow2 --listen 0 --export web --tls-certs certs {words}");
        let served = Served::start(&work, &words);
        assert_eq!(served.uri.starts_with("nbds:"), secure, "{}", served.uri);
        let (_, port, _) = parts(&served.uri);
        let done = work.run("nbdinfo", [format!("nbd://127.0.0.1:{port}/web")]);
        assert_eq!(done.code == Some(0), plain, "{words}: {}", done.text());
        for done in Known::by("certs").all(&work, &served.uri) {
            assert_eq!(done.code == Some(0), secure, "{words}: {}", done.text());
        }
        served.stop();
    }
}

#[test]
fn credentials_of_no_use_are_refused_before_anything_is_served() {
    if !have_all() {
        return;
    }
    let (work, authority) = with_certificates();
    let refused = |dir: &str, words: &str, why: &[&str]| {
        work.vdisk(&format!("serve nbd disk.qcow2 --socket s --tls-certs {dir} {words}"))
            .fails(why);
    };
    work.vdisk("serve nbd disk.qcow2 --socket s --tls-verify-peer").ends(64);
    work.vdisk("serve nbd disk.qcow2 --socket s --tls perhaps").ends(64);
    work.vdisk("serve nbd disk.qcow2 --socket s --tls require").fails(&["--tls-certs"]);
    refused("certs", "--tls on --tls-verify-peer", &["--tls=require"]);
    refused("nowhere", "", &["nowhere/server-cert.pem"]);
    authority.fill(&work.path("d"), &[Wanted { expired: true, ..Wanted::SERVER }]);
    refused("d", "", &["d/server-cert.pem", "has expired"]);
    authority.fill(&work.path("d"), &[Wanted::SERVER]);
    let put = |name: &str, bytes: &[u8]| {
        let path = Path::new("d").join(name);
        let before = work.path(&path).exists().then(|| work.bytes(&path));
        work.put(&path, bytes);
        before
    };
    let key = put("server-key.pem", &work.bytes("other/server-key.pem")).unwrap();
    refused("d", "", &["d/server-key.pem"]);
    put("server-key.pem", b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n");
    refused("d", "", &["d/server-key.pem", "encrypted", "openssl pkey"]);
    put("server-key.pem", b"no key");
    refused("d", "", &["d/server-key.pem", "no private key"]);
    put("server-key.pem", &key);
    let authorities = put("ca-cert.pem", &work.bytes("other/ca-cert.pem")).unwrap();
    refused("d", "", &["d/server-cert.pem", "signed by none of the authorities"]);
    put("ca-cert.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    refused("d", "", &["d/ca-cert.pem"]);
    fs::remove_file(work.path("d/ca-cert.pem")).unwrap();
    refused("d", "--tls-verify-peer", &["d/ca-cert.pem"]);
    Served::start(&work, "nbd disk.qcow2 --socket s --tls-certs d").stop();
    put("ca-cert.pem", &authorities);
    put("ca-crl.pem", b"no list");
    refused("d", "--tls-verify-peer", &["d/ca-crl.pem"]);
    put("server-cert.pem", &vec![b'x'; 5 << 20]);
    refused("d", "", &["d/server-cert.pem"]);
}

/// Requests of a round, which are under way together.
const COUNT: usize = 500;

#[test]
fn a_disk_takes_snapshots_under_several_clients_with_tls() {
    if !have_all() {
        return;
    }
    let (work, _) = with_certificates();
    let words = "nbd disk.qcow2 --listen 0 --export web --tls-certs certs --tls-verify-peer";
    let served = Served::start(&work, words);
    let known = Known::by("certs");
    let over = AtomicBool::new(false);
    let rounds = thread::scope(|scope| {
        let clients = [0, 1, 2].map(|n: usize| {
            let (work, served, over) = (&work, &served, &over);
            scope.spawn(move || {
                let mut rounds = 0;
                while !over.load(Ordering::Relaxed) {
                    rounds += 1;
                    let (at, step) = (16 * (n + 1), 4096 * (n + 1));
                    let pattern = rounds % 200 + 1;
                    let each = |what: &str, n: usize| {
                        format!("{what} -P {pattern} {} {step}", at * MIB + n * step)
                    };
                    let writes = (0..COUNT).map(|n| each("aio_write", n));
                    let reads = (0..COUNT).map(|n| each("aio_read", n));
                    let flush = || std::iter::once("aio_flush".to_owned());
                    let commands: Vec<_> =
                        writes.chain(flush()).chain(reads).chain(flush()).collect();
                    let options = known.options(&served.uri);
                    let words = known.object();
                    let words = words.split_whitespace().chain(["--image-opts"]);
                    let commands = commands.iter().flat_map(|command| ["-c", command]);
                    let done = work.run("qemu-io", words.chain(commands).chain([&*options]));
                    let text = done.succeeds().text();
                    assert!(!text.contains("failed"), "{text}");
                }
                rounds
            })
        });
        let judged = scope.spawn(|| {
            for name in ["one", "two", "three"] {
                thread::sleep(Duration::from_millis(200));
                work.vdisk(&format!("snapshot create disk.qcow2 {name}")).succeeds();
            }
            work.vdisk("snapshot merge disk.qcow2 two").succeeds();
        });
        let judged = judged.join();
        over.store(true, Ordering::Relaxed);
        judged.unwrap();
        clients.map(|client| client.join().unwrap())
    });
    served.stop();
    for name in work.files().iter().filter(|n| n.ends_with(".qcow2")) {
        work.qemu_img(&format!("check {name}")).succeeds();
    }
    work.qemu_img("convert -O raw disk.qcow2 flat.raw").succeeds();
    let now = work.bytes("flat.raw");
    for (n, rounds) in rounds.into_iter().enumerate() {
        let (at, len) = (16 * (n + 1) * MIB, COUNT * 4096 * (n + 1));
        let last = (rounds % 200 + 1) as u8;
        assert!(now[at..at + len].iter().all(|b| *b == last), "round {rounds} of client {n}");
    }
}

/// Bytes that say that TLS is to begin: the client's flags, and the option.
fn start_tls() -> Vec<u8> {
    [&3u32.to_be_bytes()[..], b"IHAVEOPT", &5u32.to_be_bytes(), &[0; 4]].concat()
}

#[test]
fn hostile_bytes_before_and_within_tls_harm_nobody() {
    if !have_all() {
        return;
    }
    let (work, _) = with_certificates();
    let served = Served::start(&work, "nbd disk.qcow2 --listen 0 --export web --tls-certs certs");
    let (host, port, _) = parts(&served.uri);
    let connect = || {
        let stream = TcpStream::connect(format!("{host}:{port}")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    };
    // They stay until the end, half way through.
    let half: Vec<_> = (0..8u8)
        .map(|n| {
            let mut stream = connect();
            stream.write_all(&start_tls()).unwrap();
            stream.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..usize::from(n)]).unwrap();
            stream
        })
        .collect();
    for seed in 0..40u64 {
        let mut stream = connect();
        let size = noise(seed, 2)[0] as usize * 40;
        let mut bytes = noise(seed + 100, size.max(8) / 8 * 8);
        if seed % 2 == 0 {
            // A record of the handshake by its head.
            bytes[..5].copy_from_slice(&[22, 3, 1, 1, 0]);
        }
        let _ = stream.write_all(&[start_tls(), bytes].concat());
        let _ = stream.shutdown(Shutdown::Write);
        let mut said = Vec::new();
        if let Err(e) = stream.read_to_end(&mut said) {
            assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "it does not hang up");
        }
        // The greeting, a consent, and perhaps an alert: nothing of the export.
        assert!(said.len() < 18 + 20 + 100, "{} bytes", said.len());
    }
    for done in Known::by("certs").all(&work, &served.uri) {
        done.succeeds();
    }
    drop(half);
    soon("a place for another client", || {
        Known::by("certs").all(&work, &served.uri)[1].code == Some(0)
    });
    served.stop();
}
