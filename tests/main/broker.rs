//! The broker beside a server: of the directory of its disk the server reads all and writes nothing by name,
//! and the broker opens, makes, names and removes the disk's own files, whatever it is told.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid as NixPid;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType, recvmsg, sendmsg, sockopt,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::boot::{Booted, can_boot};
use crate::host::Work;
use crate::jail::{assert_bounded, let_through, scene};
use crate::mount::{is_left_alone, server, soon};
use crate::puppet::{Puppet, Word};
use crate::require::{Need, have};
use crate::serve::Served;

const SIZE: usize = 8 << 20;
/// A name of the form that frozen layers of the disk have.
const FORMED: &str = "web@0123456789ab.qcow2";

/// A disk with a snapshot, and beside it what is somebody else's: a disk, what is called as a layer of the
/// first would be, and a link that is called so.
fn neighbours() -> Work {
    let work = Work::new();
    fs::create_dir(work.path("disks")).unwrap();
    work.put("base.raw", vec![0x11; SIZE]);
    work.vdisk("clone base.raw disks/web.qcow2").succeeds();
    work.vdisk("snapshot create disks/web.qcow2 one").succeeds();
    work.put("disks/other.qcow2", "another disk");
    work.put("disks/web@aaaaaaaaaaaa.qcow2", "another disk");
    symlink("other.qcow2", work.path("disks/web@bbbbbbbbbbbb.qcow2")).unwrap();
    work
}

/// Requires that what is somebody else's is what it was, and no more is there than the disk's.
#[track_caller]
fn assert_untouched(work: &Work) {
    for name in ["other.qcow2", "web@aaaaaaaaaaaa.qcow2", "web@bbbbbbbbbbbb.qcow2"] {
        assert_eq!(work.bytes(Path::new("disks").join(name)), b"another disk", "{name}");
    }
    assert!(work.path("disks/web@bbbbbbbbbbbb.qcow2").is_symlink());
    assert_eq!(fs::metadata(work.path("disks/other.qcow2")).unwrap().nlink(), 1);
    let all = fs::read_dir(work.path("disks")).unwrap();
    let names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let known = |name: &String| name.starts_with("web") || name == "other.qcow2";
    assert_eq!(names.filter(|name| !known(name)).collect::<Vec<_>>(), [""; 0]);
    assert!(work.bytes("base.raw") == [0x11; SIZE]);
}

/// The broker beside a process.
fn broker(process: u32) -> Option<u32> {
    let is_its = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((name, rest)) = stat.rsplit_once(") ") else { return false };
        let mut words = rest.split(' ');
        let lives = words.next() != Some("Z");
        lives && name.ends_with("(vdisk-broker") && words.next() == Some(&*process.to_string())
    };
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.find(is_its)
}

/// Whether a process has ended, also where nobody has asked how.
fn has_ended(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"));
    stat.map_or(true, |stat| stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')))
}

/// The server's end of its broker's channel: what code that took the server over has.
struct Stolen(OwnedFd);

const OPEN: u8 = 16;
const CREATE: u8 = 17;
const NAMELESS: u8 = 18;
const GIVE: u8 = 19;
const LINK: u8 = 20;
const RENAME: u8 = 21;
const REMOVE: u8 = 22;

/// A request as the server would make it, in its first directory.
fn request(what: u8, first: &[u8], second: &[u8]) -> Vec<u8> {
    let len = u8::try_from(first.len()).unwrap();
    // A mode that would have the file run as its owner.
    let number = 0o6755_u32.to_le_bytes();
    [&[what, len, 0, 0], &number[..], first, second].concat()
}

impl Stolen {
    /// Of a process that has one.
    fn from(process: u32) -> Stolen {
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
    fn refused(&self, bytes: &[u8], why: &[i32]) {
        let (error, file) = self.ask(bytes);
        let text = String::from_utf8_lossy(bytes);
        assert!(why.contains(&error) && file.is_none(), "{text:?}: {error}");
    }
}

/// Requires that the disk of a server can be changed in all ways that its user does not see.
fn assert_changes(work: &Work, disk: &str) {
    for words in [
        "snapshot create DISK two",
        "snapshot create DISK three",
        "snapshot create DISK four",
        "snapshot rename DISK two zwei",
        "snapshot merge DISK three --in-batches",
        "snapshot merge DISK zwei",
        "snapshot merge DISK four",
        "resize DISK +1M",
        "compact DISK",
        "check DISK",
    ] {
        work.vdisk(&words.replace("DISK", disk)).succeeds();
    }
}

#[test]
fn a_server_that_was_taken_over_changes_no_file_in_the_directory_of_its_disk() {
    if !have(Need::Landlock) {
        return;
    }
    let work = neighbours();
    // The socket is there, too: it goes with the server, and nothing else can.
    let words = "nbd disks/web.qcow2 --socket disks/web.sock --jail require";
    let served = Served::start(&work, words);
    let puppet = Puppet::stop(served.pid(), i32::try_from(served.pid()).unwrap());
    assert_changes_nothing(&puppet, &work);
    drop(puppet);
    assert_untouched(&work);
    assert_changes(&work, "disks/web.qcow2");
    served.stop();
    assert!(!work.path("disks/web.sock").exists());
    assert_untouched(&work);
    work.vdisk("check disks/web.qcow2").succeeds();
}

/// Requires that what a process tries by name in the directory of the disk is refused, for the disk, too.
fn assert_changes_nothing(puppet: &Puppet, work: &Work) {
    let at = |name: &str| -> PathBuf { work.path("disks").join(name) };
    let (own, other, new, dir) = (at("web.qcow2"), at("other.qcow2"), at(FORMED), at("."));
    let here = Word::Is(i64::from(libc::AT_FDCWD));
    let is = |flags: i32| Word::Is(i64::from(flags));
    let link = at("web@bbbbbbbbbbbb.qcow2");
    let (at_own, at_other, at_new) = (Word::Path(&own), Word::Path(&other), Word::Path(&new));
    let mode = Word::Is(0o600);
    let attacks: Vec<(&str, i64, Vec<Word<'_>>)> = vec![
        ("write another", libc::SYS_openat, vec![here, at_other, is(libc::O_RDWR)]),
        ("write by a link", libc::SYS_openat, vec![here, Word::Path(&link), is(libc::O_WRONLY)]),
        ("cut another", libc::SYS_truncate, vec![at_other, Word::Is(0)]),
        ("empty another", libc::SYS_openat, vec![here, at_other, is(libc::O_TRUNC)]),
        ("write its own", libc::SYS_openat, vec![here, at_own, is(libc::O_RDWR)]),
        ("make", libc::SYS_openat, vec![here, at_new, is(libc::O_CREAT | libc::O_RDWR), mode]),
        (
            "make without a name",
            libc::SYS_openat,
            vec![here, Word::Path(&dir), is(libc::O_TMPFILE | libc::O_RDWR), mode],
        ),
        ("rename another", libc::SYS_rename, vec![at_other, at_new]),
        ("replace another", libc::SYS_rename, vec![at_own, at_other]),
        ("replace its own", libc::SYS_rename, vec![at_other, at_own]),
        ("link", libc::SYS_link, vec![at_other, at_new]),
        ("remove another", libc::SYS_unlink, vec![at_other]),
        ("remove its own", libc::SYS_unlink, vec![at_own]),
        ("make a link", libc::SYS_symlink, vec![at_other, at_new]),
        ("make a directory", libc::SYS_mkdir, vec![at_new, mode]),
        ("make a device", libc::SYS_mknod, vec![at_new, Word::Is(0o600 | 0o060_000), Word::Is(0)]),
    ];
    for (what, number, words) in attacks {
        let done = puppet.call(number, &words);
        let refused = [-i64::from(libc::EPERM), -i64::from(libc::EACCES)];
        assert!(refused.contains(&done), "{what}: {done}");
    }
    // Headers of what stands beside it are read.
    assert!(puppet.call(libc::SYS_openat, &[here, at_other, is(libc::O_RDONLY)]) >= 0);
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

#[test]
fn without_its_broker_a_server_serves_on_and_says_why_its_tree_stays_as_it_is() {
    if !have(Need::Landlock) || !have(Need::Qemu) {
        return;
    }
    let work = neighbours();
    let served = Served::start(&work, "nbd disks/web.qcow2 --socket sock --jail require");
    served.qemu_io(&work, &["write -P 0x22 0 64k", "flush"]).succeeds();
    let process = broker(served.pid()).unwrap();
    kill(NixPid::from_raw(i32::try_from(process).unwrap()), Signal::SIGKILL).unwrap();
    soon("the broker's end", || has_ended(process));
    let why = ["the process beside this one", "has ended", "start it anew"];
    work.vdisk("snapshot create disks/web.qcow2 two").fails(&why);
    work.vdisk("snapshot delete disks/web.qcow2 one --yes").fails(&[]);
    served.qemu_io(&work, &["read -P 0x22 0 64k", "write -P 0x33 64k 64k", "flush"]).succeeds();
    // What needs no name goes on.
    work.vdisk("resize disks/web.qcow2 +1M").succeeds();
    served.stop();
    assert_untouched(&work);
    work.vdisk("check disks/web.qcow2").succeeds();
    let list = work.vdisk("snapshot list disks/web.qcow2").succeeds().out();
    assert!(list.contains("one") && !list.contains("two"), "{list}");
    assert_eq!(work.vdisk("read disks/web.qcow2 64K 1").succeeds().stdout, [0x33]);
}

#[test]
fn a_broker_ends_with_a_server_that_is_killed_and_not_by_what_ends_it() {
    let work = neighbours();
    let served = Served::start(&work, "nbd disks/web.qcow2 --socket sock");
    let process = broker(served.pid()).unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(NixPid::from_raw(i32::try_from(process).unwrap()), signal).unwrap();
    }
    work.vdisk("snapshot create disks/web.qcow2 two").succeeds();
    served.signal(Signal::SIGKILL);
    soon("the broker's end", || has_ended(process));
    // Nothing of it keeps the disk.
    work.vdisk("write disks/web.qcow2 0").succeeds();
}

#[test]
fn without_a_jail_a_server_has_no_broker() {
    let work = neighbours();
    let served = Served::start(&work, "nbd disks/web.qcow2 --socket sock --jail off");
    assert_eq!(broker(served.pid()), None);
    work.vdisk("snapshot create disks/web.qcow2 two").succeeds();
    served.stop();
}

#[test]
fn the_tree_of_a_disk_changes_under_any_name_that_it_has() {
    if !have(Need::Landlock) {
        return;
    }
    let work = neighbours();
    fs::create_dir(work.path("names")).unwrap();
    symlink("../disks/web.qcow2", work.path("names/link")).unwrap();
    let long = "x".repeat(250);
    work.vdisk(&format!("clone base.raw disks/{long}")).succeeds();
    work.vdisk(&format!("snapshot create disks/{long} zero")).succeeds();
    work.vdisk("create disks/data.qcow2 8M --data-file data.raw").succeeds();
    for disk in ["names/link", &format!("disks/{long}"), "disks/data.qcow2"] {
        let served = Served::start(&work, &format!("nbd {disk} --socket sock --jail require"));
        assert_changes(&work, disk);
        served.stop();
        work.vdisk(&format!("check {disk}")).succeeds();
    }
    // Its snapshots keep the name that it had, and so does one on another branch.
    work.vdisk("snapshot create names/link branch").succeeds();
    work.vdisk("snapshot revert names/link one --yes").succeeds();
    fs::rename(work.path("disks/web.qcow2"), work.path("disks/new")).unwrap();
    let served = Served::start(&work, "nbd disks/new --socket sock --jail require");
    work.vdisk("snapshot delete disks/new branch --yes").succeeds();
    work.vdisk("snapshot undo disks/new --yes").succeeds();
    work.vdisk("snapshot delete disks/new branch --yes").succeeds();
    work.vdisk("snapshot forget disks/new --yes").succeeds();
    assert_changes(&work, "disks/new");
    work.vdisk("snapshot merge disks/new one").succeeds();
    served.stop();
    work.vdisk("check disks/new").succeeds();
    assert_eq!(work.bytes("disks/other.qcow2"), b"another disk");
    assert_eq!(work.bytes("disks/web@aaaaaaaaaaaa.qcow2"), b"another disk");
}

#[test]
fn the_disks_of_a_guest_have_one_broker_in_all_their_directories() {
    if !can_boot() || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    let own = Work::below(&work.path("disks"));
    own.vdisk("clone ../../bases/base.raw clone.qcow2").succeeds();
    own.put("other.qcow2", "another disk");
    let mut booted = Booted::waiting(&own);
    let stolen = Stolen::from(booted.pid());
    for what in [OPEN, CREATE, REMOVE] {
        stolen.refused(&request(what, b"other.qcow2", b""), &[libc::EPERM]);
    }
    drop(stolen);
    assert_changes(&own, "clone.qcow2");
    let process = broker(booted.pid()).unwrap();
    booted.signal(Signal::SIGTERM);
    assert_eq!(booted.status(), Some(0));
    soon("the broker's end", || has_ended(process));
    assert_eq!(own.bytes("other.qcow2"), b"another disk");
    assert!(!prey.program.exists());
}

#[test]
fn the_server_of_a_mount_has_a_broker_and_one_who_unmounts() {
    if !have(Need::Fuse) || !have(Need::Landlock) {
        return;
    }
    let work = neighbours();
    let at = work.path("at");
    fs::create_dir(&at).unwrap();
    work.vdisk("mount --raw disks/web.qcow2 at --jail require").succeeds();
    let process = u32::try_from(server(&at).unwrap().as_raw()).unwrap();
    let puppet = Puppet::stop(process, i32::try_from(process).unwrap());
    assert_changes_nothing(&puppet, &work);
    drop(puppet);
    File::options().write(true).open(at.join("disk.raw")).unwrap().write_all_at(b"in", 0).unwrap();
    assert_changes(&work, "disks/web.qcow2");
    work.vdisk("umount at").succeeds();
    is_left_alone(&at);
    assert_untouched(&work);
    work.vdisk("check disks/web.qcow2").succeeds();
    assert_eq!(work.vdisk("read disks/web.qcow2 0 2").succeeds().stdout, b"in");
}

#[test]
fn a_file_system_can_be_unmounted_as_soon_as_the_server_of_a_disk_on_it_has_ended() {
    if !have(Need::Root) || !have(Need::Fuse) {
        return;
    }
    let work = Work::new();
    for dir in ["host", "at"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    for _ in 0..5 {
        work.run("mount", ["-t", "tmpfs", "tmpfs", "host"]).succeeds();
        // Below what is to be unmounted, as a user is in the directory of his disks.
        let own = Work::below(&work.path("host"));
        own.vdisk("create disk.qcow2 8M").succeeds();
        let served = Served::start(&own, "nbd disk.qcow2 --socket sock");
        own.vdisk("snapshot create disk.qcow2 one").succeeds();
        served.stop();
        let disk = own.path("disk.qcow2");
        work.vdisk(&format!("mount --raw {} at", disk.display())).succeeds();
        work.vdisk("umount at").succeeds();
        work.run("umount", ["host"]).succeeds();
        drop(own);
    }
}
