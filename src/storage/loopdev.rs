//! Loop devices: a file as a block device of the kernel, so that the kernel's file systems can
//! stand on it. Knows no image format and nothing of what the file holds.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use linux_raw_sys::loop_device::{
    _bindgen_ty_1 as Flag, LOOP_CONFIGURE, LOOP_CTL_GET_FREE, LOOP_GET_STATUS64, LOOP_SET_CAPACITY,
    loop_config, loop_info64,
};
use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Result};

/// How often another process may take the free device from under our hands before we give up.
const ATTEMPTS: usize = 64;

mod ioctl {
    use super::*;

    nix::ioctl_none_bad!(ctl_get_free, LOOP_CTL_GET_FREE);
    nix::ioctl_write_ptr_bad!(configure, LOOP_CONFIGURE, loop_config);
    nix::ioctl_none_bad!(set_capacity, LOOP_SET_CAPACITY);
    nix::ioctl_read_bad!(get_status, LOOP_GET_STATUS64, loop_info64);
}

/// What part of a file the device shows, and how.
#[derive(Debug, Clone, Default)]
pub struct LoopOptions {
    /// First byte of the file, a multiple of 512.
    pub offset: u64,
    /// Length in bytes, a multiple of 512; 0 for all that follows.
    pub len: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Kept with the device for [`name_of`], at most 63 bytes.
    pub name: String,
}

/// A loop device held open. The kernel clears it by itself when the last opener, a mounted file
/// system included, lets go.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
    path: PathBuf,
    _file: File,
}

impl LoopDevice {
    /// Makes a free loop device show `file`, with direct I/O where the file can: what is written
    /// then lies in the page cache once, and a flush of the device reaches the file.
    /// Needs `CAP_SYS_ADMIN`; the device keeps `file` open by itself.
    pub fn attach(file: BorrowedFd<'_>, options: &LoopOptions) -> Result<LoopDevice> {
        let control = File::open("/dev/loop-control").map_err(|e| {
            Error::io("cannot open /dev/loop-control; loop devices are needed to mount", e)
        })?;
        let config = config(file, options)?;
        for _ in 0..ATTEMPTS {
            // SAFETY: this request takes no argument and only returns a number.
            let number = unsafe { ioctl::ctl_get_free(control.as_raw_fd()) }
                .map_err(|e| Error::io("no loop device is free", e.into()))?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = File::options()
                .read(true)
                .write(!options.read_only)
                .open(&path)
                .map_err(|e| Error::io("cannot open the loop device", e).at_path(&path))?;
            // SAFETY: `config` is the kernel's struct, fully initialised; the kernel reads it
            // before the call returns.
            match unsafe { ioctl::configure(device.as_raw_fd(), &config) } {
                Ok(_) => {
                    let number = u32::try_from(number).unwrap_or(u32::MAX);
                    return Ok(LoopDevice { number, path, _file: device });
                }
                // Between the two calls somebody else took it.
                Err(Errno::EBUSY) => continue,
                Err(e) => {
                    let error = Error::io("cannot set up the loop device", e.into());
                    return Err(error.at_path(&path));
                }
            }
        }
        Err(Error::new(ErrorKind::InUse, "every free loop device was taken by others; try again"))
    }

    /// The device's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The N of `/dev/loopN`, the device's minor number.
    pub fn number(&self) -> u32 {
        self.number
    }
}

fn config(file: BorrowedFd<'_>, options: &LoopOptions) -> Result<loop_config> {
    // SAFETY: the struct is plain numbers and arrays of them; all zeroes is its empty value.
    let mut config: loop_config = unsafe { std::mem::zeroed() };
    config.fd = file.as_raw_fd().unsigned_abs();
    config.block_size = 512;
    config.info.lo_offset = options.offset;
    config.info.lo_sizelimit = options.len;
    let mut flags = Flag::LO_FLAGS_AUTOCLEAR as u32 | Flag::LO_FLAGS_DIRECT_IO as u32;
    if options.read_only {
        flags |= Flag::LO_FLAGS_READ_ONLY as u32;
    }
    config.info.lo_flags = flags;
    let name = options.name.as_bytes();
    if name.len() >= config.info.lo_file_name.len() {
        return Err(Error::invalid("the name of a loop device is at most 63 bytes long"));
    }
    for (to, from) in config.info.lo_file_name.iter_mut().zip(name) {
        *to = *from;
    }
    Ok(config)
}

/// Makes the loop device at `path` as long as its file is by now.
pub fn update_size(path: &Path) -> Result<()> {
    let failed = |e| Error::io("cannot change the loop device's size", e).at_path(path);
    let device = File::options().read(true).write(true).open(path).map_err(failed)?;
    // SAFETY: the struct is plain numbers and arrays of them; all zeroes is its empty value.
    let mut info: loop_info64 = unsafe { std::mem::zeroed() };
    // To say what it shows, the kernel asks for the file's attributes: its size is known then.
    // SAFETY: the kernel writes at most the struct, which outlives the call.
    unsafe { ioctl::get_status(device.as_raw_fd(), &mut info) }
        .map_err(|e| failed(io::Error::from(e)))?;
    // SAFETY: this request takes no argument.
    let done = unsafe { ioctl::set_capacity(device.as_raw_fd()) };
    done.map(drop).map_err(|e| failed(io::Error::from(e)))
}

/// The name that [`LoopOptions::name`] gave to the loop device at `path`; `None` where the
/// device shows no file. Needs the right to open the device.
pub fn name_of(path: &Path) -> Result<Option<String>> {
    let failed = |e| Error::io("cannot ask the loop device", e).at_path(path);
    let device = File::open(path).map_err(failed)?;
    if !device.metadata().map_err(failed)?.file_type().is_block_device() {
        return Err(Error::invalid("not a loop device").at_path(path));
    }
    // SAFETY: the struct is plain numbers and arrays of them; all zeroes is its empty value.
    let mut info: loop_info64 = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most the struct, which outlives the call.
    match unsafe { ioctl::get_status(device.as_raw_fd(), &mut info) } {
        Ok(_) => {
            let name: Vec<u8> = info.lo_file_name.iter().copied().take_while(|b| *b != 0).collect();
            Ok(Some(String::from_utf8_lossy(&name).into_owned()))
        }
        Err(Errno::ENXIO) => Ok(None),
        Err(e) => Err(failed(io::Error::from(e))),
    }
}
