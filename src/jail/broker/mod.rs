//! A broker: a process beside one that is jailed, which opens for writing, makes, names and removes for it the
//! files of its own disks, and no others.
//!
//! Landlock bounds directories: who may make one file in one may replace all. So a jailed server may only read
//! where its disks are, and asks for the rest by name. The broker knows the names that are there when the jail
//! is closed, and the rules by which more are made; it follows no link, and reads no disk.

mod rules;
mod wire;
mod work;

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use nix::fcntl::OFlag;

use super::Mode;
use crate::beside::{self, Channel};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::name::{Differs, Form, directory, follow};
use crate::storage::{FileMaker, Host, make_by};
pub use rules::May;
use rules::Rules;
use wire::{MAX, Packet, Word};

/// A broker that knows no files yet. It ends when the process is gone that has this.
pub struct Broker(Channel);

/// What is a broker's to open, make, name and remove.
#[derive(Default)]
pub struct Grants(Vec<Place>);

struct Place {
    dir: File,
    identity: (u64, u64),
    rules: Rules,
}

impl Grants {
    /// Adds the file at `path`, which need not be there; where a link is there, that.
    ///
    /// # Errors
    /// Where its directory cannot be had.
    pub fn file(&mut self, path: &Path, may: May) -> Result<()> {
        let name = path.file_name().unwrap_or_default().to_owned();
        self.place(directory(path))?.names.push((name, may));
        Ok(())
    }

    /// Adds all files in a directory that are called so, but for those of these names.
    ///
    /// # Errors
    /// As [`file`](Grants::file).
    pub fn forms(&mut self, dir: &Path, forms: Vec<Form>, others: Vec<OsString>) -> Result<()> {
        let rules = self.place(dir)?;
        rules.forms.extend(forms);
        rules.others.extend(others);
        Ok(())
    }

    /// Whether that is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn place(&mut self, dir: &Path) -> Result<&mut Rules> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        let open = OpenOptions::new().read(true).custom_flags(flags.bits()).open(dir);
        let open = open.and_then(|dir| Ok((identity(&dir.metadata()?), dir)));
        let (identity, open) =
            open.map_err(|e| Error::io("could not be opened", e).at_path(dir))?;
        let known = self.0.iter().position(|place| place.identity == identity);
        let at = known.unwrap_or(self.0.len());
        if known.is_none() {
            self.0.push(Place { dir: open, identity, rules: Rules::default() });
        }
        let lost = || Error::invalid("no directory").at_path(dir);
        self.0.get_mut(at).map(|place| &mut place.rules).ok_or_else(lost)
    }
}

fn identity(meta: &fs::Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// A broker that was told what is its, and closes its own jail.
pub struct Told {
    channel: Channel,
    places: Vec<(u64, u64)>,
}

impl Broker {
    /// Starts it. To be called as early as can be, while this process is small and has no other thread.
    ///
    /// # Errors
    /// Where no process can be started.
    pub fn start() -> Result<Broker> {
        let started = Channel::pair().and_then(|(own, its)| {
            let number = its.number();
            beside::start(c"vdisk-broker", &[number], || work::run(its)).map(|()| Broker(own))
        });
        started.map_err(|e| Error::io("cannot start the process that opens files", e))
    }

    /// Tells it what is its, and to close its own jail. It does so meanwhile.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn tell(self, grants: Grants, mode: Mode) -> Result<Told> {
        let Broker(channel) = self;
        let places = grants.0.iter().map(|place| place.identity).collect();
        tell(&channel, grants, mode).map_err(gone)?;
        Ok(Told { channel, places })
    }
}

fn gone(error: io::Error) -> Error {
    Error::io("the process that opens files has ended", error)
}

fn tell(channel: &Channel, grants: Grants, mode: Mode) -> io::Result<()> {
    let say =
        |packet: Packet<'_>, file: Option<BorrowedFd<'_>>| channel.send(&packet.encode()?, file);
    for (number, Place { dir, rules, .. }) in (0..).zip(&grants.0) {
        let of = |word| Packet::new(word, number);
        say(of(Word::Place), Some(dir.as_fd()))?;
        for (name, may) in &rules.names {
            say(Packet { number: *may as u32, first: name.as_bytes(), ..of(Word::Name) }, None)?;
        }
        for name in &rules.others {
            say(Packet { first: name.as_bytes(), ..of(Word::Other) }, None)?;
        }
        for form in &rules.forms {
            let number = match form.differs {
                Differs::Numbers => 0,
                Differs::Digits(count) => u32::try_from(count).unwrap_or(u32::MAX),
            };
            let (first, second) = (form.before.as_bytes(), form.behind.as_bytes());
            say(Packet { number, first, second, ..of(Word::Form) }, None)?;
        }
    }
    say(Packet { number: work::number_of(mode), ..Packet::new(Word::Close, 0) }, None)
}

impl Told {
    /// Has it do from now on what the storage does to files by their names.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where it has not the jail that it was to have.
    pub fn take_over(self) -> Result<()> {
        let Told { channel, places } = self;
        let mut bytes = [0; MAX];
        let answer = channel.receive(&mut bytes).map_err(gone)?;
        match bytes.get(..answer.len).and_then(<[u8]>::split_first_chunk::<4>) {
            Some(([0, 0, 0, 0], _)) => {}
            Some((_, text)) => {
                let text = String::from_utf8_lossy(text).into_owned();
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            None => return Err(gone(io::ErrorKind::UnexpectedEof.into())),
        }
        make_by(Box::new(Asking { channel: CHANNEL.get_or_init(|| Mutex::new(channel)), places }));
        Ok(())
    }
}

/// The channel of this process, whose broker is one.
static CHANNEL: OnceLock<Mutex<Channel>> = OnceLock::new();
/// How long a broker may take to end.
const FAREWELL: u16 = 5000;

/// Lets the broker of this process go, where it has one, and returns when that has let go of the directories:
/// who waits for the end of this process may be about to unmount them.
pub fn leave() {
    if let Some(channel) = CHANNEL.get() {
        let channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
        // It may be gone.
        let _ = channel.finish(FAREWELL.into());
    }
}

/// A jailed process, which asks its broker.
struct Asking {
    channel: &'static Mutex<Channel>,
    /// Its directories, in the order in which it was told them.
    places: Vec<(u64, u64)>,
}

impl Asking {
    /// Which of the broker's directories that is; `None` where it is none: there the jail says what can be done.
    fn place(&self, dir: &Path) -> Option<u16> {
        let identity = identity(&fs::metadata(dir).ok()?);
        u16::try_from(self.places.iter().position(|place| *place == identity)?).ok()
    }

    /// A packet about a file, in its directory.
    fn of<'a>(&self, word: Word, path: &'a Path) -> Option<Packet<'a>> {
        let place = self.place(directory(path))?;
        let first = path.file_name()?.as_bytes();
        Some(Packet { first, ..Packet::new(word, place) })
    }

    /// A packet about a file that has, or gets, another name in the same directory.
    fn both<'a>(&self, word: Word, from: &'a Path, to: &'a Path) -> Option<Packet<'a>> {
        let (from, to) = (self.of(word, from)?, self.of(word, to)?);
        (from.place == to.place).then_some(Packet { second: to.first, ..from })
    }

    /// Asks, and returns what file came.
    fn ask(&self, packet: Packet<'_>, with: Option<&File>) -> io::Result<Option<File>> {
        let ended = || {
            let text = "the process beside this one that opens and makes its disks' files has ended. What is \
                        open is read and written as before; end this one and start it anew for the rest";
            io::Error::new(io::ErrorKind::BrokenPipe, text)
        };
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = packet.encode()?;
        channel.send(&bytes, with.map(AsFd::as_fd)).map_err(|_| ended())?;
        let mut file = None;
        loop {
            let mut bytes = [0; MAX];
            let answer = channel.receive(&mut bytes).map_err(|_| ended())?;
            file = answer.files.into_iter().next().map(File::from).or(file);
            match bytes.get(..answer.len) {
                Some([]) | None => return Err(ended()),
                Some(&[a, b, c, d, ..]) => match i32::from_le_bytes([a, b, c, d]) {
                    0 => return Ok(file),
                    number => return Err(io::Error::from_raw_os_error(number)),
                },
                Some(_) => {}
            }
        }
    }

    fn ask_for(&self, packet: Packet<'_>) -> io::Result<File> {
        // Where this process has too many open, none came.
        let lost = || io::Error::from_raw_os_error(libc::EMFILE);
        self.ask(packet, None)?.ok_or_else(lost)
    }
}

impl FileMaker for Asking {
    fn open(&self, path: &Path) -> io::Result<File> {
        let real = follow(path);
        let real = real.as_deref().unwrap_or(path);
        self.of(Word::Open, real).map_or_else(|| Host.open(path), |packet| self.ask_for(packet))
    }

    fn create(&self, path: &Path, mode: u32) -> io::Result<File> {
        match self.of(Word::Create, path) {
            Some(packet) => self.ask_for(Packet { number: mode, ..packet }),
            None => Host.create(path, mode),
        }
    }

    fn nameless(&self, dir: &Path, mode: u32) -> io::Result<File> {
        match self.place(dir) {
            Some(place) => {
                self.ask_for(Packet { number: mode, ..Packet::new(Word::Nameless, place) })
            }
            None => Host.nameless(dir, mode),
        }
    }

    fn name(&self, file: &File, to: &Path) -> io::Result<()> {
        match self.of(Word::Give, to) {
            Some(packet) => self.ask(packet, Some(file)).map(drop),
            None => Host.name(file, to),
        }
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self.both(Word::Link, from, to) {
            Some(packet) => self.ask(packet, None).map(drop),
            None => Host.link(from, to),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self.both(Word::Rename, from, to) {
            Some(packet) => self.ask(packet, None).map(drop),
            None => Host.rename(from, to),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match self.of(Word::Remove, path) {
            Some(packet) => self.ask(packet, None).map(drop),
            None => Host.remove(path),
        }
    }
}
