//! The network of a container: the loopback interface, and what is connected to it.

mod pasta;
mod slirp;
pub mod user;

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// What a container's programs can reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Network {
    /// Themselves.
    #[default]
    None,
    /// All that the host reaches, as the host.
    Host,
    /// What the host reaches, through a program in user space; ports of the host lead in.
    User(Vec<user::Publish>),
}

/// The loopback interface is the first in every network namespace.
const LOOPBACK: i32 = 1;
const HEADER: usize = 16;
const REQUEST: usize = HEADER + 16;
const ERROR: u16 = 2;

/// Sets the loopback interface of this network namespace up: rtnetlink(7), one RTM_NEWLINK.
/// The kernel gives it its addresses.
pub(super) fn loopback_up() -> io::Result<()> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &set_up(LOOPBACK), &kernel, MsgFlags::empty())?;
    let mut answer = [0; 256];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    acknowledged(answer.get(..length).unwrap_or_default())
}

/// `struct nlmsghdr` and `struct ifinfomsg`, in the machine's byte order.
fn set_up(interface: i32) -> Vec<u8> {
    const NEW_LINK: u16 = 16;
    const REQUEST_AND_ACKNOWLEDGE: u16 = 1 | 4;
    const UP: u32 = 1;
    let mut bytes = Vec::with_capacity(REQUEST);
    bytes.extend((REQUEST as u32).to_ne_bytes());
    bytes.extend(NEW_LINK.to_ne_bytes());
    bytes.extend(REQUEST_AND_ACKNOWLEDGE.to_ne_bytes());
    bytes.extend([0; 8]); // sequence number and port: one request, one answer
    bytes.extend([0; 4]); // any family, any hardware
    bytes.extend(interface.to_ne_bytes());
    bytes.extend(UP.to_ne_bytes()); // flags,
    bytes.extend(UP.to_ne_bytes()); // and which of them change
    bytes
}

/// `struct nlmsgerr`: a negative error number, or 0.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer.get(HEADER..HEADER + 4).and_then(|b| b.try_into().ok());
    match (kind, code.map(i32::from_ne_bytes)) {
        (Some(ERROR), Some(0)) => Ok(()),
        (Some(ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "an odd answer of the kernel")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_without_trust() {
        let mut answer = vec![0; 20];
        answer[4..6].copy_from_slice(&ERROR.to_ne_bytes());
        assert!(acknowledged(&answer).is_ok());
        answer[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        assert_eq!(acknowledged(&answer).unwrap_err().raw_os_error(), Some(1));
        assert!(acknowledged(&answer[..18]).is_err());
        assert!(acknowledged(&[]).is_err());
        assert_eq!(set_up(LOOPBACK).len(), REQUEST);
    }
}
