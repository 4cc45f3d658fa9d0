//! A program in namespaces of its own, with a directory as its root.
//!
//! Four processes stand one in the other, each started from the same binary:
//!
//! 1. The *host* process ([`Space`]) stays among the host's mounts. It passes signals and the terminal
//!    on, and waits. What serves the container's root (a FUSE volume, say) can be a copy of it that
//!    stands beside it, shares no memory with it and ends with it ([`Outset::start_beside`]).
//! 2. The *keeper* is the first process of an outer pid namespace, and holds a mount namespace, so
//!    that nothing that is mounted for the container shows on the host and all of it goes when the
//!    keeper goes, however it ends. When the host process ends, the keeper ends all and removes the
//!    control groups; when the keeper is killed, the kernel kills everything in its pid namespace.
//!    A program can free itself of a parent-death signal, but not of this. When the program has
//!    ended, the keeper stays until the host process has unmounted the root and has seen whether
//!    that went well.
//! 3. The *init* enters the container's namespaces, builds /proc, /dev and /sys in the new root,
//!    gives up what it must and becomes:
//! 4. The program, process 1 of the container. The kernel sends process 1 no signal that it has
//!    no handler for, so the host process kills it where any other process would have died of
//!    the signal.
//!
//! The host process is in the keeper's mount namespace only for the length of a call, by a thread
//! that holds nothing by which it serves ([`Space::place`]): were it the last in there as it ends, it
//! would unmount what it serves itself, and wait for itself forever.
//!
//! An ordinary user's container stands in a user namespace, which the host process enters first:
//! so it has the right to mount, and what it does to files it does as their user. The program runs
//! with podman's default capabilities and system calls (seccomp) and without devices from its
//! root's file system; `no_new_privs` and other capabilities on demand. There is no security
//! module's profile. The binary is executed through a read-only mount, so that the program cannot
//! overwrite it by way of /proc.
//!
//! Knows namespaces and a directory; no disk and no file system format.

mod caps;
mod cgroup;
mod handle;
mod ids;
mod init;
mod keeper;
mod namespace;
mod network;
mod root;
mod scratch;
mod seats;
mod seccomp;
mod supervise;
mod sys;
mod terminal;
mod user;
mod visit;
mod wire;

use std::ffi::{OsStr, OsString};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vdisk_fuse::apart::Apart;
use vdisk_fuse::mount::is_host_root;

pub use caps::Capabilities;
pub use cgroup::Limits;
pub use handle::Handle;
pub use ids::Ids;
pub use network::Network;
pub use network::user::Publish;
pub use root::volume::Volume;
pub use seccomp::notify::Owners;
pub use visit::{Visit, visit};

use crate::beside;
use crate::error::{Error, Result};
use cgroup::room::Room;
use scratch::Scratch;

/// Told the way into a container that has started.
pub type Started = dyn Fn(&[u8]) + Send + Sync;

/// What is to run, and how.
#[derive(Clone, Default)]
pub struct Spec {
    /// The program and its arguments. A name without `/` is looked for in `PATH`.
    pub command: Vec<OsString>,
    /// Variables that are set besides, or instead of, `PATH`, `HOME`, `TERM`, `HOSTNAME` and
    /// `container`.
    pub env: Vec<(OsString, OsString)>,
    /// The directory to start in, `/` when not given.
    pub workdir: Option<PathBuf>,
    /// Makes that directory, root's, where it is missing.
    pub make_workdir: bool,
    /// `USER[:GROUP]`, names or numbers, root when not given.
    pub user: Option<String>,
    /// The container's host name.
    pub hostname: String,
    /// How many files its processes may have open unless they ask for more; as this process where
    /// not given.
    pub open_files: Option<u64>,
    /// Refuses every change of the root.
    pub read_only: bool,
    /// Directories and files of the host's that it sees.
    pub volumes: Vec<Volume>,
    /// What it reaches.
    pub network: Network,
    /// What its superuser may do.
    pub capabilities: Capabilities,
    /// Keeps its programs from getting rights by set-user-id files and file capabilities.
    pub no_new_privileges: bool,
    /// Leaves all system calls to it.
    pub unfiltered: bool,
    /// Gives it a terminal of its own also where its user does not sit at both ends.
    pub terminal: bool,
    /// Where those come who are to sit at that terminal, instead of the user of this process.
    pub console: Option<Arc<UnixListener>>,
    /// Notes whose files are, where there is one user only ([`Ids::One`]).
    pub owners: Option<Arc<dyn Owners>>,
    /// Called when the program has started, by the thread that runs it, with the way in for [`visit`].
    pub started: Option<Arc<Started>>,
}

/// How a container ended.
#[derive(Debug)]
pub struct Outcome {
    /// The program's exit status; 128 and the signal's number when a signal ended it; 127 when the
    /// program was not found, 126 when it cannot be executed.
    pub status: u8,
    /// Why the program did not start, when it did not.
    pub not_started: Option<Error>,
}

/// A mount namespace apart from the host's, and who will run a container in it.
///
/// The container's processes are on their way already, and wait for [`Space::run`]: meanwhile its
/// root can be opened and mounted. They and the namespace are there until this is dropped.
#[derive(Debug)]
pub struct Space {
    /// For the init, until it has called.
    listener: Option<UnixListener>,
    signals: SignalFd,
    scratch: Scratch,
    ids: Ids,
    why_one: Option<String>,
    keeper: Child,
    /// A pidfd of the keeper's, by which its end is seen.
    end: OwnedFd,
    /// To the keeper, who ends when it is shut.
    link: UnixStream,
    place: Apart,
    handle: Handle,
    beside: Option<beside::Child>,
    /// Where this process is, to make room for the container's control group.
    _room: Option<Room>,
}

/// This process, about to run a container: it is in the container's user namespace, where there is one,
/// and holds back the signals that the container is to get. It has one thread still.
#[derive(Debug)]
pub struct Outset {
    limits: Limits,
    signals: SignalFd,
    scratch: Scratch,
    ids: Ids,
    why_one: Option<String>,
    beside: Option<beside::Child>,
    room: Option<Room>,
}

/// The signals that are passed on to the program.
const FORWARDED: [Signal; 7] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

impl Outset {
    /// Moves this process, where it is an ordinary user's, into a user namespace, and holds back the
    /// signals that a container is to get. To be called before the process has a second thread: threads
    /// inherit all of them. `limits` are those of the container that is to run.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`](crate::ErrorKind::Denied) where this host gives an ordinary user no
    /// user namespace; the text says what could be done.
    pub fn new(limits: &Limits) -> Result<Outset> {
        let mut mask = SigSet::empty();
        mask.extend(FORWARDED);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let scratch = Scratch::find(is_host_root())?;
        let (ids, why_one) = namespace::enter()?;
        // While it is alone in its control group.
        let room = cgroup::make_room(limits);
        Ok(Outset { limits: *limits, signals, scratch, ids, why_one, beside: None, room })
    }

    /// Whose ids the container has.
    pub fn ids(&self) -> Ids {
        self.ids
    }

    /// Has a copy of this process do `work`, with nothing open but standard input, output and error and
    /// `keep`. It shares no memory with this process, holds back the same signals, and ends when this
    /// process or the [`Space`] does. To be called once.
    ///
    /// # Errors
    /// Where it cannot be made: this process has other threads, say.
    pub fn start_beside(&mut self, keep: &[RawFd], work: impl FnOnce() -> u8) -> Result<()> {
        let started = beside::Child::start(keep, work);
        let started = started.map_err(|e| Error::io("cannot start a process beside this", e))?;
        self.beside = Some(started);
        Ok(())
    }
}

impl Space {
    /// Makes a mount namespace. To be called before the process has a second thread. `prepare` is called
    /// in the mount namespace, before anything stands there that the host's does not have.
    ///
    /// # Errors
    /// Where the host gives none.
    pub fn enter(outset: Outset, prepare: impl FnOnce() + Send) -> Result<Space> {
        let Outset { limits, signals, scratch, ids, why_one, beside, room } = outset;
        let doing = |e| Error::io("cannot prepare the container", e);
        let control = wire::socket().map_err(doing)?;
        let (link, keepers) = UnixStream::pair().map_err(doing)?;
        let leaf = room.as_ref().map(Room::leaf);
        let keeper = namespace::make(&[control.as_fd(), keepers.as_fd()], || {
            prepare();
            scratch.cover()?;
            wire::listen(&control, &scratch.control())
                .map_err(|e| doing(e).at_path(scratch.path()))?;
            supervise::start_keeper(&scratch, leaf, &limits, keepers.as_fd())
                .map_err(|e| Error::io("cannot start the container's keeper", e))
        })?;
        let end = supervise::pidfd(keeper.id().cast_signed()).map_err(doing)?;
        let place =
            Apart::beside(end.try_clone().map_err(doing)?, link.try_clone().map_err(doing)?.into());
        let listener = Some(UnixListener::from(control));
        let handle = Handle::new()?;
        Ok(Space {
            listener,
            signals,
            scratch,
            ids,
            why_one,
            keeper,
            end,
            link,
            place,
            handle,
            beside,
            _room: room,
        })
    }

    /// The mount namespace.
    pub fn place(&self) -> &Apart {
        &self.place
    }

    /// An empty directory there: the place to mount a root at.
    pub fn root(&self) -> PathBuf {
        self.scratch.root()
    }

    /// What steers the program from other threads.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Why there is but one, where that is so.
    pub fn why_one(&self) -> Option<&str> {
        self.why_one.as_deref()
    }

    /// Runs a program with `root`, a directory there, as its root directory and waits for its end.
    /// All its processes have ended then, and nothing keeps `root` busy. To be called once.
    ///
    /// # Errors
    /// When the container cannot be set up. That the program cannot be executed is an [`Outcome`].
    pub fn run(&mut self, root: &Path, spec: &Spec) -> Result<Outcome> {
        let resolver = supervise::resolver(&spec.network)?;
        supervise::run(self, root, spec, resolver)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        // Who waits for orders sees that there will be none, and takes away what he has made.
        self.handle.close();
        self.listener = None;
        let _ = self.link.shutdown(Shutdown::Both);
        let _ = self.keeper.wait();
        // It may be in the group that is given back.
        self.beside = None;
    }
}

/// The entry of the processes inside: what a [`Space`] starts this binary with after `stage`'s own
/// words. Returns the exit status.
///
/// # Errors
/// When called by anybody else.
pub fn stage(words: &[OsString]) -> Result<u8> {
    let mut words = words.iter().map(OsString::as_os_str);
    let stage = words.next().and_then(OsStr::to_str);
    let scratch = words.next().map(|path| Scratch::at(Path::new(path)));
    match (stage, scratch) {
        (Some(KEEPER), Some(scratch)) => keeper::run(&scratch, &words.collect::<Vec<_>>()),
        (Some(INIT), Some(scratch)) => {
            init::run(&scratch, &words.map(PathBuf::from).collect::<Vec<_>>())
        }
        (Some(VISIT), Some(_)) => visit::run(&words.collect::<Vec<_>>()),
        _ => Err(Error::invalid("this command is for vdisk's own use")),
    }
}

/// The hidden verb by which this binary reaches [`stage`].
pub const STAGE: &str = "container-stage";
const KEEPER: &str = "keeper";
const INIT: &str = "init";
const VISIT: &str = "visit";

/// Changes the flags of a mount that exists.
fn change(at: impl AsRef<Path>, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&str>, at.as_ref(), None::<&str>, flags, None::<&str>)
}
