//! Sockets to listen on: in the file system, for their owner alone, or of TCP.
//!
//! A socket's file that a killed process left is replaced; one that somebody listens on never is.

use std::fs;
use std::io::{self, ErrorKind as IoErrorKind};
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, setsockopt,
    socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::stream::{Socket, Stream};
use crate::storage::directory::{DirectoryLock, lock_directory};
use crate::storage::name::remove;

/// How long others may take to make their sockets in the same directory.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// A socket that is listened on.
#[derive(Debug)]
pub enum Listener {
    /// In the file system.
    Unix(UnixSocket),
    /// Of TCP.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at `path`, as [`UnixSocket::bind`] does.
    pub fn unix(path: &Path) -> Result<Listener> {
        UnixSocket::bind(path).map(Listener::Unix)
    }

    /// Listens on a port of this host. The system chooses where the port is 0.
    pub fn tcp(host: &str, port: u16) -> Result<Listener> {
        let failed = |e| Error::io(format!("cannot listen on {host}, port {port}"), e);
        let mut last = io::Error::from(IoErrorKind::AddrNotAvailable);
        for address in (host, port).to_socket_addrs().map_err(failed)? {
            match TcpListener::bind(address) {
                Ok(listener) => return Ok(Listener::Tcp(listener)),
                Err(e) => last = e,
            }
        }
        Err(failed(last))
    }

    /// Where it is in the file system, if it is there.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Listener::Unix(socket) => Some(socket.path()),
            Listener::Tcp(_) => None,
        }
    }

    /// Takes a connection; fails with [`WouldBlock`](IoErrorKind::WouldBlock) where none waits
    /// and the socket is [not to be waited for](Listener::set_nonblocking).
    pub(super) fn accept(&self) -> io::Result<Stream> {
        let socket = match self {
            Listener::Unix(socket) => Socket::Unix(socket.listener.accept()?.0),
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                // A host that is gone without a word is noticed by this alone.
                setsockopt(&stream, sockopt::KeepAlive, &true)?;
                Socket::Tcp(stream)
            }
        };
        Ok(Stream::new(socket))
    }

    /// Lets [`accept`](Listener::accept) return at once.
    pub(super) fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Listener::Unix(socket) => socket.listener.set_nonblocking(true),
            Listener::Tcp(listener) => listener.set_nonblocking(true),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix(socket) => socket.listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// A socket in the file system that is listened on. Its file goes with it, unless it is another's by
/// then.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of its file.
    file: (u64, u64),
}

impl UnixSocket {
    /// Listens at `path`; only this user can connect.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where somebody listens there; [`ErrorKind::Exists`] where something else
    /// has that name.
    pub fn bind(path: &Path) -> Result<UnixSocket> {
        let failed = |e: io::Error| Error::io("cannot make the socket", e).at_path(path);
        let path = std::path::absolute(path).map_err(failed)?;
        let address = UnixAddr::new(&path).map_err(|_| {
            let text = "the name is too long for a socket: 107 bytes are the most".to_owned();
            Error::invalid(text).at_path(&path)
        })?;
        let dir = path.parent().ok_or_else(|| Error::invalid("a socket without a directory"))?;
        let _alone = alone(dir)?;
        let made = match make(&address) {
            Err(Errno::EADDRINUSE) => {
                remove_stale(&path, &address)?;
                make(&address)
            }
            made => made,
        };
        let listener = UnixListener::from(made.map_err(|errno| failed(errno.into()))?);
        let file = identity(&path).map_err(failed)?;
        Ok(UnixSocket { listener, path, file })
    }

    /// What takes the connections.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The full path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let _alone = self.path.parent().map(alone);
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = remove(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Keeps other processes of ours from making and removing sockets in `dir` meanwhile.
fn alone(dir: &Path) -> Result<DirectoryLock> {
    let failed = |e: io::Error| Error::io("the directory cannot be used", e).at_path(dir);
    lock_directory(dir, PATIENCE).map_err(failed)
}

fn new_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

/// Makes a socket that is listened on.
fn make(address: &UnixAddr) -> nix::Result<OwnedFd> {
    let socket = new_socket()?;
    // The file gets the mode that the socket has: nobody else can connect before it is told.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), address)?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

/// Removes the socket of a process that is gone.
fn remove_stale(path: &Path, address: &UnixAddr) -> Result<()> {
    let failed = |e| Error::io("could not be examined", e).at_path(path);
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        let text = "this is no socket, and is not replaced by one: name another file";
        return Err(Error::new(ErrorKind::Exists, text).at_path(path));
    }
    let probe = new_socket().map_err(|e| failed(e.into()))?;
    // One whose queue is full does not let us wait: it is alive.
    nix::fcntl::fcntl(&probe, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    match connect(probe.as_raw_fd(), address) {
        Err(Errno::ECONNREFUSED) => fs::remove_file(path).map_err(|e| {
            Error::io("a socket that nobody serves cannot be removed", e).at_path(path)
        }),
        _ => {
            let text = "another process listens on this socket: name another file";
            Err(Error::new(ErrorKind::InUse, text).at_path(path))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_is_its_owners_and_goes_with_its_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let socket = UnixSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert_eq!(UnixSocket::bind(&path).unwrap_err().kind(), ErrorKind::InUse);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_another_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        // The standard library leaves the file behind, as a process that was killed does.
        drop(UnixListener::bind(&path).unwrap());
        let socket = UnixSocket::bind(&path).unwrap();
        // What has the name by then is another's.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "text").unwrap();
        drop(socket);
        assert_eq!(fs::read(&path).unwrap(), b"text");
        assert_eq!(UnixSocket::bind(&path).unwrap_err().kind(), ErrorKind::Exists);
    }

    #[test]
    fn a_socket_with_a_full_queue_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let socket = UnixSocket::bind(&path).unwrap();
        let address = UnixAddr::new(&path).unwrap();
        let mut waiting = Vec::new();
        loop {
            let client = new_socket().unwrap();
            let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
            nix::fcntl::fcntl(&client, flags).unwrap();
            match connect(client.as_raw_fd(), &address) {
                Ok(()) => waiting.push(client),
                Err(errno) => break assert_eq!(errno, Errno::EAGAIN),
            }
        }
        assert_eq!(UnixSocket::bind(&path).unwrap_err().kind(), ErrorKind::InUse);
        drop(socket);
    }

    #[test]
    fn a_name_that_is_too_long_is_told() {
        let error = UnixSocket::bind(Path::new(&"x".repeat(200))).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }
}
