//! The modules of a kernel that a guest needs to reach its root: which they are, in the order in which
//! they are loaded, by the lists that `depmod` has written beside them.
//!
//! It knows a directory such as /lib/modules/VERSION, not what becomes of the files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};

/// What a guest's disk and its file system are driven by.
pub const WANTED: [&str; 3] = ["virtio_mmio", "virtio_blk", "ext4"];
/// What the others ask for by an algorithm's name, where it is a module.
const ALSO: [&str; 3] = ["virtio_ring", "crc32c_generic", "crc32c"];
/// The largest module, unpacked.
const MOST: u64 = 64 << 20;

/// One module: its name, and its unpacked bytes.
pub struct Module {
    /// As `lsmod` shows it.
    pub name: String,
    /// An ELF file.
    pub bytes: Vec<u8>,
}

/// The modules that a guest needs, each after those that it stands on. Empty where the kernel has all
/// of it built in.
pub fn needed(directory: &Path) -> Result<Vec<Module>> {
    let dependencies = dependencies(&text(directory, "modules.dep")?);
    let built_in: BTreeSet<_> = text(directory, "modules.builtin")?.lines().map(name).collect();
    let mut order = Vec::new();
    for wanted in ALSO.iter().chain(&WANTED) {
        match dependencies.get(*wanted) {
            Some((path, below)) => {
                // What stands first in the list is what the module itself asks for: it is loaded last.
                let all = below.iter().rev().chain([path]);
                all.for_each(|path| {
                    if !order.contains(path) {
                        order.push(path.clone())
                    }
                });
            }
            None if built_in.contains(*wanted) || ALSO.contains(wanted) => {}
            None => {
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!("this kernel has no {wanted}, neither built in nor as a module"),
                )
                .at_path(directory));
            }
        }
    }
    let read = |path: &String| {
        let bytes = unpacked(&directory.join(path))?;
        Ok(Module { name: name(path), bytes })
    };
    order.iter().map(read).collect()
}

fn text(directory: &Path, file: &str) -> Result<String> {
    let path = directory.join(file);
    std::fs::read_to_string(&path).map_err(|e| {
        let text =
            "cannot read the list of modules (a directory such as /lib/modules/VERSION is meant)";
        Error::io(text, e).at_path(path)
    })
}

/// `kernel/fs/ext4/ext4.ko.xz` is `ext4`; names know no hyphens.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// By a module's name: its path, and the paths of those that it stands on.
fn dependencies(text: &str) -> BTreeMap<String, (String, Vec<String>)> {
    let line = |line: &str| {
        let (path, below) = line.split_once(':')?;
        let below = below.split_ascii_whitespace().map(str::to_owned).collect();
        Some((name(path), (path.to_owned(), below)))
    };
    text.lines().filter_map(line).collect()
}

fn unpacked(path: &Path) -> Result<Vec<u8>> {
    let failed = |e| Error::io("cannot read the module", e).at_path(path);
    let file = File::open(path).map_err(failed)?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let reader: Box<dyn Read> = match extension {
        "ko" => Box::new(file),
        "gz" => Box::new(flate2::read::GzDecoder::new(file)),
        "xz" => Box::new(liblzma::read::XzDecoder::new(file)),
        "zst" => Box::new(zstd::stream::read::Decoder::new(file).map_err(failed)?),
        other => {
            let text = format!("modules that are packed as .{other} are not read");
            return Err(Error::unsupported(text).at_path(path));
        }
    };
    let mut bytes = Vec::new();
    reader.take(MOST + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MOST {
        return Err(Error::invalid("too large to be a module").at_path(path));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_those_that_they_stand_on() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put(
            "modules.dep",
            "a/ext4.ko: a/mbcache.ko a/jbd2.ko\na/jbd2.ko:\na/mbcache.ko:\n\
             v/virtio_mmio.ko: v/virtio_ring.ko v/virtio.ko\nv/virtio_ring.ko: v/virtio.ko\nv/virtio.ko:\n",
        );
        put("modules.builtin", "kernel/drivers/block/virtio-blk.ko\n");
        for module in ["ext4", "mbcache", "jbd2"] {
            std::fs::create_dir_all(dir.path().join("a")).unwrap();
            put(&format!("a/{module}.ko"), module);
        }
        for module in ["virtio_mmio", "virtio_ring", "virtio"] {
            std::fs::create_dir_all(dir.path().join("v")).unwrap();
            put(&format!("v/{module}.ko"), module);
        }
        let names: Vec<_> = needed(dir.path()).unwrap().into_iter().map(|m| m.name).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_mmio", "jbd2", "mbcache", "ext4"]);
        put("modules.builtin", "");
        let error = needed(dir.path()).err().unwrap();
        assert!(error.to_string().contains("virtio_blk"), "{error}");
    }
}
