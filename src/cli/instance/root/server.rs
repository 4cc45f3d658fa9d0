//! The process that serves a container's root: it opens the disk, and goes into a jail before it looks at what
//! the disk holds. What is to be done where the root is mounted, the host process does for it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vdisk::chain::Chain;
use vdisk::container::Ids;
use vdisk::control::{Bound, Failure};
use vdisk::filesystem;
use vdisk::jail::{Reach, Work};
use vdisk::mount::Shown;
use vdisk::mount::files::DiskFiles;
use vdisk::{Error, Result};
use vdisk_fuse::Server;
use vdisk_fuse::files::{Files, Keeping};
use vdisk_fuse::kernel::Device;

use super::{Gift, Source, start};
use crate::cli::instance::holding;
use crate::cli::mount::outside::link::{Link, Links, Opened, Said};
use crate::cli::mount::outside::{Held, Outside, found};
use crate::cli::mount::overlay::{self, OfDisk, Wanted};
use crate::cli::open::disk::{self, Use};
use crate::cli::open::jail::{self, Around};
use crate::cli::open::turn;

/// How many requests are worked on at a time.
const THREADS: usize = 8;
/// How long the kernel may believe what it was told: nobody changes it but through the kernel.
const BELIEF: Duration = Duration::from_secs(86400);

/// Serves the root that is wanted on this connection to the kernel, for a container with these ids, until
/// it is unmounted; the exit status.
pub fn run(source: &Source<'_>, ids: Ids, connection: Device, (links, gifts): (Links, Link)) -> u8 {
    let outside = Outside::by(links);
    let work = Serving { source, ids, connection, outside: outside.clone(), gifts };
    let ended = match source.upper {
        Some((upper, dir)) => work.overlay(upper, dir),
        None => work.of_disk(),
    };
    let said = match &ended {
        Ok(()) => Said::Ended,
        Err(error) => Said::Failed(Failure::from(error)),
    };
    // There is nobody else to tell.
    let _ = outside.say(&said);
    u8::from(ended.is_err())
}

struct Serving<'a> {
    source: &'a Source<'a>,
    ids: Ids,
    connection: Device,
    outside: Outside,
    gifts: Link,
}

/// Gives a file to others.
type Give = Box<dyn FnMut(Gift) -> io::Result<()> + Send>;

impl Serving<'_> {
    fn of_disk(self) -> Result<()> {
        let source = self.source;
        let using = Use {
            write: source.ephemeral || !source.read_only,
            ephemeral: source.ephemeral,
            snapshot: source.snapshot,
            ..Use::default()
        };
        let using = source.opening.holding(using);
        let broker = jail::broker(using.write && !source.ephemeral)?;
        let chain = turn::again(|| disk::open(source.disk, &using))?;
        leave_user()?;
        let kernels = source.is_kernels(self.ids);
        let held = if kernels { Held::by_kernel } else { Held::in_user_space };
        let held = Arc::new(held(source.doing(), self.outside.clone()));
        let bound = holding::bind(&chain, &source.full()?, held.clone())?;
        let mut jail = Around::new(Work::Files, broker);
        jail.reach(Path::new("/dev/fuse"), Reach::Write);
        jail.reach(Path::new("/dev/null"), Reach::Write);
        if !kernels {
            // In which groups who makes a request is.
            jail.reach(Path::new("/proc"), Reach::Read);
        }
        jail.disk(&chain, bound.is_some())?;
        jail.close()?;
        let ended = if kernels {
            self.kernels(&chain, bound)
        } else {
            self.user_space(&chain, bound, &held)
        };
        ended.map_err(|e| e.at_path(source.disk))
    }

    /// Shows the disk to the kernel, whose own driver has the file system in it.
    fn kernels(self, chain: &Arc<Chain>, bound: Option<Bound>) -> Result<()> {
        let device = self.source.device(chain);
        let disk = found(device.as_ref(), self.source.partition, self.source.read_only)?;
        let read_only = disk.read_only;
        self.outside.mount(Opened::Disk(disk))?;
        let shown = Shown::on(self.connection, device, read_only)?;
        while_held(bound, || shown.wait())
    }

    fn user_space(self, chain: &Arc<Chain>, bound: Option<Bound>, held: &Held) -> Result<()> {
        let source = self.source;
        let device = source.device(chain);
        let fs = Arc::new(filesystem::open(device, source.partition, source.read_only)?);
        held.serve(fs.clone());
        let one = self.ids == Ids::One;
        let files = DiskFiles::new(fs.clone(), THREADS);
        let files = Arc::new(if one { files.all_root() } else { files });
        let keeping = Keeping { ttl: BELIEF, writeback: !fs.read_only() };
        let give = one.then(|| {
            let files = files.clone();
            Box::new(move |Gift { inode, user, group }| {
                let inode = u32::try_from(inode).map_err(|_| io::ErrorKind::NotFound)?;
                files.give(inode, user, group)
            }) as Give
        });
        let server = self.serve(files.clone(), keeping, fs.read_only(), give)?;
        while_held(bound, || {
            server.join().map_err(failed)?;
            fs.close()?;
            files.check()
        })
    }

    fn overlay(self, upper: &Path, work: Option<&Path>) -> Result<()> {
        let source = self.source;
        let lower = source.full()?;
        let of_disk = OfDisk {
            opening: source.opening.clone(),
            snapshot: source.snapshot.map(str::to_owned),
            partition: source.partition,
        };
        let lowers = std::slice::from_ref(&lower);
        let wanted = Wanted::new(upper, lowers, work, Path::new("/")).of_disk(of_disk);
        let in_namespace = self.ids != Ids::Host;
        let (ready, jail) = turn::again(|| overlay::prepare(wanted.clone(), in_namespace))?;
        leave_user()?;
        jail::close(jail)?;
        let overlay = ready.lay()?;
        // What UPPER's file system cannot keep is refused when somebody wants it.
        let notes = self.ids == Ids::One && overlay.note_owners().is_ok();
        let give = notes.then(|| {
            let overlay = overlay.clone();
            Box::new(move |Gift { inode, user, group }| overlay.give_inode(inode, user, group))
                as Give
        });
        let keeping = Keeping { ttl: BELIEF, writeback: false };
        let read_only = source.read_only;
        let server = self.serve(overlay, keeping, read_only, give)?;
        server.join().map_err(failed).map_err(|e| e.at_path(source.disk))
    }

    /// Serves the files, once they are mounted.
    fn serve(
        self,
        files: Arc<dyn Files>,
        keeping: Keeping,
        read_only: bool,
        give: Option<Give>,
    ) -> Result<Server> {
        self.outside.mount(Opened::Files { read_only, owners: give.is_some() })?;
        if let Some(mut give) = give {
            let gifts = self.gifts;
            let errno = |e: io::Error| e.raw_os_error().unwrap_or(libc::EIO);
            start("owners", move || gifts.answer(|gift| give(gift).err().map(errno)))?;
        }
        let served = Server::files_on(self.connection, files, keeping, THREADS);
        served.map_err(|e| Error::io("cannot serve over FUSE", e))
    }
}

/// Lets commands reach the disk for as long as `work` takes, and tells those who wait for that how it ended.
fn while_held(bound: Option<Bound>, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let control = bound.map(Bound::serve).transpose()?;
    let ended = work();
    if let Some(control) = control {
        control.end(&ended);
    }
    ended
}

fn failed(e: io::Error) -> Error {
    Error::io("the FUSE server failed", e)
}

/// Lets go of the user's input and output: what he says is for the container.
fn leave_user() -> Result<()> {
    let failed = |e: io::Error| Error::io("cannot let go of input and output", e);
    let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
    nix::unistd::dup2_stdin(&null).map_err(|e| failed(e.into()))?;
    nix::unistd::dup2_stdout(&null).map_err(|e| failed(e.into()))
}
