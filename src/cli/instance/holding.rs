//! What a command that holds a disk adds to its control: who its user is, and how he is told.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use vdisk::chain::Chain;
use vdisk::change::live::{Live, Quiesce};
use vdisk::change::merge::Progress;
use vdisk::control::{self, Bound, Holder, Kind, Named, Request, Service};
use vdisk::filesystem::ext4::mounted::Mounted;
use vdisk::storage::{fsfreeze, loopdev};
use vdisk::{Error, ErrorKind, Result};
use vdisk_fuse::apart::Apart;

/// How long it may take until all that was written has reached the disk and the file system is at
/// rest.
const TO_FREEZE: Duration = Duration::from_secs(30);
/// How long the kernel may believe the size of a file in our FUSE mounts.
const BELIEF: Duration = Duration::from_millis(1200);

/// Makes the socket for commands about `chain`, the disk at `path`, which is written for `kind`; nothing
/// where its changes go elsewhere. It is not served yet: no thread is started.
pub fn bind(chain: &Arc<Chain>, path: &Path, kind: Arc<dyn Kind>) -> Result<Option<Bound>> {
    match Live::new(chain.clone(), path) {
        Ok(live) => {
            let bound = Holder::bind(live, kind)?;
            if let Some(dir) = control::elsewhere() {
                let text = "control sockets are here, since the usual directory cannot be used: commands \
                            find this disk's user only where TMPDIR is the same";
                eprintln!("vdisk: warning: {}: {text}", dir.display());
            }
            Ok(Some(bound))
        }
        Err(e) if matches!(e.kind(), ErrorKind::ReadOnly | ErrorKind::Invalid) => Ok(None),
        Err(e) => Err(e),
    }
}

/// A process that only says when it ends: nothing can be done to its disk.
pub struct Bystander;

impl Service for Bystander {
    fn holds(&self, _: Named) -> bool {
        false
    }

    fn serve(&self, _: &Request, _: &mut Progress<'_>) -> Result<serde_json::Value> {
        Err(Error::unsupported("nothing can be done to what is mounted here"))
    }
}

/// A directory, and in which mount namespace.
pub type At<'a> = (&'a Apart, &'a Path);

/// The file system in a disk, mounted on a loop device.
pub struct Files {
    /// What it is mounted for.
    doing: String,
    place: Apart,
    at: PathBuf,
    /// The loop device's number.
    number: u32,
    /// What the mount's root says its device is: somebody else's mount may stand there by now.
    device: u64,
}

impl Files {
    /// The file system at a directory there, on the loop device `7:N`.
    pub fn new(doing: String, at: At<'_>, loop_device: &str) -> Result<Files> {
        let number = loop_device.strip_prefix("7:").and_then(|n| n.parse().ok());
        let number = number.ok_or_else(|| Error::invalid("a mount without a loop device"))?;
        let (place, at) = (at.0.clone(), at.1.to_path_buf());
        let device = apart(&place, || device_of(&open(&at)?))?;
        Ok(Files { doing, place, at, number, device })
    }

    /// Calls `work` with the root of the mount, if it is still there.
    fn with_root(
        place: &Apart,
        at: &Path,
        device: u64,
        work: impl FnOnce(&File) -> Result<()> + Send,
    ) -> Result<()> {
        apart(place, || {
            let root = open(at)?;
            if device_of(&root)? != device {
                let text = "what is mounted there is not this disk's file system any more";
                return Err(Error::new(ErrorKind::NotFound, text).at_path(at));
            }
            work(&root)
        })
    }
}

/// Runs what waits for file systems that this process serves itself.
fn apart<T: Send>(place: &Apart, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    place.run(&[], work).map_err(|e| Error::io("cannot go where it is mounted", e)).flatten()
}

fn open(at: &Path) -> Result<File> {
    File::open(at).map_err(|e| Error::io("could not be opened", e).at_path(at))
}

fn device_of(file: &File) -> Result<u64> {
    Ok(file.metadata().map_err(|e| Error::io("could not be examined", e))?.dev())
}

impl Quiesce for Files {
    fn freeze(&self) -> Result<Instant> {
        let since = Instant::now();
        let (told, heard) = mpsc::channel();
        let given_up = Arc::new(AtomicBool::new(false));
        let (place, at) = (self.place.clone(), self.at.clone());
        let (device, over) = (self.device, given_up.clone());
        let work = move || {
            let done = Files::with_root(&place, &at, device, fsfreeze::freeze);
            let frozen = done.is_ok();
            let _ = told.send(done);
            if frozen && over.load(Ordering::SeqCst) {
                let _ = Files::with_root(&place, &at, device, fsfreeze::thaw);
            }
        };
        std::thread::Builder::new()
            .name("freeze".into())
            .spawn(work)
            .map_err(|e| Error::io("cannot start a thread", e))?;
        match heard.recv_timeout(TO_FREEZE) {
            Ok(done) => done.map(|()| since),
            Err(_) => {
                given_up.store(true, Ordering::SeqCst);
                // It may have come to rest in the meantime, before it could hear that.
                if heard.try_recv().is_ok_and(|done| done.is_ok()) {
                    self.thaw();
                }
                let text = format!(
                    "the file system did not come to rest within {} seconds: no snapshot was taken",
                    TO_FREEZE.as_secs()
                );
                Err(Error::new(ErrorKind::Io, text).at_path(&self.at))
            }
        }
    }

    fn thaw(&self) {
        for _ in 0..3 {
            let thawed = Files::with_root(&self.place, &self.at, self.device, fsfreeze::thaw);
            if thawed.is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Kind for Files {
    fn doing(&self) -> String {
        self.doing.clone()
    }

    fn quiesce(&self) -> Result<&dyn Quiesce> {
        Ok(self)
    }

    fn resized(&self, _: u64) -> Result<()> {
        let device = PathBuf::from(format!("/dev/loop{}", self.number));
        let size = || std::fs::read_to_string(format!("/sys/block/loop{}/size", self.number)).ok();
        let before = size();
        apart(&self.place, || loopdev::update_size(&device))?;
        if size() == before {
            // The kernel may have asked for the size just before; a partition keeps its own.
            std::thread::sleep(BELIEF);
            apart(&self.place, || loopdev::update_size(&device))?;
        }
        Ok(())
    }
}

fn written_out(root: &File) -> Result<()> {
    nix::unistd::syncfs(root).map_err(|e| Error::io("could not be written out", e.into()))
}

/// Has the kernel write out what programs have written to what is mounted at a directory there.
pub fn write_out((place, at): At<'_>) -> Result<()> {
    apart(place, || written_out(&open(at)?))
}

/// The file system in a disk, served in user space.
pub struct UserSpaceFiles {
    doing: String,
    place: Apart,
    at: PathBuf,
    device: u64,
    fs: Arc<Mounted>,
}

impl UserSpaceFiles {
    /// The file system `fs`, mounted at a directory there as the device of this number.
    pub fn on(device: u64, doing: String, at: At<'_>, fs: Arc<Mounted>) -> UserSpaceFiles {
        UserSpaceFiles { doing, place: at.0.clone(), at: at.1.to_path_buf(), device, fs }
    }
}

impl Quiesce for UserSpaceFiles {
    fn freeze(&self) -> Result<Instant> {
        // What programs have written may be in the kernel still. Where the mount cannot be
        // reached from here any more, that is for those who still use it.
        let _ = Files::with_root(&self.place, &self.at, self.device, written_out);
        self.fs.freeze()
    }

    fn go_on(&self) -> bool {
        self.fs.thaw();
        true
    }

    fn thaw(&self) {
        self.fs.thaw();
    }
}

impl Kind for UserSpaceFiles {
    fn doing(&self) -> String {
        self.doing.clone()
    }

    fn quiesce(&self) -> Result<&dyn Quiesce> {
        Ok(self)
    }

    fn rests(&self) -> bool {
        true
    }

    fn resized(&self, _: u64) -> Result<()> {
        // The file system keeps its size.
        Ok(())
    }
}

/// A disk that its user sees as a whole, and whose file systems only he knows.
pub struct Whole {
    doing: String,
    /// Whom to ask for rest.
    user: &'static str,
    resized: Box<dyn Fn() + Send + Sync>,
    rearranged: Box<dyn Fn() + Send + Sync>,
}

impl Whole {
    /// A disk used for `doing` by `user`; `resized` tells him that its size is another.
    pub fn new(
        doing: String,
        user: &'static str,
        resized: impl Fn() + Send + Sync + 'static,
    ) -> Whole {
        Whole { doing, user, resized: Box::new(resized), rearranged: Box::new(|| {}) }
    }

    /// The same; `rearranged` is called when the disk may have other snapshots.
    pub fn showing(self, rearranged: impl Fn() + Send + Sync + 'static) -> Whole {
        Whole { rearranged: Box::new(rearranged), ..self }
    }
}

impl Kind for Whole {
    fn doing(&self) -> String {
        self.doing.clone()
    }

    fn quiesce(&self) -> Result<&dyn Quiesce> {
        Err(Error::unsupported(format!(
            "the file systems on the disk are {}'s: freeze them there (`fsfreeze`), or take the \
             snapshot without --freeze",
            self.user
        )))
    }

    fn resized(&self, _: u64) -> Result<()> {
        (self.resized)();
        Ok(())
    }

    fn rearranged(&self) {
        (self.rearranged)();
    }
}
