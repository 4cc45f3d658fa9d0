//! Where the bytes of an image come from: a file, a server's export, or nothing at all.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use vdisk::ErrorKind;
use vdisk::nbd;
use vdisk::storage::{FileOptions, FileStorage, Storage};

use crate::qemu_img::blkdebug::faults::Faults;
use crate::qemu_img::blkdebug::faulty::FaultyStorage;
use crate::qemu_img::fail::{Fail, Outcome, open_reason, os_text, reason};
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::images::window::Window;
use crate::qemu_img::names::name::Protocol;

/// The bytes of a source.
pub struct Bytes {
    /// All of them.
    pub storage: Arc<dyn Storage>,
    /// The file at the bottom of it; an empty one where there is none.
    pub file: Arc<FileStorage>,
    /// The server's export, where it is one.
    pub export: Option<Arc<nbd::Client>>,
}

impl Bytes {
    fn of(file: Arc<FileStorage>) -> Bytes {
        Bytes { storage: file.clone(), file, export: None }
    }
}

/// Opens what is at the bottom of a source.
pub fn open(protocol: &Protocol, using: Use) -> Outcome<Bytes> {
    match protocol {
        Protocol::File(path) => open_file(path, using).map(Bytes::of),
        Protocol::Faulty { config, rules, image } => {
            let Bytes { storage, file, .. } = open(image, using)?;
            let faults = Faults::read(config.as_deref(), rules)?;
            Ok(Bytes { storage: Arc::new(FaultyStorage::new(storage, faults)), file, export: None })
        }
        // A file without blocks is all that it takes: it reads as zeroes, and says so.
        Protocol::Null(size) => no_file(*size).map(Bytes::of),
        Protocol::Nbd(target) => {
            let client = nbd::Client::connect(target, using.write);
            let client = Arc::new(client.map_err(|e| Fail::new(reason(&e)))?);
            let file = no_file(0)?;
            Ok(Bytes { storage: client.clone(), file, export: Some(client) })
        }
        Protocol::Quorum(parts) => {
            let first = parts.first().ok_or_else(|| Fail::new("No children"))?;
            open(first, using)
        }
        Protocol::Part { offset, size, of } => {
            let Bytes { storage, file, .. } = open(of, using)?;
            let window = Window::new(storage, *offset, *size)?;
            Ok(Bytes { storage: Arc::new(window), file, export: None })
        }
    }
}

/// Files without names that were made while this process could, by their sizes.
static NO_FILES: Mutex<Vec<(u64, Arc<FileStorage>)>> = Mutex::new(Vec::new());

/// Makes what an image needs that is in no file, for a process that can make none when it opens it.
pub fn prepare(protocol: &Protocol) {
    match protocol {
        Protocol::File(_) => {}
        Protocol::Faulty { image, .. } => prepare(image),
        Protocol::Part { of, .. } => prepare(of),
        Protocol::Quorum(parts) => parts.iter().for_each(prepare),
        Protocol::Null(size) => keep_no_file(*size),
        Protocol::Nbd(_) => keep_no_file(0),
    }
}

fn keep_no_file(size: u64) {
    // Where there can be none, who opens the image says so.
    if let Ok(file) = no_file(size) {
        NO_FILES.lock().unwrap_or_else(PoisonError::into_inner).push((size, file));
    }
}

/// A file without name and without blocks, of `size` bytes.
fn no_file(size: u64) -> Outcome<Arc<FileStorage>> {
    let kept = NO_FILES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, file)) = kept.iter().find(|(kept, _)| *kept == size) {
        return Ok(file.clone());
    }
    drop(kept);
    let made = FileStorage::temporary(&std::env::temp_dir())
        .and_then(|file| file.set_len(size).map(|()| file));
    made.map(Arc::new).map_err(|e| Fail::new(reason(&e)))
}

fn open_file(path: &Path, using: Use) -> Outcome<Arc<FileStorage>> {
    let options = FileOptions { access: Some(using.access()), write: using.write };
    let opened = FileStorage::open(path, options).map_err(|e| match e.kind() {
        ErrorKind::Unsupported if using.write && path.is_dir() => {
            let text = os_text(nix::libc::EISDIR);
            Fail::new(format!("Could not open '{}': {text}", path.display()))
        }
        ErrorKind::Unsupported => {
            Fail::new(format!("'file' driver requires '{}' to be a regular file", path.display()))
        }
        _ => Fail::new(open_reason(&e, path)),
    });
    opened.map(Arc::new)
}
