//! The root of a container: the file system in a disk, by the kernel's driver or in user space, or
//! an overlay over the files in it. What the disk holds is read and served by a process of its own, in a
//! jail, which [`server`] is; here it is mounted, and unmounted.

mod link;
mod server;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::change::live::Quiesce;
use vdisk::container::{Ids, Outset, Owners, Space};
use vdisk::control::{Failure, Kind};
use vdisk::filesystem::Found;
use vdisk::filesystem::probe::FileSystem;
use vdisk::mount::paced::Paced;
use vdisk::mount::{self, AttachOptions, Stack};
use vdisk::{Error, ErrorKind, Result};
use vdisk_fuse::apart::Apart;
use vdisk_fuse::files::has_capability;
use vdisk_fuse::kernel::Device;
use vdisk_fuse::mount::{MountOptions, open_on};

use self::link::{Asker, Capable, Gift, Link, Links, Mounted, Opened, Said, Wish};
use super::holding::{At, Files, write_out};
use crate::cli::open::options::Opening;

/// How long the end of a server may take after the unmount.
const RELEASE: Duration = Duration::from_secs(30);
/// The same, where it is known that something went wrong.
const RELEASE_FAILED: Duration = Duration::from_secs(10);

/// Which root is wanted.
pub struct Source<'a> {
    pub disk: &'a Path,
    pub opening: &'a Opening,
    pub partition: Option<u32>,
    pub snapshot: Option<&'a str>,
    pub ephemeral: bool,
    pub read_only: bool,
    /// Without the kernel's driver.
    pub user_space: bool,
    /// Where changes go instead of the disk, and where to work for them.
    pub upper: Option<(&'a Path, Option<&'a Path>)>,
    /// Bytes a second, at most.
    pub rate: Option<u64>,
    /// What the container's program is called.
    pub program: String,
}

/// A root that is being opened, by a process beside this one.
pub struct Begun {
    /// To the kernel, to be mounted here.
    connection: Device,
    links: Links,
}

/// A root that is mounted.
pub struct Root {
    place: Apart,
    at: PathBuf,
    disk: PathBuf,
    /// To its server.
    link: Link,
    /// The loop device that it is on.
    loop_device: Option<String>,
    /// Whether the server is to end.
    ending: Arc<AtomicBool>,
    owners: Option<Arc<dyn Owners>>,
}

impl Begun {
    /// Starts the process that opens and serves it. To be called while this one has one thread.
    ///
    /// # Errors
    /// Where there is no FUSE. What is wrong with the disk is for [`mount`](Begun::mount) to say.
    pub fn start(source: &Source<'_>, outset: &mut Outset) -> Result<Begun> {
        let ids = outset.ids();
        let connection = Device::open().map_err(no_fuse)?;
        let served = connection.as_fd().try_clone_to_owned().map_err(no_fuse)?;
        let served = Device::from(served);
        let (links, theirs) = Links::pairs()?;
        let mut keep = theirs.numbers().to_vec();
        keep.push(served.as_fd().as_raw_fd());
        outset.start_beside(&keep, move || server::run(source, ids, served, theirs))?;
        Ok(Begun { connection, links })
    }

    /// Mounts it in the container's space.
    ///
    /// # Errors
    /// Where it cannot be opened, or not be mounted.
    pub fn mount(self, source: &Source<'_>, space: &Space) -> Result<Root> {
        let Begun { connection, links } = self;
        let (place, at) = (space.place(), space.root());
        let opened = match links.root.hear() {
            Ok(Some(Said::Opened(opened))) => opened,
            other => return Err(other.map_or_else(|_| lost(), said)),
        };
        let ending = Arc::<AtomicBool>::default();
        let mut root = Root {
            place: place.clone(),
            at: at.clone(),
            disk: source.disk.to_owned(),
            link: links.root,
            loop_device: None,
            ending: ending.clone(),
            owners: None,
        };
        let told = |link: &Link| link.say(&Mounted).map_err(|_| lost());
        let mut files = None;
        match opened {
            Opened::Files { read_only, owners } => {
                let options = source.mount_options(place, read_only);
                open_on(&connection, &at, &options).map_err(no_fuse)?;
                // From here on it is the server's alone, whose end is seen by it.
                drop(connection);
                told(&root.link)?;
                let gifts = Asker::by(links.gifts);
                root.owners = owners.then(|| Arc::new(Noted(gifts)) as _);
            }
            Opened::Disk { file_system, offset, len, read_only } => {
                let fs = FileSystem::named(&file_system).ok_or_else(lost)?;
                let (found, options) = (Found { fs, offset, len }, source.attach_options(place));
                let shown = mount::connect(&connection, &options.name)?;
                drop(connection);
                told(&root.link)?;
                let stack = Stack { found: &found, read_only, options: &options, at: &at };
                let number = mount::stand(shown, stack).map_err(|e| e.at_path(source.disk))?;
                let device = format!("7:{number}");
                files = Some(Files::new(source.doing(), (place, &at), &device)?);
                root.loop_device = Some(device);
            }
        }
        let wishes = Wishes { files, place: place.clone(), at };
        let handle = space.handle();
        let callers = links.callers;
        let watch = move || {
            callers.answer(|Capable { process, capability }| has_capability(process, capability));
            if !ending.load(Ordering::SeqCst) {
                // Nothing can be done in there any more.
                let _ = handle.kill();
            }
        };
        start("wishes", move || wishes.serve(&links.wishes))?;
        start("callers", watch)?;
        Ok(root)
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = std::thread::Builder::new().name(name.into()).spawn(work);
    started.map(drop).map_err(|e| Error::io("cannot start a thread", e))
}

/// What a server says that has not done what it was to do.
fn said(said: Option<Said>) -> Error {
    match said {
        Some(Said::Failed(failure)) => {
            let error = Error::from(failure);
            let kind = match error.kind() {
                // It has waited for its turn already.
                ErrorKind::Busy => ErrorKind::InUse,
                kind => kind,
            };
            // It goes to the user's terminal, and comes from who reads what others wrote.
            let plain = |c: char| if c.is_control() { '?' } else { c };
            Error::new(kind, error.to_string().chars().map(plain).collect::<String>())
        }
        _ => lost(),
    }
}

fn lost() -> Error {
    Error::new(ErrorKind::Io, "the process that serves the container's root was lost")
}

impl Root {
    /// Who notes owners that the kernel does not know.
    pub fn owners(&self) -> Option<Arc<dyn Owners>> {
        self.owners.clone()
    }

    /// Unmounts, and returns when everything is durable and the disk is about to be free.
    pub fn end(self) -> Result<()> {
        self.ending.store(true, Ordering::SeqCst);
        self.ended().map_err(|e| e.at_path(&self.disk))
    }

    fn ended(&self) -> Result<()> {
        let unmounted = mount::unmount(&self.place, &self.at);
        let limit = if unmounted.is_ok() {
            RELEASE
        } else {
            // What is still in use goes when its last user does.
            mount::detach(&self.place, &self.at);
            RELEASE_FAILED
        };
        match (self.link.hear_within(limit), unmounted) {
            (Ok(Some(Said::Ended)), unmounted) => unmounted,
            (Ok(said), _) => Err(self::said(said)),
            (Err(_), Err(error)) => Err(error),
            (Err(_), Ok(())) => Err(match &self.loop_device {
                Some(device) => mount::still_mounted(&self.at, device),
                None => Error::new(ErrorKind::InUse, "still mounted somewhere").at_path(&self.at),
            }),
        }
    }
}

impl Source<'_> {
    /// Whether the kernel's own driver has the file system.
    fn is_kernels(&self, ids: Ids) -> bool {
        self.upper.is_none() && !self.user_space && ids == Ids::Host
    }

    fn doing(&self) -> String {
        format!("the root of a container ({})", self.program)
    }

    fn full(&self) -> Result<PathBuf> {
        std::path::absolute(self.disk)
            .map_err(|e| Error::io("cannot name the disk", e).at_path(self.disk))
    }

    /// The disk, no faster than it may be.
    fn device(&self, chain: &Arc<Chain>) -> Arc<dyn BlockDevice> {
        match self.rate {
            Some(rate) => Arc::new(Paced::new(chain.clone(), rate)),
            None => chain.clone(),
        }
    }

    fn attach_options(&self, place: &Apart) -> AttachOptions {
        AttachOptions {
            partition: self.partition,
            read_only: self.read_only,
            name: self.disk.display().to_string(),
            place: place.clone(),
            ..AttachOptions::default()
        }
    }

    fn mount_options(&self, place: &Apart, read_only: bool) -> MountOptions {
        MountOptions {
            source: self.disk.to_string_lossy().into_owned(),
            // All users of the container; of others the kernel lets none in.
            others: true,
            read_only,
            suid: true,
            dev: false,
            place: place.clone(),
            ..MountOptions::default()
        }
    }
}

fn no_fuse(e: io::Error) -> Error {
    let text = match e.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound => {
            "cannot serve the container's root over FUSE: /dev/fuse must be there, and open to \
             this user (root: `modprobe fuse`, `chmod 666 /dev/fuse`)"
        }
        _ => "cannot mount over FUSE",
    };
    let kind =
        if e.kind() == io::ErrorKind::PermissionDenied { ErrorKind::Denied } else { ErrorKind::Io };
    Error::new(kind, format!("{text}: {e}"))
}

/// What the server wishes of this process.
struct Wishes {
    /// The kernel's file system, where it is that.
    files: Option<Files>,
    place: Apart,
    at: PathBuf,
}

impl Wishes {
    /// Does it until the server is gone.
    fn serve(self, link: &Link) {
        let mut at_rest = false;
        link.answer(|wish: Wish| {
            let done = self.grant(wish);
            at_rest = match wish {
                Wish::Freeze => done.is_ok(),
                Wish::Thaw => false,
                _ => at_rest,
            };
            done.as_ref().err().map(Failure::from)
        });
        if at_rest {
            let _ = self.grant(Wish::Thaw);
        }
    }

    fn grant(&self, wish: Wish) -> Result<()> {
        let kernels = || {
            let none = || Error::unsupported("the kernel has no file system on this disk");
            self.files.as_ref().ok_or_else(none)
        };
        match wish {
            Wish::WriteOut => write_out(at(&self.place, &self.at)),
            Wish::Freeze => kernels()?.freeze().map(drop),
            Wish::Thaw => {
                kernels()?.thaw();
                Ok(())
            }
            Wish::Resized(size) => kernels()?.resized(size),
        }
    }
}

fn at<'a>(place: &'a Apart, at: &'a Path) -> At<'a> {
    (place, at)
}

/// Owners that the server notes.
struct Noted(Asker);

impl Owners for Noted {
    fn give(&self, inode: u64, user: Option<u32>, group: Option<u32>) -> io::Result<()> {
        match self.0.ask::<Option<i32>>(&Gift { inode, user, group })? {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }
}
