//! What two processes beside each other say: a length (4 bytes, little-endian) and as many bytes of JSON at a time,
//! or one byte with a file.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vdisk_fuse::mount::receive;

/// The longest word, in bytes.
const LONGEST: usize = 64 << 10;

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

    /// Hands a file over.
    pub fn hand(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        let files = [file.as_raw_fd()];
        let with = [ControlMessage::ScmRights(&files)];
        let byte = [IoSlice::new(&[0])];
        sendmsg::<()>(self.number(), &byte, &with, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Waits for a file that is handed over.
    pub fn handed(&self) -> io::Result<OwnedFd> {
        receive(&self.0)
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

impl From<OwnedFd> for Link {
    fn from(end: OwnedFd) -> Link {
        Link(end.into())
    }
}

impl From<Link> for OwnedFd {
    fn from(Link(end): Link) -> OwnedFd {
        end.into()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    type Word = (u32, u32);

    #[test]
    fn what_is_asked_is_answered_until_the_end() {
        let (ours, theirs) = Link::pair().unwrap();
        let answers = std::thread::spawn(move || {
            theirs.answer(|(a, b): Word| a.checked_add(b));
        });
        let asker = Asker::by(ours);
        assert_eq!(asker.ask::<Option<u32>>(&(7, 2)).unwrap(), Some(9));
        drop(asker);
        answers.join().unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_an_error_and_no_end() {
        let (ours, theirs) = Link::pair().unwrap();
        (&theirs.0).write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(ours.hear::<Word>().is_err());
        let (ours, theirs) = Link::pair().unwrap();
        theirs.say(&"served").unwrap();
        assert!(ours.hear::<Word>().is_err());
        drop(theirs);
        assert!(ours.hear::<Word>().unwrap().is_none());
        assert!(ours.hear_within::<Word>(Duration::from_millis(1)).unwrap().is_none());
    }

    #[test]
    fn a_file_is_handed_over_behind_what_was_said() {
        let (ours, theirs) = Link::pair().unwrap();
        let (mut end, other) = UnixStream::pair().unwrap();
        theirs.say(&(1, 2)).unwrap();
        theirs.hand(other.as_fd()).unwrap();
        theirs.say(&(3, 4)).unwrap();
        drop(other);
        assert_eq!(ours.hear::<Word>().unwrap(), Some((1, 2)));
        let handed = Link::from(ours.handed().unwrap());
        assert_eq!(ours.hear::<Word>().unwrap(), Some((3, 4)));
        handed.say(&(5, 6)).unwrap();
        drop(handed);
        let mut said = Vec::new();
        end.read_to_end(&mut said).unwrap();
        assert!(said.ends_with(b"[5,6]"));
    }
}
