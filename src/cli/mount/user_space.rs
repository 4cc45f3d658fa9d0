//! The file system in a disk, mounted without the kernel's driver: what an ordinary user gets.

use std::sync::Arc;
use std::time::Duration;

use vdisk::block::BlockDevice;
use vdisk::filesystem;
use vdisk::filesystem::ext4::mounted::Mounted;
use vdisk::mount::files::DiskFiles;
use vdisk::{Error, Result};
use vdisk_fuse::files::Keeping;
use vdisk_fuse::mount::MountOptions;
use vdisk_fuse::server::Serving;
use vdisk_fuse::{Server, Waiting};

use crate::cli::mount::args::Args;

/// How many requests are worked on at a time.
const THREADS: usize = 8;
/// How long the kernel may believe what it was told: nobody changes it but through the kernel.
const BELIEF: Duration = Duration::from_secs(3600);

/// The files in a disk, served over FUSE: by a `Server`, or mounted and [`Waiting`] for one.
pub struct UserSpace<S = Server> {
    server: S,
    files: Arc<DiskFiles>,
    fs: Arc<Mounted>,
}

impl UserSpace<Waiting> {
    /// Mounts the file system in `device` as `args` say.
    pub fn mount(device: Arc<dyn BlockDevice>, args: &Args) -> Result<UserSpace<Waiting>> {
        let fs = filesystem::open(device, args.partition, args.read_only)?;
        let fs = Arc::new(fs);
        let files = Arc::new(DiskFiles::new(fs.clone(), THREADS));
        let root = nix::unistd::geteuid().is_root();
        let mount = MountOptions {
            source: args.disk.to_string_lossy().into_owned(),
            others: root,
            read_only: fs.read_only(),
            suid: false,
            dev: false,
            exec: !args.no_exec,
            ..MountOptions::default()
        };
        let keeping = Keeping { ttl: BELIEF, writeback: !fs.read_only() };
        let serving = Serving { mount, keeping, threads: THREADS };
        let server = Waiting::files(files.clone(), &args.dir, &serving)
            .map_err(|e| Error::io("cannot mount over FUSE", e).at_path(&args.dir))?;
        Ok(UserSpace { server, files, fs })
    }

    /// Serves it from now on.
    pub fn serve(self) -> Result<UserSpace> {
        let UserSpace { server, files, fs } = self;
        let server = server.serve().map_err(|e| Error::io("cannot serve over FUSE", e))?;
        Ok(UserSpace { server, files, fs })
    }
}

impl<S> UserSpace<S> {
    /// The file system.
    pub fn file_system(&self) -> Arc<Mounted> {
        self.fs.clone()
    }
}

impl UserSpace {
    /// Returns when it is unmounted and everything is durable.
    pub fn wait(self) -> Result<()> {
        self.server.join().map_err(|e| Error::io("the FUSE server failed", e))?;
        self.fs.close()?;
        self.files.check()
    }
}
