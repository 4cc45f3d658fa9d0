//! An ordinary user of the host, for commands that need no root: a number that nobody has, devices
//! that he may open, and users lent to him or not, in a mount namespace of the command's own.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use crate::host::{Done, PATIENCE, Running, VDISK, Work};

/// His number.
pub const USER: u32 = 54321;
/// The first number that is lent to him.
pub const LENT: u32 = 7_000_000;

/// Whom the container of an ordinary user knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// 65536 numbers are lent to him.
    Lent,
    /// Nobody but himself.
    One,
}

/// Who runs a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    Root,
    Someone(Ids),
}

/// Root, and the user with and without users that are lent to him.
pub const ALL: [Who; 3] = [Who::Root, Who::Someone(Ids::Lent), Who::Someone(Ids::One)];

/// $0: "lent" or "one"; then a directory of the test's, and the command. Root's own place for
/// temporary files may be shut to him, so he gets one where the command runs.
const BECOME: &str = r#"set -e
devices=$1; shift
mkdir -p "$devices"
mount -t tmpfs none "$devices"
mknod -m 666 "$devices/fuse" c 10 229
mknod -m 666 "$devices/tun" c 10 200
mount --bind "$devices/fuse" /dev/fuse
[ ! -e /dev/net/tun ] || mount --bind "$devices/tun" /dev/net/tun
{ cat /etc/passwd; echo "someone:x:54321:54321::/:/bin/sh"; } > "$devices/passwd"
mount --bind "$devices/passwd" /etc/passwd
: > "$devices/ids"
[ "$0" = one ] || echo someone:7000000:65536 > "$devices/ids"
[ -e /etc/subuid ] && mount --bind "$devices/ids" /etc/subuid
[ -e /etc/subgid ] && mount --bind "$devices/ids" /etc/subgid
unset XDG_RUNTIME_DIR
mkdir -p -m 1777 tmp
export TMPDIR="$PWD/tmp"
exec setpriv --reuid 54321 --regid 54321 --clear-groups "$@"
"#;

/// Makes all of the test's files the user's, and shows him the way to them.
pub fn give(work: &Work) {
    fs::set_permissions(work.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    chown(work.dir(), Some(USER), Some(USER)).unwrap();
    for name in work.files() {
        let path = work.path(&name);
        if fs::symlink_metadata(&path).unwrap().is_file() {
            chown(&path, Some(USER), Some(USER)).unwrap();
        }
    }
    // He may have no way to where it was built.
    let own = work.path("vdisk");
    if !own.exists() {
        fs::copy(VDISK, &own).unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

/// Starts `vdisk` as this user, after [`give`].
pub fn start<A: AsRef<OsStr>>(
    work: &Work,
    who: Who,
    words: impl IntoIterator<Item = A>,
) -> Running {
    start_after(work, who, "", words)
}

/// The same, after a script of root's in a mount namespace of the command's own.
pub fn start_after<A: AsRef<OsStr>>(
    work: &Work,
    who: Who,
    script: &str,
    words: impl IntoIterator<Item = A>,
) -> Running {
    if who == Who::Root && script.is_empty() {
        return work.command(VDISK, words);
    }
    let own = work.path("vdisk");
    let vdisk = if who == Who::Root { Path::new(VDISK) } else { &own };
    let words = words.into_iter().map(|word| word.as_ref().to_owned());
    start_program(work, who, script, [vdisk.as_os_str().to_owned()].into_iter().chain(words))
}

/// Starts any program so.
pub fn start_program<A: AsRef<OsStr>>(
    work: &Work,
    who: Who,
    script: &str,
    words: impl IntoIterator<Item = A>,
) -> Running {
    let (script, mut first) = match who {
        Who::Root => (format!("set -e\n{script}\nexec \"$@\"\n"), vec!["sh".into()]),
        Who::Someone(ids) => {
            let devices = work.path("devices");
            fs::create_dir_all(&devices).unwrap();
            let ids = if ids == Ids::Lent { "lent" } else { "one" };
            (format!("set -e\n{script}\n{BECOME}"), vec![ids.into(), devices.into_os_string()])
        }
    };
    first.extend(words.into_iter().map(|word| word.as_ref().to_owned()));
    let begin = ["-m", "sh", "-c", &script].map(OsString::from);
    work.command("unshare", begin.into_iter().chain(first))
}

/// Runs `vdisk` to its end.
pub fn run<A: AsRef<OsStr>>(work: &Work, who: Who, words: impl IntoIterator<Item = A>) -> Done {
    start(work, who, words).finish(None, PATIENCE)
}

/// Runs a shell script on `web.qcow2`.
pub fn sh(work: &Work, who: Who, options: &str, script: &str) -> Done {
    let words = ["run"].into_iter().chain(options.split_whitespace());
    run(work, who, words.chain(["web.qcow2", "--", "sh", "-c", script]))
}
