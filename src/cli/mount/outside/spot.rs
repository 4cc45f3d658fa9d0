//! What is mounted at a directory: written out, brought to rest, told the size of its device. Knows not who
//! serves it; but that may be this process, or one that waits for it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use vdisk::storage::{fsfreeze, loopdev};
use vdisk::{Error, ErrorKind, Result};
use vdisk_fuse::apart::Apart;

/// How long it may take until all that was written has reached the disk and the file system is at
/// rest.
const TO_FREEZE: Duration = Duration::from_secs(30);
/// How long the kernel may believe the size of a file in our FUSE mounts.
const BELIEF: Duration = Duration::from_millis(1200);

/// A directory in some mount namespace, and what was mounted there.
#[derive(Debug, Clone)]
pub struct Spot {
    place: Apart,
    at: PathBuf,
    /// What the mount's root says its device is: somebody else's mount may stand there by now. Nothing
    /// where nobody else mounts.
    device: Option<u64>,
    /// The loop device that the kernel's file system is on, where it is that.
    loop_number: Option<u32>,
}

impl Spot {
    /// A directory there, at which nobody but who asks mounts anything.
    pub fn own(place: &Apart, at: &Path) -> Spot {
        Spot { place: place.clone(), at: at.to_path_buf(), device: None, loop_number: None }
    }

    /// The same at a directory where anybody mounts: what is mounted there as the device `major:minor`.
    ///
    /// # Errors
    /// Where that is no number.
    pub fn of_device(place: &Apart, at: &Path, device: &str) -> Result<Spot> {
        let parts = device.split_once(':').and_then(|(major, minor)| {
            Some(nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?))
        });
        let device = parts.ok_or_else(|| Error::invalid("a mount without a number"))?;
        Ok(Spot { device: Some(device), ..Spot::own(place, at) })
    }

    /// The kernel's file system there, on the loop device `7:N`.
    ///
    /// # Errors
    /// Where that is none, or nothing can be seen there.
    pub fn on_loop(place: &Apart, at: &Path, device: &str) -> Result<Spot> {
        let number = device.strip_prefix("7:").and_then(|n| n.parse().ok());
        let number = number.ok_or_else(|| Error::invalid("a mount without a loop device"))?;
        let spot = Spot::own(place, at);
        // The file system's own number may be an anonymous one (btrfs).
        let device = spot.apart(|| device_of(&open(at)?))?;
        Ok(Spot { device: Some(device), loop_number: Some(number), ..spot })
    }

    /// Has the kernel write out what programs have written.
    pub fn write_out(&self) -> Result<()> {
        self.with_root(|root| {
            nix::unistd::syncfs(root).map_err(|e| Error::io("could not be written out", e.into()))
        })
    }

    /// Brings the kernel's file system to rest.
    ///
    /// # Errors
    /// Where there is none, or it does not come to rest in time.
    pub fn freeze(&self) -> Result<()> {
        self.loop_number()?;
        let (told, heard) = mpsc::channel();
        let given_up = Arc::new(AtomicBool::new(false));
        let (spot, over) = (self.clone(), given_up.clone());
        let work = move || {
            let done = spot.with_root(fsfreeze::freeze);
            let frozen = done.is_ok();
            let _ = told.send(done);
            if frozen && over.load(Ordering::SeqCst) {
                let _ = spot.with_root(fsfreeze::thaw);
            }
        };
        std::thread::Builder::new()
            .name("freeze".into())
            .spawn(work)
            .map_err(|e| Error::io("cannot start a thread", e))?;
        match heard.recv_timeout(TO_FREEZE) {
            Ok(done) => done,
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

    /// Lets it go on.
    pub fn thaw(&self) {
        for _ in 0..3 {
            if self.with_root(fsfreeze::thaw).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Tells the kernel's file system that its device may have another size.
    pub fn resized(&self) -> Result<()> {
        let number = self.loop_number()?;
        let device = PathBuf::from(format!("/dev/loop{number}"));
        let size = || std::fs::read_to_string(format!("/sys/block/loop{number}/size")).ok();
        let before = size();
        self.apart(|| loopdev::update_size(&device))?;
        if size() == before {
            // The kernel may have asked for the size just before; a partition keeps its own.
            std::thread::sleep(BELIEF);
            self.apart(|| loopdev::update_size(&device))?;
        }
        Ok(())
    }

    fn loop_number(&self) -> Result<u32> {
        let none = || Error::unsupported("the kernel has no file system on this disk");
        self.loop_number.ok_or_else(none)
    }

    /// Calls `work` with the root of the mount, if it is still there.
    fn with_root(&self, work: impl FnOnce(&File) -> Result<()> + Send) -> Result<()> {
        self.apart(|| {
            let root = open(&self.at)?;
            if let Some(device) = self.device
                && device_of(&root)? != device
            {
                let text = "what is mounted there is not this disk's file system any more";
                return Err(Error::new(ErrorKind::NotFound, text).at_path(&self.at));
            }
            work(&root)
        })
    }

    /// Runs what waits for file systems that this process may serve itself.
    fn apart<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let done = self.place.run(&[], work);
        done.map_err(|e| Error::io("cannot go where it is mounted", e)).flatten()
    }
}

fn open(at: &Path) -> Result<File> {
    File::open(at).map_err(|e| Error::io("could not be opened", e).at_path(at))
}

fn device_of(file: &File) -> Result<u64> {
    Ok(file.metadata().map_err(|e| Error::io("could not be examined", e))?.dev())
}
