//! The file system in a disk, mounted without the kernel's driver: what an ordinary user gets.

use std::sync::Arc;
use std::time::Duration;

use vdisk::block::BlockDevice;
use vdisk::filesystem;
use vdisk::filesystem::ext4::mounted::Mounted;
use vdisk::mount::files::DiskFiles;
use vdisk::{Error, Result};
use vdisk_fuse::Server;
use vdisk_fuse::files::Keeping;
use vdisk_fuse::kernel::Device;
use vdisk_fuse::mount::MountOptions;

use crate::cli::mount::args::Args;

/// How many requests are worked on at a time.
const THREADS: usize = 8;
/// How long the kernel may believe what it was told: nobody changes it but through the kernel.
const BELIEF: Duration = Duration::from_secs(3600);

/// The files in a disk, not served yet.
pub struct Found {
    files: Arc<DiskFiles>,
    fs: Arc<Mounted>,
}

/// The files in a disk, served over FUSE.
pub struct UserSpace {
    server: Server,
    found: Found,
}

/// How they are mounted as `args` say; what of the disk may not be changed is for the disk to say.
pub fn mount_options(args: &Args) -> MountOptions {
    MountOptions {
        source: args.disk.to_string_lossy().into_owned(),
        others: nix::unistd::geteuid().is_root(),
        suid: false,
        dev: false,
        exec: !args.no_exec,
        ..MountOptions::default()
    }
}

impl Found {
    /// Opens the file system in `device` as `args` say. Here its journal is replayed.
    pub fn open(device: Arc<dyn BlockDevice>, args: &Args) -> Result<Found> {
        let fs = Arc::new(filesystem::open(device, args.partition, args.read_only)?);
        let files = Arc::new(DiskFiles::new(fs.clone(), THREADS));
        Ok(Found { files, fs })
    }

    /// The file system.
    pub fn file_system(&self) -> Arc<Mounted> {
        self.fs.clone()
    }

    /// Serves it on a connection that is mounted.
    pub fn serve(self, connection: Device) -> Result<UserSpace> {
        let keeping = Keeping { ttl: BELIEF, writeback: !self.fs.read_only() };
        let server = Server::files_on(connection, self.files.clone(), keeping, THREADS)
            .map_err(|e| Error::io("cannot serve over FUSE", e))?;
        Ok(UserSpace { server, found: self })
    }
}

impl UserSpace {
    /// Returns when it is unmounted and everything is durable.
    pub fn wait(self) -> Result<()> {
        self.server.join().map_err(|e| Error::io("the FUSE server failed", e))?;
        self.found.fs.close()?;
        self.found.files.check()
    }
}
