//! The broker itself: what its process does until the other is gone.
//!
//! It reads no byte of any file. Whoever asks may have been taken over, and says what he likes.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode as FileMode, OFlags, ResolveFlags, fstat, linkat, openat, openat2,
    renameat, unlinkat,
};

use super::rules::{May, Rules};
use super::wire::{MAX, Packet, Word};
use crate::beside::{Channel, Received};
use crate::jail::{Jail, Mode, Reach, Work};
use crate::storage::name::{Differs, Form};

/// The bits of a mode that say who may do what.
const MODE: u32 = 0o777;

/// What it is for.
#[derive(Default)]
struct Broker {
    places: Vec<(OwnedFd, Rules)>,
}

/// Does what is asked at the channel.
pub(super) fn run(channel: Channel) {
    // The other sees that this one is gone.
    let _ = serve(&channel);
}

fn serve(channel: &Channel) -> io::Result<()> {
    let mut broker = Broker::default();
    let mut bytes = [0; MAX];
    let mode = loop {
        let Received { len, files, whole } = channel.receive(&mut bytes)?;
        let packet = bytes.get(..len).filter(|_| whole).and_then(Packet::decode);
        let Some(packet) = packet else { return Ok(()) };
        if packet.word == Word::Close {
            break mode_of(packet.number).ok_or_else(invalid)?;
        }
        broker.learn(&packet, files).ok_or_else(invalid)?;
    };
    let closed = broker.close(mode);
    let text = closed.as_ref().err().map(ToString::to_string).unwrap_or_default();
    say(channel, closed.as_ref().err().map(|_| libc::EPERM), &text)?;
    if closed.is_err() {
        return Ok(());
    }
    loop {
        let Received { len, files, whole } = channel.receive(&mut bytes)?;
        if len == 0 {
            return Ok(());
        }
        let packet = bytes.get(..len).filter(|_| whole).and_then(Packet::decode);
        let done = packet.ok_or_else(invalid).and_then(|packet| broker.act(&packet, files));
        let failed = match done {
            // It is closed here before the other goes on: a lock on it goes when the other closes it.
            Ok(Some(file)) => channel.send(&[0], Some(file.as_fd())).err(),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        say(channel, failed.map(|error| error.raw_os_error().unwrap_or(libc::EIO)), "")?;
    }
}

/// Says how it went: an error's number, or 0.
fn say(channel: &Channel, error: Option<i32>, text: &str) -> io::Result<()> {
    let mut bytes = error.unwrap_or_default().to_le_bytes().to_vec();
    bytes.extend(text.bytes().take(MAX - bytes.len()));
    channel.send(&bytes, None)
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

fn refused() -> io::Error {
    io::Error::from_raw_os_error(libc::EPERM)
}

/// How much of a jail there has to be, as a number.
pub(super) fn number_of(mode: Mode) -> u32 {
    match mode {
        Mode::Require => 0,
        Mode::Best => 1,
        Mode::Off => 2,
    }
}

fn mode_of(number: u32) -> Option<Mode> {
    [Mode::Require, Mode::Best, Mode::Off].into_iter().find(|mode| number_of(*mode) == number)
}

impl Broker {
    /// Notes what is the disk's, before its user can be taken over.
    fn learn(&mut self, packet: &Packet<'_>, files: Vec<OwnedFd>) -> Option<()> {
        let Packet { word, place, number, first, second } = *packet;
        if word == Word::Place {
            self.places.push((files.into_iter().next()?, Rules::default()));
            return Some(());
        }
        let (_, rules) = self.places.get_mut(usize::from(place))?;
        let name = || OsStr::from_bytes(first).to_owned();
        let text = |bytes| std::str::from_utf8(bytes).ok().map(str::to_owned);
        match word {
            Word::Name => rules.names.push((name(), May::of(number)?)),
            Word::Other => rules.others.push(name()),
            Word::Form => {
                let differs = match usize::try_from(number).ok()? {
                    0 => Differs::Numbers,
                    digits => Differs::Digits(digits),
                };
                rules.forms.push(Form { before: text(first)?, differs, behind: text(second)? });
            }
            _ => return None,
        }
        Some(())
    }

    /// Closes its own jail: the directories, and the few calls that it makes there.
    fn close(&self, mode: Mode) -> crate::Result<()> {
        let mut jail = Jail::empty(Work::Broker);
        for (dir, _) in &self.places {
            let dir = dir.try_clone().map_err(|e| crate::Error::io("a directory is lost", e))?;
            jail.reach_open(dir, Reach::Files);
        }
        jail.close(mode).map(drop)
    }

    /// Does what is asked, if that is the disk's.
    fn act(&self, packet: &Packet<'_>, files: Vec<OwnedFd>) -> io::Result<Option<OwnedFd>> {
        let (dir, rules) = self.places.get(usize::from(packet.place)).ok_or_else(invalid)?;
        if files.len() != usize::from(packet.word == Word::Give) {
            return Err(invalid());
        }
        let allowed = |name: &[u8], may: May| {
            let name = OsStr::from_bytes(name).to_owned();
            if rules.allow(&name, may) { Ok(name) } else { Err(refused()) }
        };
        let (first, second) = (packet.first, packet.second);
        let mode = FileMode::from_raw_mode(packet.number & MODE);
        match packet.word {
            Word::Open => open(dir, &allowed(first, May::Write)?).map(Some),
            Word::Create => {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let name = allowed(first, May::All)?;
                Ok(Some(openat(dir, &name, flags | OFlags::NOFOLLOW, mode)?))
            }
            Word::Nameless if rules.make_files() => {
                let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
                Ok(Some(openat(dir, ".", flags, mode)?))
            }
            Word::Nameless => Err(refused()),
            Word::Give => give(dir, files, &allowed(first, May::All)?).map(|()| None),
            Word::Link => {
                let (from, to) = (allowed(first, May::All)?, allowed(second, May::All)?);
                Ok(linkat(dir, &from, dir, &to, AtFlags::empty()).map(|()| None)?)
            }
            Word::Rename => {
                let (from, to) = (allowed(first, May::All)?, allowed(second, May::All)?);
                Ok(renameat(dir, &from, dir, &to).map(|()| None)?)
            }
            Word::Remove => {
                let name = allowed(first, May::Remove)?;
                Ok(unlinkat(dir, &name, AtFlags::empty()).map(|()| None)?)
            }
            Word::Place | Word::Name | Word::Form | Word::Other | Word::Close => Err(refused()),
        }
    }
}

/// Opens a file for reading and writing: one, and not what a link leads to.
fn open(dir: &OwnedFd, name: &OsString) -> io::Result<OwnedFd> {
    let flags =
        OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let opened = match openat2(dir, name, flags, FileMode::empty(), beneath) {
        Err(rustix::io::Errno::NOSYS) => openat(dir, name, flags, FileMode::empty()),
        opened => opened,
    };
    let file = opened?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) == FileType::RegularFile {
        Ok(file)
    } else {
        Err(refused())
    }
}

/// Gives the file that came its first name. One that has a name may be anybody's, and would be written as the
/// disk's under another.
fn give(dir: &OwnedFd, files: Vec<OwnedFd>, name: &OsString) -> io::Result<()> {
    let [file] = &files[..] else { return Err(invalid()) };
    let stat = fstat(file)?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if !is_file || stat.st_nlink != 0 {
        return Err(refused());
    }
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, open, dir, name, AtFlags::SYMLINK_FOLLOW)?)
}
