//! slirp4netns(1): an Ethernet in a network namespace, whose packets a TCP/IP stack in user space turns
//! into sockets of the host's. Slower than pasta, and IPv4 only.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use super::super::scratch::Scratch;
use super::user::Publish;
use crate::error::{Error, ErrorKind, Result};

/// Where it answers questions for names.
pub(super) const NAME_SERVER: &str = "10.0.2.3";

/// Connects the network namespace at the scratch directory's name for it; returns when it can be
/// used. slirp4netns is a child of this process then.
pub(super) fn connect(program: &Path, scratch: &Scratch, publish: &[Publish]) -> Result<()> {
    let told = scratch.path().join("slirp.log");
    let socket = scratch.path().join("slirp");
    let ready = start(program, scratch, &told, &socket)
        .map_err(|e| Error::io("cannot run slirp4netns", e).at_path(program))?;
    if !ready {
        let said = fs::read_to_string(&told).unwrap_or_default();
        let said = said.trim().replace('\n', "; ");
        let text = format!("slirp4netns could not connect the container: {said}");
        return Err(Error::new(ErrorKind::Io, text));
    }
    publish.iter().try_for_each(|one| open(&socket, one))
}

/// Starts it, and waits until it is ready or has ended.
fn start(program: &Path, scratch: &Scratch, told: &Path, socket: &Path) -> io::Result<bool> {
    let (mut heard, ready) = io::pipe()?;
    Command::new(program)
        .args(["--configure", "--mtu=65520", "--disable-host-loopback"])
        .args(["--enable-sandbox", "--enable-seccomp", "--netns-type=path"])
        // What it has as its standard input is for it to write to.
        .args(["--ready-fd=0", "--api-socket"])
        .arg(socket)
        .arg(scratch.network())
        .arg("tap0")
        .env("PATH", "/usr/bin:/bin")
        .stdin(OwnedFd::from(ready))
        .stdout(Stdio::null())
        .stderr(File::create(told)?)
        .spawn()?;
    let mut byte = [0];
    Ok(heard.read(&mut byte)? == 1)
}

/// Has a port of the host's lead into the container.
fn open(socket: &Path, one: &Publish) -> Result<()> {
    let failed = |why: String| {
        Error::new(ErrorKind::Io, format!("slirp4netns could not publish {one}: {why}"))
    };
    let host = match one.address {
        None => Ipv4Addr::UNSPECIFIED,
        Some(IpAddr::V4(address)) => address,
        Some(IpAddr::V6(_)) => {
            return Err(failed("it knows IPv4 only; pasta (package passt) knows both".into()));
        }
    };
    let answer = ask(socket, &request(one, host)).map_err(|e| failed(e.to_string()))?;
    if answer.contains("\"error\"") { Err(failed(answer)) } else { Ok(()) }
}

fn request(one: &Publish, host: Ipv4Addr) -> String {
    let protocol = if one.udp { "udp" } else { "tcp" };
    let (from, to) = (one.host, one.container);
    format!(
        r#"{{"execute":"add_hostfwd","arguments":{{"proto":"{protocol}","host_addr":"{host}","host_port":{from},"guest_port":{to}}}}}"#
    )
}

fn ask(socket: &Path, request: &str) -> io::Result<String> {
    let mut socket = UnixStream::connect(socket)?;
    socket.write_all(request.as_bytes())?;
    socket.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    // A line, however long it says it is.
    socket.take(4096).read_to_string(&mut answer)?;
    Ok(answer.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_as_the_manual_page_has_it() {
        let one: Publish = "127.0.0.1:8080:80/udp".parse().unwrap();
        let text = request(&one, Ipv4Addr::LOCALHOST);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["execute"], "add_hostfwd");
        let wanted = serde_json::json!({
            "proto": "udp", "host_addr": "127.0.0.1", "host_port": 8080, "guest_port": 80
        });
        assert_eq!(value["arguments"], wanted);
    }
}
