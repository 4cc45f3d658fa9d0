//! A FUSE file system's mount: made by the kernel for whoever may mount (root, and in a user
//! namespace whoever has its `CAP_SYS_ADMIN`), else by `fusermount3`. Knows not what is served.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};
use nix::unistd::{getegid, geteuid};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, fstat, openat, stat, statx};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    open_tree, unmount,
};

use crate::apart::Apart;
use crate::kernel::device::Device;
use crate::server::shown;
use crate::sys;

/// How a file system is mounted. The kernel always decides by mode, owner and ACL who may do what.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Named as the source in `/proc/self/mounts`.
    pub source: String,
    /// What stands after `fuse.` there.
    pub subtype: String,
    /// Whether users other than this process's may enter.
    pub others: bool,
    /// Refuses every change.
    pub read_only: bool,
    /// Whether set-user-id files work as such.
    pub suid: bool,
    /// Whether device nodes work as such.
    pub dev: bool,
    /// Whether programs can be run.
    pub exec: bool,
    /// In which mount namespace.
    pub place: Apart,
}

impl Default for MountOptions {
    fn default() -> MountOptions {
        MountOptions {
            source: "vdisk".into(),
            subtype: crate::server::SUBTYPE.into(),
            others: false,
            read_only: false,
            suid: false,
            dev: false,
            exec: true,
            place: Apart::here(),
        }
    }
}

/// Mounts at `directory`, and returns the connection, by which it is to be served at once: until
/// then, all who look wait.
///
/// # Errors
/// Where it cannot be mounted there.
pub fn open(directory: &Path, options: &MountOptions) -> io::Result<Device> {
    if options.place.is_here() && !privileged() {
        return through_fusermount(directory, options);
    }
    // By this process: the kernel asks that who opened the connection is of the user namespace in
    // which it is mounted.
    let device = Device::open()?;
    open_on(&device, directory, options)?;
    Ok(device)
}

/// Mounts a connection at `directory`: it is for who has it, here or in another process, to be served at
/// once.
///
/// # Errors
/// Where it cannot be mounted there by this process itself.
pub fn open_on(device: &Device, directory: &Path, options: &MountOptions) -> io::Result<()> {
    let mount = || {
        let root = detached_on(device, options)?;
        move_mount(&root, "", CWD, directory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        read_further_ahead(&root);
        Ok(())
    };
    options.place.run(&[device.as_fd()], mount).flatten()
}

/// Takes away again what [`open`] has mounted and nobody serves.
pub(crate) fn take_back(directory: &Path, options: &MountOptions) {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    // Without the right to, it stays: a mount that says that its server is gone.
    let _ = options.place.run(&[], || unmount(directory, flags));
}

/// Has the kernel ask for more at a time where it reads ahead: a request costs much the same
/// whatever its size. Takes the superuser; who cannot goes on with the kernel's 128 KiB.
fn read_further_ahead(root: &OwnedFd) {
    // Nobody serves it yet: the kernel is not to ask.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let Ok(stat) = statx(root, "", flags, StatxFlags::empty()) else { return };
    let (major, minor) = (stat.stx_dev_major, stat.stx_dev_minor);
    let _ = std::fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), "1024");
}

/// The most that the kernel asks for at once, in bytes: half of what it reads ahead, so that one request is
/// answered while what the one before it brought is read, and so little that it fits into a pipe.
const MAX_READ: usize = 512 << 10;
const _: () = assert!(MAX_READ <= crate::kernel::MOST_PIPED);

/// Whether the kernel lets this process mount by itself.
pub(crate) fn privileged() -> bool {
    fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).is_ok()
}

/// Whether this process is the superuser of the host, and not of a user namespace only: the kernel's first is
/// the only one that has all ids there are.
pub fn is_host_root() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    geteuid().is_root() && map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

/// Mounts a connection in no mount namespace: the root of that mount. Needs `CAP_SYS_ADMIN`.
///
/// It lives as long as its root or a file in it is open anywhere, and leaves nothing behind when who serves
/// it is killed. Who looks at what is open waits until it is served.
///
/// # Errors
/// Where it cannot be mounted.
pub fn detached_on(device: &Device, options: &MountOptions) -> io::Result<OwnedFd> {
    let fs = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let settings = [
        ("source", shown(&options.source).to_owned()),
        ("subtype", options.subtype.clone()),
        ("fd", device.as_fd().as_raw_fd().to_string()),
        ("rootmode", "40000".to_owned()),
        ("user_id", geteuid().to_string()),
        ("group_id", getegid().to_string()),
        ("max_read", MAX_READ.to_string()),
    ];
    for (key, value) in settings {
        fsconfig_set_string(&fs, key, value.as_str())?;
    }
    fsconfig_set_flag(&fs, "default_permissions")?;
    if options.others {
        fsconfig_set_flag(&fs, "allow_other")?;
    }
    if options.read_only {
        fsconfig_set_flag(&fs, "ro")?;
    }
    fsconfig_create(&fs)?;
    let attributes = [
        (options.suid, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (options.dev, MountAttrFlags::MOUNT_ATTR_NODEV),
        (options.exec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (!options.read_only, MountAttrFlags::MOUNT_ATTR_RDONLY),
    ];
    let attributes = attributes.iter().filter(|(may, _)| !may).map(|(_, attribute)| *attribute);
    Ok(fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes.collect())?)
}

/// A directory in a copy of the mount on which it stands, without what is mounted in it: for reading, which leaves
/// no trace. The copy stands in no mount namespace, and nobody can ask for it to be unmounted.
pub(crate) fn detached_copy(directory: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = open_tree(CWD, directory, flags)?;
    // In a user namespace the times may not be this process's to decide about.
    let _ = sys::only_read(copy.as_fd());
    // Once the descriptor that made it is closed, the copy takes no part in what is mounted elsewhere.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(&copy, ".", flags, Mode::empty())?)
}

/// Two directories of one mount in one such copy, so that files can be renamed from one to the other.
pub(crate) fn detached_pair(one: &Path, two: &Path) -> io::Result<[OwnedFd; 2]> {
    let full = [one.canonicalize()?, two.canonicalize()?];
    let [one, two] = &full;
    let same = one.components().zip(two.components()).take_while(|(one, two)| one == two);
    let above: PathBuf = same.map(|(part, _)| part).collect();
    let copy =
        open_tree(CWD, &above, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let moved = || io::Error::from_raw_os_error(libc::EXDEV);
    let mount_of = |path: &Path| -> io::Result<u64> {
        Ok(statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID)?.stx_mnt_id)
    };
    let mount = mount_of(&above)?;
    let in_copy = |path: &Path| -> io::Result<OwnedFd> {
        let below = path.strip_prefix(&above).map_err(io::Error::other)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let directory = openat(&copy, Path::new(".").join(below), flags, Mode::empty())?;
        let (there, here) = (fstat(&directory)?, stat(path)?);
        // Where something else is mounted on the way, the copy holds what is under that.
        let same = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino);
        if same && mount_of(path)? == mount { Ok(directory) } else { Err(moved()) }
    };
    Ok([in_copy(one)?, in_copy(two)?])
}

/// Has `fusermount3`, which is set-user-id root, mount and hand the connection over.
fn through_fusermount(directory: &Path, options: &MountOptions) -> io::Result<Device> {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    let escaped = |word: &str| word.replace('\\', "\\\\").replace(',', "\\,");
    let mut words = vec![
        format!("fsname={}", escaped(shown(&options.source))),
        format!("subtype={}", escaped(&options.subtype)),
        "default_permissions".into(),
    ];
    let flags = [
        (options.others, "allow_other"),
        (options.read_only, "ro"),
        (!options.suid, "nosuid"),
        (!options.dev, "nodev"),
        (!options.exec, "noexec"),
    ];
    words.extend(flags.iter().filter(|(set, _)| *set).map(|(_, word)| (*word).to_owned()));
    // Its end of the pair goes to the child as its standard input: a descriptor without
    // close-on-exec could leak into a program that another thread starts at this moment.
    let output = Command::new("fusermount3")
        .arg0("fusermount3")
        .args(["-o", &words.join(","), "--"])
        .arg(directory)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .output()
        .map_err(|e| io::Error::new(e.kind(), format!("fusermount3 cannot be run: {e}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(io::Error::other(said));
    }
    Ok(receive(&ours)?.into())
}

/// The one descriptor that comes over a socket, as `SCM_RIGHTS` beside a byte.
pub fn receive(socket: impl AsFd) -> io::Result<OwnedFd> {
    let socket = socket.as_fd();
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.first()
        {
            return Ok(crate::sys::received(*fd));
        }
    }
    Err(io::Error::other("nothing was handed over"))
}
