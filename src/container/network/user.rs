//! The network of a container in user space: pasta(1), or where it is not installed slirp4netns(1),
//! carries the container's connections out and published ports in, with no right that its user has
//! not.

use std::fmt;
use std::fs::File;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::mount::{MsFlags, mount};

use super::super::scratch::Scratch;
use super::super::wire::Message;
use super::{pasta, slirp};
use crate::error::{Error, ErrorKind, Result};

/// A port of the host's that leads into the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// The host's address; all of them where not given.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host: u16,
    /// The container's port.
    pub container: u16,
    /// UDP, not TCP.
    pub udp: bool,
}

impl FromStr for Publish {
    type Err = String;

    /// `[ADDRESS:]PORT:PORT[/tcp|/udp]`, an IPv6 address in brackets, as podman has it.
    fn from_str(text: &str) -> std::result::Result<Publish, String> {
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let udp = match protocol {
            "tcp" => false,
            "udp" => true,
            _ => return Err(format!("{protocol:?} is neither tcp nor udp")),
        };
        let port = |text: &str| match text.parse::<u16>() {
            Ok(0) | Err(_) => Err(format!("{text:?} is no port")),
            Ok(port) => Ok(port),
        };
        let (host, container) = ports.rsplit_once(':').unwrap_or((ports, ports));
        let (address, host) = match host.rsplit_once(':') {
            None => (None, host),
            Some((address, host)) => {
                let plain = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
                let plain = plain.unwrap_or(address);
                let parsed = plain.parse().map_err(|_| format!("{address:?} is no address"))?;
                (Some(parsed), host)
            }
        };
        Ok(Publish { address, host: port(host)?, container: port(container)?, udp })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(address) => write!(f, "{address}:")?,
            None => {}
        }
        let protocol = if self.udp { "udp" } else { "tcp" };
        write!(f, "{}:{}/{protocol}", self.host, self.container)
    }
}

const NONE: Option<&str> = None;

/// A program that carries.
enum Carrier {
    Pasta(PathBuf),
    Slirp(PathBuf),
}

impl Carrier {
    fn find() -> Result<Carrier> {
        // The processes inside have no PATH of their user's.
        let places = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(Path::new);
        let find = |name: &str| places.iter().map(|d| d.join(name)).find(|path| path.is_file());
        let pasta = find("pasta").map(Carrier::Pasta);
        pasta.or_else(|| find("slirp4netns").map(Carrier::Slirp)).ok_or_else(|| {
            let text = "a network in user space needs pasta (package passt) or slirp4netns, and \
                        neither is installed";
            Error::new(ErrorKind::NotFound, text)
        })
    }

    /// Where the container's questions for names are answered.
    fn name_server(&self) -> &'static str {
        match self {
            Carrier::Pasta(_) => pasta::NAME_SERVER,
            Carrier::Slirp(_) => slirp::NAME_SERVER,
        }
    }
}

/// What /etc/resolv.conf says in the container: the one server that answers there, and the host's
/// domains.
///
/// # Errors
/// Where there is no program that carries.
pub(in super::super) fn resolver(hosts: &str) -> Result<String> {
    let server = Carrier::find()?.name_server();
    let kept = hosts.lines().filter(|line| !line.trim_start().starts_with("nameserver"));
    let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
    Ok(format!("{kept}nameserver {server}\n"))
}

/// What the keeper is to be asked for, for a container whose init is the process `init`.
pub(in super::super) fn wish(init: i32, publish: &[Publish]) -> Message {
    let mut wish = Message::default().with("network", format!("/proc/{init}/ns/net"));
    for one in publish {
        wish.push("publish", one.to_string());
    }
    wish
}

/// Connects the network that a [`wish`] names; returns when it can be used. What serves it is a
/// child of this process, or of its pid namespace's first.
pub(in super::super) fn connect(wish: &Message, scratch: &Scratch) -> Result<()> {
    // By a name of its own: what carries has too few rights to look at the init's /proc.
    let network = scratch.network();
    let of_init = wish.get("network").unwrap_or_default();
    File::create(&network)
        .and_then(|_| Ok(mount(Some(of_init), &network, NONE, MsFlags::MS_BIND, NONE)?))
        .map_err(|e| Error::io("cannot name the container's network", e).at_path(&network))?;
    let parsed = wish.all("publish").map(|text| text.to_string_lossy().parse::<Publish>());
    let publish: Vec<Publish> =
        parsed.collect::<std::result::Result<_, _>>().map_err(Error::invalid)?;
    match Carrier::find()? {
        Carrier::Pasta(program) => pasta::connect(&program, &network, &publish),
        Carrier::Slirp(program) => slirp::connect(&program, scratch, &publish),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_podman_reads_them_and_come_back() {
        let read = |text: &str| text.parse::<Publish>();
        let plain = read("8080:80").unwrap();
        assert_eq!(
            (plain.host, plain.container, plain.udp, plain.address),
            (8080, 80, false, None)
        );
        for text in ["8080:80/tcp", "127.0.0.1:8080:80/udp", "[::1]:53:53/udp"] {
            assert_eq!(read(text).unwrap().to_string(), text);
        }
        assert_eq!(read("53/udp").unwrap().to_string(), "53:53/udp");
        for text in ["", "x", "0:80", "80:70000", "1.2.3:80:80", "80:80/sctp"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
