//! Connections for a process in a jail, which can make none: a process beside it makes them, to the servers that
//! were named before the jail was closed, and to no other. It hears nothing that they say.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{PathBuf, absolute};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::Address;
use super::stream::Socket;
use crate::beside::{self, Channel};
use crate::error::{Error, ErrorKind, Result};

/// Who makes them, where that is not this process itself.
static BY: OnceLock<Connector> = OnceLock::new();

/// The most bytes of an answer.
const MOST: usize = 4096;

/// What an answer begins with.
const CONNECTED: u8 = 0;
const NOT_FOUND: u8 = 1;
const FAILED: u8 = 2;

struct Connector {
    addresses: Vec<Address>,
    channel: Mutex<Channel>,
}

/// From now on a process beside this one makes the connections to these servers. To be called while this
/// process has one thread.
///
/// # Errors
/// Where that cannot be started.
pub fn connect_beside(addresses: Vec<Address>) -> Result<()> {
    let started = full(&addresses).and_then(|full| {
        let (own, its) = Channel::pair()?;
        beside::start(c"vdisk-connect", &[its.number()], || serve(&its, &full))?;
        Ok(own)
    });
    let failed = |e| Error::io("cannot start the process that connects to servers", e);
    let channel = Mutex::new(started.map_err(failed)?);
    // A command says once which they are.
    let _ = BY.set(Connector { addresses, channel });
    Ok(())
}

/// Each with its path as it is found from any directory, where it has one.
fn full(addresses: &[Address]) -> io::Result<Vec<(Address, Option<PathBuf>)>> {
    let full = |address: &Address| match address {
        Address::Unix(path) => Ok((address.clone(), Some(absolute(path)?))),
        Address::Tcp { .. } => Ok((address.clone(), None)),
    };
    addresses.iter().map(full).collect()
}

/// Is that process.
fn serve(channel: &Channel, servers: &[(Address, Option<PathBuf>)]) {
    let mut number = [0; 4];
    while let Ok(asked) = channel.receive(&mut number) {
        if asked.len != number.len() {
            return;
        }
        let number = usize::try_from(u32::from_ne_bytes(number)).ok();
        let named = number.and_then(|number| servers.get(number));
        let named = named.ok_or_else(|| Error::invalid("no server"));
        let made = named.and_then(|(address, full)| address.reach(full.as_deref()));
        let told = match &made {
            Ok(socket) => channel.send(&[CONNECTED], Some(socket.as_fd())),
            Err(error) => {
                let kind = if error.kind() == ErrorKind::NotFound { NOT_FOUND } else { FAILED };
                let text = error.message();
                let text = text.get(..text.floor_char_boundary(MOST / 2)).unwrap_or_default();
                channel.send(&[&[kind], text.as_bytes()].concat(), None)
            }
        };
        if told.is_err() {
            return;
        }
    }
}

/// A connection that was made so; nothing where this process makes its connections itself.
pub(super) fn ask(address: &Address) -> Option<Result<Socket>> {
    let by = BY.get()?;
    let number = by.addresses.iter().position(|known| known == address)?;
    Some(by.ask(number, address))
}

impl Connector {
    fn ask(&self, number: usize, address: &Address) -> Result<Socket> {
        let failed = |text: &str| Error::new(ErrorKind::Io, format!("{address}: {text}"));
        let gone = |_| failed("the process that connects to servers is gone");
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        channel.send(&number.to_ne_bytes(), None).map_err(gone)?;
        let mut answer = vec![0; MOST];
        let mut got = channel.receive(&mut answer).map_err(gone)?;
        let (kind, text) = match answer.get(..got.len).unwrap_or_default() {
            [kind, text @ ..] => (*kind, String::from_utf8_lossy(text).into_owned()),
            [] => return Err(failed("the process that connects to servers is gone")),
        };
        match (kind, got.files.pop()) {
            (CONNECTED, Some(file)) => Ok(socket(address, file)),
            (NOT_FOUND, _) => Err(Error::new(ErrorKind::NotFound, text)),
            _ => Err(Error::new(ErrorKind::Io, text)),
        }
    }
}

fn socket(address: &Address, file: OwnedFd) -> Socket {
    match address {
        Address::Unix(_) => Socket::Unix(UnixStream::from(file)),
        Address::Tcp { .. } => Socket::Tcp(TcpStream::from(file)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn connections_are_made_to_those_that_were_named_and_to_no_other() {
        let dir = std::env::temp_dir().join(format!("vdisk-connect-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let address = Address::Unix(dir.join("sock"));
        let listener = UnixListener::bind(dir.join("sock")).unwrap();
        let (own, its) = Channel::pair().unwrap();
        let served = full(std::slice::from_ref(&address)).unwrap();
        let server = std::thread::spawn(move || serve(&its, &served));
        let by = Connector { addresses: vec![address.clone()], channel: Mutex::new(own) };
        assert!(matches!(by.ask(0, &address), Ok(Socket::Unix(_))));
        drop(listener);
        let refused = by.ask(0, &address).map(drop).unwrap_err();
        assert!(refused.to_string().contains("Connection refused"), "{refused}");
        assert!(by.ask(7, &address).is_err());
        drop(by);
        server.join().unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
