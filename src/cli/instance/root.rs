//! The root of a container: the file system in a disk, by the kernel's driver or in user space, or
//! an overlay over the files in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::container::{Ids, Owners};
use vdisk::control;
use vdisk::filesystem;
use vdisk::filesystem::ext4::mounted::Mounted;
use vdisk::mount::files::DiskFiles;
use vdisk::mount::paced::Paced;
use vdisk::mount::{self, AttachOptions, Attached};
use vdisk::{Error, ErrorKind, Result};
use vdisk_fuse::Server;
use vdisk_fuse::apart::Apart;
use vdisk_fuse::files::{Files as Tree, Keeping};
use vdisk_fuse::mount::MountOptions;
use vdisk_fuse::overlay::Overlay;
use vdisk_fuse::server::Serving;

use super::holding::{self, At, Files, UserSpaceFiles};
use crate::cli::mount::overlay::{self, OfDisk, Wanted};
use crate::cli::open::disk::{self, Use};
use crate::cli::open::options::Opening;

/// How many requests are worked on at a time.
const THREADS: usize = 8;
/// How long the kernel may believe what it was told: nobody changes it but through the kernel.
const BELIEF: Duration = Duration::from_secs(86400);
/// How long the end of a server may take after the unmount.
const RELEASE: Duration = Duration::from_secs(30);

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

/// A root that is mounted.
pub struct Root {
    place: Apart,
    at: PathBuf,
    disk: PathBuf,
    served: Served,
    control: Option<control::Server>,
    owners: Option<Arc<dyn Owners>>,
}

enum Served {
    Kernel(Attached),
    Files(Server, Arc<DiskFiles>, Arc<Mounted>),
    Overlay(Server),
}

impl Root {
    /// Mounts it at a directory there, for a container with these ids.
    pub fn mount(source: &Source<'_>, at: At<'_>, ids: Ids) -> Result<Root> {
        let mut root = if source.upper.is_some() {
            Root::overlay(source, at, ids)?
        } else {
            Root::of_disk(source, at, ids)?
        };
        root.disk = source.disk.to_owned();
        Ok(root)
    }

    fn of_disk(source: &Source<'_>, at: At<'_>, ids: Ids) -> Result<Root> {
        let using = Use {
            write: source.ephemeral || !source.read_only,
            ephemeral: source.ephemeral,
            snapshot: source.snapshot,
            ..Use::default()
        };
        let chain = disk::open(source.disk, &source.opening.holding(using))?;
        if source.user_space || ids != Ids::Host {
            return Root::user_space(source, &chain, at, ids);
        }
        let options = AttachOptions {
            partition: source.partition,
            read_only: source.read_only,
            name: source.disk.display().to_string(),
            place: at.0.clone(),
            ..AttachOptions::default()
        };
        let device = source.device(&chain);
        let attached = mount::attach(device, &options, at.1).map_err(|e| e.at_path(source.disk))?;
        let files = Files::new(source.doing(), at, &attached.loop_device())?;
        let control = holding::serve(&chain, &source.full()?, Arc::new(files))?;
        Ok(Root::new(at, Served::Kernel(attached), control, None))
    }

    fn user_space(source: &Source<'_>, chain: &Arc<Chain>, at: At<'_>, ids: Ids) -> Result<Root> {
        let fs = filesystem::open(source.device(chain), source.partition, source.read_only);
        let fs = Arc::new(fs.map_err(|e| e.at_path(source.disk))?);
        let files = DiskFiles::new(fs.clone(), THREADS);
        let files = Arc::new(if ids == Ids::One { files.all_root() } else { files });
        let keeping = Keeping { ttl: BELIEF, writeback: !fs.read_only() };
        let server = serve(files.clone(), at, source, keeping, fs.read_only())?;
        let quiet = UserSpaceFiles::new(source.doing(), at, fs.clone())?;
        let control = holding::serve(chain, &source.full()?, Arc::new(quiet))?;
        let owners: Option<Arc<dyn Owners>> =
            (ids == Ids::One).then(|| Arc::new(Recorded(files.clone())) as _);
        Ok(Root::new(at, Served::Files(server, files, fs), control, owners))
    }

    fn overlay(source: &Source<'_>, at: At<'_>, ids: Ids) -> Result<Root> {
        let Some((upper, work)) = source.upper else {
            return Err(Error::invalid("an overlay needs an upper directory"));
        };
        let lower = source.full()?;
        let of_disk = OfDisk {
            opening: source.opening.clone(),
            snapshot: source.snapshot.map(str::to_owned),
            partition: source.partition,
        };
        let wanted = Wanted::new(upper, std::slice::from_ref(&lower), work, at.1).of_disk(of_disk);
        let overlay = overlay::lay(wanted, ids != Ids::Host)?;
        // What UPPER's file system cannot keep is refused when somebody wants it.
        let notes = ids == Ids::One && overlay.note_owners().is_ok();
        let owners: Option<Arc<dyn Owners>> = notes.then(|| Arc::new(Noted(overlay.clone())) as _);
        let keeping = Keeping { ttl: BELIEF, writeback: false };
        let server = serve(overlay, at, source, keeping, source.read_only)?;
        Ok(Root::new(at, Served::Overlay(server), None, owners))
    }

    fn new(
        at: At<'_>,
        served: Served,
        control: Option<control::Server>,
        owners: Option<Arc<dyn Owners>>,
    ) -> Root {
        let (place, at) = (at.0.clone(), at.1.to_owned());
        Root { place, at, disk: PathBuf::new(), served, control, owners }
    }

    /// Who notes owners that the kernel does not know.
    pub fn owners(&self) -> Option<Arc<dyn Owners>> {
        self.owners.clone()
    }

    /// Unmounts, and returns when everything is durable and the disk is free.
    pub fn end(self) -> Result<()> {
        let Root { place, at, disk, served, control, .. } = self;
        let at = (&place, at.as_path());
        let ended = match served {
            Served::Kernel(attached) => attached.detach(),
            Served::Files(server, files, fs) => {
                release(server, at).and_then(|()| fs.close()).and_then(|()| files.check())
            }
            Served::Overlay(server) => release(server, at),
        };
        let ended = ended.map_err(|e| e.at_path(disk));
        if let Some(control) = control {
            control.end(&ended);
        }
        ended
    }
}

impl Source<'_> {
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
}

fn serve(
    files: Arc<dyn Tree>,
    at: At<'_>,
    source: &Source<'_>,
    keeping: Keeping,
    read_only: bool,
) -> Result<Server> {
    let mount = MountOptions {
        source: source.disk.to_string_lossy().into_owned(),
        // All users of the container; of others the kernel lets none in.
        others: true,
        read_only,
        suid: true,
        dev: false,
        place: at.0.clone(),
        ..MountOptions::default()
    };
    let serving = Serving { mount, keeping, threads: THREADS };
    Server::files(files, at.1, &serving).map_err(|e| {
        let text = match e.kind() {
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::NotFound => {
                "cannot serve the container's root over FUSE: /dev/fuse must be there, and open to \
                 this user (root: `modprobe fuse`, `chmod 666 /dev/fuse`)"
            }
            _ => "cannot mount over FUSE",
        };
        let kind = if e.kind() == std::io::ErrorKind::PermissionDenied {
            ErrorKind::Denied
        } else {
            ErrorKind::Io
        };
        Error::new(kind, format!("{text}: {e}"))
    })
}

fn release(server: Server, (place, at): At<'_>) -> Result<()> {
    mount::unmount(place, at)?;
    match server.join_within(RELEASE) {
        Ok(ended) => ended.map_err(|e| Error::io("the FUSE server failed", e)),
        Err(_) => Err(Error::new(ErrorKind::InUse, "still mounted somewhere").at_path(at)),
    }
}

/// Owners noted in the disk's inodes.
struct Recorded(Arc<DiskFiles>);

impl Owners for Recorded {
    fn give(&self, inode: u64, user: Option<u32>, group: Option<u32>) -> std::io::Result<()> {
        let inode = u32::try_from(inode).map_err(|_| std::io::ErrorKind::NotFound)?;
        self.0.give(inode, user, group)
    }
}

/// Owners noted in the upper directory of an overlay.
struct Noted(Arc<Overlay>);

impl Owners for Noted {
    fn give(&self, inode: u64, user: Option<u32>, group: Option<u32>) -> std::io::Result<()> {
        self.0.give_inode(inode, user, group)
    }
}
