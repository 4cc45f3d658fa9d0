//! Who keeps a mount busy, as far as /proc tells. Only for the text of an error.

use std::fs;
use std::path::{Path, PathBuf};

/// How many are named.
const NAMED: usize = 3;

/// The processes that have a file, a directory or a mapping under `at`, such as `bash (pid 7)`,
/// and the mounts that stand below it; empty where none can be found.
pub fn users(at: &Path) -> Vec<String> {
    let mut found: Vec<String> = processes()
        .filter(|process| uses(process, at))
        .map(|process| describe(&process))
        .take(NAMED)
        .collect();
    let below = mount_points(Path::new("/proc/thread-self/mountinfo"));
    let below = below.into_iter().filter(|(_, point)| point.starts_with(at) && point != at);
    found.extend(below.map(|(_, point)| format!("the mount at {}", point.display())).take(NAMED));
    found
}

/// The processes in whose mount namespace a mount of the device `major:minor` is left.
pub fn namespaces(device: &str) -> Vec<String> {
    processes()
        .filter(|process| {
            mount_points(&process.join("mountinfo")).iter().any(|(of, _)| of == device)
        })
        .map(|process| describe(&process))
        .take(NAMED)
        .collect()
}

fn processes() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
    })
}

/// Reads links and text only: to touch the files themselves could wait for a dead server.
fn uses(process: &Path, at: &Path) -> bool {
    let under = |link: PathBuf| fs::read_link(link).is_ok_and(|target| target.starts_with(at));
    if ["cwd", "root", "exe"].iter().any(|name| under(process.join(name))) {
        return true;
    }
    let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    if open.map(|entry| entry.path()).any(under) {
        return true;
    }
    let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
    maps.lines()
        .filter_map(|line| line.find('/').and_then(|place| line.get(place..)))
        .any(|path| Path::new(path).starts_with(at))
}

fn describe(process: &Path) -> String {
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    let pid = process.file_name().unwrap_or_default().to_string_lossy().into_owned();
    format!("{} (pid {pid})", name.trim_end())
}

/// The device and the mount point of every line of a mountinfo file.
fn mount_points(file: &Path) -> Vec<(String, PathBuf)> {
    crate::mountinfo::read(file)
        .unwrap_or_default()
        .into_iter()
        .map(|mount| (mount.device, mount.point))
        .collect()
}
