//! What mount(8), fstab and umount(8) run for file systems of the types `fuse.vdisk` and, to unmount,
//! `fuse.vdisk-overlay`: `vdisk DISK DIR -o OPTIONS` (by way of mount.fuse), or the program under the names
//! `mount.fuse.vdisk` and `umount.fuse.…`. Says the same as a command line of `vdisk mount` or `vdisk umount`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use vdisk::{Error, Result};

use super::overlay;

/// The name under which mount(8) finds it without mount.fuse.
const NAME: &str = "mount.fuse.vdisk";
/// The names under which umount(8) finds it. By itself umount(8) returns before the server has ended: what stood
/// under the mount is still in use then, and not all of it durable.
const UMOUNT: [&str; 2] = ["umount.fuse.vdisk", "umount.fuse.vdisk-overlay"];

/// The words of `vdisk mount` that a mount helper's mean, where the program was called as one; the
/// first is the program.
pub fn means(called: &OsStr, words: &[OsString]) -> Option<Result<Vec<OsString>>> {
    let called = Path::new(called).file_name().unwrap_or_default();
    if UMOUNT.iter().any(|name| called == *name) {
        return Some(unmounts(words));
    }
    let by_name = called == NAME;
    // No verb has a slash in it, and mount(8) knows no disk without one.
    let by_form = match words {
        [disk, _, option, _] => option == "-o" && disk.as_bytes().contains(&b'/'),
        _ => false,
    };
    (by_name || by_form).then(|| translate(words))
}

fn translate(words: &[OsString]) -> Result<Vec<OsString>> {
    let (mut plain, mut options) = (Vec::new(), Vec::new());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_bytes() {
            b"-o" => {
                let list = words.next().map(|list| list.as_bytes()).unwrap_or_default();
                options.extend(overlay::split(list, b','));
            }
            // The type, and a namespace that mount(8) has entered already.
            b"-t" | b"-N" => drop(words.next()),
            b"-s" | b"-f" | b"-n" | b"-v" => {}
            bytes if bytes.starts_with(b"-") => {
                let text = format!("a mount helper has no option {}", word.display());
                return Err(Error::invalid(text));
            }
            _ => plain.push(word.clone()),
        }
    }
    if plain.len() != 2 {
        return Err(Error::invalid(format!("usage: {NAME} DISK DIR -o OPTIONS")));
    }
    let mut means = vec!["vdisk".into(), "mount".into()];
    for option in options {
        means.extend(meaning(&option)?);
    }
    means.push("--".into());
    means.append(&mut plain);
    Ok(means)
}

/// `umount.TYPE DIR [-n] [-l] [-f] [-v] [-r] [-t TYPE] [-N NAMESPACE]`.
fn unmounts(words: &[OsString]) -> Result<Vec<OsString>> {
    let mut means = vec!["vdisk".into(), "umount".into()];
    let mut plain = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_bytes() {
            b"-t" | b"-N" => drop(words.next()),
            b"-l" => means.push("--lazy".into()),
            b"-f" => means.push("--force".into()),
            // It is not mounted read-only instead where that fails.
            b"-n" | b"-v" | b"-r" => {}
            bytes if bytes.starts_with(b"-") => {
                let text = format!("this umount helper has no option {}", word.display());
                return Err(Error::invalid(text));
            }
            _ => plain.push(word.clone()),
        }
    }
    if plain.len() != 1 {
        return Err(Error::invalid("usage: umount.fuse.vdisk DIR [-l]"));
    }
    means.push("--".into());
    means.append(&mut plain);
    Ok(means)
}

/// What one option means; `None` for what is always so, or is for others to read.
fn meaning(option: &[u8]) -> Result<Option<OsString>> {
    const FLAGS: [(&str, &str); 7] = [
        ("ro", "--read-only"),
        ("noexec", "--no-exec"),
        ("ephemeral", "--ephemeral"),
        ("user_space", "--user-space"),
        ("user-space", "--user-space"),
        ("raw", "--raw"),
        ("follow", "--follow"),
    ];
    const VALUES: [(&str, &str); 3] =
        [("snapshot", "--snapshot="), ("partition", "--partition="), ("format", "--format=")];
    if let Some((_, flag)) = FLAGS.iter().find(|(name, _)| name.as_bytes() == option) {
        return Ok(Some((*flag).into()));
    }
    // mount.fuse asks for `suid` and `dev` by itself: what a disk holds is not trusted for that.
    const IDLE: [&str; 7] = ["rw", "exec", "suid", "nosuid", "dev", "nodev", "allow_other"];
    let text = String::from_utf8_lossy(option);
    if overlay::idle(&text) || IDLE.contains(&&*text) {
        return Ok(None);
    }
    let at = option.iter().position(|byte| *byte == b'=').unwrap_or(option.len());
    let (key, value) = option.split_at(at);
    let known = VALUES.iter().find(|(name, _)| name.as_bytes() == key && !value.is_empty());
    let Some((_, flag)) = known else {
        return Err(Error::invalid(format!("a disk has no mount option {text:?}")));
    };
    let value = overlay::plain(value.get(1..).unwrap_or_default());
    Ok(Some(OsString::from_vec([flag.as_bytes(), &value].concat())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Vec<OsString> {
        list.iter().map(OsString::from).collect()
    }

    #[test]
    fn a_mount_helpers_words_are_those_of_the_command() {
        let list =
            words(&["/d/a b.qcow2", "/mnt", "-o", r"rw,nofail,dev,suid,snapshot=a\,b,noexec"]);
        let said = means(OsStr::new("vdisk"), &list).unwrap().unwrap();
        let all = ["vdisk", "mount", "--snapshot=a,b", "--no-exec", "--", "/d/a b.qcow2", "/mnt"];
        assert_eq!(said, words(&all));
        assert!(means(OsStr::new("vdisk"), &words(&["run", "d", "-o", "x"])).is_none());
        let bad = words(&["/d", "/mnt", "-o", "nonsense"]);
        assert!(means(OsStr::new("vdisk"), &bad).unwrap().is_err());
        let list = words(&["d", "/mnt", "-n", "-t", "fuse.vdisk", "-o", "ro"]);
        let said = means(OsStr::new("/sbin/mount.fuse.vdisk"), &list).unwrap().unwrap();
        assert_eq!(said, words(&["vdisk", "mount", "--read-only", "--", "d", "/mnt"]));
        let umount = OsStr::new("/sbin/umount.fuse.vdisk-overlay");
        let list = words(&["/mnt", "-n", "-l", "-f", "-t", "fuse.vdisk-overlay"]);
        let said = means(umount, &list).unwrap().unwrap();
        assert_eq!(said, words(&["vdisk", "umount", "--lazy", "--force", "--", "/mnt"]));
        assert!(means(umount, &words(&["-n"])).unwrap().is_err());
        assert!(means(umount, &words(&["/mnt", "-x"])).unwrap().is_err());
    }
}
