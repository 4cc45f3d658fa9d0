//! A disk's snapshots as volumes of a raw mount, each opened while somebody has its file open.
//!
//! To hold all of them open at once would cost files in the square of their number: each stands
//! on those before it.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vdisk::chain::Chain;
use vdisk::change;
use vdisk::family::tree::Family;
use vdisk::image::Id;
use vdisk::mount::volume::DeviceVolume;
use vdisk::open::{Format, OpenOptions};
use vdisk::{Error, Result};
use vdisk_fuse::{Tree, Volume};

/// Where they are shown.
const DIRECTORY: &str = "snapshots";

/// A snapshot, for reading.
pub struct Snapshot {
    layer: PathBuf,
    size: u64,
    options: OpenOptions,
    opened: Mutex<Opened>,
}

#[derive(Default)]
struct Opened {
    files: usize,
    volume: Option<Arc<DeviceVolume>>,
}

/// A tree of files, and in it the disk's snapshots as they are now.
pub struct Shown {
    tree: Arc<Tree>,
    /// The disk, where it can have snapshots.
    disk: Option<PathBuf>,
    /// What their layers were opened with.
    options: OpenOptions,
    /// By the layer's id: a snapshot that is read goes on under its number.
    known: Mutex<HashMap<Id, Arc<Snapshot>>>,
}

impl Shown {
    /// The snapshots of `chain`, which is the disk at `path`, opened with `options`. What is no qcow2
    /// image has none, whatever its guest wrote.
    pub fn new(chain: &Chain, path: &Path, options: OpenOptions) -> Result<Shown> {
        let layers = chain.all_layers();
        // A throw-away head has the name of what it stands on.
        let own = layers.iter().rev().find(|layer| layer.path == path);
        let layered = own.is_some_and(|layer| layer.format == Format::Qcow2);
        let disk = layered.then(|| path.to_path_buf());
        let options = OpenOptions { format: Some(Format::Qcow2), ..options };
        let (tree, known) = (Arc::new(Tree::new()), Mutex::default());
        let shown = Shown { tree, disk, options, known };
        shown.refresh()?;
        Ok(shown)
    }

    /// What is served.
    pub fn tree(&self) -> &Arc<Tree> {
        &self.tree
    }

    /// Shows the snapshots that the disk has now.
    pub fn refresh(&self) -> Result<()> {
        // One at a time: the last one to look is the last one to show.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let family = self.disk.as_deref().map_or(Ok(None), Family::read)?;
        let mut next = HashMap::new();
        let mut files: Vec<(String, Arc<dyn Volume>)> = Vec::new();
        for member in family.iter().flat_map(Family::snapshots) {
            let mut file = file_name(&member.label.name);
            // Two names can become one when they are cut or lose a slash.
            while files.iter().any(|(other, _)| *other == file) {
                file = format!("{}~.raw", file.trim_end_matches(".raw"));
            }
            let new = || Arc::new(Snapshot::new(&member.path, member.peek.size, &self.options));
            let snapshot = known.get(&member.label.layer).cloned().unwrap_or_else(new);
            next.insert(member.label.layer, snapshot.clone());
            files.push((file, snapshot));
        }
        let shown = self.tree.exchange(DIRECTORY, files);
        shown.map_err(|e| Error::io("the snapshots cannot be shown", e))?;
        *known = next;
        Ok(())
    }
}

/// What a snapshot's file is called; a name may be longer than a file's and hold slashes.
fn file_name(name: &str) -> String {
    const LONGEST: usize = 240;
    let end = (0..=LONGEST.min(name.len())).rev().find(|at| name.is_char_boundary(*at));
    format!("{}.raw", name[..end.unwrap_or(0)].replace('/', "_"))
}

impl Snapshot {
    fn new(layer: &Path, size: u64, options: &OpenOptions) -> Snapshot {
        let (layer, options) = (layer.to_path_buf(), options.clone());
        Snapshot { layer, size, options, opened: Mutex::default() }
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
            let chain = change::open(&self.layer, &self.options)
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
