//! A copy's bytes are on the disk before its name is: whatever a crash leaves, the name shows the lower
//! file or the whole copy. Knows no node.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use crate::sys;

/// What it takes that a file's bytes come to the disk before the name that it is given next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// That they are written out. Their place and length are in the journal then, and the name comes
    /// into it later, hence not to the disk without them. And before each commit the journal has the
    /// disk make durable what was written to it.
    Journal,
    /// That they are durable: the rest comes to the disk in any order.
    Sync,
}

impl Order {
    /// Of the file system that an open file is on. It is ext4 alone of which the former is known, and
    /// only where it says all that this takes: to ask for more is never wrong.
    pub(crate) fn of(file: BorrowedFd<'_>) -> Order {
        if in_journal(file).unwrap_or(false) { Order::Journal } else { Order::Sync }
    }

    /// Sees to it.
    pub(crate) fn keep(self, file: impl AsFd) -> io::Result<()> {
        match self {
            Order::Journal => sys::write_out(file.as_fd()),
            Order::Sync => Ok(rustix::fs::fsync(file)?),
        }
    }
}

fn in_journal(file: BorrowedFd<'_>) -> io::Result<bool> {
    if rustix::fs::fstatfs(file)?.f_type != libc::EXT4_SUPER_MAGIC {
        return Ok(false);
    }
    let device = rustix::fs::fstat(file)?.st_dev;
    let (major, minor) = (libc::major(device), libc::minor(device));
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"))?;
    let Some(name) = link.file_name() else { return Ok(false) };
    // A journal on a device of its own does not have this one's memory emptied; it has no inode, which
    // is the 8 here.
    let inside = Path::new("/proc/fs/jbd2").join(format!("{}-8", name.display())).exists();
    let options = std::fs::read_to_string(Path::new("/proc/fs/ext4").join(name).join("options"))?;
    Ok(inside && options.lines().any(|option| option == "data=ordered"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_does_not_say_that_it_keeps_an_order_is_asked_to_be_durable() {
        let memory = File::open("/dev/shm").unwrap();
        assert_eq!(Order::of(memory.as_fd()), Order::Sync);
        let other = File::open("/proc").unwrap();
        assert_eq!(Order::of(other.as_fd()), Order::Sync);
    }
}
