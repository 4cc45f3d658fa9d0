//! Where an NBD server listens, as names and options say it.

use std::path::PathBuf;

use vdisk::nbd::{Address, Target};

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::names::tree::Tree;

/// Where servers listen unless told otherwise.
const PORT: &str = "10809";

/// The export that a name means, which begins with the scheme `nbd`, `nbd+tcp` or `nbd+unix`.
pub fn from_name(text: &str) -> Outcome<Target> {
    match text.split_once("://") {
        Some((scheme, rest)) => from_uri(scheme == "nbd+unix", rest),
        None => from_old_name(text),
    }
}

fn target(address: Address, export: Option<String>) -> Target {
    Target { address, export, context: None }
}

/// `nbd://host[:port]/export`, `nbd+unix:///export?socket=path`.
fn from_uri(is_unix: bool, rest: &str) -> Outcome<Target> {
    let invalid = || Fail::new("No valid URL specified");
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(a, b)| (a, Some(b)));
    let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
    let named = |text: &str| Some(decoded(text)).filter(|t| !t.is_empty());
    if is_unix {
        let socket = query.and_then(|q| q.strip_prefix("socket=")).filter(|s| !s.is_empty());
        let socket =
            socket.filter(|s| server.is_empty() && !s.contains('&')).ok_or_else(invalid)?;
        return Ok(target(Address::Unix(PathBuf::from(decoded(socket))), named(path)));
    }
    if server.is_empty() || query.is_some() {
        return Err(invalid());
    }
    let (host, port) = host_and_port(server).unwrap_or((server, PORT));
    let address = Address::Tcp { host: decoded(host), port: port.to_owned() };
    Ok(target(address, named(path.trim_start_matches('/'))))
}

/// A text in which `%` and two hexadecimal digits stand for a byte.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = tail.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match code.and_then(|two| u8::from_str_radix(two, 16).ok()).filter(|_| *first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Host and port around the last colon, one in an IPv6 address left alone.
fn host_and_port(text: &str) -> Option<(&str, &str)> {
    text.rsplit_once(':').filter(|(_, port)| !port.contains(']'))
}

/// `nbd:unix:path` and `nbd:host:port`, with `:exportname=name` behind.
fn from_old_name(text: &str) -> Outcome<Target> {
    let rest = text.strip_prefix("nbd:").unwrap_or(text);
    let (place, export) = match rest.split_once(":exportname=") {
        Some((place, name)) => (place, Some(name.to_owned()).filter(|n| !n.is_empty())),
        None => (rest, None),
    };
    if place.is_empty() {
        return Err(Fail::new("NBD server address missing"));
    }
    if let Some(path) = place.strip_prefix("unix:") {
        return Ok(target(Address::Unix(PathBuf::from(path)), export));
    }
    let parts = host_and_port(place);
    let (host, port) =
        parts.ok_or_else(|| Fail::new(format!("error parsing address '{place}'")))?;
    Ok(target(Address::Tcp { host: host.to_owned(), port: port.to_owned() }, export))
}

/// The export that the options of the driver `nbd` describe.
pub fn from_options(tree: &mut Tree) -> Outcome<Target> {
    if let Some(name) = tree.take("filename") {
        return from_name(&name);
    }
    if tree.take("tls-creds").is_some() {
        return Err(Fail::new("TLS is not supported"));
    }
    let (export, context) = (tree.take("export"), tree.take("x-dirty-bitmap"));
    let mut server = tree.below("server");
    let old = (tree.take("path"), tree.take("host"), tree.take("port"));
    let address = match (server.0.is_empty(), old) {
        (false, (None, None, None)) => from_server(&mut server)?,
        (false, _) => {
            return Err(Fail::new("'server' and path/host/port cannot be used at the same time"));
        }
        (true, (Some(_), Some(_), _)) => {
            return Err(Fail::new("path and host may not be used at the same time"));
        }
        (true, (Some(path), None, port)) => {
            if port.is_some() {
                return Err(Fail::new("port may not be used without host"));
            }
            Address::Unix(PathBuf::from(path))
        }
        (true, (None, Some(host), port)) => {
            Address::Tcp { host, port: port.unwrap_or_else(|| PORT.to_owned()) }
        }
        (true, (None, None, Some(_))) => {
            return Err(Fail::new("port may not be used without host"));
        }
        (true, (None, None, None)) => return Err(Fail::new("NBD server address missing")),
    };
    Ok(Target { address, export, context })
}

fn from_server(server: &mut Tree) -> Outcome<Address> {
    let mut needed = |name: &str| {
        server.take(name).ok_or_else(|| Fail::new(format!("Parameter '{name}' is missing")))
    };
    match needed("type")?.as_str() {
        "unix" => Ok(Address::Unix(PathBuf::from(needed("path")?))),
        "inet" | "tcp" => Ok(Address::Tcp { host: needed("host")?, port: needed("port")? }),
        other => Err(Fail::new(format!("Parameter 'type' does not accept value '{other}'"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_options_say_the_same_export() {
        for (name, uri) in [
            ("nbd:unix:/s", "nbd+unix://?socket=/s"),
            ("nbd:unix:/s:exportname=e", "nbd+unix:///e?socket=/s"),
            ("nbd:host:1", "nbd://host:1"),
            ("nbd://host", "nbd://host:10809"),
            ("nbd://[::1]:7/a%2fb", "nbd://[::1]:7/a/b"),
            ("nbd+tcp://host:8/", "nbd://host:8"),
            ("nbd+unix:///e?socket=/s%20t", "nbd+unix:///e?socket=/s t"),
        ] {
            assert_eq!(from_name(name).unwrap().uri(), uri, "{name}");
        }
        for (name, why) in [
            ("nbd:", "NBD server address missing"),
            ("nbd:unix", "error parsing address 'unix'"),
            ("nbd://", "No valid URL specified"),
            ("nbd+unix:///x", "No valid URL specified"),
        ] {
            assert_eq!(from_name(name).unwrap_err().text(), why, "{name}");
        }
    }
}
