//! A TAP device of the host's (Documentation/networking/tuntap.rst), one frame a read or write.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use nix::libc::{IFF_NO_PI, IFF_TAP, IFNAMSIZ, O_NONBLOCK, ifreq};

use super::Network;
use crate::error::{Error, Result};
use crate::virtio::{Frames, Link, MAX_FRAME, Mac};

// TUNSETIFF: attaches the file to a device (linux/if_tun.h).
nix::ioctl_write_ptr_bad!(
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<i32>()),
    ifreq
);

struct Tap(File);

impl Link for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.0).write(frame).map(drop)
    }
}

impl Frames for Arc<Tap> {
    fn receive(&mut self, buffer: &mut [u8; MAX_FRAME]) -> io::Result<Option<usize>> {
        match (&self.0).read(buffer) {
            Ok(len) => Ok(Some(len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The TAP device `name`: one that is there and may be used by this user, or as root a new one.
pub fn tap(name: &str, mac: Mac) -> Result<Network> {
    let fits = !name.is_empty() && name.len() < IFNAMSIZ && !name.contains(['/', '\0', '%']);
    if !fits {
        return Err(Error::invalid(format!("{name:?} is no name of a network device")));
    }
    let opened =
        OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open("/dev/net/tun");
    let file =
        opened.map_err(|e| Error::io("a TAP device needs /dev/net/tun (root: modprobe tun)", e))?;
    // SAFETY: plain numbers, for which zeroes are values.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI) as i16;
    // SAFETY: the file is open, and the request is a whole one that outlives the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }.map_err(|e| {
        let text = format!(
            "cannot use the TAP device {name}: root makes one for a user by `ip tuntap add mode tap \
             user USER name {name}`"
        );
        Error::io(text, e.into())
    })?;
    let tap = Arc::new(Tap(file));
    Ok(Network { mac, link: Arc::clone(&tap) as _, frames: Box::new(tap) })
}
