//! A broker that is told by its server, taken over, what it is not there for: it opens, makes, names and removes
//! its disk's own files, and nothing else.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::libc;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType, recvmsg, sendmsg, sockopt,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::broker::{FORMED, assert_changes, assert_untouched, broker, has_ended, neighbours};
use crate::host::Work;
use crate::jail::{assert_bounded, let_through, scene};
use crate::mount::soon;
use crate::puppet::{Puppet, Word};
use crate::require::{Need, have};
use crate::serve::Served;

/// The server's end of its broker's channel: what code that took the server over has.
pub struct Stolen(OwnedFd);

pub const OPEN: u8 = 16;
pub const CREATE: u8 = 17;
const NAMELESS: u8 = 18;
const GIVE: u8 = 19;
const LINK: u8 = 20;
const RENAME: u8 = 21;
pub const REMOVE: u8 = 22;

/// A request as the server would make it, in its first directory.
pub fn request(what: u8, first: &[u8], second: &[u8]) -> Vec<u8> {
    let len = u8::try_from(first.len()).unwrap();
    // A mode that would have the file run as its owner.
    let number = 0o6755_u32.to_le_bytes();
    [&[what, len, 0, 0], &number[..], first, second].concat()
}

impl Stolen {
    /// Of a process that has one.
    pub fn from(process: u32) -> Stolen {
        let pid = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
        let process_fd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let numbers = fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten();
        let sockets = numbers.filter_map(|entry| {
            let link = fs::read_link(entry.path()).ok()?;
            let number = entry.file_name().to_str()?.parse().ok()?;
            link.to_str()?.starts_with("socket:").then_some(number)
        });
        let mut open = sockets
            .filter_map(|number| pidfd_getfd(&process_fd, number, PidfdGetfdFlags::empty()).ok());
        let is_it = |fd: &OwnedFd| sockopt::socket_type(fd) == Ok(SocketType::SEQPACKET);
        Stolen(open.find(is_it).expect("a channel to a broker"))
    }

    /// Sends bytes and open files, and returns what came: an error's number, and a file.
    fn ask_with(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> (i32, Option<File>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(with.push(SendAncillaryMessage::ScmRights(files)));
        }
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut with, SendFlags::NOSIGNAL).unwrap();
        let mut file = None;
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut with = RecvAncillaryBuffer::new(&mut space);
            let mut bytes = [0; 64];
            let mut room = [IoSliceMut::new(&mut bytes)];
            let got = recvmsg(&self.0, &mut room, &mut with, RecvFlags::CMSG_CLOEXEC).unwrap();
            for message in with.drain() {
                if let RecvAncillaryMessage::ScmRights(files) = message {
                    file = files.last().map(File::from);
                }
            }
            match got.bytes {
                0 => panic!("the broker has ended"),
                4.. => return (i32::from_le_bytes(bytes[..4].try_into().unwrap()), file),
                _ => {}
            }
        }
    }

    fn ask(&self, bytes: &[u8]) -> (i32, Option<File>) {
        self.ask_with(bytes, &[])
    }

    /// Requires that a request is refused, and why.
    #[track_caller]
    pub fn refused(&self, bytes: &[u8], why: &[i32]) {
        let (error, file) = self.ask(bytes);
        let text = String::from_utf8_lossy(bytes);
        assert!(why.contains(&error) && file.is_none(), "{text:?}: {error}");
    }
}

#[test]
fn a_broker_does_nothing_to_what_is_not_its_disks_whatever_it_is_told() {
    if !have(Need::Landlock) {
        return;
    }
    let work = neighbours();
    let served = Served::start(&work, "nbd disks/web.qcow2 --listen 127.0.0.1:0 --jail require");
    let stolen = Stolen::from(served.pid());
    let (eperm, einval) = (libc::EPERM, libc::EINVAL);
    let long = [b'x'; 255];
    let others: [&[u8]; 21] = [
        b"other.qcow2",
        b"web@aaaaaaaaaaaa.qcow2",
        b"web@bbbbbbbbbbbb.qcow2",
        b"web@0123456789AB.qcow2",
        b"web@0123456789a.qcow2",
        b"web@0123456789abc.qcow2",
        b"web@0123456789ab.qcow2/",
        b"web@0123456789ab.qcow2\0",
        b"web@../../base.raw.qcow2",
        b"../base.raw",
        b"../disks/web.qcow2",
        b"./web.qcow2",
        b"/etc/passwd",
        b"/proc/self/exe",
        b".",
        b"..",
        b"",
        b".web.qcow2.1-.draft",
        b".other.qcow2.1-1.draft",
        b"\xff\xfe",
        &long,
    ];
    for name in others {
        for what in [OPEN, CREATE, GIVE, REMOVE] {
            stolen.refused(&request(what, name, b""), &[eperm, einval]);
        }
        for what in [LINK, RENAME] {
            stolen.refused(&request(what, name, b"web.qcow2"), &[eperm]);
            stolen.refused(&request(what, name, FORMED.as_bytes()), &[eperm]);
            stolen.refused(&request(what, b"web.qcow2", name), &[eperm]);
            stolen.refused(&request(what, name, name), &[eperm]);
        }
    }
    // No other directory, nor what is only told before the jail is closed.
    let mut elsewhere = request(OPEN, b"web.qcow2", b"");
    elsewhere[2] = 1;
    stolen.refused(&elsewhere, &[einval]);
    for what in 1..=5 {
        stolen.refused(&request(what, b"other.qcow2", b""), &[eperm]);
    }
    assert_untouched(&work);
    gives_no_name_to_what_has_one(&stolen, &work);
    assert_untouched(&work);
    follows_no_link(&stolen, &work);
    drop(stolen);
    assert_changes(&work, "disks/web.qcow2");
    served.stop();
}

/// A file that is open for reading only would be the disk's, to be written, under one of its names.
fn gives_no_name_to_what_has_one(stolen: &Stolen, work: &Work) {
    let give = request(GIVE, FORMED.as_bytes(), b"");
    let other = File::open(work.path("disks/other.qcow2")).unwrap();
    let dir = File::open(work.path("disks")).unwrap();
    for file in [other.as_fd(), dir.as_fd(), stolen.0.as_fd()] {
        assert_eq!(stolen.ask_with(&give, &[file]).0, libc::EPERM);
    }
    let made = stolen.ask(&request(NAMELESS, b"", b""));
    let made = made.1.unwrap();
    assert_eq!(stolen.ask_with(&give, &[made.as_fd(), other.as_fd()]).0, libc::EINVAL);
    assert!(!work.path("disks").join(FORMED).exists());
    assert_eq!(stolen.ask_with(&give, &[made.as_fd()]).0, 0);
    // It was made for who asked, and never to run as its owner.
    assert_eq!(made.metadata().unwrap().permissions().mode() & 0o7000, 0);
    made.write_all_at(b"the disk's", 0).unwrap();
    let twice = stolen.ask_with(&request(GIVE, b"web@1123456789ab.qcow2", b""), &[made.as_fd()]);
    assert_eq!(twice.0, libc::EPERM);
    assert_eq!(stolen.ask(&request(REMOVE, FORMED.as_bytes(), b"")).0, 0);
}

/// A link in the place of a file of the disk's, or what else may stand there.
fn follows_no_link(stolen: &Stolen, work: &Work) {
    let at = work.path("disks").join(FORMED);
    let other = work.path("disks/other.qcow2");
    for target in [Path::new("other.qcow2"), &other, Path::new("../base.raw"), Path::new("none")] {
        symlink(target, &at).unwrap();
        stolen.refused(&request(OPEN, FORMED.as_bytes(), b""), &[libc::ELOOP]);
        stolen.refused(&request(CREATE, FORMED.as_bytes(), b""), &[libc::EEXIST]);
        for what in [LINK, RENAME] {
            let moved = request(what, FORMED.as_bytes(), b"web@1123456789ab.qcow2");
            stolen.refused(&moved, &[libc::EACCES]);
        }
        assert_eq!(stolen.ask(&request(REMOVE, FORMED.as_bytes(), b"")).0, 0);
    }
    nix::unistd::mkfifo(&at, nix::sys::stat::Mode::S_IRWXU).unwrap();
    stolen.refused(&request(OPEN, FORMED.as_bytes(), b""), &[libc::EPERM]);
    fs::remove_file(&at).unwrap();
    fs::create_dir(&at).unwrap();
    stolen.refused(&request(OPEN, FORMED.as_bytes(), b""), &[libc::EISDIR]);
    stolen.refused(&request(REMOVE, FORMED.as_bytes(), b""), &[libc::EISDIR]);
    fs::remove_dir(&at).unwrap();
    assert_untouched(work);
}

#[test]
fn a_broker_answers_what_is_no_request_and_goes_on() {
    if !have(Need::Landlock) {
        return;
    }
    let work = neighbours();
    let served = Served::start(&work, "vhost-user disks/web.qcow2 --socket sock --jail require");
    let stolen = Stolen::from(served.pid());
    let whole = request(RENAME, b"web.qcow2", FORMED.as_bytes());
    // Of less than it says, of nothing that it knows, of more than there is room for.
    for len in 1..8 + b"web.qcow2".len() {
        stolen.refused(&whole[..len], &[libc::EINVAL]);
    }
    for what in [0, 6, 15, 23, 255] {
        stolen.refused(&request(what, b"web.qcow2", b""), &[libc::EINVAL]);
    }
    for len in [600, 1023, 1024, 1025, 4096, 100_000] {
        let mut more = request(REMOVE, b"web.qcow2", b"");
        more.resize(len, b'x');
        stolen.refused(&more, &[libc::EINVAL]);
        stolen.refused(&vec![REMOVE; len], &[libc::EINVAL]);
    }
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..2000 {
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed as u8
        };
        let len = 1 + usize::from(next()) % 40;
        let mut bytes: Vec<u8> = (0..len).map(|_| next()).collect();
        bytes[0] = 16 + bytes[0] % 8;
        let (error, file) = stolen.ask(&bytes);
        let nothing = bytes[0] == NAMELESS || file.is_none() && error != 0;
        assert!(nothing, "round {round}: {bytes:?}: {error}");
    }
    // Files that come with what asks for none go.
    let null = File::open("/dev/null").unwrap();
    let before = open_files(broker(served.pid()).unwrap());
    for count in 1..=8 {
        let files = vec![null.as_fd(); count];
        let (error, file) = stolen.ask_with(&request(OPEN, b"web.qcow2", b""), &files);
        assert_eq!((error, file.is_some()), (libc::EINVAL, false), "{count}");
    }
    assert_eq!(open_files(broker(served.pid()).unwrap()), before);
    drop(stolen);
    assert_untouched(&work);
    work.vdisk("snapshot create disks/web.qcow2 two").succeeds();
    served.stop();
    assert_untouched(&work);
}

fn open_files(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}

#[test]
fn a_broker_is_in_a_jail_of_its_own_and_out_of_the_servers_reach() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    let served = Served::start(&work, "nbd disks/clone.qcow2 --socket sockets/sock --jail require");
    let process = broker(served.pid()).unwrap();
    assert_bounded(process);
    // It has a channel and the directories, and none of what the server has.
    let open = fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten();
    let mut open: Vec<_> = open.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    open.retain(|target| target != Path::new("/dev/null") && target.starts_with("/"));
    open.sort();
    let real = |name: &str| fs::canonicalize(work.path(name)).unwrap();
    assert_eq!(open, [real("disks"), real("sockets")]);
    // What it says of itself only root may read.
    let owner = fs::metadata(format!("/proc/{process}/environ")).unwrap();
    assert_eq!((owner.uid(), owner.mode() & 0o077), (0, 0));
    let puppet = Puppet::stop(process, i32::try_from(process).unwrap());
    let through = let_through(&prey, |number, words| puppet.call(number, words));
    assert!(through.is_empty(), "{through:?}");
    let here = Word::Is(i64::from(libc::AT_FDCWD));
    let disk = work.path("disks/clone.qcow2");
    let more = [
        (libc::SYS_openat, vec![here, Word::Path(Path::new("/etc/passwd")), Word::Is(0)]),
        (libc::SYS_mkdirat, vec![here, Word::Path(&work.path("disks/dir")), Word::Is(0o700)]),
        (libc::SYS_chmod, vec![Word::Path(&disk), Word::Is(0o777)]),
        (libc::SYS_clone, vec![Word::Is(0)]),
        (libc::SYS_read, vec![Word::Is(0), Word::Stack, Word::Is(1)]),
        (libc::SYS_dup, vec![Word::Is(0)]),
        (libc::SYS_getpid, vec![]),
    ]
    .map(|(number, words)| puppet.call(number, &words));
    assert!(more.iter().all(|done| [-1, -13].contains(done)), "{more:?}");
    drop(puppet);
    work.vdisk("snapshot create disks/clone.qcow2 one").succeeds();
    let puppet = Puppet::stop(served.pid(), i32::try_from(served.pid()).unwrap());
    let broker = Word::Is(process.into());
    // PTRACE_SEIZE.
    for (number, words) in [
        (libc::SYS_kill, vec![broker, Word::Is(0)]),
        (libc::SYS_ptrace, vec![Word::Is(0x4206), broker]),
        (libc::SYS_process_vm_readv, vec![broker]),
    ] {
        assert_eq!(puppet.call(number, &words), -i64::from(libc::EPERM));
    }
    let memory = PathBuf::from(format!("/proc/{process}/mem"));
    assert!(puppet.call(libc::SYS_openat, &[here, Word::Path(&memory), Word::Is(0)]) < 0);
    drop(puppet);
    served.stop();
    soon("the broker's end", || has_ended(process));
}
