//! Runs a command under ptrace(2): writes down everything that it changes in one directory, and
//! stops it, or makes a call fail, at a chosen one of those changes.
//!
//! Nothing in the command knows of this. It knows system calls and files, and no disk.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{self, c_long, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use vdisk::internals::storage::{Access, FileOptions, FileStorage};

use super::holder::SAID;
use crate::model::pattern;
use crate::processes::spawn;

/// Bytes that the command finds in its standard input.
const STDIN: u64 = 9000;

/// A file, however many names it has. Unlike an inode's number it is not used again.
pub type FileId = usize;

/// One change below the directory.
#[derive(Debug, Clone)]
pub enum Event {
    Write {
        file: FileId,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// Zeroes within the file, or beyond its end where `grow`.
    Zero {
        file: FileId,
        offset: u64,
        len: u64,
        grow: bool,
    },
    SetLen {
        file: FileId,
        len: u64,
    },
    /// All changes of the file before the event `upto` are durable.
    Sync {
        file: FileId,
        upto: usize,
    },
    /// A new, empty file, without a name.
    New {
        file: FileId,
    },
    Name {
        name: String,
        file: FileId,
    },
    Rename {
        from: String,
        to: String,
    },
    Remove {
        name: String,
    },
    /// All changes of names before the event `upto` are durable.
    SyncNames {
        upto: usize,
    },
    /// A holder said how many of its writes are durable.
    Said {
        number: usize,
    },
}

/// What happens to the command on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It runs to its end.
    Undisturbed,
    /// It is killed before it does this change, counted from 0.
    Kill(usize),
    /// This change is not done, and returns an error.
    Fail(usize, Errno),
    /// From this change on the host has no room: whatever takes some fails.
    Full(usize),
}

/// What became of the command.
#[derive(Debug)]
pub struct Run {
    /// The exit status; `None` after a signal.
    pub status: Option<i32>,
    /// What it changed.
    pub log: Vec<Event>,
    /// The changes that it tried, those that failed included.
    pub tried: usize,
    /// Files whose names it gave to others while anybody could have begun to write them.
    pub unguarded: Vec<String>,
    /// What it wrote to its standard error.
    pub stderr: String,
}

/// The files of a directory by inode number.
pub struct Files {
    dir: PathBuf,
    ids: HashMap<u64, FileId>,
    next: FileId,
}

impl Files {
    /// Those that `dir` holds now, their ids in the order of their names.
    pub fn of(dir: &Path) -> (Files, Vec<(String, FileId)>) {
        let mut files = Files { dir: dir.canonicalize().unwrap(), ids: HashMap::new(), next: 0 };
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap()).collect();
        names.sort_by_key(|entry| entry.file_name());
        let named = names.iter().map(|entry| {
            let ino = entry.metadata().unwrap().ino();
            let id = *files.ids.entry(ino).or_insert(files.next);
            files.next = files.next.max(id + 1);
            (entry.file_name().into_string().unwrap(), id)
        });
        let named = named.collect();
        (files, named)
    }

    fn born(&mut self, ino: u64) -> FileId {
        self.next += 1;
        self.ids.insert(ino, self.next - 1);
        self.next - 1
    }
}

/// A change that a thread is doing.
enum Call {
    Write {
        file: FileId,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// The bytes come from a file: they are looked at when they are there.
    Copy {
        file: FileId,
        fd: i32,
        offset: u64,
        len: Option<u64>,
    },
    Zero {
        file: FileId,
        offset: u64,
        len: u64,
        grow: bool,
    },
    SetLen {
        file: FileId,
        len: u64,
    },
    Grow {
        file: FileId,
        len: u64,
    },
    Sync {
        file: FileId,
        upto: usize,
    },
    SyncNames {
        upto: usize,
    },
    Open {
        name: Option<String>,
        there: bool,
        truncates: bool,
    },
    Name {
        name: String,
    },
    Rename {
        from: String,
        to: String,
    },
    Remove {
        name: String,
    },
    Said {
        number: usize,
    },
}

impl Call {
    fn takes_room(&self) -> bool {
        match self {
            Call::Write { .. } | Call::Copy { .. } | Call::Grow { .. } => true,
            Call::Open { there, .. } => !there,
            Call::Name { .. } => true,
            Call::Zero { grow, .. } => *grow,
            _ => false,
        }
    }
}

/// A thread between a call's entry and its exit.
struct Inside {
    call: Option<Call>,
    fails: Option<Errno>,
}

struct Tracer {
    files: Files,
    fate: Fate,
    inside: HashMap<Pid, Inside>,
    /// Whether the command itself runs, and no longer the shell that waits to become it.
    begun: bool,
    run: Run,
}

/// Runs `program` with `args` in the directory that `files` were read from.
pub fn run(program: &Path, args: &[String], files: Files, fate: Fate) -> Run {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "read go; exec \"$@\"", "sh"]).arg(program).args(args);
    command.current_dir(&files.dir);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = spawn(&mut command);
    let pid = Pid::from_raw(child.id() as i32);
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(pid, options).unwrap();
    ptrace::interrupt(pid).unwrap();
    let (log, unguarded, stderr) = (Vec::new(), Vec::new(), String::new());
    let run = Run { status: None, log, tried: 0, unguarded, stderr };
    let mut tracer = Tracer { files, fate, inside: HashMap::new(), begun: false, run };
    let mut go = child.stdin.take();
    loop {
        // Only what this thread started: others run commands too.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let status = waitpid(None, Some(flags)).unwrap();
        if let Some(mut go) = go.take() {
            // The shell takes the first line, and the command has the rest.
            go.write_all(b"go\n").unwrap();
            go.write_all(&pattern(0, STDIN, 7)).unwrap();
        }
        match status {
            WaitStatus::Exited(p, code) if p == pid => {
                tracer.run.status = Some(code);
                break;
            }
            WaitStatus::Signaled(p, ..) if p == pid => break,
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {}
            other => tracer.stopped(pid, other),
        }
    }
    // The loop has seen its end: there is nothing left to wait for.
    let _ = child.wait();
    let mut stderr = child.stderr.take().unwrap();
    std::io::Read::read_to_string(&mut stderr, &mut tracer.run.stderr).unwrap();
    tracer.run
}

impl Tracer {
    fn stopped(&mut self, leader: Pid, status: WaitStatus) {
        let (thread, signal) = match status {
            WaitStatus::PtraceSyscall(thread) => {
                if self.syscall(thread) {
                    let _ = kill(leader, Signal::SIGKILL);
                    return;
                }
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, _, event) => {
                self.begun |= event == libc::PTRACE_EVENT_EXEC;
                (thread, None)
            }
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            other => panic!("{other:?}"),
        };
        // A thread that was killed meanwhile is gone.
        let _ = ptrace::syscall(thread, signal);
    }

    /// The entry or the exit of a call; `true` where the command dies here.
    fn syscall(&mut self, thread: Pid) -> bool {
        let (Ok(info), Ok(regs)) = (ptrace::syscall_info(thread), ptrace::getregs(thread)) else {
            return false;
        };
        if info.op == libc::PTRACE_SYSCALL_INFO_EXIT {
            if let Some(inside) = self.inside.remove(&thread) {
                self.exit(thread, inside, regs);
            }
            return false;
        }
        let call = if self.begun { self.decode(thread, &regs) } else { None };
        let mut fails = None;
        if let Some(Call::Rename { to, .. }) = &call {
            self.look_for_guard(to.clone());
        }
        if let Some(call) = &call {
            let number = self.run.tried;
            fails = match self.fate {
                Fate::Kill(at) if at == number => return true,
                Fate::Fail(at, errno) if at == number => Some(errno),
                Fate::Full(at) if at <= number && call.takes_room() => Some(Errno::ENOSPC),
                _ => None,
            };
            if fails.is_some() {
                let _ = ptrace::setregs(thread, user_regs_struct { orig_rax: u64::MAX, ..regs });
            }
            self.run.tried += 1;
        }
        self.inside.insert(thread, Inside { call, fails });
        false
    }

    /// Notes whether another program could open the file `name`, which is about to lose its name, for
    /// writing: what it wrote would be gone.
    fn look_for_guard(&mut self, name: String) {
        let options = FileOptions { access: Some(Access::Write), write: false };
        let path = self.files.dir.join(&name);
        if path.exists() && FileStorage::open_within(&path, options, Duration::ZERO).is_ok() {
            self.run.unguarded.push(name);
        }
    }

    fn exit(&mut self, thread: Pid, inside: Inside, regs: user_regs_struct) {
        if let Some(errno) = inside.fails {
            let rax = -(errno as i64) as u64;
            let _ = ptrace::setregs(thread, user_regs_struct { rax, ..regs });
            return;
        }
        let result = regs.rax as i64;
        if let Some(call) = inside.call.filter(|_| result >= 0) {
            self.note(thread, call, result as u64);
        }
    }

    /// Writes down a call that was done.
    fn note(&mut self, thread: Pid, call: Call, result: u64) {
        let event = match call {
            Call::Write { file, offset, mut bytes } => {
                bytes.truncate(result as usize);
                Event::Write { file, offset, bytes }
            }
            Call::Copy { file, fd, offset, len } => {
                let target = File::open(format!("/proc/{thread}/fd/{fd}")).unwrap();
                let len = len.unwrap_or(if result > 0 {
                    result
                } else {
                    target.metadata().unwrap().len()
                });
                let mut bytes = vec![0; len as usize];
                target.read_exact_at(&mut bytes, offset).unwrap();
                Event::Write { file, offset, bytes }
            }
            Call::Zero { file, offset, len, grow } => Event::Zero { file, offset, len, grow },
            Call::SetLen { file, len } => Event::SetLen { file, len },
            Call::Grow { file, len } => Event::Zero { file, offset: len, len: 0, grow: true },
            Call::Said { number } => Event::Said { number },
            Call::Sync { file, upto } => Event::Sync { file, upto },
            Call::SyncNames { upto } => Event::SyncNames { upto },
            Call::Rename { from, to } => Event::Rename { from, to },
            Call::Remove { name } => Event::Remove { name },
            Call::Name { name } => {
                let ino = fs::metadata(self.files.dir.join(&name)).unwrap().ino();
                Event::Name { file: self.files.ids[&ino], name }
            }
            Call::Open { name, there, truncates } => {
                return self.opened(thread, name, there, truncates, result);
            }
        };
        self.run.log.push(event);
    }

    fn opened(&mut self, thread: Pid, name: Option<String>, there: bool, truncates: bool, fd: u64) {
        let ino = fs::metadata(format!("/proc/{thread}/fd/{fd}")).unwrap().ino();
        if there {
            if truncates {
                self.run.log.push(Event::SetLen { file: self.files.ids[&ino], len: 0 });
            }
            return;
        }
        let file = self.files.born(ino);
        self.run.log.push(Event::New { file });
        if let Some(name) = name {
            self.run.log.push(Event::Name { name, file });
        }
    }
}

/// Reads a call's arguments.
impl Tracer {
    /// The change of the directory that a call is about to do, if it does one.
    fn decode(&self, thread: Pid, regs: &user_regs_struct) -> Option<Call> {
        let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
        let [first, second, third, fourth, ..] = args;
        let at = self.run.log.len();
        let fd = first as i32;
        match regs.orig_rax as c_long {
            libc::SYS_write if fd == libc::STDERR_FILENO => {
                let said = String::from_utf8(peek(thread, second, third)).ok()?;
                let number = said.strip_prefix(SAID)?.trim_end().parse().ok()?;
                Some(Call::Said { number })
            }
            libc::SYS_write => {
                let file = self.file(thread, fd)?;
                let bytes = peek(thread, second, third);
                Some(Call::Write { file, offset: position(thread, fd), bytes })
            }
            libc::SYS_pwrite64 => {
                let file = self.file(thread, fd)?;
                Some(Call::Write { file, offset: fourth, bytes: peek(thread, second, third) })
            }
            libc::SYS_writev => {
                let file = self.file(thread, fd)?;
                let bytes = gather(thread, second, third);
                Some(Call::Write { file, offset: position(thread, fd), bytes })
            }
            libc::SYS_pwritev | libc::SYS_pwritev2 => {
                let file = self.file(thread, fd)?;
                Some(Call::Write { file, offset: fourth, bytes: gather(thread, second, third) })
            }
            libc::SYS_fallocate => self.fallocate(thread, fd, second as i32, third, fourth),
            libc::SYS_ftruncate => Some(Call::SetLen { file: self.file(thread, fd)?, len: second }),
            libc::SYS_fsync | libc::SYS_fdatasync if self.is_dir(thread, fd) => {
                Some(Call::SyncNames { upto: at })
            }
            libc::SYS_fsync | libc::SYS_fdatasync => {
                Some(Call::Sync { file: self.file(thread, fd)?, upto: at })
            }
            libc::SYS_copy_file_range | libc::SYS_ioctl => self.copy(thread, regs),
            _ => self.names(thread, regs.orig_rax as c_long, args),
        }
    }

    fn fallocate(&self, thread: Pid, fd: i32, mode: i32, offset: u64, len: u64) -> Option<Call> {
        let file = self.file(thread, fd)?;
        let keep = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 if keep => None,
            0 => Some(Call::Grow { file, len: offset + len }),
            libc::FALLOC_FL_PUNCH_HOLE => Some(Call::Zero { file, offset, len, grow: false }),
            libc::FALLOC_FL_ZERO_RANGE => Some(Call::Zero { file, offset, len, grow: !keep }),
            other => panic!("fallocate with mode {other:#x}"),
        }
    }

    fn copy(&self, thread: Pid, regs: &user_regs_struct) -> Option<Call> {
        const FICLONE: u64 = 0x4004_9409;
        const FICLONERANGE: u64 = 0x4020_940d;
        let word = |at: u64| u64::from_le_bytes(peek(thread, at, 8).try_into().unwrap());
        let (fd, offset, len) = match regs.orig_rax as c_long {
            libc::SYS_copy_file_range if regs.r10 == 0 => {
                (regs.rdx as i32, position(thread, regs.rdx as i32), None)
            }
            libc::SYS_copy_file_range => (regs.rdx as i32, word(regs.r10), None),
            _ if regs.rsi == FICLONE => (regs.rdi as i32, 0, None),
            _ if regs.rsi == FICLONERANGE => {
                (regs.rdi as i32, word(regs.rdx + 24), Some(word(regs.rdx + 16)))
            }
            _ => return None,
        };
        Some(Call::Copy { file: self.file(thread, fd)?, fd, offset, len })
    }

    fn names(&self, thread: Pid, number: c_long, args: [u64; 6]) -> Option<Call> {
        const HERE: u64 = libc::AT_FDCWD as u64;
        let name = |dir: u64, path: u64| self.name(thread, dir as i32, path);
        match number {
            libc::SYS_open => self.open(name(HERE, args[0]), args[1] as i32),
            libc::SYS_openat => self.open(name(args[0], args[1]), args[2] as i32),
            libc::SYS_link => Some(Call::Name { name: name(HERE, args[1])? }),
            libc::SYS_linkat => Some(Call::Name { name: name(args[2], args[3])? }),
            libc::SYS_rename => {
                Some(Call::Rename { from: name(HERE, args[0])?, to: name(HERE, args[1])? })
            }
            libc::SYS_renameat | libc::SYS_renameat2 => {
                Some(Call::Rename { from: name(args[0], args[1])?, to: name(args[2], args[3])? })
            }
            libc::SYS_unlink => Some(Call::Remove { name: name(HERE, args[0])? }),
            libc::SYS_unlinkat => Some(Call::Remove { name: name(args[0], args[1])? }),
            _ => None,
        }
    }

    /// An open that makes a file or empties one; `name` may be the directory's own.
    fn open(&self, name: Option<String>, flags: i32) -> Option<Call> {
        let name = name?;
        if flags & libc::O_TMPFILE == libc::O_TMPFILE {
            return Some(Call::Open { name: None, there: false, truncates: false });
        }
        let (creates, truncates) = (flags & libc::O_CREAT != 0, flags & libc::O_TRUNC != 0);
        let there = self.files.dir.join(&name).exists();
        let changes = creates && !there || truncates && there;
        (changes && !name.is_empty()).then_some(Call::Open { name: Some(name), there, truncates })
    }

    /// The file in the directory that is open at `fd`.
    fn file(&self, thread: Pid, fd: i32) -> Option<FileId> {
        let link = format!("/proc/{thread}/fd/{fd}");
        if !fs::read_link(&link).ok()?.starts_with(&self.files.dir) {
            return None;
        }
        let meta = fs::metadata(&link).ok()?;
        meta.is_file().then(|| self.files.ids[&meta.ino()])
    }

    fn is_dir(&self, thread: Pid, fd: i32) -> bool {
        fs::read_link(format!("/proc/{thread}/fd/{fd}")).is_ok_and(|path| path == self.files.dir)
    }

    /// The name in the directory that a path means, empty for the directory itself; `None` where
    /// it means something elsewhere.
    fn name(&self, thread: Pid, dir: i32, path: u64) -> Option<String> {
        let path = PathBuf::from(text(thread, path));
        let from = match dir {
            libc::AT_FDCWD => fs::read_link(format!("/proc/{thread}/cwd")),
            fd => fs::read_link(format!("/proc/{thread}/fd/{fd}")),
        };
        let full: PathBuf = from.ok()?.join(path).components().collect();
        let name = full.strip_prefix(&self.files.dir).ok()?;
        Some(name.to_str().unwrap().to_owned())
    }
}

fn memory(thread: Pid) -> File {
    File::open(format!("/proc/{thread}/mem")).unwrap()
}

fn peek(thread: Pid, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    memory(thread).read_exact_at(&mut bytes, at).unwrap();
    bytes
}

fn gather(thread: Pid, vectors: u64, count: u64) -> Vec<u8> {
    let list = peek(thread, vectors, count * 16);
    let word = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap());
    list.chunks(16).flat_map(|v| peek(thread, word(&v[..8]), word(&v[8..]))).collect()
}

/// A string that ends with a zero byte.
fn text(thread: Pid, at: u64) -> String {
    let memory = memory(thread);
    let mut bytes = Vec::new();
    let mut byte = [0];
    while memory.read_exact_at(&mut byte, at + bytes.len() as u64).is_ok() && byte[0] != 0 {
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

/// Where the next read or write of an open file goes.
fn position(thread: Pid, fd: i32) -> u64 {
    let info = fs::read_to_string(format!("/proc/{thread}/fdinfo/{fd}")).unwrap();
    info.lines().find_map(|l| l.strip_prefix("pos:")).unwrap().trim().parse().unwrap()
}
