//! How commands come to an open disk: the options that say how, the passphrase, the turn among commands, the
//! jail that they work in, and the process that has the disk already.

pub mod disk;
pub mod held;
pub mod jail;
pub mod limit;
pub mod memory;
pub mod options;
pub mod passphrase;
pub mod rest;
pub mod turn;
