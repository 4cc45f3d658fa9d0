//! What the server of a disk's files cannot do by itself, being in a jail, done by a process outside: it mounts
//! and unmounts what is served, brings the kernel's file system to rest for a snapshot, tells it of the disk's
//! growth, and looks at the processes that use the mount.
//!
//! It reads no disk, believes nothing of the server but what is asked in [`link`], and is in no jail: who
//! unmounts may have to run the program that may do so, which has rights of its own. For `mount` it is a process
//! beside the server; for `run` the one that runs the container, beside which the server is.

pub mod link;
pub mod outer;
mod spot;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use vdisk::beside;
use vdisk::block::BlockDevice;
use vdisk::change::live::Quiesce;
use vdisk::control::{Failure, Kind};
use vdisk::filesystem::ext4::mounted::Mounted;
use vdisk::filesystem::{self, Found};
use vdisk::mount::AttachOptions;
use vdisk::{Error, Result};
use vdisk_fuse::files::ask_of_callers;
use vdisk_fuse::kernel::Device;
use vdisk_fuse::mount::MountOptions;

use link::{Asker, Capable, Disk, Link, Links, Opened, Said, Served, Stood, Wish};
pub use spot::Spot;

/// The process outside, as the server sees it. For `mount` it ends when the last of these is gone.
#[derive(Clone)]
pub struct Outside(Arc<Ways>);

struct Ways {
    mount: Link,
    wishes: Asker,
}

impl Outside {
    /// By these ways; from now on it says what the processes that use the mount can do.
    pub fn by(links: Links) -> Outside {
        let Links { mount, wishes, callers } = links;
        let callers = Asker::by(callers);
        ask_of_callers(Box::new(move |process, capability| {
            callers.ask(&Capable { process, capability }).ok().flatten()
        }));
        Outside(Arc::new(Ways { mount, wishes: Asker::by(wishes) }))
    }

    /// Starts the process that unmounts at `dir` what is mounted there later, by this process.
    ///
    /// To be called while this process has no other thread.
    pub fn start(dir: &Path) -> Result<Outside> {
        Outside::start_with(dir, None)
    }

    /// The same, for what that process mounts there, as `options` say, by the connection that this
    /// returns also, to be served by this process.
    pub fn start_to_mount(dir: &Path, options: AttachOptions) -> Result<(Outside, Device)> {
        let failed = |e| Error::io("cannot serve the disk over FUSE", e);
        let connection = Device::open().map_err(failed)?;
        let served = Device::from(connection.as_fd().try_clone_to_owned().map_err(failed)?);
        let stand = outer::Stand { connection, options, at: dir.to_path_buf() };
        Ok((Outside::start_with(dir, Some(outer::Mounting::Disk(stand)))?, served))
    }

    /// The same, for a tree of files that this process serves, and [`mount_files`](Outside::mount_files).
    pub fn start_to_mount_files(dir: &Path, options: MountOptions) -> Result<Outside> {
        Outside::start_with(dir, Some(outer::Mounting::Files(options)))
    }

    fn start_with(dir: &Path, mounting: Option<outer::Mounting>) -> Result<Outside> {
        let (theirs, ours) = Links::pairs()?;
        let mut keep = theirs.numbers().to_vec();
        if let Some(outer::Mounting::Disk(stand)) = &mounting {
            keep.push(stand.connection.as_fd().as_raw_fd());
        }
        let started = beside::start(c"vdisk-outside", &keep, || outer::run(theirs, dir, mounting));
        started.map_err(|e| Error::io("cannot start the process that mounts and unmounts", e))?;
        Ok(Outside::by(ours))
    }

    /// Tells it that this process has mounted the device of this number.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn mounted_here(&self, number: &str) -> Result<()> {
        self.say(&Said::Mounted(number.to_owned()))
    }

    /// Says what is open, and waits until it is mounted: to be served then, at once.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn mount(&self, opened: Opened) -> Result<()> {
        self.say(&Said::Opened(opened))?;
        self.hear::<Served>().map(drop)
    }

    /// Says that a tree of files is open, and waits until it is mounted: the number of its device, and the
    /// connection to the kernel on which it is to be served then, at once.
    ///
    /// # Errors
    /// Why it is not.
    pub fn mount_files(&self, read_only: bool) -> Result<(String, Device)> {
        self.say(&Said::Opened(Opened::Files { read_only, owners: false }))?;
        let number = self.stood()?;
        let connection = self.0.mount.handed().map_err(gone)?;
        Ok((number, connection.into()))
    }

    /// Waits until what is served is mounted: the number of its device.
    ///
    /// # Errors
    /// Why it is not.
    pub fn stood(&self) -> Result<String> {
        match self.hear()? {
            Stood::On(number) => Ok(number),
            Stood::Failed(failure) => Err(failure.into()),
        }
    }

    /// Says something of what is mounted.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn say(&self, said: &Said) -> Result<()> {
        self.0.mount.say(said).map_err(gone)
    }

    fn hear<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        let heard = self.0.mount.hear().map_err(gone)?;
        heard.ok_or_else(|| gone(io::ErrorKind::BrokenPipe.into()))
    }

    /// Has it do that.
    ///
    /// # Errors
    /// What went wrong, or that it is gone.
    pub fn wish(&self, wish: Wish) -> Result<()> {
        let done = self.0.wishes.ask::<Option<Failure>>(&wish).map_err(gone)?;
        done.map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// Has it unmount. While the mount is in use it stays.
    pub fn unmount(&self) {
        // Where it is gone, somebody else may unmount still.
        let _ = self.wish(Wish::Unmount);
    }

    /// Has it take the mount away, whoever uses it.
    pub fn detach(&self) {
        let _ = self.wish(Wish::Detach);
    }
}

/// The kernel's file system in a disk, or in a partition of it, to be mounted.
///
/// # Errors
/// Where there is none.
pub fn found(device: &dyn BlockDevice, partition: Option<u32>, read_only: bool) -> Result<Disk> {
    let Found { fs, offset, len } = filesystem::find(device, partition)?;
    let read_only = read_only || device.read_only() || fs.read_only;
    Ok(Disk { file_system: fs.name.to_owned(), offset, len, read_only })
}

fn gone(error: io::Error) -> Error {
    Error::io("the process that mounts and unmounts is gone", error)
}

/// A disk whose file system is mounted where this process cannot go.
pub struct Held {
    doing: String,
    outside: Outside,
    /// Whether the file system is the kernel's.
    kernels: bool,
    /// The file system, where it is served here.
    fs: OnceLock<Arc<Mounted>>,
}

impl Held {
    /// With a file system of the kernel's.
    pub fn by_kernel(doing: String, outside: Outside) -> Held {
        Held { doing, outside, kernels: true, fs: OnceLock::new() }
    }

    /// With one that this process serves.
    pub fn in_user_space(doing: String, outside: Outside) -> Held {
        Held { doing, outside, kernels: false, fs: OnceLock::new() }
    }

    /// Which one, once it is known.
    pub fn serve(&self, fs: Arc<Mounted>) {
        // It is one.
        let _ = self.fs.set(fs);
    }
}

impl Quiesce for Held {
    fn freeze(&self) -> Result<Instant> {
        let Some(fs) = self.fs.get() else {
            let since = Instant::now();
            return self.outside.wish(Wish::Freeze).map(|()| since);
        };
        // What programs have written may be in the kernel still. Where the mount cannot be
        // reached any more, that is for those who still use it.
        let _ = self.outside.wish(Wish::WriteOut);
        fs.freeze()
    }

    fn go_on(&self) -> bool {
        self.fs.get().inspect(|fs| fs.thaw()).is_some()
    }

    fn thaw(&self) {
        match self.fs.get() {
            Some(fs) => fs.thaw(),
            // It is done too when this process is heard no more. Where the other is gone, `vdisk umount`
            // does it.
            None => drop(self.outside.wish(Wish::Thaw)),
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

    fn resized(&self, _: u64) -> Result<()> {
        // A file system that is served here keeps its size.
        if self.kernels { self.outside.wish(Wish::Resized) } else { Ok(()) }
    }
}
