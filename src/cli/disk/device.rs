//! A block device that a new disk goes to: what stands on it now, and asking before that is lost.

use std::path::Path;
use std::sync::Arc;

use vdisk::block::BlockDevice;
use vdisk::chain::{Chain, Layer};
use vdisk::family;
use vdisk::filesystem::{partition, probe};
use vdisk::formats::raw;
use vdisk::open::{self, Format};
use vdisk::storage::{FileStorage, Storage, device};
use vdisk::{ErrorKind, Result};

use crate::cli::terminal::{ask, size};

/// Opens the block device at `path` for a new disk, for nobody else; `None` where it is none. The
/// user agrees to lose what it holds, by `yes` or on a terminal.
pub fn taken(path: &Path, yes: bool) -> Result<Option<Arc<FileStorage>>> {
    if !device::is_device(path) {
        return Ok(None);
    }
    family::refuse_sealed(path)?;
    let file = Arc::new(FileStorage::open_device(path)?);
    let held = size::human(file.len()?);
    let loss = format!(
        "{} is a device of {held} that holds {}, which is lost",
        path.display(),
        holds(&file)?
    );
    ask::confirm(&loss, yes)?;
    Ok(Some(file))
}

/// What the device holds, as far as its bytes tell.
fn holds(file: &Arc<FileStorage>) -> Result<String> {
    let format = open::probe(&**file)?;
    if format != Format::Raw {
        return Ok(format!("a {format} disk"));
    }
    let image = Arc::new(raw::Image::open(file.clone(), true)?);
    let path = file.path().to_path_buf();
    let disk = Chain::new(Layer { path, format, image, file: file.clone() }, vec![], 0);
    match probe::probe(&disk, 0, disk.size())? {
        probe::Content::Unknown => {}
        content => return Ok(content.name().to_owned()),
    }
    match partition::partitions(&disk) {
        Ok(Some(table)) => return Ok(format!("a partition table of {} partitions", table.len())),
        Err(e) if e.kind() == ErrorKind::Corrupt => return Ok("a damaged partition table".into()),
        Ok(None) => {}
        Err(e) => return Err(e),
    }
    const FRONT: u64 = 1 << 20;
    let mut front = vec![0; disk.size().min(FRONT) as usize];
    file.read_exact_at(0, &mut front)?;
    Ok(match vdisk::block::is_zero(&front) {
        true => "zeroes in front and perhaps more".to_owned(),
        false => "data of an unknown kind".to_owned(),
    })
}
