//! The host's network for an ordinary user, by passt: frames go over a stream socket, each after its
//! length in four bytes, big-endian (passt's "UNIX domain" protocol, QEMU's `-netdev stream`).

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::Network;
use crate::error::{Error, Result};
use crate::virtio::{Frames, Link, MAX_FRAME, Mac};

const PROGRAM: &str = "passt";
/// What the guest is told to use: its buffers hold no longer frames.
const MTU: &str = "1500";
const LENGTH: usize = 4;
/// How long the program may take to end.
const TO_END: Duration = Duration::from_secs(2);

/// A stream to a program that ends with it.
struct Stream {
    socket: UnixStream,
    /// What is left of a frame of which a part has been sent.
    rest: Mutex<Vec<u8>>,
    program: Mutex<Child>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        let program = self.program.get_mut().unwrap_or_else(PoisonError::into_inner);
        // It ends when the stream does, and has to where a jail lets no signal out.
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = program.kill();
        let until = Instant::now() + TO_END;
        while matches!(program.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Link for Stream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        self.push(&mut rest)?;
        if !rest.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let len = u32::try_from(frame.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        rest.extend_from_slice(&len.to_be_bytes());
        rest.extend_from_slice(frame);
        self.push(&mut rest)
    }
}

impl Stream {
    /// Sends what there is room for.
    fn push(&self, rest: &mut Vec<u8>) -> io::Result<()> {
        while !rest.is_empty() {
            match (&self.socket).write(rest) {
                Ok(len) => drop(rest.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What has come, which need not end where a frame does.
struct Incoming {
    stream: Arc<Stream>,
    bytes: Vec<u8>,
    /// Where the next frame begins.
    at: usize,
}

impl Frames for Incoming {
    fn receive(&mut self, buffer: &mut [u8; MAX_FRAME]) -> io::Result<Option<usize>> {
        loop {
            let left = self.bytes.get(self.at..).unwrap_or_default();
            if let Some((len, rest)) = left.split_first_chunk::<LENGTH>() {
                let len = u32::from_be_bytes(*len) as usize;
                if len > MAX_FRAME {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                if let Some(frame) = rest.get(..len) {
                    buffer.iter_mut().zip(frame).for_each(|(to, from)| *to = *from);
                    self.at += LENGTH + len;
                    return Ok(Some(len));
                }
            }
            self.bytes.drain(..self.at);
            self.at = 0;
            let before = self.bytes.len();
            self.bytes.resize(before + MAX_FRAME, 0);
            let room = self.bytes.get_mut(before..).unwrap_or_default();
            let read = (&self.stream.socket).read(room);
            self.bytes.truncate(before + read.as_ref().map_or(0, |len| *len));
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The host's network in user space, for which `passt` has to be installed.
pub fn user(mac: Mac) -> Result<Network> {
    let failed = |e| Error::io("cannot start the guest's network", e);
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    // The program inherits its end.
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|e| failed(e.into()))?;
    let fd = theirs.as_raw_fd().to_string();
    let program = Command::new(PROGRAM)
        .args(["--quiet", "--foreground", "--mtu", MTU, "--fd", &fd])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::io(
                "--net user needs the program passt: install it (Debian and Ubuntu: the package passt)",
                e,
            ),
            _ => Error::io("cannot start passt", e),
        })?;
    drop(theirs);
    let (rest, program) = (Mutex::default(), Mutex::new(program));
    let stream = Arc::new(Stream { socket: ours, rest, program });
    let incoming = Incoming { stream: Arc::clone(&stream), bytes: Vec::new(), at: 0 };
    Ok(Network { mac, link: stream, frames: Box::new(incoming) })
}
