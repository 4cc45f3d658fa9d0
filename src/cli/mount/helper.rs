//! What mount(8) and fstab run for a file system of the type `fuse.vdisk`: `vdisk DISK DIR -o OPTIONS`
//! (by way of mount.fuse), or the program under the name `mount.fuse.vdisk`. Says the same as a
//! command line of `vdisk mount`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use vdisk::{Error, Result};

use super::overlay;

/// The name under which mount(8) finds it without mount.fuse.
const NAME: &str = "mount.fuse.vdisk";

/// The words of `vdisk mount` that a mount helper's mean, where the program was called as one; the
/// first is the program.
pub fn means(called: &OsStr, words: &[OsString]) -> Option<Result<Vec<OsString>>> {
    let by_name = Path::new(called).file_name().is_some_and(|name| name == NAME);
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
    }
}
