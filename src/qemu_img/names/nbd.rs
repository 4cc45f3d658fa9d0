//! Where an NBD server listens, as names and options say it.

use std::path::PathBuf;

use vdisk::nbd::tls::ClientCredentials;
use vdisk::nbd::{Address, Target, Tls};

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::names::credentials;
use crate::qemu_img::names::tree::Tree;

/// Where servers listen unless told otherwise.
const PORT: &str = "10809";

/// The export that a name means, which begins with the scheme `nbd` or, with TLS, `nbds`: alone, or with
/// `+tcp` or `+unix` behind.
pub fn from_name(text: &str) -> Outcome<Target> {
    match text.split_once("://") {
        Some((scheme, rest)) => from_uri(scheme, rest),
        None if text.starts_with("nbd:") => from_old_name(text),
        None => Err(no_url()),
    }
}

fn no_url() -> Fail {
    Fail::new("No valid URL specified")
}

fn target(address: Address, export: Option<String>) -> Target {
    Target { address, export, context: None, tls: None }
}

/// `nbd://host[:port]/export`, `nbd+unix:///export?socket=path`; `nbds` with `tls-certificates=dir`.
fn from_uri(scheme: &str, rest: &str) -> Outcome<Target> {
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(a, b)| (a, Some(b)));
    let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
    let named = |text: &str| Some(decoded(text)).filter(|t| !t.is_empty());
    let mut query = Query::parse(query)?;
    let mut target = if scheme.ends_with("+unix") {
        let socket = query.take("socket").filter(|s| !s.is_empty() && server.is_empty());
        target(Address::Unix(PathBuf::from(socket.ok_or_else(no_url)?)), named(path))
    } else {
        if server.is_empty() {
            return Err(no_url());
        }
        let (host, port) = host_and_port(server).unwrap_or((server, PORT));
        let address = Address::Tcp { host: decoded(host), port: port.to_owned() };
        target(address, named(path.trim_start_matches('/')))
    };
    if scheme.starts_with("nbds") {
        target.tls = Some(query.tls()?);
    }
    match query.0.is_empty() {
        true => Ok(target),
        false => Err(no_url()),
    }
}

/// What stands behind the `?` of an URI: names and values.
struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: Option<&str>) -> Outcome<Query> {
        let parts = text.into_iter().flat_map(|text| text.split('&'));
        let pair = |part: &str| part.split_once('=').map(|(name, v)| (decoded(name), decoded(v)));
        parts.map(pair).collect::<Option<_>>().map(Query).ok_or_else(no_url)
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.remove(at).1)
    }

    /// As "NBD URI" says it.
    fn tls(&mut self) -> Outcome<Tls> {
        let verify_peer = match self.take("tls-verify-peer").as_deref() {
            None | Some("1" | "true" | "on" | "yes") => true,
            Some("0" | "false" | "off" | "no") => false,
            Some(_) => return Err(no_url()),
        };
        let dir = self.take("tls-certificates").ok_or_else(|| {
            Fail::new("tls-certificates=DIR behind the '?' says where ca-cert.pem is")
        })?;
        let credentials = ClientCredentials { dir: dir.into(), verify_peer };
        Ok(Tls { credentials, hostname: self.take("tls-hostname") })
    }
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
    let (creds, hostname) = (tree.take("tls-creds"), tree.take("tls-hostname"));
    let credentials = creds.map(|id| credentials::lookup(&id)).transpose()?;
    let tls = credentials.map(|credentials| Tls { credentials, hostname });
    if let Some(name) = tree.take("filename") {
        let target = from_name(&name)?;
        return Ok(Target { tls: tls.or(target.tls), ..target });
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
    Ok(Target { address, export, context, tls })
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
            ("nbd+unix:///x?socket=/s&colour=red", "No valid URL specified"),
            ("nbd://host?tls-certificates=d", "No valid URL specified"),
            ("nbds:host:1", "No valid URL specified"),
        ] {
            assert_eq!(from_name(name).unwrap_err().text(), why, "{name}");
        }
    }

    #[test]
    fn an_uri_with_tls_says_where_the_certificates_are() {
        for (name, dir, verify_peer, hostname) in [
            ("nbds://host/e?tls-certificates=/a%20b", "/a b", true, None),
            ("nbds+unix:///?socket=/s&tls-certificates=d&tls-hostname=h", "d", true, Some("h")),
            ("nbds://h?tls-verify-peer=false&tls-certificates=d", "d", false, None),
        ] {
            let tls = from_name(name).unwrap().tls.unwrap();
            let credentials = ClientCredentials { dir: dir.into(), verify_peer };
            assert_eq!(tls, Tls { credentials, hostname: hostname.map(str::to_owned) }, "{name}");
        }
        assert!(from_name("nbds://host").unwrap_err().text().contains("tls-certificates"));
    }
}
