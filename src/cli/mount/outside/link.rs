//! What the jailed process that serves a disk's files and the one outside say to each other: a length (4 bytes,
//! little-endian) and as many bytes of JSON at a time. Neither believes more than that.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vdisk::control::Failure;
use vdisk::{Error, Result};

/// The longest word, in bytes.
const LONGEST: usize = 64 << 10;

/// What the server says of what it serves, once each in this order, or that it failed.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said {
    /// It is open, and can be mounted.
    Opened(Opened),
    /// The server has mounted it itself, as the device of this number.
    Mounted(String),
    /// It is not mounted any more, and everything is durable.
    Ended,
    /// Why there is none, or what was lost.
    Failed(Failure),
}

/// What there is to be mounted.
#[derive(Debug, Serialize, Deserialize)]
pub enum Opened {
    /// A tree of files.
    Files {
        /// Whether it refuses every change.
        read_only: bool,
        /// Whether it notes owners that the kernel does not know.
        owners: bool,
    },
    /// A disk as a file, with a file system of the kernel's in it.
    Disk(Disk),
}

/// Where in a disk there is a file system of the kernel's.
#[derive(Debug, Serialize, Deserialize)]
pub struct Disk {
    /// What people call the file system.
    pub file_system: String,
    /// Its first byte.
    pub offset: u64,
    /// In bytes; 0 for all that follows.
    pub len: u64,
    /// Whether it refuses every change.
    pub read_only: bool,
}

/// What the server is told: that its connection is mounted, and to be served.
#[derive(Debug, Serialize, Deserialize)]
pub struct Served;

/// What the server of a disk is told when that is served: how it went on.
#[derive(Debug, Serialize, Deserialize)]
pub enum Stood {
    /// The kernel's file system is mounted, on the device of this number.
    On(String),
    /// It is not.
    Failed(Failure),
}

/// What the server has done outside, which it cannot itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wish {
    /// Have the kernel write out what programs have written.
    WriteOut,
    /// Bring the kernel's file system to rest.
    Freeze,
    /// Let it go on.
    Thaw,
    /// Tell it that the disk may have another size.
    Resized,
    /// Unmount it. While it is in use it stays.
    Unmount,
    /// Take the mount away, whoever uses it.
    Detach,
}

/// Whether a process has a capability.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Capable {
    pub process: u32,
    pub capability: u32,
}

/// One way between the two.
#[derive(Debug)]
pub struct Link(UnixStream);

impl Link {
    /// Both ends of one.
    pub fn pair() -> io::Result<(Link, Link)> {
        UnixStream::pair().map(|(ours, theirs)| (Link(ours), Link(theirs)))
    }

    /// Its descriptor's number.
    pub fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Says one thing.
    pub fn say(&self, what: &impl Serialize) -> io::Result<()> {
        let bytes = serde_json::to_vec(what)?;
        let length = u32::try_from(bytes.len()).ok().filter(|len| *len as usize <= LONGEST);
        let length = length.ok_or(ErrorKind::InvalidInput)?;
        let framed = [&length.to_le_bytes(), &bytes[..]].concat();
        (&self.0).write_all(&framed)
    }

    /// Waits for one thing; nothing where the other end is closed.
    pub fn hear<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        let mut length = [0; 4];
        match (&self.0).read_exact(&mut length) {
            Err(e) if matches!(e.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                return Ok(None);
            }
            heard => heard?,
        }
        let length = u32::from_le_bytes(length) as usize;
        if length > LONGEST {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut bytes = vec![0; length];
        (&self.0).read_exact(&mut bytes)?;
        Ok(Some(serde_json::from_slice(&bytes)?))
    }

    /// The same, for at most so long.
    pub fn hear_within<T: DeserializeOwned>(&self, limit: Duration) -> io::Result<Option<T>> {
        self.0.set_read_timeout(Some(limit))?;
        self.hear()
    }

    /// Answers what the other end asks, until that is closed.
    pub fn answer<Q: DeserializeOwned, A: Serialize>(&self, mut answer: impl FnMut(Q) -> A) {
        while let Ok(Some(question)) = self.hear() {
            if self.say(&answer(question)).is_err() {
                return;
            }
        }
    }
}

/// The end that asks: one question at a time.
#[derive(Debug)]
pub struct Asker(Mutex<Link>);

impl Asker {
    /// By this link.
    pub fn by(link: Link) -> Asker {
        Asker(Mutex::new(link))
    }

    /// Asks, and waits for the answer.
    pub fn ask<A: DeserializeOwned>(&self, question: &impl Serialize) -> io::Result<A> {
        let link = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        link.say(question)?;
        link.hear()?.ok_or_else(|| ErrorKind::BrokenPipe.into())
    }
}

/// All ways between the two, as one of them has them.
pub struct Links {
    /// On which the server says what there is to be mounted, and hears of it.
    pub mount: Link,
    /// On which it asks for what it wishes.
    pub wishes: Link,
    /// On which it asks what the processes can do that use the mount.
    pub callers: Link,
}

impl Links {
    /// The outer process's, and the server's.
    pub fn pairs() -> Result<(Links, Links)> {
        let made = || {
            let [mount, wishes, callers] = [Link::pair()?, Link::pair()?, Link::pair()?];
            let outer = Links { mount: mount.0, wishes: wishes.0, callers: callers.0 };
            Ok((outer, Links { mount: mount.1, wishes: wishes.1, callers: callers.1 }))
        };
        made().map_err(|e: io::Error| Error::io("cannot speak with the server", e))
    }

    /// The numbers of their descriptors.
    pub fn numbers(&self) -> [RawFd; 3] {
        [&self.mount, &self.wishes, &self.callers].map(Link::number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_answered_until_the_end() {
        let (ours, theirs) = Link::pair().unwrap();
        let answers = std::thread::spawn(move || {
            theirs.answer(|asked: Capable| asked.process.checked_add(asked.capability));
        });
        let asker = Asker::by(ours);
        let asked = Capable { process: 7, capability: 2 };
        assert_eq!(asker.ask::<Option<u32>>(&asked).unwrap(), Some(9));
        drop(asker);
        answers.join().unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_an_error_and_no_end() {
        let (ours, theirs) = Link::pair().unwrap();
        (&theirs.0).write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(ours.hear::<Said>().is_err());
        let (ours, theirs) = Link::pair().unwrap();
        theirs.say(&Served).unwrap();
        assert!(ours.hear::<Said>().is_err());
        drop(theirs);
        assert!(ours.hear::<Said>().unwrap().is_none());
        assert!(ours.hear_within::<Said>(Duration::from_millis(1)).unwrap().is_none());
    }
}
