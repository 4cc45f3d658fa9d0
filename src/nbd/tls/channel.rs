//! TLS over a socket that several threads read and write at once.
//!
//! What both directions share, keys and records, is behind one lock that is never held while the
//! socket is waited for: who cannot write, as the other end reads nothing, keeps nobody from reading.
//! What the protocol itself has to say in between, such as new keys, goes out with the next bytes that
//! are written.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::socket::{MsgFlags, send};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

/// Encrypted bytes that are read at once.
const READ: usize = 128 << 10;
/// Bytes that are encrypted at once, before they are written.
const WRITE: usize = 128 << 10;

/// Which end of a connection this is.
pub enum Side {
    /// The one that proves itself.
    Server(Arc<ServerConfig>),
    /// The one that checks that, and the name that has to be proved.
    Client(Arc<ClientConfig>, ServerName<'static>),
}

/// The state of TLS on a connection.
///
/// Locks: `incoming` or `outgoing` first, then `connection`; never both of the first.
pub struct Channel {
    connection: Mutex<Connection>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
}

/// Bytes off the socket that have not been decrypted.
struct Incoming {
    bytes: Box<[u8]>,
    /// Those that are left.
    from: usize,
    to: usize,
}

impl Read for Incoming {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = (&self.bytes[self.from..self.to]).read(buf)?;
        self.from += n;
        Ok(n)
    }
}

/// Bytes that go to the socket.
struct Outgoing {
    bytes: Vec<u8>,
    /// A part of a record may have been written: nothing can follow it.
    failed: bool,
}

impl Channel {
    /// Comes to an agreement with the other end of `socket`.
    ///
    /// # Errors
    /// Those of `socket`, and [`rustls::Error`] as the source of one of [`ErrorKind::InvalidData`].
    pub fn agree(side: Side, socket: &mut (impl Read + Write)) -> io::Result<Channel> {
        let made = match side {
            Side::Server(config) => ServerConnection::new(config).map(Connection::Server),
            Side::Client(config, name) => {
                ClientConnection::new(config, name).map(Connection::Client)
            }
        };
        let mut connection = made.map_err(io::Error::other)?;
        connection.set_buffer_limit(Some(WRITE));
        while connection.is_handshaking() {
            connection.complete_io(socket)?;
        }
        let bytes = vec![0; READ].into_boxed_slice();
        Ok(Channel {
            connection: Mutex::new(connection),
            incoming: Mutex::new(Incoming { bytes, from: 0, to: 0 }),
            outgoing: Mutex::new(Outgoing { bytes: Vec::new(), failed: false }),
        })
    }

    /// Reads as `Read` does. An end that was not announced is an end all the same: what is said above
    /// says itself where it ends.
    pub fn read(&self, socket: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
        let mut incoming = lock(&self.incoming);
        loop {
            if let Some(n) = self.decrypt(&mut incoming, buf)? {
                return Ok(n);
            }
            (incoming.from, incoming.to) = (0, 0);
            match socket.read(&mut incoming.bytes)? {
                0 => return Ok(0),
                n => incoming.to = n,
            }
        }
    }

    /// Fills `buf` with what is here, or says that nothing is.
    fn decrypt(&self, incoming: &mut Incoming, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let mut connection = lock(&self.connection);
        loop {
            match connection.reader().read(buf) {
                Ok(n) => return Ok(Some(n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
            if incoming.from == incoming.to {
                return Ok(None);
            }
            connection.read_tls(incoming)?;
            let processed = connection.process_new_packets();
            processed.map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
        }
    }

    /// Whether bytes are here that no read has taken.
    pub fn has_more(&self) -> bool {
        let incoming = lock(&self.incoming);
        let has_plain = || {
            let mut connection = lock(&self.connection);
            let mut reader = connection.reader();
            io::BufRead::fill_buf(&mut reader).is_ok_and(|bytes| !bytes.is_empty())
        };
        incoming.from < incoming.to || has_plain()
    }

    /// Writes as `Write` does: what it takes is all written when it returns.
    pub fn write(&self, socket: &mut impl Write, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut outgoing = lock(&self.outgoing);
        if outgoing.failed {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let taken = {
            let mut connection = lock(&self.connection);
            let taken = connection.writer().write_vectored(bufs)?;
            outgoing.take(&mut connection)?;
            taken
        };
        let written = socket.write_all(&outgoing.bytes);
        outgoing.bytes.clear();
        outgoing.failed = written.is_err();
        written.map(|()| taken)
    }

    /// Says what is left to be said at the end, as far as the socket takes it at once.
    pub fn say_goodbye(&self, socket: &impl AsFd) {
        let mut outgoing = lock(&self.outgoing);
        let mut connection = lock(&self.connection);
        connection.send_close_notify();
        if outgoing.failed || outgoing.take(&mut connection).is_err() {
            return;
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // Nobody needs to hear it.
        let _ = send(socket.as_fd().as_raw_fd(), &outgoing.bytes, flags);
        outgoing.failed = true;
    }
}

impl Outgoing {
    /// Takes all that is to be written.
    fn take(&mut self, connection: &mut Connection) -> io::Result<()> {
        while connection.wants_write() {
            connection.write_tls(&mut self.bytes)?;
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
