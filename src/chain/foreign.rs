//! Layers that other programs made: opened for reading, with the further files that they name.

use std::path::{Component, Path};
use std::sync::Arc;

use super::Layer;
use super::gate::{self, Format};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{vdi, vhd, vhdx, vmdk};
use crate::image::Image;
use crate::storage::{FileOptions, FileStorage, Storage};

/// Opens the layer in `file`, whose name is `path` and whose format is neither qcow2 nor raw.
///
/// # Errors
/// [`ErrorKind::ReadOnly`] where `options` are for writing; [`ErrorKind::Denied`] where a VMDK
/// names a file outside its directory.
pub(super) fn open(
    format: Format,
    path: &Path,
    file: Arc<FileStorage>,
    options: FileOptions,
) -> Result<Arc<dyn Image>> {
    if options.write {
        let message = format!(
            "is a {format} image, which is only read: make a clone of it, or convert it to qcow2"
        );
        return Err(Error::new(ErrorKind::ReadOnly, message).at_path(path));
    }
    let image: Result<Arc<dyn Image>> = match format {
        Format::Vmdk => return Ok(Arc::new(open_vmdk(path, file, options)?)),
        Format::Vpc => vhd::Vhd::open(file, vhd::SizeBy::Creator).map(|image| Arc::new(image) as _),
        Format::Vhdx => vhdx::Vhdx::open(file).map(|image| Arc::new(image) as _),
        Format::Vdi => vdi::Vdi::open(file).map(|image| Arc::new(image) as _),
        Format::Qcow2 | Format::Raw | Format::Luks => {
            Err(Error::invalid(format!("{format} is no foreign format")))
        }
    };
    image.map_err(|e| e.at_path(path))
}

/// Opens the VMDK in `storage`, whose name is `path`, with the files that it names, which stand in
/// its directory.
pub fn open_vmdk(
    path: &Path,
    storage: Arc<dyn Storage>,
    options: FileOptions,
) -> Result<vmdk::Vmdk> {
    let plan = vmdk::Plan::read(storage).map_err(|e| e.at_path(path))?;
    let files = files_of(&plan, path, options)?;
    let files: Vec<Arc<dyn Storage>> = files.into_iter().map(|file| file as _).collect();
    plan.open(&files).map_err(|e| e.at_path(path))
}

/// The files besides its own in which a VMDK keeps its data.
pub(super) fn further_files(layer: &Layer) -> Result<Vec<Arc<FileStorage>>> {
    let plan = vmdk::Plan::read(layer.file.clone()).map_err(|e| e.at_path(&layer.path))?;
    files_of(&plan, &layer.path, FileOptions { access: None, write: false })
}

fn files_of(plan: &vmdk::Plan, path: &Path, options: FileOptions) -> Result<Vec<Arc<FileStorage>>> {
    let mut files = Vec::new();
    for name in plan.files() {
        let beside = Path::new(name)
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if !beside {
            let message = format!(
                "names '{name}' as one of its files: only files in its own directory are opened \
                 for it"
            );
            return Err(Error::new(ErrorKind::Denied, message).at_path(path));
        }
        files.push(Arc::new(FileStorage::open(&gate::resolve(path, name)?, options)?));
    }
    Ok(files)
}

/// The parent is the one that the child was made on, as far as the child's format can tell.
pub(super) fn check_parent(child: &Layer, parent: &Layer) -> Result<()> {
    let expected = child.image.parent_fingerprints();
    let Some(found) = parent.image.fingerprint() else { return Ok(()) };
    if expected.is_empty() || expected.contains(&found) {
        return Ok(());
    }
    let message = format!(
        "has changed since '{}' was made on it, or is another file: its id is {found}, {} was \
         recorded. Bring the old file back",
        child.path.display(),
        expected.join(" or ")
    );
    Err(Error::new(ErrorKind::BaseChanged, message).at_path(&parent.path))
}
