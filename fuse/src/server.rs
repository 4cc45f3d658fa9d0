//! A tree being served: the mount, the worker threads, and their end.
//! Knows nothing of what the volumes are used for.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, MountOption, Session, SessionACL};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, move_mount};

use crate::files::{Files, Keeping};
use crate::filesystem::VolumeFs;
use crate::kernel::device::Device;
use crate::kernel::session;
use crate::mount;
use crate::mount::MountOptions;
use crate::tree::Tree;

/// What `/proc/self/mounts` shows after `fuse.`.
pub const SUBTYPE: &str = "vdisk";
/// The same of an overlay; also the name of its mount helper.
pub const OVERLAY_SUBTYPE: &str = "vdisk-overlay";

/// What the kernel keeps of a volume's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Nothing: every read and write reaches the volume. For a reader that caches for itself,
    /// such as a loop device under a file system.
    None,
    /// Reads are cached and read ahead; writes are cached until `fsync`, `close` or writeback,
    /// and only then can fail.
    WriteBack,
}

/// How a tree is served.
#[derive(Debug, Clone)]
pub struct Options {
    /// Named as the source in `/proc/self/mounts`.
    pub name: String,
    /// What the kernel keeps.
    pub caching: Caching,
    /// How many requests are worked on at a time, at least 1.
    pub threads: usize,
}

/// How a tree of files is served.
#[derive(Debug, Clone)]
pub struct Serving {
    /// How it is mounted.
    pub mount: MountOptions,
    /// What the kernel keeps.
    pub keeping: Keeping,
    /// How many requests are worked on at a time, at least 1.
    pub threads: usize,
}

/// A tree that is mounted and not served yet: no thread runs for it, and whoever looks at it waits.
/// Dropped, it leaves a mount that says that its server is gone.
pub struct Waiting(Box<dyn FnOnce() -> io::Result<Server>>);

impl Waiting {
    /// As [`Server::mount`].
    ///
    /// # Errors
    /// Where it cannot be mounted there.
    pub fn mount(tree: Arc<Tree>, directory: &Path, options: &Options) -> io::Result<Waiting> {
        if !mount::privileged() {
            return Waiting::through_fusermount(tree, directory, options);
        }
        let mounting = MountOptions { source: options.name.clone(), ..MountOptions::default() };
        let device = Device::open()?;
        let root = mount::detached_on(&device, &mounting)?;
        let session = session_on(device, tree, options)?;
        move_mount(&root, "", CWD, directory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(Waiting(Box::new(|| Ok(Server { workers: start(session)? }))))
    }

    fn through_fusermount(
        tree: Arc<Tree>,
        directory: &Path,
        options: &Options,
    ) -> io::Result<Waiting> {
        let mut config = config(options);
        config.mount_options = vec![
            MountOption::FSName(shown(&options.name).replace(',', "_")),
            MountOption::CUSTOM(format!("subtype={SUBTYPE}")),
            MountOption::DefaultPermissions,
            MountOption::NoSuid,
            MountOption::NoDev,
        ];
        let fs = VolumeFs::new(tree, options.caching);
        let session = Session::new(fs, directory, &config)?;
        Ok(Waiting(Box::new(|| {
            let mut session = session.spawn()?;
            let nothing = std::thread::Builder::new().spawn(|| Ok(()))?;
            let workers = std::mem::replace(&mut session.guard, nothing);
            // Dropped, it would unmount the path, whatever may be mounted there by then. Forgotten,
            // it costs a descriptor until the process ends.
            std::mem::forget(session);
            Ok(Server { workers })
        })))
    }

    /// As [`Server::files`].
    ///
    /// # Errors
    /// Where it cannot be mounted there.
    pub fn files(
        files: Arc<dyn Files>,
        directory: &Path,
        serving: &Serving,
    ) -> io::Result<Waiting> {
        let device = mount::open(directory, &serving.mount)?;
        let (directory, serving) = (directory.to_owned(), serving.clone());
        Ok(Waiting(Box::new(move || {
            let workers = session::serve(device, files, serving.keeping, serving.threads);
            let workers = workers.inspect_err(|_| mount::take_back(&directory, &serving.mount))?;
            Ok(Server { workers })
        })))
    }

    /// Serves it from now on.
    ///
    /// # Errors
    /// Where no threads can be had.
    pub fn serve(self) -> io::Result<Server> {
        self.0()
    }
}

/// A tree being served by threads of this process. Dropping it ends nothing: the threads end
/// when the kernel lets go of the file system, that is when it is unmounted and no file in it
/// is open.
pub struct Server {
    workers: JoinHandle<io::Result<()>>,
}

impl Server {
    /// Serves `tree` at `directory`, as any user who may mount there (through `fusermount3`
    /// where the kernel asks for more rights than the process has).
    pub fn mount(tree: Arc<Tree>, directory: &Path, options: &Options) -> io::Result<Server> {
        Waiting::mount(tree, directory, options)?.serve()
    }

    /// Serves a tree of files at `directory`, as [`mount`](Server::mount) does.
    ///
    /// # Errors
    /// Where it cannot be mounted there.
    pub fn files(files: Arc<dyn Files>, directory: &Path, serving: &Serving) -> io::Result<Server> {
        Waiting::files(files, directory, serving)?.serve()
    }

    /// Serves `tree` on a connection that is mounted.
    ///
    /// # Errors
    /// Where it cannot be served.
    pub fn on(device: Device, tree: Arc<Tree>, options: &Options) -> io::Result<Server> {
        Ok(Server { workers: start(session_on(device, tree, options)?)? })
    }

    /// Serves a tree of files on a connection that is mounted, by as many threads, at least 1.
    ///
    /// # Errors
    /// Where it cannot be served.
    pub fn files_on(
        device: Device,
        files: Arc<dyn Files>,
        keeping: Keeping,
        threads: usize,
    ) -> io::Result<Server> {
        Ok(Server { workers: session::serve(device, files, keeping, threads)? })
    }

    /// Waits until the kernel lets go of the file system and every thread has ended.
    pub fn join(self) -> io::Result<()> {
        match self.workers.join() {
            // What ENODEV says to a worker that waits for a request, this says to one that the
            // unmount finds with a request, the release of a file, just taken from the queue.
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
            Ok(ended) => ended,
            Err(_) => Err(io::Error::other("a FUSE thread panicked")),
        }
    }

    /// As [`join`](Server::join), for at most `limit`; gives the server back where that passed.
    pub fn join_within(self, limit: Duration) -> Result<io::Result<()>, Server> {
        let end = Instant::now() + limit;
        let mut pause = Duration::from_micros(200);
        while !self.workers.is_finished() {
            if Instant::now() >= end {
                return Err(self);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(self.join())
    }
}

/// The end of a name, as much of it as the kernel takes for the source of a mount.
pub(crate) fn shown(name: &str) -> &str {
    /// Bytes; one more ends the text.
    const MOST: usize = 255;
    name.get(name.ceil_char_boundary(name.len().saturating_sub(MOST))..).unwrap_or_default()
}

fn config(options: &Options) -> Config {
    let mut config = Config::default();
    config.acl = SessionACL::Owner;
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    config
}

fn session_on(device: Device, tree: Arc<Tree>, options: &Options) -> io::Result<Session<VolumeFs>> {
    let (filesystem, config) = (VolumeFs::new(tree, options.caching), config(options));
    Session::from_fd(filesystem, device.into(), SessionACL::Owner, config)
}

fn start(session: Session<VolumeFs>) -> io::Result<JoinHandle<io::Result<()>>> {
    std::thread::Builder::new().name("fuse".into()).spawn(move || {
        // The kernel may wait for this server to make room in memory: its threads must neither
        // wait for such room nor be slowed by dirty pages that only they can clean. Without the
        // right to say so (CAP_SYS_RESOURCE) a server is as good as any other. The workers
        // inherit it from this thread.
        let _ = rustix::process::configure_io_flusher_behavior(true);
        session.run()
    })
}
