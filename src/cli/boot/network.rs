//! What a guest's network card is plugged into, as the user says it.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::str::FromStr;

use sha2::{Digest, Sha256};
use vdisk::Result;
use vdisk::vm::{self, Network};

/// `none`, `user` or `tap:NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    None,
    User,
    Tap(String),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Wanted, String> {
        match (text, text.strip_prefix("tap:")) {
            ("none", _) => Ok(Wanted::None),
            ("user", _) => Ok(Wanted::User),
            (_, Some(name)) if !name.is_empty() => Ok(Wanted::Tap(name.to_owned())),
            _ => Err("must be none, user or tap:NAME".into()),
        }
    }
}

impl Wanted {
    /// The card of a guest with this first disk.
    pub fn plug(&self, disk: &Path) -> Result<Option<Network>> {
        match self {
            Wanted::None => Ok(None),
            Wanted::User => vm::user(address(disk)).map(Some),
            Wanted::Tap(name) => vm::tap(name, address(disk)).map(Some),
        }
    }
}

/// An address that a disk's guest keeps from one start to the next, and that the disks of one host do
/// not share: local, and of one card.
fn address(disk: &Path) -> [u8; 6] {
    let disk = std::path::absolute(disk).unwrap_or_else(|_| disk.to_owned());
    let digest = Sha256::digest(disk.as_os_str().as_bytes());
    let mut address = [0x52, 0x54, 0, 0, 0, 0];
    address[3..].copy_from_slice(&digest[..3]);
    address[2] = digest[3];
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_as_users_write_them() {
        assert_eq!("tap:vnet0".parse(), Ok(Wanted::Tap("vnet0".into())));
        assert_eq!(("none".parse(), "user".parse()), (Ok(Wanted::None), Ok(Wanted::User)));
        assert!("tap:".parse::<Wanted>().is_err() && "bridge".parse::<Wanted>().is_err());
    }

    #[test]
    fn each_disk_has_an_address_of_its_own() {
        let first = address(Path::new("/a/b.qcow2"));
        assert_eq!(first, address(Path::new("/a/b.qcow2")));
        assert_ne!(first, address(Path::new("/a/c.qcow2")));
        assert_eq!(first[0] & 3, 2, "local, and of one card");
    }
}
