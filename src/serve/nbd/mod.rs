//! NBD's server: a flat disk as an export, for any number of clients up to a bound.
//!
//! [`handshake`] agrees with a client on the export, [`connection`] takes its requests, [`request`]
//! checks them, [`execute`] carries them out, [`reply`] writes the answers; the numbers and layouts are the client's own, in
//! [`crate::nbd`], as is TLS. Specification: "The NBD protocol" (fixed newstyle, structured replies,
//! metadata contexts, write zeroes, info, TLS).

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::socket::Listener;
use crate::error::{Error, Result};
use crate::jail;
use crate::nbd::stream::{Hasty, Stream};

mod connection;
mod contexts;
mod execute;
mod export;
mod handshake;
mod reply;
mod request;
#[cfg(test)]
mod tests;

use connection::Connection;
pub use contexts::{Bitmap, Contexts, MAX_BITMAPS};
use export::Gone;
pub use export::{Export, Tls};

/// Clients at a time.
const MAX_CONNECTIONS: usize = 32;
/// How long a client may take to agree on the export.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// How long what is under way may take to be answered when the server stops.
const GRACE: Duration = Duration::from_secs(5);
/// How long a disk may then still take to do what it was asked for.
const TO_END: Duration = Duration::from_secs(60);
/// How long to wait when the host has no more files or memory for another client.
const PAUSE: Duration = Duration::from_millis(50);

/// A running server; it ends when this is [stopped](Server::stop) or dropped.
pub struct Server {
    shared: Arc<Shared>,
    /// It gives the listener back: to remove a socket's file may not be its right.
    acceptor: Option<JoinHandle<Listener>>,
    /// Closed to wake the thread that accepts.
    wake: Option<UnixStream>,
}

struct Shared {
    export: Export,
    tls: Tls,
    stopping: AtomicBool,
    /// Who is connected, by number.
    clients: Mutex<Vec<(u64, Arc<Stream>)>>,
    /// Signalled when a client is gone.
    left: Condvar,
    next: AtomicU64,
}

impl Server {
    /// Serves `export` to all who connect to `listener`, and fulfil what `tls` asks for.
    pub fn start(export: Export, listener: Listener, tls: Tls) -> Result<Server> {
        let failed = |e| Error::io("cannot start to serve", e);
        listener.set_nonblocking().map_err(failed)?;
        let (wake, woken) = UnixStream::pair().map_err(failed)?;
        let shared = Arc::new(Shared {
            export,
            tls,
            stopping: AtomicBool::new(false),
            clients: Mutex::default(),
            left: Condvar::new(),
            next: AtomicU64::new(0),
        });
        let own = shared.clone();
        let acceptor = thread::Builder::new()
            .name("nbd-accept".into())
            .spawn(move || {
                jail::narrow(jail::Thread::Connection);
                own.accept_all(&listener, &woken);
                listener
            })
            .map_err(failed)?;
        Ok(Server { shared, acceptor: Some(acceptor), wake: Some(wake) })
    }

    /// Takes no more requests, answers those that are under way, and makes all that was written
    /// durable.
    pub fn stop(mut self) -> Result<()> {
        self.finish();
        let device = &self.shared.export.device;
        if device.read_only() { Ok(()) } else { device.flush() }
    }

    fn finish(&mut self) {
        let shared = &self.shared;
        shared.stopping.store(true, Ordering::SeqCst);
        drop(self.wake.take());
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for (how, time) in [(Shutdown::Read, GRACE), (Shutdown::Both, TO_END)] {
            for (_, stream) in shared.clients().iter() {
                let _ = stream.shutdown(how);
            }
            shared.wait_until_all_left(Instant::now() + time);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Vec<(u64, Arc<Stream>)>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until_all_left(&self, until: Instant) {
        let mut clients = self.clients();
        while !clients.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            clients = match self.left.wait_timeout(clients, left) {
                Ok((clients, _)) => clients,
                Err(e) => e.into_inner().0,
            };
        }
    }

    /// Takes connections until the other end of `woken` is closed.
    fn accept_all(self: &Arc<Shared>, listener: &Listener, woken: &UnixStream) {
        loop {
            let mut ready = [
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(woken.as_fd(), PollFlags::POLLIN),
            ];
            // It fails where the host lacks memory, perhaps: later it may have some.
            let polled = poll(&mut ready, PollTimeout::NONE);
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            match polled.map_err(io::Error::from).and_then(|_| listener.accept()) {
                Ok(stream) => self.welcome(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }

    /// Serves a client in a thread of its own; one too many is turned away.
    fn welcome(self: &Arc<Shared>, stream: Stream) {
        let stream = Arc::new(stream);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut clients = self.clients();
            if clients.len() >= MAX_CONNECTIONS {
                return;
            }
            clients.push((number, stream.clone()));
        }
        let guest = Guest { shared: self.clone(), number };
        // Where no thread starts, the closure is dropped, and the guest leaves with it.
        let _ = thread::Builder::new().name("nbd".into()).spawn(move || {
            // A client that left, or was cut off, is nobody's failure.
            let _ = guest.shared.converse(&stream);
            stream.close();
        });
    }

    fn converse(&self, stream: &Stream) -> std::result::Result<(), Gone> {
        let hasty = Hasty::new(stream, HANDSHAKE);
        let agreed = handshake::negotiate(hasty, &self.export, &self.tls)?;
        let Some(terms) = agreed else { return Ok(()) };
        stream.set_patience(None)?;
        Connection::new(stream, &self.export, terms, &self.stopping).serve();
        Ok(())
    }
}

/// A client's entry, taken out when its thread ends, of a panic too.
struct Guest {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.clients().retain(|(number, _)| *number != self.number);
        self.shared.left.notify_all();
    }
}
