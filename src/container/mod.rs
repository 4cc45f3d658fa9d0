//! A program in namespaces of its own, with a directory as its root.
//!
//! Four processes stand one in the other, each started from the same binary:
//!
//! 1. The *host* process ([`Space`]) has a mount namespace of its own, so that nothing it mounts
//!    for the container shows on the host and all of it goes when the process goes, however it
//!    ends. It may serve the container's root (a FUSE volume, say) with other threads. It passes
//!    signals and the terminal on, and waits.
//! 2. The *keeper* is the first process of an outer pid namespace. When the host process ends,
//!    the keeper ends all and removes the control groups; when the keeper is killed, the kernel
//!    kills everything in its pid namespace. A program can free itself of a parent-death signal,
//!    but not of this.
//! 3. The *init* enters the container's namespaces, builds /proc, /dev and /sys in the new root,
//!    gives up what it must and becomes:
//! 4. The program, process 1 of the container. The kernel sends process 1 no signal that it has
//!    no handler for, so the host process kills it where any other process would have died of
//!    the signal.
//!
//! The program runs with podman's default capabilities and without devices from its root's file
//! system. There is no seccomp filter, no user namespace and no security module's profile, and
//! `no_new_privs` is off: the kernel, its file system drivers among it, is what stands between
//! the program and the host. The binary is executed through a read-only mount, so that the
//! program cannot overwrite it by way of /proc.
//!
//! Knows namespaces and a directory; no disk and no file system format.

mod cgroup;
mod init;
mod keeper;
mod network;
mod privilege;
mod root;
mod supervise;
mod terminal;
mod wire;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

pub use cgroup::Limits;

use crate::error::{Error, ErrorKind, Result};

/// Where the host process works; other processes see an empty directory here.
const SCRATCH: &str = "/run/vdisk/container";

/// What is to run, and how.
#[derive(Debug, Clone, Default)]
pub struct Spec {
    /// The program and its arguments. A name without `/` is looked for in `PATH`.
    pub command: Vec<OsString>,
    /// Variables that are set besides, or instead of, `PATH`, `HOME`, `TERM`, `HOSTNAME` and
    /// `container`.
    pub env: Vec<(OsString, OsString)>,
    /// The directory to start in, `/` when not given.
    pub workdir: Option<PathBuf>,
    /// `USER[:GROUP]`, names or numbers, root when not given.
    pub user: Option<String>,
    /// The container's host name.
    pub hostname: String,
    /// What it may use of the host.
    pub limits: Limits,
    /// How many files its processes may have open unless they ask for more; as this process where
    /// not given.
    pub open_files: Option<u64>,
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

/// A process that has cut itself off from the host's mounts and is ready to run a container.
#[derive(Debug)]
pub struct Space {
    listener: UnixListener,
    signals: SignalFd,
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

impl Space {
    /// Moves this process into a mount namespace of its own and holds back the signals that a
    /// container is to get. To be called before the process has a second thread: threads inherit
    /// both.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] without the superuser's rights.
    pub fn enter() -> Result<Space> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::new(ErrorKind::Denied, "running a container needs root: use sudo"));
        }
        let mut mask = SigSet::empty();
        mask.extend(FORWARDED);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;

        let doing = |what: &'static str| move |e: nix::Error| Error::io(what, e.into());
        unshare(CloneFlags::CLONE_NEWNS).map_err(doing("cannot make a mount namespace"))?;
        // What the host unmounts later goes here, too; what is mounted here stays here.
        change("/", MsFlags::MS_REC | MsFlags::MS_SLAVE)
            .map_err(doing("cannot cut the mounts off from the host's"))?;
        fs::create_dir_all(SCRATCH)
            .map_err(|e| Error::io("cannot make a directory to work in", e).at_path(SCRATCH))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), SCRATCH, Some("tmpfs"), flags, Some("mode=0700"))
            .map_err(doing("cannot mount a tmpfs"))?;
        fs::create_dir(Space::root_path())
            .and_then(|()| bind_executable())
            .and_then(|()| UnixListener::bind(control()))
            .map(|listener| Space { listener, signals })
            .map_err(|e| Error::io("cannot prepare the container", e).at_path(SCRATCH))
    }

    /// An empty directory that only this process sees: the place to mount a root at.
    pub fn root(&self) -> PathBuf {
        Space::root_path()
    }

    fn root_path() -> PathBuf {
        Path::new(SCRATCH).join("root")
    }

    /// Runs a program with `root` as its root directory and waits for its end. All its processes
    /// have ended then, and nothing keeps `root` busy.
    ///
    /// # Errors
    /// When the container cannot be set up. That the program cannot be executed is an [`Outcome`].
    pub fn run(&self, root: &Path, spec: &Spec) -> Result<Outcome> {
        supervise::run(self, root, spec)
    }
}

/// The entry of the processes inside: what a [`Space`] starts this binary with after `stage`'s own
/// words. Returns the exit status.
///
/// # Errors
/// When called by anybody else.
pub fn stage(words: &[OsString]) -> Result<u8> {
    let mut words = words.iter().map(OsString::as_os_str);
    match words.next().and_then(OsStr::to_str) {
        Some(KEEPER) => keeper::run(&control()),
        Some(INIT) => init::run(&control(), &words.map(PathBuf::from).collect::<Vec<_>>()),
        _ => Err(Error::invalid("this command is for vdisk's own use")),
    }
}

/// The hidden verb by which this binary reaches [`stage`].
pub const STAGE: &str = "container-stage";
const KEEPER: &str = "keeper";
const INIT: &str = "init";

fn control() -> PathBuf {
    Path::new(SCRATCH).join("control")
}

fn executable() -> PathBuf {
    Path::new(SCRATCH).join("vdisk")
}

/// Shows this binary as a file on a read-only mount. A program in the container that gets hold of
/// /proc/PID/exe of a process on its way in cannot write through such a mount.
fn bind_executable() -> io::Result<()> {
    let at = executable();
    let running = fs::metadata("/proc/self/exe")?;
    let installed = fs::read_link("/proc/self/exe")?;
    let same = |found: fs::Metadata| (found.dev(), found.ino()) == (running.dev(), running.ino());
    let source = if fs::metadata(&installed).is_ok_and(same) {
        fs::File::create(&at)?;
        installed
    } else {
        // The binary was replaced while it runs; the stages must be of one version.
        fs::copy("/proc/self/exe", &at)?;
        at.clone()
    };
    mount(Some(&source), &at, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    Ok(change(&at, read_only | MsFlags::MS_NOSUID | MsFlags::MS_NODEV)?)
}

/// Changes the flags of a mount that exists.
fn change(at: impl AsRef<Path>, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&str>, at.as_ref(), None::<&str>, flags, None::<&str>)
}
