//! The terminal of a container whose user has let go of it: whoever comes to its socket sits at it, sees what is
//! printed from then on, and types. There may be several at once.
//!
//! Knows streams of bytes and no terminal.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Who sits at a terminal.
#[derive(Debug)]
pub(super) struct Seats {
    listener: Arc<UnixListener>,
    taken: Mutex<Vec<Arc<UnixStream>>>,
}

impl Seats {
    /// Those that are found at this socket.
    pub(super) fn at(listener: Arc<UnixListener>) -> io::Result<Seats> {
        listener.set_nonblocking(true)?;
        Ok(Seats { listener, taken: Mutex::default() })
    }

    /// Shows them what was printed. Who does not keep up is sent away: the program must not be held up.
    pub(super) fn show(&self, bytes: &[u8]) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).retain(|seat| {
            let keeps_up = (&**seat).write(bytes).is_ok_and(|shown| shown == bytes.len());
            if !keeps_up {
                let _ = seat.shutdown(Shutdown::Both);
            }
            keeps_up
        });
    }

    /// Passes on what they type, until `stopped` ends or `typed` says no.
    pub(super) fn hear(&self, stopped: &UnixStream, mut typed: impl FnMut(&[u8]) -> bool) {
        let mut seats: Vec<Arc<UnixStream>> = Vec::new();
        loop {
            let fds = [stopped.as_fd(), self.listener.as_fd()].into_iter();
            let fds = fds.chain(seats.iter().map(|seat| seat.as_fd()));
            let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(_) => return,
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            let [stop, caller, speakers @ ..] = ready.as_slice() else { return };
            if *stop {
                return;
            }
            let mut speakers = speakers.iter();
            let mut all = true;
            seats.retain(|seat| match speakers.next() {
                Some(true) => self.listen(seat, |bytes| {
                    all &= typed(bytes);
                }),
                _ => true,
            });
            if !all {
                return;
            }
            // A caller who has gone again is none.
            if *caller && let Ok((seat, _)) = self.listener.accept() {
                seats.extend(self.take(seat));
            }
        }
    }

    fn take(&self, seat: UnixStream) -> Option<Arc<UnixStream>> {
        seat.set_nonblocking(true).ok()?;
        let seat = Arc::new(seat);
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&seat));
        Some(seat)
    }

    /// Hears one of them; whether he can be heard again. Who only has no more to say still sees what is printed.
    fn listen(&self, seat: &Arc<UnixStream>, typed: impl FnOnce(&[u8])) -> bool {
        let mut buffer = [0; 4096];
        match (&**seat).read(&mut buffer) {
            Ok(length @ 1..) => typed(buffer.get(..length).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Ok(_) => return false,
            Err(_) => {
                let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
                taken.retain(|other| !Arc::ptr_eq(seat, other));
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn who_comes_sees_what_is_printed_and_is_heard_and_who_leaves_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door");
        let seats = Seats::at(Arc::new(UnixListener::bind(&path).unwrap())).unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let (said, heard) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| seats.hear(&stopped, |bytes| said.send(bytes.to_vec()).is_ok()));
            let mut all: Vec<_> = (0..2).map(|_| UnixStream::connect(&path).unwrap()).collect();
            for (number, seat) in all.iter_mut().enumerate() {
                seat.write_all(&[number as u8]).unwrap();
                assert_eq!(heard.recv().unwrap(), [number as u8]);
            }
            seats.show(b"shown");
            for seat in &mut all {
                let mut shown = [0; 5];
                seat.read_exact(&mut shown).unwrap();
                assert_eq!(&shown, b"shown");
            }
            drop(all.pop());
            // One that does not read is sent away, and holds nobody up.
            let much = vec![0; 64 << 10];
            for _ in 0..1000 {
                seats.show(&much);
            }
            assert!(seats.taken.lock().unwrap().is_empty());
            drop(stop);
        });
    }
}
