//! Layers that other programs made: opened for reading, with the further files that they name.

use std::path::{Component, Path};
use std::sync::Arc;

use crate::chain::Layer;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{parallels, qcow, qed, vdi, vhd, vhdx, vmdk};
use crate::image::Image;
use crate::open::gate;
use crate::open::gate::Format;
use crate::open::options::OpenOptions;
use crate::storage::{FileOptions, FileStorage, Storage};

/// Opens the layer in `file`, whose name is `path` and whose format is neither qcow2 nor raw.
///
/// # Errors
/// [`ErrorKind::ReadOnly`] where `options` are for writing; [`ErrorKind::Denied`] where a VMDK
/// names a file outside its directory.
pub(crate) fn open(
    format: Format,
    path: &Path,
    file: Arc<FileStorage>,
    options: &OpenOptions,
) -> Result<Arc<dyn Image>> {
    if !options.read_only {
        let message = format!(
            "is a {format} image, which is only read: make a clone of it, or convert it to qcow2"
        );
        return Err(Error::new(ErrorKind::ReadOnly, message).at_path(path));
    }
    let image: Result<Arc<dyn Image>> = match format {
        Format::Vmdk => {
            let vmdk = open_vmdk(path, file, options.file_options(), options.follow)?;
            return Ok(Arc::new(vmdk));
        }
        Format::Vpc => vhd::Vhd::open(file, vhd::SizeBy::Creator).map(|image| Arc::new(image) as _),
        Format::Vhdx => vhdx::Vhdx::open(file).map(|image| Arc::new(image) as _),
        Format::Parallels => parallels::Parallels::open(file).map(|image| Arc::new(image) as _),
        Format::Qcow => qcow::Qcow::open(file).map(|image| Arc::new(image) as _),
        Format::Qed => qed::Qed::open(file).map(|image| Arc::new(image) as _),
        Format::Vdi => vdi::Vdi::open(file).map(|image| Arc::new(image) as _),
        Format::Qcow2 | Format::Raw | Format::Luks => {
            Err(Error::invalid(format!("{format} is no foreign format")))
        }
    };
    image.map_err(|e| e.at_path(path))
}

/// Opens the VMDK in `storage`, whose name is `path`, with the files that it names in its directory.
/// Those may be links that lead elsewhere where `follow` says that the user vouches for them.
pub fn open_vmdk(
    path: &Path,
    storage: Arc<dyn Storage>,
    options: FileOptions,
    follow: bool,
) -> Result<vmdk::Vmdk> {
    let plan = vmdk::Plan::read(storage).map_err(|e| e.at_path(path))?;
    let files = files_of(&plan, path, options, follow)?;
    let files: Vec<Arc<dyn Storage>> = files.into_iter().map(|file| file as _).collect();
    plan.open(&files).map_err(|e| e.at_path(path))
}

/// The same, to be written.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for the kinds that are only read.
pub fn open_vmdk_to_write(
    path: &Path,
    storage: Arc<dyn Storage>,
    options: FileOptions,
) -> Result<vmdk::Written> {
    let plan = vmdk::Plan::read(storage).map_err(|e| e.at_path(path))?;
    let files = files_of(&plan, path, options, gate::follows_links())?;
    let files: Vec<Arc<dyn Storage>> = files.into_iter().map(|file| file as _).collect();
    plan.open_to_write(&files).map_err(|e| e.at_path(path))
}

/// The files besides its own in which a VMDK keeps its data.
pub(crate) fn further_files(layer: &Layer) -> Result<Vec<Arc<FileStorage>>> {
    let plan = vmdk::Plan::read(layer.file.clone()).map_err(|e| e.at_path(&layer.path))?;
    // The layer has them open: they were let through.
    files_of(&plan, &layer.path, FileOptions { access: None, write: false }, true)
}

fn files_of(
    plan: &vmdk::Plan,
    path: &Path,
    options: FileOptions,
    follow: bool,
) -> Result<Vec<Arc<FileStorage>>> {
    let open = |name| file_of(name, path, options, follow).map(Arc::new);
    plan.files().iter().map(open).collect()
}

/// Opens the file that the VMDK at `path` names.
fn file_of(
    name: &vmdk::Name,
    path: &Path,
    options: FileOptions,
    follow: bool,
) -> Result<FileStorage> {
    let vmdk::Name { bytes, text } = name;
    let beside = |name: &Path| {
        name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
    };
    if !beside(Path::new(text)) || !beside(Path::new(bytes)) {
        let message = format!(
            "names '{text}' as one of its files: only files in its own directory are opened for it"
        );
        return Err(Error::new(ErrorKind::Denied, message).at_path(path));
    }
    let admit = |at: &Path| match follow {
        true => Ok(()),
        false => gate::admit_beside(path, text, at, gate::Named::Part),
    };
    // A colon in it is a part of the file's name: nothing else than a file is opened here.
    let by_text = path.parent().unwrap_or(Path::new("")).join(text);
    if bytes.as_encoded_bytes() != text.as_bytes() {
        // The name as it is, which the file came with; else as whoever copied it wrote it.
        let as_it_is = path.parent().unwrap_or(Path::new("")).join(bytes);
        admit(&as_it_is)?;
        match FileStorage::open(&as_it_is, options) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            opened => return opened,
        }
    }
    admit(&by_text)?;
    FileStorage::open(&by_text, options)
}

/// The parent is the one that the child was made on, as far as the child's format can tell.
pub(crate) fn check_parent(child: &Layer, parent: &Layer) -> Result<()> {
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
