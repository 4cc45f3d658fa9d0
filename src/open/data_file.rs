//! External data files: a qcow2 image's name for one, through the gate, to an open file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::Layer;
use crate::error::{Error, ErrorKind, Result};
use crate::open::gate;
use crate::open::options::OpenOptions;
use crate::qcow2;
use crate::storage::{FileOptions, FileStorage, Storage};

/// Opens the qcow2 image in `file`, and its data file where it has one.
pub(crate) fn open_qcow2(
    path: &Path,
    file: Arc<FileStorage>,
    options: &OpenOptions,
    cache: u64,
) -> Result<qcow2::Image> {
    let header = qcow2::Header::read(&*file)?;
    let own = options.file_options();
    let access = own.access.filter(|_| !options.locked);
    let options_of_data = FileOptions { access, ..own };
    let data_file = open_data_file(path, &file, &header, options_of_data, options.follow)?;
    let OpenOptions { read_only, same_contents, repair, .. } = *options;
    let passphrase = options.passphrase.clone();
    let inner =
        qcow2::OpenOptions { read_only, cache, same_contents, repair, data_file, passphrase };
    let image = qcow2::Image::with_header(file, header, inner)?;
    Ok(if options.unrecorded { image.unrecorded() } else { image })
}

/// Opens the external data file that the image at `path`, in `file`, names in its header; `None` for
/// an image without one. It stands by the image, unless `follow` says that the user vouches for it.
///
/// # Errors
/// [`ErrorKind::Denied`] for a name that is no path or leads elsewhere; [`ErrorKind::NotFound`] says
/// what is missing.
pub fn open_data_file(
    path: &Path,
    file: &FileStorage,
    header: &qcow2::Header,
    options: FileOptions,
    follow: bool,
) -> Result<Option<Arc<dyn Storage>>> {
    if !header.has_data_file() {
        return Ok(None);
    }
    let name = header.data_file()?.ok_or_else(|| {
        Error::corrupt("the image keeps its data in another file and does not name it")
    })?;
    Ok(Some(open_data(path, file, name, options, follow)?))
}

/// The external data file of an open layer, where it has one, for looking at it.
pub(crate) fn beside(layer: &Layer) -> Result<Option<Arc<FileStorage>>> {
    let name = layer.image.details().and_then(|details| details.data_file);
    let options = FileOptions { access: None, write: false };
    // The layer has it open: it was let through.
    name.map(|name| open_data(&layer.path, &layer.file, &name, options, true)).transpose()
}

/// Opens the data file that the image at `path` names. The same policy as for backing files.
fn open_data(
    path: &Path,
    image: &FileStorage,
    name: &str,
    options: FileOptions,
    follow: bool,
) -> Result<Arc<FileStorage>> {
    let at = find(path, name)?;
    if !follow {
        gate::admit_beside(path, name, &at, gate::Named::Data)?;
    }
    let data = FileStorage::open(&at, options).map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            let message =
                format!("is missing; '{}' names it as its external data file", path.display());
            Error::new(ErrorKind::NotFound, message).at_path(&at)
        }
        _ => e,
    })?;
    // Its tables and its data would overwrite each other.
    if data.identity()? == image.identity()? {
        return Err(Error::corrupt("names itself as its external data file"));
    }
    Ok(Arc::new(data))
}

/// The path that a data file's name means: relative to the image's directory, so that both move
/// together. QEMU takes it to be relative to its working directory, so where nothing has that name
/// beside the image, this does, too.
fn find(path: &Path, name: &str) -> Result<PathBuf> {
    let beside = gate::resolve_as(path, name, "external data file")?;
    let plain = Path::new(name.strip_prefix("file:").unwrap_or(name));
    let elsewhere = !beside.exists() && plain.exists();
    Ok(if elsewhere { plain.to_path_buf() } else { beside })
}
