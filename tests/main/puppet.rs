//! System calls made in place of another process, as code that took it over would make them. By ptrace(2):
//! the process knows nothing of it, and needs nothing for it.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::libc::{self, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Below the stack of a thread: nothing of its own is there.
const BELOW: u64 = 1024;
/// `syscall`.
const INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// A word that a call is given.
#[derive(Debug, Clone, Copy)]
pub enum Word<'a> {
    /// A number.
    Is(i64),
    /// A path, by its address.
    Path(&'a Path),
    /// The address of the page that the stack is in.
    Stack,
}

/// A thread of another process that stands still.
pub struct Puppet {
    thread: Pid,
    memory: File,
    before: user_regs_struct,
    /// The address of an instruction that makes a call.
    instruction: u64,
    /// What it was signalled meanwhile.
    owed: Cell<Option<Signal>>,
}

impl Puppet {
    /// Stops a thread of the process. It goes on when this is dropped.
    pub fn stop(process: u32, thread: i32) -> Puppet {
        let thread = Pid::from_raw(thread);
        ptrace::seize(thread, Options::empty()).unwrap();
        ptrace::interrupt(thread).unwrap();
        let stopped = wait(thread);
        assert!(matches!(stopped, WaitStatus::PtraceEvent(..)), "{stopped:?}");
        Puppet::of(process, thread)
    }

    fn of(process: u32, thread: Pid) -> Puppet {
        let memory = File::options().read(true).write(true).open(format!("/proc/{process}/mem"));
        let (memory, before) = (memory.unwrap(), ptrace::getregs(thread).unwrap());
        let instruction = instruction(process, &memory);
        Puppet { thread, memory, before, instruction, owed: Cell::default() }
    }

    /// Makes a call there; what it returned.
    pub fn call(&self, number: i64, words: &[Word<'_>]) -> i64 {
        let mut regs = self.before;
        regs.rip = self.instruction;
        // It is in no call that could be begun again.
        regs.orig_rax = u64::MAX;
        self.fill(&mut regs, number, words);
        ptrace::setregs(self.thread, regs).unwrap();
        loop {
            ptrace::step(self.thread, None).unwrap();
            match wait(self.thread) {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => break,
                // It has not made the call yet: one that it has started has ended, say.
                WaitStatus::Stopped(_, signal) => self.owed.set(Some(signal)),
                other => panic!("{other:?}"),
            }
        }
        ptrace::getregs(self.thread).unwrap().rax as i64
    }

    /// Puts a call's number and words where the kernel looks for them.
    fn fill(&self, regs: &mut user_regs_struct, number: i64, words: &[Word<'_>]) {
        let mut room = (regs.rsp - BELOW) & !15;
        let mut words = words.iter().map(|word| match word {
            Word::Is(number) => *number as u64,
            Word::Stack => regs.rsp & !0xfff,
            Word::Path(path) => {
                let mut bytes = path.as_os_str().as_encoded_bytes().to_vec();
                bytes.push(0);
                room -= bytes.len() as u64;
                self.memory.write_all_at(&bytes, room).unwrap();
                room
            }
        });
        let mut next = || words.next().unwrap_or(0);
        let all: [u64; 6] = std::array::from_fn(|_| next());
        regs.rax = number as u64;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = all;
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let mut regs = self.before;
        // As the kernel would have it go on: the call that was interrupted is made again.
        match regs.rax as i64 {
            -514..=-512 if regs.orig_rax as i64 >= 0 => {
                (regs.rax, regs.rip) = (regs.orig_rax, regs.rip - 2);
            }
            -516 => (regs.rax, regs.rip) = (libc::SYS_restart_syscall as u64, regs.rip - 2),
            _ => {}
        }
        regs.orig_rax = u64::MAX;
        let _ = ptrace::setregs(self.thread, regs);
        let _ = ptrace::detach(self.thread, self.owed.get());
    }
}

fn wait(thread: Pid) -> WaitStatus {
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap()
}

/// The address of an instruction that makes a call: the kernel maps one into every process.
fn instruction(process: u32, memory: &File) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).expect("a vdso");
    let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
    let address = |text| u64::from_str_radix(text, 16).unwrap();
    let (from, to) = (address(from), address(to));
    let mut code = vec![0; usize::try_from(to - from).unwrap()];
    memory.read_exact_at(&mut code, from).unwrap();
    let at = code.windows(2).position(|two| two == INSTRUCTION).expect("a call in the vdso");
    from + at as u64
}

/// The threads of a process that run its code: their names and ids. KVM has one that runs none, in the
/// kernel alone (its flag is PF_USER_WORKER).
pub fn threads(process: u32) -> Vec<(String, i32)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let named = tasks.flatten().filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        let flags: u32 = stat.rsplit(") ").next()?.split(' ').nth(6)?.parse().ok()?;
        let named = (name.trim_end().to_owned(), task.file_name().to_str()?.parse().ok()?);
        (flags & 0x4000 == 0).then_some(named)
    });
    named.collect()
}

/// A command that is stopped when it is about to end, its work done.
pub struct Ending {
    child: Child,
    process: Pid,
    puppet: Option<Puppet>,
    /// The exit status that it would end with.
    pub status: u64,
}

impl Ending {
    /// Runs a program to its last call. A call of the number `lacking` is one that its kernel does not have.
    pub fn of(program: &str, words: &[&str], dir: &Path, lacking: Option<i64>) -> Ending {
        Ending::seize(program, words, dir, lacking, false)
    }

    /// The same of the first copy that a program makes of itself; the program stands still meanwhile.
    pub fn of_copy(program: &str, words: &[&str], dir: &Path) -> Ending {
        Ending::seize(program, words, dir, None, true)
    }

    fn seize(
        program: &str,
        words: &[&str],
        dir: &Path,
        lacking: Option<i64>,
        mut of_copy: bool,
    ) -> Ending {
        // The shell waits until it is watched.
        let mut child = Command::new("/bin/sh")
            .args(["-c", "read go; exec \"$@\"", "sh", program])
            .args(words)
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut thread = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let mut options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_EXITKILL;
        options.set(Options::PTRACE_O_TRACEFORK, of_copy);
        ptrace::seize(thread, options).unwrap();
        ptrace::interrupt(thread).unwrap();
        let mut go = child.stdin.take();
        let mut begun = false;
        let regs = loop {
            let status = wait(thread);
            if let Some(mut go) = go.take() {
                go.write_all(b"go\n").unwrap();
            }
            let signal = match status {
                WaitStatus::PtraceSyscall(_) => {
                    let regs = ptrace::getregs(thread).unwrap();
                    if begun && !of_copy && regs.orig_rax == libc::SYS_exit_group as u64 {
                        break regs;
                    }
                    if lacking.is_some_and(|number| regs.orig_rax == number as u64) {
                        // It fails with ENOSYS, which the register for its result holds already.
                        let none = user_regs_struct { orig_rax: u64::MAX, ..regs };
                        ptrace::setregs(thread, none).unwrap();
                    }
                    None
                }
                WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_FORK) if begun && of_copy => {
                    thread =
                        Pid::from_raw(i32::try_from(ptrace::getevent(thread).unwrap()).unwrap());
                    of_copy = false;
                    // It stands still from the beginning.
                    wait(thread);
                    None
                }
                WaitStatus::PtraceEvent(_, _, event) => {
                    begun |= event == libc::PTRACE_EVENT_EXEC;
                    None
                }
                WaitStatus::Stopped(_, signal) => Some(signal),
                other => panic!("{words:?} ended unseen: {other:?}"),
            };
            ptrace::syscall(thread, signal).unwrap();
        };
        // Its last call becomes one that does nothing; then it stands where others can be made.
        let nothing = user_regs_struct { orig_rax: libc::SYS_getpid as u64, ..regs };
        ptrace::setregs(thread, nothing).unwrap();
        ptrace::syscall(thread, None).unwrap();
        let left = wait(thread);
        assert!(matches!(left, WaitStatus::PtraceSyscall(_)), "{left:?}");
        let puppet = Puppet::of(thread.as_raw().unsigned_abs(), thread);
        Ending { child, process: thread, puppet: Some(puppet), status: regs.rdi }
    }

    /// What it has said on standard error.
    pub fn err(mut self) -> String {
        self.end();
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    fn end(&mut self) {
        // Its last call is not made again: there is nothing to go on to. A copy ends with what it is of.
        let _ = self.child.kill();
        drop(self.puppet.take());
        let _ = self.child.wait();
    }

    /// The process.
    pub fn process(&self) -> u32 {
        self.process.as_raw().unsigned_abs()
    }

    /// Makes a call there; what it returned.
    pub fn call(&self, number: i64, words: &[Word<'_>]) -> i64 {
        self.puppet.as_ref().unwrap().call(number, words)
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.end();
    }
}
