//! An overlay as the kernel-facing side calls it, without a mount: what the kernel forgets when it
//! runs out of memory cannot be brought about from outside.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use vdisk_fuse::files::{Caller, Files, ROOT, SetXattr};
use vdisk_fuse::host::HostLayer;
use vdisk_fuse::layer::Layer;
use vdisk_fuse::overlay::{Layers, Overlay, UpperDirs};

fn overlay(dir: &Path) -> Overlay {
    for name in ["upper", "work"] {
        fs::create_dir(dir.join(name)).unwrap();
    }
    let lower: Arc<dyn Layer> = Arc::new(HostLayer::open(&dir.join("lower")).unwrap());
    let upper = Some(UpperDirs::open(&dir.join("upper"), &dir.join("work")).unwrap());
    Overlay::new(Layers { lowers: vec![lower], upper, user_xattrs: Some(true) }, 64).unwrap()
}

fn look(files: &Overlay, parent: u64, name: &str) -> u64 {
    files.lookup(parent, OsStr::new(name)).unwrap().unwrap().node
}

/// As the kernel's dentries go under memory pressure: a file stays known by one of its names, while
/// the directory of its other name is forgotten and found again.
#[test]
fn a_directory_that_was_forgotten_is_the_same_when_it_is_found_again() {
    let dir = std::env::temp_dir().join(format!("vdisk-fuse-forget-{}", std::process::id()));
    fs::create_dir_all(dir.join("lower/e")).unwrap();
    fs::create_dir_all(dir.join("lower/b")).unwrap();
    fs::write(dir.join("lower/e/x"), "x").unwrap();
    fs::write(dir.join("lower/e/other"), "x").unwrap();
    fs::hard_link(dir.join("lower/e/x"), dir.join("lower/b/y")).unwrap();
    let files = overlay(&dir);
    files.thread().unwrap();
    let (e, b) = (look(&files, ROOT, "e"), look(&files, ROOT, "b"));
    let x = look(&files, e, "x");
    assert_eq!(look(&files, b, "y"), x);
    files.forget(x, 1);
    files.forget(e, 1);
    let again = look(&files, ROOT, "e");
    let caller = Caller { uid: 0, gid: 0, pid: std::process::id() };
    // Both come to stand in the upper layer, the directory by its file's name in it.
    files.release(files.open(caller, x, libc::O_WRONLY, false).unwrap().handle);
    let set = SetXattr { value: b"1", flags: 0, kill_sgid: false };
    files.setxattr(again, OsStr::new("user.a"), &set).unwrap();
    assert_eq!(look(&files, again, "x"), x);
    // Nothing is kept once all of it is forgotten.
    files.forget(x, 2);
    files.forget(again, 1);
    files.forget(b, 1);
    assert_eq!(files.nodes(), 1);
    drop(files);
    fs::remove_dir_all(&dir).unwrap();
}
