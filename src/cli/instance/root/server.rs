//! The process that serves a container's root: it opens the disk, and goes into a jail before it looks at what
//! the disk holds. What is to be done where the root is mounted, the host process does for it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vdisk::chain::Chain;
use vdisk::change::live::Quiesce;
use vdisk::container::Ids;
use vdisk::control::{Bound, Failure, Kind};
use vdisk::filesystem::ext4::mounted::Mounted as FileSystem;
use vdisk::filesystem::{self, Found};
use vdisk::jail::{Reach, Work};
use vdisk::mount::Shown;
use vdisk::mount::files::DiskFiles;
use vdisk::{Error, Result};
use vdisk_fuse::Server;
use vdisk_fuse::files::{Files, Keeping, ask_of_callers};
use vdisk_fuse::kernel::Device;

use super::link::{Asker, Capable, Gift, Link, Links, Mounted, Opened, Said, Wish};
use super::{Source, start};
use crate::cli::instance::holding;
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
pub fn run(source: &Source<'_>, ids: Ids, connection: Device, links: Links) -> u8 {
    let Links { root, wishes, callers, gifts } = links;
    let callers = Asker::by(callers);
    ask_of_callers(Box::new(move |process, capability| {
        callers.ask(&Capable { process, capability }).ok().flatten()
    }));
    let work = Serving { source, ids, connection, root: &root, gifts };
    let ended = match source.upper {
        Some((upper, dir)) => work.overlay(upper, dir),
        None => work.of_disk(Asker::by(wishes)),
    };
    let said = match &ended {
        Ok(()) => Said::Ended,
        Err(error) => Said::Failed(Failure::from(error)),
    };
    // There is nobody else to tell.
    let _ = root.say(&said);
    u8::from(ended.is_err())
}

struct Serving<'a> {
    source: &'a Source<'a>,
    ids: Ids,
    connection: Device,
    root: &'a Link,
    gifts: Link,
}

/// Gives a file to others.
type Give = Box<dyn FnMut(Gift) -> io::Result<()> + Send>;

impl Serving<'_> {
    fn of_disk(self, host: Asker) -> Result<()> {
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
        let held = Arc::new(Held { doing: source.doing(), host, kernels, fs: OnceLock::new() });
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
            self.user_space(&chain, bound, &held.fs)
        };
        ended.map_err(|e| e.at_path(source.disk))
    }

    /// Shows the disk to the kernel, whose own driver has the file system in it.
    fn kernels(self, chain: &Arc<Chain>, bound: Option<Bound>) -> Result<()> {
        let device = self.source.device(chain);
        let Found { fs, offset, len } = filesystem::find(device.as_ref(), self.source.partition)?;
        let read_only = self.source.read_only || device.read_only() || fs.read_only;
        let file_system = fs.name.to_owned();
        mounted(self.root, Opened::Disk { file_system, offset, len, read_only })?;
        let shown = Shown::on(self.connection, device, read_only)?;
        while_held(bound, || shown.wait())
    }

    fn user_space(
        self,
        chain: &Arc<Chain>,
        bound: Option<Bound>,
        held: &OnceLock<Arc<FileSystem>>,
    ) -> Result<()> {
        let source = self.source;
        let device = source.device(chain);
        let fs = Arc::new(filesystem::open(device, source.partition, source.read_only)?);
        let _ = held.set(fs.clone());
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
        let (overlay, jail) = turn::again(|| overlay::lay(wanted.clone(), in_namespace))?;
        // What UPPER's file system cannot keep is refused when somebody wants it.
        let notes = self.ids == Ids::One && overlay.note_owners().is_ok();
        leave_user()?;
        jail::close(jail)?;
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
        mounted(self.root, Opened::Files { read_only, owners: give.is_some() })?;
        if let Some(mut give) = give {
            let gifts = self.gifts;
            let errno = |e: io::Error| e.raw_os_error().unwrap_or(libc::EIO);
            start("owners", move || gifts.answer(|gift| give(gift).err().map(errno)))?;
        }
        let served = Server::files_on(self.connection, files, keeping, THREADS);
        served.map_err(|e| Error::io("cannot serve over FUSE", e))
    }
}

/// Says what is open, and waits until it is mounted.
fn mounted(root: &Link, opened: Opened) -> Result<()> {
    let gone = |e| Error::io("the container is gone", e);
    root.say(&Said::Opened(opened)).map_err(gone)?;
    let heard = root.hear::<Mounted>().map_err(gone)?;
    heard.map(drop).ok_or_else(|| gone(io::ErrorKind::BrokenPipe.into()))
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

/// The disk, whose file system is mounted where this process cannot go.
struct Held {
    doing: String,
    host: Asker,
    /// Whether the file system is the kernel's.
    kernels: bool,
    /// The file system, where it is served here.
    fs: OnceLock<Arc<FileSystem>>,
}

impl Held {
    fn wish(&self, wish: Wish) -> Result<()> {
        let done = self.host.ask::<Option<Failure>>(&wish);
        let done = done.map_err(|e| Error::io("the container is gone", e))?;
        done.map_or(Ok(()), |failure| Err(failure.into()))
    }
}

impl Quiesce for Held {
    fn freeze(&self) -> Result<Instant> {
        let Some(fs) = self.fs.get() else {
            let since = Instant::now();
            return self.wish(Wish::Freeze).map(|()| since);
        };
        // What programs have written may be in the kernel still. Where the mount cannot be
        // reached any more, that is for those who still use it.
        let _ = self.wish(Wish::WriteOut);
        fs.freeze()
    }

    fn go_on(&self) -> bool {
        self.fs.get().inspect(|fs| fs.thaw()).is_some()
    }

    fn thaw(&self) {
        match self.fs.get() {
            Some(fs) => fs.thaw(),
            // The host process does it, too, when it hears no more.
            None => drop(self.wish(Wish::Thaw)),
        }
    }
}

impl Kind for Held {
    fn doing(&self) -> String {
        self.doing.clone()
    }

    fn quiesce(&self) -> Result<&dyn Quiesce> {
        Ok(self)
    }

    fn rests(&self) -> bool {
        !self.kernels
    }

    fn resized(&self, size: u64) -> Result<()> {
        // A file system that is served here keeps its size.
        if self.kernels { self.wish(Wish::Resized(size)) } else { Ok(()) }
    }
}
