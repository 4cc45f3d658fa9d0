//! The holder's side of a control socket: who may ask, one thread per question, and an end at which
//! all who wait for it are told.
//!
//! A client that is slow, silent or hostile costs one thread for a bounded time. It knows no disk.

use std::io::{BufRead, BufReader, ErrorKind as IoErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, getsockopt, recv, sockopt::PeerCredentials};
use serde_json::Value;

use super::place;
use super::wire::{MAX_LINE, Named, Question, Reply, Request};
use crate::change::merge::Progress;
use crate::error::{Error, Result};
use crate::storage::directory::{DirectoryLock, lock_directory};

/// Questions that are answered at a time.
const MAX_CONNECTIONS: usize = 64;
/// How long somebody who connects may take to ask.
const TO_ASK: Duration = Duration::from_secs(10);
/// How long somebody may take to read what he is told.
const TO_READ: Duration = Duration::from_secs(5);
/// How often progress is told, and a cancellation looked for.
const BEAT: Duration = Duration::from_millis(50);
/// How long those who wait for the end may take to be told.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long what is being done may take to stop when the disk is to be free.
const TO_STOP: Duration = Duration::from_secs(30);
/// How long a process may need from the end of its mount to its own.
const HANDOVER: Duration = Duration::from_secs(30);

/// How long a process may take to make a socket and listen, microseconds of work: a stopped one keeps
/// nobody waiting.
const TO_LISTEN: Duration = Duration::from_secs(2);

/// What a holder does when it is asked.
pub trait Service: Send + Sync {
    /// Whether the disk that was named is the one that is held.
    fn holds(&self, disk: Named) -> bool;

    /// Does what was asked. `told` takes how far it is, and says whether to go on.
    fn serve(&self, request: &Request, told: &mut Progress<'_>) -> Result<Value>;
}

/// A control socket that is there, and not served yet: who connects waits.
pub struct Bound {
    server: Server,
    listener: UnixListener,
    woken: UnixStream,
}

impl Bound {
    /// Makes it answer to another name as well.
    pub fn also(&self, name: &str) -> Result<()> {
        self.server.also(name)
    }

    /// What can give it more names, as long as it lives.
    pub fn names(&self) -> Names {
        self.server.names()
    }

    /// Serves it from now on.
    pub fn serve(self) -> Result<Server> {
        let Bound { mut server, listener, woken } = self;
        let own = server.shared.clone();
        let acceptor = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accept_all(&own, &listener, &woken))
            .map_err(|e| Error::io("cannot serve the control socket", e))?;
        server.acceptor = Some(acceptor);
        Ok(server)
    }
}

/// A control socket, served by threads of this process until [`end`](Server::end).
pub struct Server {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    /// Closed to wake the thread that accepts.
    wake: Option<UnixStream>,
}

struct Shared {
    /// Taken when nothing is served any more.
    service: Mutex<Option<Arc<dyn Service>>>,
    /// Whether what is being done is to stop.
    stopping: AtomicBool,
    /// Taken when they are removed: from then on they may be another process's.
    names: Mutex<Vec<PathBuf>>,
    /// How it ended, when it did.
    outcome: Mutex<Option<std::result::Result<(), String>>>,
    ended: Condvar,
    connections: AtomicUsize,
}

impl Server {
    /// Listens for questions about what `service` holds, and serves them.
    pub fn listen(name: &str, service: Arc<dyn Service>) -> Result<Server> {
        Server::bind(name, service)?.serve()
    }

    /// Makes a socket for questions about what `service` holds.
    pub fn bind(name: &str, service: Arc<dyn Service>) -> Result<Bound> {
        let dir = place::directory()?;
        remove_stale(&dir);
        let path = dir.join(name);
        let failed = |e| Error::io("cannot make the control socket", e).at_path(&path);
        clear(&dir, &path).map_err(failed)?;
        let listener = listen(&dir, &path).map_err(failed)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let (wake, woken) = UnixStream::pair().map_err(failed)?;
        let shared = Arc::new(Shared {
            service: Mutex::new(Some(service)),
            stopping: AtomicBool::new(false),
            names: Mutex::new(vec![path.clone()]),
            outcome: Mutex::default(),
            ended: Condvar::new(),
            connections: AtomicUsize::new(0),
        });
        let server = Server { shared, acceptor: None, wake: Some(wake) };
        Ok(Bound { server, listener, woken })
    }

    /// Makes it answer to another name as well.
    pub fn also(&self, name: &str) -> Result<()> {
        self.shared.also(name)
    }

    /// What can give it more names, as long as it lives.
    pub fn names(&self) -> Names {
        Names(Arc::downgrade(&self.shared))
    }

    /// Tells everyone who waits for it how it ended, and serves nobody any more.
    pub fn end(self, result: &Result<()>) {
        self.end_after(result, || {});
    }

    /// As [`end`](Server::end); `last` is done when the disk is free, and before anyone is told.
    pub fn end_after(mut self, result: &Result<()>, last: impl FnOnce()) {
        self.finish(result.as_ref().map(|_| ()).map_err(|e| e.to_string()), last);
    }

    fn finish(&mut self, outcome: std::result::Result<(), String>, last: impl FnOnce()) {
        self.shared.remove_names();
        self.shared.let_go();
        last();
        lock(&self.shared.outcome).get_or_insert(outcome);
        self.shared.ended.notify_all();
        drop(self.wake.take());
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let until = Instant::now() + FAREWELL;
        while self.shared.connections.load(Ordering::SeqCst) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Gives a server more names.
pub struct Names(Weak<Shared>);

impl Names {
    /// As [`Server::also`]; nothing where the server has ended.
    pub fn also(&self, name: &str) -> Result<()> {
        self.0.upgrade().map_or(Ok(()), |shared| shared.also(name))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.finish(Err("the process that held the disk gave up".to_owned()), || {});
    }
}

/// Removes the sockets of processes that were killed, as far as their names tell.
fn remove_stale(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|n| n.strip_suffix(".sock")?.rsplit('-').nth(1));
        let pid = pid.filter(|pid| pid.bytes().all(|b| b.is_ascii_digit()));
        // A process of another namespace is not seen here, but it answers.
        let gone = pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists());
        if gone && is_dead(&entry.path()) {
            // What cannot be removed is looked at again by the next.
            let _ = remove_dead(dir, &entry.path());
        }
    }
}

/// Makes sure that [`Bound::also`] can give a socket this name, also in a process that can make no connection.
///
/// # Errors
/// Where what is left there cannot be removed.
pub fn make_way(name: &str) -> Result<()> {
    let dir = place::directory()?;
    let path = dir.join(name);
    clear(&dir, &path).map_err(|e| Error::io("cannot name the control socket", e).at_path(&path))
}

/// Removes what a process that is gone left at a socket's name. One that is about to go is waited
/// for.
fn clear(dir: &Path, path: &Path) -> std::io::Result<()> {
    let deadline = Instant::now() + HANDOVER;
    loop {
        match UnixStream::connect(path) {
            Ok(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(e) if e.kind() == IoErrorKind::ConnectionRefused => return remove_dead(dir, path),
            _ => return Ok(()),
        }
    }
}

/// Makes a socket in `dir` and listens.
fn listen(dir: &Path, path: &Path) -> std::io::Result<UnixListener> {
    let _alone = alone(dir);
    UnixListener::bind(path)
}

/// Whether nobody listens at a socket; or not yet.
fn is_dead(path: &Path) -> bool {
    UnixStream::connect(path).is_err_and(|e| e.kind() == IoErrorKind::ConnectionRefused)
}

/// Removes a socket in `dir` at which nobody will listen any more.
fn remove_dead(dir: &Path, path: &Path) -> std::io::Result<()> {
    let alone = alone(dir);
    if alone.is_none() || !is_dead(path) {
        return Ok(());
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != IoErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// What whoever makes a socket in `dir`, or removes one that is dead, has to himself: between its making and
/// the moment in which somebody listens, a new one looks dead. Nothing where it cannot be had in time.
fn alone(dir: &Path) -> Option<DirectoryLock> {
    lock_directory(dir, TO_LISTEN).ok()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes connections until the other end of `woken` is closed, and then those that came before.
fn accept_all(shared: &Arc<Shared>, listener: &UnixListener, woken: &UnixStream) {
    loop {
        let mut ready = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(woken.as_fd(), PollFlags::POLLIN),
        ];
        let polled = poll(&mut ready, PollTimeout::NONE);
        let over = ready[1].revents().is_some_and(|events| !events.is_empty());
        if polled.is_err_and(|errno| errno != nix::errno::Errno::EINTR) {
            return;
        }
        loop {
            match listener.accept() {
                Ok((stream, _)) => shared.take(stream),
                Err(e) if e.kind() == IoErrorKind::WouldBlock => break,
                // Too many files are open, perhaps: the rest of them wait a moment.
                Err(_) => {
                    std::thread::sleep(BEAT);
                    break;
                }
            }
        }
        if over {
            return;
        }
    }
}

impl Shared {
    fn also(&self, name: &str) -> Result<()> {
        let dir = place::directory()?;
        let path = dir.join(name);
        let failed = |e| Error::io("cannot name the control socket", e).at_path(&path);
        clear(&dir, &path).map_err(failed)?;
        let mut names = lock(&self.names);
        if let Some(first) = names.first() {
            std::fs::hard_link(first, &path).map_err(failed)?;
            names.push(path);
        }
        Ok(())
    }

    /// Stops what is being done, and lets go of what it is done to.
    fn let_go(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let Some(service) = lock(&self.service).take() else { return };
        let until = Instant::now() + TO_STOP;
        while Arc::strong_count(&service) > 1 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn remove_names(&self) {
        for name in std::mem::take(&mut *lock(&self.names)) {
            let _ = std::fs::remove_file(name);
        }
    }

    fn take(self: &Arc<Shared>, stream: UnixStream) {
        if !is_own_user(&stream) {
            return;
        }
        if self.connections.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
            self.connections.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        let own = self.clone();
        let started = std::thread::Builder::new().name("asked".into()).spawn(move || {
            // Whoever asked and left need not know.
            let _ = own.converse(stream);
            own.connections.fetch_sub(1, Ordering::SeqCst);
        });
        if started.is_err() {
            self.connections.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn converse(&self, stream: UnixStream) -> std::io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(BEAT))?;
        stream.set_write_timeout(Some(TO_READ))?;
        let mut line = Vec::new();
        read_line(&stream, &mut line)?;
        let question: Question = match serde_json::from_slice(&line) {
            Ok(question) => question,
            Err(e) => {
                let error = Error::invalid(format!("this is no question to a holder: {e}"));
                return say(&stream, &Reply::failed(&error));
            }
        };
        let reply = match question.request {
            Request::Wait => self.wait(&stream),
            request => {
                let service = lock(&self.service).clone();
                let Some(service) = service.filter(|s| question.disk.is_none_or(|d| s.holds(d)))
                else {
                    return say(&stream, &Reply::Elsewhere);
                };
                let stopping = &self.stopping;
                let mut beat = Beat { stream: &stream, stopping, next: Instant::now() + BEAT };
                service.serve(&request, &mut |done, total| beat.goes_on(done, total))
            }
        };
        match reply {
            Ok(result) => say(&stream, &Reply::Done { result }),
            Err(error) => say(&stream, &Reply::failed(&error)),
        }
    }

    /// Waits for the end, as long as the one who asked does.
    fn wait(&self, stream: &UnixStream) -> Result<Value> {
        let mut outcome = lock(&self.outcome);
        loop {
            match &*outcome {
                Some(Ok(())) => return Ok(Value::Null),
                Some(Err(why)) => return Err(Error::new(crate::ErrorKind::Io, why.clone())),
                None => {}
            }
            outcome = match self.ended.wait_timeout(outcome, TO_ASK) {
                Ok((outcome, _)) => outcome,
                Err(e) => e.into_inner().0,
            };
            if outcome.is_none() && has_spoken(stream) {
                return Err(Error::new(crate::ErrorKind::Interrupted, "nobody waits any more"));
            }
        }
    }
}

/// Only the user whose process this is, and root, are answered.
fn is_own_user(stream: &UnixStream) -> bool {
    let peer = getsockopt(stream, PeerCredentials).map(|c| c.uid());
    peer.is_ok_and(|uid| uid == 0 || uid == nix::unistd::geteuid().as_raw())
}

/// Reads a line of bounded length in bounded time.
fn read_line(stream: &UnixStream, line: &mut Vec<u8>) -> std::io::Result<()> {
    let until = Instant::now() + TO_ASK;
    let mut reader = BufReader::new(stream.take(MAX_LINE));
    loop {
        match reader.read_until(b'\n', line) {
            Ok(_) if line.ends_with(b"\n") => return Ok(()),
            Ok(_) => return Err(IoErrorKind::UnexpectedEof.into()),
            Err(e) if e.kind() == IoErrorKind::WouldBlock && Instant::now() < until => {}
            Err(e) => return Err(e),
        }
        if Instant::now() >= until {
            return Err(IoErrorKind::TimedOut.into());
        }
    }
}

fn say(mut stream: &UnixStream, reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Whether the one who asked has closed the connection, or said something more.
fn has_spoken(stream: &UnixStream) -> bool {
    let mut byte = [0];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut byte, flags) != Err(nix::errno::Errno::EAGAIN)
}

/// Tells progress now and then.
struct Beat<'a> {
    stream: &'a UnixStream,
    stopping: &'a AtomicBool,
    next: Instant,
}

impl Beat<'_> {
    fn goes_on(&mut self, done: u64, total: u64) -> bool {
        if self.stopping.load(Ordering::Relaxed) {
            return false;
        }
        if Instant::now() < self.next {
            return true;
        }
        self.next = Instant::now() + BEAT;
        !has_spoken(self.stream) && say(self.stream, &Reply::At { done, total }).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mount's socket names no process that lives: only that somebody listens keeps it.
    #[test]
    fn a_socket_that_is_being_made_is_not_taken_for_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    remove_stale(dir.path());
                }
            });
            let there = (0..2000).all(|number| {
                let path = dir.path().join(format!("mount-0-{number}.sock"));
                let listener = listen(dir.path(), &path).unwrap();
                let there = path.exists();
                drop(listener);
                let _ = std::fs::remove_file(&path);
                there
            });
            over.store(true, Ordering::SeqCst);
            assert!(there);
        });
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let name = |name: &str| dir.path().join(name);
        let (dead, live) = (name("mount-0-1.sock"), name("mount-0-2.sock"));
        drop(listen(dir.path(), &dead).unwrap());
        let listener = listen(dir.path(), &live).unwrap();
        remove_stale(dir.path());
        assert!(!dead.exists() && live.exists());
        drop(listener);
        clear(dir.path(), &live).unwrap();
        assert!(!live.exists());
    }
}
