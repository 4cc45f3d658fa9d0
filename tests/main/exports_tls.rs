//! The drop-in as a client of QEMU's NBD server with TLS, and credentials in QEMU's words.

use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::certificates::Wanted;
use crate::exports::ours;
use crate::host::{Running, Work};
use crate::tls_clients::{Known, have_all, parts, with_certificates};
use crate::twin::{noise, same_bytes};

const MIB: usize = 1 << 20;

/// A server that goes with the test.
struct Server(Running);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.signal(Signal::SIGTERM);
    }
}

/// `qemu-nbd` with TLS, at a free port of this host.
fn qemu_nbd(work: &Work, dir: &str, words: &str) -> (Server, String) {
    for _ in 0..10 {
        // Another may take the port before the server does.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let words = format!(
            "-t -e 8 -b 127.0.0.1 -p {port} -x web --tls-creds s --object \
             tls-creds-x509,id=s,dir={dir},endpoint=server{words} -f qcow2 disk.qcow2"
        );
        let mut server = Server(work.command("qemu-nbd", words.split_whitespace()));
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until && !server.0.has_ended() {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return (server, format!("nbds://127.0.0.1:{port}/web"));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
    panic!("qemu-nbd does not start");
}

#[test]
fn the_drop_in_reads_and_writes_a_disk_of_qemus_over_tls() {
    if !have_all() {
        return;
    }
    let (work, authority) = with_certificates();
    let want = [noise(1, 20 * MIB), vec![0; 44 * MIB]].concat();
    work.put("source", &want);
    {
        let (_server, uri) = qemu_nbd(&work, "certs", "");
        let known = Known::by("certs");
        let (object, options) = (known.object(), known.options(&uri));
        let info = format!("info {object} --image-opts {options}");
        let told = work.qemu_img(&info).succeeds().out();
        assert_eq!(ours(&work, &info).succeeds().out(), told);
        let convert = format!("convert -n {object} --target-image-opts -f raw source {options}");
        ours(&work, &convert).succeeds();
        ours(&work, &format!("convert -O raw {} back", known.uri(&work, &uri))).succeeds();
        same_bytes("the disk of qemu-nbd", &work.bytes("back"), &want);
        // What QEMU's program says to those who may not, ours says as well.
        authority.fill(&work.path("nobody"), &[]);
        for known in [Known::by("nobody"), Known::by("other")] {
            for done in known.all(&work, &uri) {
                done.fails(&[]);
            }
        }
        let known = Known { hostname: Some("elsewhere"), ..known };
        for done in known.all_with_hostname(&work, &uri) {
            done.fails(&["elsewhere"]);
        }
        let (_, port, _) = parts(&uri);
        let plain = format!("info nbd://localhost:{port}/web");
        let told = work.qemu_img(&plain).fails(&["TLS"]).err();
        assert_eq!(ours(&work, &plain).fails(&[]).err(), told);
        let any = format!(
            "info --object tls-creds-x509,id=t,dir=other,verify-peer=off --image-opts {options}"
        );
        // The server is anybody then; it still wants to know its client.
        ours(&work, &any).fails(&[]);
    }
    authority.fill(&work.path("old"), &[Wanted { expired: true, ..Wanted::SERVER }]);
    let (_server, uri) = qemu_nbd(&work, "old", ",verify-peer=off,sanity-check=off");
    let [qemu, libnbd, options, name] = Known::by("certs").all(&work, &uri);
    for done in [qemu, libnbd] {
        done.fails(&[]);
    }
    for done in [options, name] {
        done.fails(&["has expired"]);
    }
    let (_, port, _) = parts(&uri);
    ours(
        &work,
        &format!(
            "info --object tls-creds-x509,id=t,dir=other,verify-peer=off --image-opts \
             driver=nbd,host=localhost,port={port},export=web,tls-creds=t"
        ),
    )
    .succeeds();
}

#[test]
fn credentials_of_no_use_are_refused_in_qemus_words() {
    if !have_all() {
        return;
    }
    let (work, _) = with_certificates();
    for object in [
        "tls-creds-x509,id=t,dir=nowhere",
        "tls-creds-x509,id=t",
        "tls-creds-x509,id=t,dir=certs,colour=red",
        "tls-creds-x509,id=t,dir=certs,endpoint=both",
        "tls-creds-x509,id=t,dir=certs,verify-peer=perhaps",
        "tls-creds-x509,dir=certs",
        "secret,id=t,data=x --object tls-creds-x509,id=t,dir=certs",
    ] {
        let words = format!("info --object {object} disk.qcow2");
        let told = work.qemu_img(&words).fails(&["qemu-img: "]).err();
        assert_eq!(ours(&work, &words).fails(&[]).err(), told, "{words}");
    }
    for (object, creds) in [
        ("tls-creds-x509,id=t,dir=certs,endpoint=server", "t"),
        ("tls-creds-x509,id=t,dir=certs", "u"),
        ("secret,id=t,data=x", "t"),
    ] {
        let place = format!("driver=nbd,path=s,tls-creds={creds}");
        let words = format!("info --object {object} --image-opts {place}");
        let told = work.qemu_img(&words).fails(&["qemu-img: "]).err();
        assert_eq!(ours(&work, &words).fails(&[]).err(), told, "{words}");
    }
    ours(&work, "info --object tls-creds-psk,id=t,dir=certs disk.qcow2").fails(&["tls-creds-psk"]);
}
