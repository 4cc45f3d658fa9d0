//! A tree being served: the mount, the worker threads, and their end.
//! Knows nothing of what the volumes are used for.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, MountOption, Session, SessionACL};
use nix::unistd::{getgid, getuid};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use crate::filesystem::VolumeFs;
use crate::tree::Tree;

/// What `/proc/self/mounts` shows after `fuse.`.
pub const SUBTYPE: &str = "vdisk";

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

/// A tree being served by threads of this process. Dropping it ends nothing: the threads end
/// when the kernel lets go of the file system, that is when it is unmounted and no file in it
/// is open.
pub struct Server {
    workers: JoinHandle<io::Result<()>>,
}

impl Server {
    /// Serves `tree` at `directory`, as any user who may mount there (through `fusermount3`
    /// where the kernel asks for more rights than the process has).
    pub fn mount(tree: Tree, directory: &Path, options: &Options) -> io::Result<Server> {
        if !privileged() {
            return Server::through_fusermount(tree, directory, options);
        }
        let (server, root) = Server::detached(tree, options)?;
        move_mount(&root, "", CWD, directory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(server)
    }

    fn through_fusermount(tree: Tree, directory: &Path, options: &Options) -> io::Result<Server> {
        let mut config = config(options);
        config.mount_options = vec![
            MountOption::FSName(options.name.replace(',', "_")),
            MountOption::CUSTOM(format!("subtype={SUBTYPE}")),
            MountOption::DefaultPermissions,
            MountOption::NoSuid,
            MountOption::NoDev,
        ];
        let fs = VolumeFs::new(tree, options.caching);
        let mut session = Session::new(fs, directory, &config)?.spawn()?;
        let nothing = std::thread::Builder::new().spawn(|| Ok(()))?;
        let workers = std::mem::replace(&mut session.guard, nothing);
        // Dropped, it would unmount the path, whatever may be mounted there by then. Forgotten,
        // it costs a descriptor until the process ends.
        std::mem::forget(session);
        Ok(Server { workers })
    }

    /// Serves `tree` in a mount that stands in no mount namespace and returns its root, through
    /// which alone its files are opened. Needs `CAP_SYS_ADMIN`.
    ///
    /// The mount lives as long as its root or a file in it is open anywhere, and leaves nothing
    /// behind when this process is killed.
    pub fn detached(tree: Tree, options: &Options) -> io::Result<(Server, OwnedFd)> {
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let fs = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let settings = [
            ("source", options.name.clone()),
            ("subtype", SUBTYPE.to_owned()),
            ("fd", device.as_raw_fd().to_string()),
            ("rootmode", "40000".to_owned()),
            ("user_id", getuid().to_string()),
            ("group_id", getgid().to_string()),
        ];
        for (key, value) in settings {
            fsconfig_set_string(&fs, key, value.as_str())?;
        }
        fsconfig_set_flag(&fs, "default_permissions")?;
        fsconfig_create(&fs)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        let root = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let (filesystem, config) = (VolumeFs::new(tree, options.caching), config(options));
        let session = Session::from_fd(filesystem, device.into(), SessionACL::Owner, config)?;
        let server = Server { workers: start(session)? };
        Ok((server, root))
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

fn config(options: &Options) -> Config {
    let mut config = Config::default();
    config.acl = SessionACL::Owner;
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    config
}

/// Whether the kernel lets this process mount by itself.
fn privileged() -> bool {
    fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).is_ok()
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
