//! What the processes of a container tell each other: frames on a Unix socket.
//!
//! A frame is a length (4 bytes, little-endian) and that many bytes; its payload is a list of
//! fields, each ended by a zero byte, which no argument and no path can hold. What is open in one
//! process goes to another between two frames. Knows nothing of what the fields mean.

use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{
    self, AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg,
};

/// Above what the kernel takes as one program's arguments and environment together.
const LONGEST: usize = 8 << 20;

/// An ordered list of named values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Message {
    fields: Vec<(String, OsString)>,
}

impl Message {
    /// Adds a field; a name may occur many times.
    pub(super) fn push(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.fields.push((name.to_owned(), value.as_ref().to_os_string()));
    }

    /// [`Message::push`] for building a message in one expression.
    pub(super) fn with(mut self, name: &str, value: impl AsRef<OsStr>) -> Message {
        self.push(name, value);
        self
    }

    /// The first value of this name.
    pub(super) fn get<'a>(&'a self, name: &'a str) -> Option<&'a OsStr> {
        self.all(name).next()
    }

    /// The first value of this name as a number.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.to_str()?.parse().ok()
    }

    /// All values of this name, in order.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a OsStr> {
        self.fields.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_os_str())
    }

    /// Takes all values of this name away.
    pub(super) fn remove(&mut self, name: &str) {
        self.fields.retain(|(n, _)| n != name);
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, value) in &self.fields {
            bytes.extend_from_slice(name.as_bytes());
            bytes.push(b'=');
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Message> {
        let mut message = Message::default();
        for field in bytes.split_inclusive(|&b| b == 0) {
            let field = field.strip_suffix(&[0])?;
            let equals = field.iter().position(|&b| b == b'=')?;
            let name = std::str::from_utf8(field.get(..equals)?).ok()?;
            let value = OsString::from_vec(field.get(equals + 1..)?.to_vec());
            message.fields.push((name.to_owned(), value));
        }
        Some(message)
    }
}

/// Sends one message.
pub(super) fn send(mut socket: &UnixStream, message: &Message) -> io::Result<()> {
    let payload = message.encode();
    let length = u32::try_from(payload.len()).ok().filter(|&n| n as usize <= LONGEST);
    let length = length.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "the command and its environment are too long")
    })?;
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend_from_slice(&payload);
    socket.write_all(&frame)
}

/// Waits for one message; none when the other end has closed the socket.
pub(super) fn receive(mut socket: &UnixStream) -> io::Result<Option<Message>> {
    let mut length = [0; 4];
    match socket.read_exact(&mut length) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = u32::from_le_bytes(length) as usize;
    let broken = || io::Error::new(io::ErrorKind::InvalidData, "a message that makes no sense");
    if length > LONGEST {
        return Err(broken());
    }
    let mut payload = vec![0; length];
    socket.read_exact(&mut payload)?;
    Message::decode(&payload).map(Some).ok_or_else(broken)
}

/// Sends something that is open here.
pub(super) fn send_open(socket: &UnixStream, open: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [open.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::empty(), None)?;
    Ok(())
}

/// Takes what [`send_open`] has sent.
pub(super) fn receive_open(socket: &UnixStream) -> io::Result<OwnedFd> {
    vdisk_fuse::mount::receive(socket)
}

/// A socket that is nowhere yet.
pub(super) fn socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

/// Lets a socket be called at a path.
pub(super) fn listen(socket: &OwnedFd, at: &Path) -> io::Result<()> {
    socket::bind(socket.as_raw_fd(), &UnixAddr::new(at)?)?;
    Ok(socket::listen(socket, Backlog::new(1)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was_sent() {
        let (a, b) = UnixStream::pair().unwrap();
        let odd = OsString::from_vec(vec![0xff, b'=', b'\n', b' ']);
        let sent = Message::default().with("arg", "x").with("arg", &odd).with("empty", "");
        send(&a, &sent).unwrap();
        let got = receive(&b).unwrap().unwrap();
        assert_eq!(got, sent);
        assert_eq!(got.all("arg").collect::<Vec<_>>(), [OsStr::new("x"), &odd]);
        drop(a);
        assert!(receive(&b).unwrap().is_none());
    }

    #[test]
    fn a_broken_message_is_refused() {
        assert!(Message::decode(b"no zero=1").is_none());
        assert!(Message::decode(b"no equals\0").is_none());
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(receive(&b).is_err());
    }
}
