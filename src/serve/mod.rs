//! Disks served to other people's guests and tools, over a socket.
//!
//! [`socket`] is where they connect, and knows no protocol; [`nbd`] is NBD's server, [`vhost`] the
//! device of a virtual machine that another program runs. A client is untrusted: what it sends is
//! checked and bounded, and it can harm no other. Nothing here knows what a disk is made of.

pub mod nbd;
pub mod socket;
pub mod vhost;
