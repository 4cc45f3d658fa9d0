//! A disk's snapshots as volumes of a raw mount, each opened while somebody has its file open.
//!
//! To hold all of them open at once would cost files in the square of their number: each stands
//! on those before it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vdisk::Result;
use vdisk::chain::tree::Family;
use vdisk::chain::{self, OpenOptions};
use vdisk::mount::volume::DeviceVolume;
use vdisk_fuse::Volume;

/// A snapshot, for reading.
pub struct Snapshot {
    layer: PathBuf,
    size: u64,
    opened: Mutex<Opened>,
}

#[derive(Default)]
struct Opened {
    files: usize,
    volume: Option<Arc<DeviceVolume>>,
}

/// The snapshots of the disk at `path`, oldest first, with the names of their files.
pub fn all(path: &Path) -> Result<Vec<(String, Snapshot)>> {
    let Some(family) = Family::read(path)? else { return Ok(Vec::new()) };
    let mut found: Vec<(String, Snapshot)> = Vec::new();
    for member in family.snapshots() {
        let mut file = file_name(&member.label.name);
        // Two names can become one when they are cut or lose a slash.
        while found.iter().any(|(other, _)| *other == file) {
            file = format!("{}~.raw", file.trim_end_matches(".raw"));
        }
        found.push((file, Snapshot::new(&member.path, member.peek.size)));
    }
    Ok(found)
}

/// What a snapshot's file is called; a name may be longer than a file's and hold slashes.
fn file_name(name: &str) -> String {
    const LONGEST: usize = 240;
    let end = (0..=LONGEST.min(name.len())).rev().find(|at| name.is_char_boundary(*at));
    format!("{}.raw", name[..end.unwrap_or(0)].replace('/', "_"))
}

impl Snapshot {
    fn new(layer: &Path, size: u64) -> Snapshot {
        Snapshot { layer: layer.to_path_buf(), size, opened: Mutex::default() }
    }

    fn opened(&self) -> MutexGuard<'_, Opened> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn volume(&self) -> io::Result<Arc<DeviceVolume>> {
        let volume = self.opened().volume.clone();
        volume.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }
}

/// No write gets as far as a snapshot; this is what it would be told.
fn refused() -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::EROFS))
}

impl Volume for Snapshot {
    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u32 {
        4096
    }

    fn read_only(&self) -> bool {
        true
    }

    fn opened(&self) -> io::Result<()> {
        let mut opened = self.opened();
        if opened.volume.is_none() {
            let chain = super::passphrase::given()
                .map(|passphrase| OpenOptions { passphrase, ..OpenOptions::default() })
                .and_then(|options| chain::open(&self.layer, &options))
                .map_err(|error| vdisk::mount::volume::to_io(&error))?;
            opened.volume = Some(Arc::new(DeviceVolume::new(Arc::new(chain), true)));
        }
        opened.files += 1;
        Ok(())
    }

    fn closed(&self) {
        let mut opened = self.opened();
        opened.files = opened.files.saturating_sub(1);
        if opened.files == 0 {
            opened.volume = None;
        }
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.volume()?.read_at(offset, buf)
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        refused()
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        refused()
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.volume()?.next_data(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::file_name;

    #[test]
    fn any_name_of_a_snapshot_gives_the_name_of_a_file() {
        assert_eq!(file_name("before upgrade"), "before upgrade.raw");
        assert_eq!(file_name("../a/b"), ".._a_b.raw");
        assert_eq!(file_name(&"\u{20ac}".repeat(100)), "\u{20ac}".repeat(80) + ".raw");
    }
}
