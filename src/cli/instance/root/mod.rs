//! The root of a container: the file system in a disk, by the kernel's driver or in user space, or
//! an overlay over the files in it. What the disk holds is read and served by a process of its own, in a
//! jail, which [`server`] is; here it is mounted, and unmounted.

mod server;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::container::{Ids, Outset, Owners, Space};
use vdisk::mount::paced::Paced;
use vdisk::mount::{self, AttachOptions};
use vdisk::{Error, ErrorKind, Result};
use vdisk_fuse::apart::Apart;
use vdisk_fuse::kernel::Device;
use vdisk_fuse::mount::{MountOptions, open_on};

use crate::cli::inside;
use crate::cli::mount::outside::Spot;
use crate::cli::mount::outside::link::{Asker, Link, Links, Opened, Said, Served};
use crate::cli::mount::outside::outer::{Stand, Wishes, answer_for_callers};
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
    /// On which the server is asked to give files to others.
    gifts: Link,
}

/// A file that is given to others; who is not given stays.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Gift {
    inode: u64,
    user: Option<u32>,
    group: Option<u32>,
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
        let failed = |e| Error::io("cannot speak with the root's server", e);
        let (gifts, given) = Link::pair().map_err(failed)?;
        let mut keep = theirs.numbers().to_vec();
        keep.extend([given.number(), served.as_fd().as_raw_fd()]);
        let work = move || server::run(source, ids, served, (theirs, given));
        outset.start_beside(&keep, work)?;
        Ok(Begun { connection, links, gifts })
    }

    /// Mounts it in the container's space.
    ///
    /// # Errors
    /// Where it cannot be opened, or not be mounted.
    pub fn mount(self, source: &Source<'_>, space: &Space) -> Result<Root> {
        let Begun { connection, links, gifts } = self;
        let (place, at) = (space.place(), space.root());
        let opened = match links.mount.hear() {
            Ok(Some(Said::Opened(opened))) => opened,
            other => return Err(other.map_or_else(|_| lost(), said)),
        };
        let ending = Arc::<AtomicBool>::default();
        let mut root = Root {
            place: place.clone(),
            at: at.clone(),
            disk: source.disk.to_owned(),
            link: links.mount,
            loop_device: None,
            ending: ending.clone(),
            owners: None,
        };
        let mut spot = Spot::own(place, &at);
        match opened {
            Opened::Files { read_only, owners } => {
                let options = source.mount_options(place, read_only);
                open_on(&connection, &at, &options).map_err(no_fuse)?;
                // From here on it is the server's alone, whose end is seen by it.
                drop(connection);
                root.link.say(&Served).map_err(|_| lost())?;
                root.owners = owners.then(|| Arc::new(Noted(Asker::by(gifts))) as _);
            }
            Opened::Disk(disk) => {
                let options = source.attach_options(place);
                let stand = Stand { connection, options, at: at.clone() };
                let device = stand.mount(&root.link, disk)?;
                spot = Spot::on_loop(place, &at, &device)?;
                root.loop_device = Some(device);
            }
        }
        let wishes = Wishes { spot, end: None };
        let handle = space.handle();
        let callers = links.callers;
        let watch = move || {
            answer_for_callers(&callers);
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
            let error = inside::told(failure);
            let kind = match error.kind() {
                // It has waited for its turn already.
                ErrorKind::Busy => ErrorKind::InUse,
                kind => kind,
            };
            Error::new(kind, error.message())
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
