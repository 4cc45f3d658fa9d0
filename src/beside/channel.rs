//! What two processes beside each other say: whole packets, with at most one open file each.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};

/// One's end of the channel. The other sees when it is closed.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A packet that came.
#[derive(Debug)]
pub struct Received {
    /// How many bytes it has; where it has none, the other is gone.
    pub len: usize,
    /// What came with it.
    pub files: Vec<OwnedFd>,
    /// Whether nothing of it is missing.
    pub whole: bool,
}

impl Channel {
    /// Both ends of one.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let ends = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Channel(ends.0), Channel(ends.1)))
    }

    /// Its descriptor's number.
    pub fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Sends a packet, and an open file with it.
    pub fn send(&self, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut with = SendAncillaryBuffer::new(&mut space);
            if let Some(file) = &file {
                with.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(file)));
            }
            match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut with, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                done => return Ok(done.map(drop)?),
            }
        }
    }

    /// Says that nothing more will be sent, and waits until the other is gone, so long.
    pub fn finish(&self, patience: PollTimeout) -> io::Result<()> {
        shutdown(&self.0, Shutdown::Write)?;
        let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, patience)?;
        Ok(())
    }

    /// Waits for a packet; what does not fit into `bytes` is lost.
    pub fn receive(&self, bytes: &mut [u8]) -> io::Result<Received> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut with = RecvAncillaryBuffer::new(&mut space);
            let mut room = [IoSliceMut::new(bytes)];
            let got = match recvmsg(&self.0, &mut room, &mut with, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => continue,
                done => done?,
            };
            let files = with.drain().filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(files) => Some(files),
                _ => None,
            });
            let files = files.flatten().collect();
            let whole = !got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
            return Ok(Received { len: got.bytes, files, whole });
        }
    }
}
