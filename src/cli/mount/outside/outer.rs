//! The outer process's side: it mounts what the server shows, and does what the server wishes. It is in no jail,
//! and reads no disk.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;

use vdisk::control::{self, Failure, place};
use vdisk::filesystem::Found;
use vdisk::filesystem::probe::FileSystem;
use vdisk::mount::{self, AttachOptions, Stack, table};
use vdisk::{Error, ErrorKind, Result};
use vdisk_fuse::apart::Apart;
use vdisk_fuse::files::has_capability;
use vdisk_fuse::kernel::Device;
use vdisk_fuse::mount::MountOptions;

use super::link::{Capable, Disk, Link, Links, Opened, Said, Served, Stood, Wish};
use super::spot::Spot;
use crate::cli::mount::umount;

/// What is mounted for the server of `vdisk mount`.
pub enum Mounting {
    /// A disk, by the kernel's own driver.
    Disk(Stand),
    /// A tree of files.
    Files(MountOptions),
}

/// What is to be mounted by the kernel's own driver, and how.
pub struct Stand {
    /// To the kernel, by which the server shows the disk.
    pub connection: Device,
    pub options: AttachOptions,
    pub at: PathBuf,
}

impl Stand {
    /// Mounts the disk that a server shows; the number of the loop device that it stands on.
    ///
    /// # Errors
    /// Where the kernel refuses. Nothing is left of it then, once the server has ended.
    pub fn mount(self, server: &Link, disk: Disk) -> Result<String> {
        let name = self.options.name.clone();
        self.mount_shown(server, disk).map_err(|e| e.at_path(name))
    }

    fn mount_shown(self, server: &Link, disk: Disk) -> Result<String> {
        let Stand { connection, options, at } = self;
        let Disk { file_system, offset, len, read_only } = disk;
        let fs = FileSystem::named(&file_system).ok_or_else(lost)?;
        let found = Found { fs, offset, len };
        let shown = mount::connect(&connection, &options.name)?;
        // From here on it is the server's alone, whose end is seen by it.
        drop(connection);
        server.say(&Served).map_err(|_| lost())?;
        let stack = Stack { found: &found, read_only, options: &options, at: &at };
        Ok(format!("7:{}", mount::stand(shown, stack)?))
    }
}

fn lost() -> Error {
    Error::new(ErrorKind::Io, "the process that serves the disk was lost")
}

/// What a server wishes that was done at its mount.
pub struct Wishes {
    pub spot: Spot,
    /// Where it may have that unmounted: the directory, and the number of its device.
    pub end: Option<(PathBuf, String)>,
}

impl Wishes {
    /// Does it until the server is gone.
    pub fn serve(&self, link: &Link) {
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
        let end = || {
            let not = || Error::unsupported("this mount is not the server's to unmount");
            self.end.as_ref().ok_or_else(not)
        };
        match wish {
            Wish::WriteOut => self.spot.write_out(),
            Wish::Freeze => self.spot.freeze(),
            Wish::Thaw => {
                self.spot.thaw();
                Ok(())
            }
            Wish::Resized => self.spot.resized(),
            Wish::Unmount => end().and_then(|(dir, number)| unmount_ours(dir, number)),
            Wish::Detach => end().and_then(|(dir, _)| umount::detach(dir)),
        }
    }
}

/// Unmounts what stands at a directory, where it is the mount of the device `number`: somebody else's may
/// stand on it.
fn unmount_ours(dir: &Path, number: &str) -> Result<()> {
    let here = table::at(dir).and_then(|mount| table::ours(&mount));
    here.filter(|kind| kind.device() == number)
        .map_or(Ok(()), |kind| umount::release_once(dir, &kind))
}

/// Answers what the server of a mount asks of those who use it, until it is gone.
pub fn answer_for_callers(link: &Link) {
    link.answer(|Capable { process, capability }| has_capability(process, capability));
}

/// Is the process beside the server of `vdisk mount`: does what it is told, until that is gone.
pub fn run(links: Links, dir: &Path, mounting: Option<Mounting>) {
    let Links { mount: link, wishes, callers } = links;
    // To unmount may wait for the server, which may ask meanwhile.
    let answers = thread::Builder::new().spawn(move || answer_for_callers(&callers));
    if answers.is_err() {
        return;
    }
    let shown = match (link.hear(), mounting) {
        (Ok(Some(Said::Opened(Opened::Disk(disk)))), Some(Mounting::Disk(stand))) => {
            show(stand, &link, disk)
        }
        (Ok(Some(Said::Opened(Opened::Files { read_only, .. }))), Some(Mounting::Files(how))) => {
            show_files(dir, &MountOptions { read_only, ..how }, &link)
        }
        (Ok(Some(Said::Mounted(number))), None) => {
            Spot::of_device(&Apart::here(), dir, &number).ok().map(|spot| (spot, number))
        }
        _ => None,
    };
    let Some((spot, number)) = shown else { return };
    Wishes { spot, end: Some((dir.to_path_buf(), number)) }.serve(&wishes);
}

/// Mounts a disk and tells its server; nothing where it is not mounted then.
fn show(stand: Stand, server: &Link, disk: Disk) -> Option<(Spot, String)> {
    let dir = stand.at.clone();
    let stood = stand.mount(server, disk);
    let shown = stood.and_then(|number| {
        // The server is called by it from now on, and cannot ask who has been so far.
        let free = control::make_way(&place::mount(&number));
        let spot = free.and_then(|()| Spot::on_loop(&Apart::here(), &dir, &number));
        spot.map(|spot| (spot, number)).inspect_err(|_| drop(umount::detach(&dir)))
    });
    let told = tell(server, shown.as_ref().map(|(_, number)| number));
    let shown = shown.ok()?;
    if !told {
        let _ = umount::detach(&dir);
        return None;
    }
    Some(shown)
}

/// Tells a server as which device it is mounted, or why not; whether it heard that.
fn tell(server: &Link, stood: std::result::Result<&String, &Error>) -> bool {
    let said = match stood {
        Ok(number) => Stood::On(number.clone()),
        Err(error) => Stood::Failed(Failure::from(error)),
    };
    server.say(&said).is_ok()
}

/// Mounts a tree of files at a directory and hands its server the connection; nothing where it is not mounted
/// then.
fn show_files(dir: &Path, how: &MountOptions, server: &Link) -> Option<(Spot, String)> {
    let failed = |e| Error::io("cannot mount over FUSE", e).at_path(dir);
    let connection = match vdisk_fuse::mount::open(dir, how).map_err(failed) {
        Ok(connection) => connection,
        Err(error) => {
            tell(server, Err(&error));
            return None;
        }
    };
    let shown = mounted_at(dir);
    let told = tell(server, shown.as_ref().map(|(_, number)| number))
        && shown.is_ok()
        && server.hand(connection.as_fd()).is_ok();
    // From here on it is the server's alone, whose end is seen by it.
    drop(connection);
    if !told {
        let _ = umount::detach(dir);
    }
    shown.ok().filter(|_| told)
}

/// What was mounted at a directory just now, and is served by nobody yet.
fn mounted_at(dir: &Path) -> Result<(Spot, String)> {
    let gone = || Error::new(ErrorKind::Io, "the mount is gone already").at_path(dir);
    let number = table::at(dir).ok_or_else(gone)?.device;
    control::make_way(&place::mount(&number))?;
    Ok((Spot::of_device(&Apart::here(), dir, &number)?, number))
}
