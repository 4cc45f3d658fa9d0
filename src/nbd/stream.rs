//! A connection of either kind, plain or with TLS, for both its ends. It knows no protocol above.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::tls::{Channel, Side};

/// A connected socket, whose bytes are anybody's.
pub enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn set_patience(&self, time: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Unix(s) => s.set_read_timeout(time).and_then(|()| s.set_write_timeout(time)),
            Socket::Tcp(s) => s.set_read_timeout(time).and_then(|()| s.set_write_timeout(time)),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Unix(s) => s.as_fd(),
            Socket::Tcp(s) => s.as_fd(),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(s) => (&*s).read(buf),
            Socket::Tcp(s) => (&*s).read(buf),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(s) => (&*s).write(buf),
            Socket::Tcp(s) => (&*s).write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Unix(s) => (&*s).write_vectored(bufs),
            Socket::Tcp(s) => (&*s).write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection. Threads may read and write it at once through references: who waits to write keeps
/// nobody from reading, with TLS too.
pub struct Stream {
    socket: Socket,
    /// What all bytes pass through once it is there.
    tls: OnceLock<Channel>,
}

impl Stream {
    /// A connection without TLS so far.
    pub fn new(socket: Socket) -> Stream {
        Stream { socket, tls: OnceLock::new() }
    }

    /// Lets each wait for bytes end after `time`, which is not 0; never where there is none.
    pub fn set_patience(&self, time: Option<Duration>) -> io::Result<()> {
        self.socket.set_patience(time)
    }

    /// Ends one direction or both of the socket; who waits there wakes up.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match &self.socket {
            Socket::Unix(s) => s.shutdown(how),
            Socket::Tcp(s) => s.shutdown(how),
        }
    }

    /// Ends the connection in good order, and waits for nobody: with TLS the other end is told that
    /// nothing was cut off. Nobody reads or writes any more.
    pub fn close(&self) {
        if let Some(tls) = self.tls.get() {
            tls.say_goodbye(&self.socket);
        }
        let _ = self.shutdown(Shutdown::Both);
    }

    /// Whether bytes wait to be read.
    pub fn has_more(&self) -> bool {
        if self.tls.get().is_some_and(Channel::has_more) {
            return true;
        }
        let mut more = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut more, PollTimeout::ZERO) != Ok(0)
    }

    fn read_through(&self, mut socket: impl Read, buf: &mut [u8]) -> io::Result<usize> {
        match self.tls.get() {
            Some(tls) => tls.read(&mut socket, buf),
            None => socket.read(buf),
        }
    }

    fn write_through(&self, mut socket: impl Write, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.tls.get() {
            Some(tls) => tls.write(&mut socket, bufs),
            None => socket.write_vectored(bufs),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.read_through(&self.socket, buf)
    }
}

impl Write for &Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_through(&self.socket, &[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.write_through(&self.socket, bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes all of `bufs`, with one call where the other end takes it.
pub fn write_all(to: &mut impl Write, bufs: &mut [IoSlice<'_>]) -> io::Result<()> {
    let mut left = bufs;
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match to.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut left, n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// A connection that can be made secure.
pub trait Plain: Read + Write {
    /// Agrees with the other end on TLS, which all bytes pass through from then on. Bytes that came in
    /// plain and were not read yet are taken for the other end's part in that, and fail it.
    ///
    /// # Errors
    /// Among others, those with [`rustls::Error`] as their source.
    fn secure(&mut self, side: Side) -> io::Result<()>;
}

/// A connection on which all that is said has to be said until some moment.
pub struct Hasty<'a> {
    stream: &'a Stream,
    until: Instant,
}

impl<'a> Hasty<'a> {
    /// `stream`, for `time` from now on.
    pub fn new(stream: &'a Stream, time: Duration) -> Hasty<'a> {
        Hasty { stream, until: Instant::now() + time }
    }

    fn socket(&self) -> HastySocket<'a> {
        HastySocket { socket: &self.stream.socket, until: self.until }
    }

    /// Whether bytes pass through TLS.
    pub fn is_secure(&self) -> bool {
        self.stream.tls.get().is_some()
    }
}

impl Plain for Hasty<'_> {
    fn secure(&mut self, side: Side) -> io::Result<()> {
        let channel = Channel::agree(side, &mut self.socket())?;
        self.stream.tls.set(channel).map_err(|_| io::ErrorKind::AlreadyExists.into())
    }
}

impl Read for Hasty<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.read_through(self.socket(), buf)
    }
}

impl Write for Hasty<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.write_through(self.socket(), &[IoSlice::new(buf)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket that is waited for until some moment, however little comes at a time.
struct HastySocket<'a> {
    socket: &'a Socket,
    until: Instant,
}

impl HastySocket<'_> {
    fn in_time(&self) -> io::Result<&Socket> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_patience(Some(left))?;
        Ok(self.socket)
    }
}

impl Read for HastySocket<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.in_time()?.read(buf)
    }
}

impl Write for HastySocket<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.in_time()?.write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.in_time()?.write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
