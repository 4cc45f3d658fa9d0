//! A test's place on the host: a directory of its own, commands that end in bounded time, and
//! nothing left behind, also when the test fails. Knows no format and no `vdisk` verb.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long a command may take before it counts as hung.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a test where what is mounted is its own: no namespace that another test begins meanwhile has it,
/// too, and keeps it busy, nor does this one keep what others have mounted.
pub fn with_own_mounts(test: impl FnOnce() + Send) {
    let run = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let table = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        for line in table.lines().rev() {
            let words: Vec<_> = line.split(' ').collect();
            if words[0].starts_with("/dev/loop") || words[2].starts_with("fuse") {
                let _ = umount2(words[1], MntFlags::MNT_DETACH);
            }
        }
        test();
    };
    thread::scope(|scope| scope.spawn(run).join()).unwrap();
}

/// A directory of the test's own, where its commands run. When it is dropped, what is mounted
/// below it is unmounted, loop devices on its files are detached, and its files are removed.
pub struct Work {
    dir: tempfile::TempDir,
}

impl Work {
    /// An empty directory under the host's temporary directory.
    pub fn new() -> Work {
        Work::below(&std::env::temp_dir())
    }

    /// An empty directory in `parent`, for tests that need a certain file system.
    pub fn below(parent: &Path) -> Work {
        let dir = tempfile::Builder::new().prefix("vdisk-test-").tempdir_in(parent);
        Work { dir: dir.expect("a directory to work in") }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A file's full path.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir().join(name)
    }

    /// A file's bytes.
    pub fn bytes(&self, name: impl AsRef<Path>) -> Vec<u8> {
        let path = self.path(name);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Makes or replaces a file.
    pub fn put(&self, name: impl AsRef<Path>, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// The names of the files in the directory, sorted.
    pub fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs `vdisk` with these words, split at white space.
    pub fn vdisk(&self, words: &str) -> Done {
        self.run(VDISK, words.split_whitespace())
    }

    /// Runs `vdisk` with exactly these arguments.
    pub fn vdisk_args<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Done {
        self.run(VDISK, args)
    }

    /// Runs `vdisk` with `input` on its standard input.
    pub fn vdisk_fed(&self, words: &str, input: &[u8]) -> Done {
        self.command(VDISK, words.split_whitespace()).finish(Some(input.to_vec()), PATIENCE)
    }

    /// Runs `qemu-img` with these words, split at white space.
    pub fn qemu_img(&self, words: &str) -> Done {
        self.run("qemu-img", words.split_whitespace())
    }

    /// Runs `qemu-io` on an image, one `-c` for each of `commands`. A pattern that does not
    /// hold counts as failure: older versions of qemu-io print it and still end well.
    pub fn qemu_io(&self, image: &str, commands: &[&str]) -> Done {
        let options = commands.iter().flat_map(|command| ["-c", command]);
        let mut done = self.run("qemu-io", ["-t", "writeback", image].into_iter().chain(options));
        if done.text().contains("verification failed") {
            done.code = Some(1);
        }
        done
    }

    /// Runs a program to its end, which must come within [`PATIENCE`].
    pub fn run<A: AsRef<OsStr>>(&self, program: &str, args: impl IntoIterator<Item = A>) -> Done {
        self.command(program, args).finish(None, PATIENCE)
    }

    /// A program that is about to run in this directory.
    pub fn command<A: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Running {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir()).env("LC_ALL", "C");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::start(command)
    }

    /// Starts `vdisk`; the test goes on meanwhile.
    pub fn vdisk_start(&self, words: &str) -> Running {
        self.command(VDISK, words.split_whitespace())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        for mount in mounts_below(self.dir()).iter().rev() {
            if let Some(connection) = &mount.fuse_connection {
                // A FUSE mount whose server is stuck must not take the test runner with it.
                let _ = fs::write(connection.join("abort"), "1");
            }
            let _ = umount2(&mount.point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        detach_loops_below(self.dir());
    }
}

/// The `vdisk` that cargo has built for these tests.
pub const VDISK: &str = env!("CARGO_BIN_EXE_vdisk");

/// Something mounted below a test's directory.
struct Mount {
    point: PathBuf,
    fuse_connection: Option<PathBuf>,
}

/// The mounts below `dir`, in the order in which they were made.
fn mounts_below(dir: &Path) -> Vec<Mount> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounts = table.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?;
        let point = PathBuf::from(fields.nth(1)?);
        let kind = line.split(" - ").nth(1)?;
        let minor = device.split(':').nth(1)?;
        let fuse_connection =
            kind.starts_with("fuse").then(|| Path::new("/sys/fs/fuse/connections").join(minor));
        point.starts_with(dir).then_some(Mount { point, fuse_connection })
    });
    mounts.collect()
}

/// Detaches loop devices that stand on files below `dir`.
fn detach_loops_below(dir: &Path) {
    let Ok(devices) = fs::read_dir("/sys/block") else { return };
    for device in devices.flatten() {
        let Ok(backing) = fs::read_to_string(device.path().join("loop/backing_file")) else {
            continue;
        };
        if Path::new(backing.trim_end()).starts_with(dir) {
            let node = Path::new("/dev").join(device.file_name());
            let _ = Command::new("losetup").arg("-d").arg(node).status();
        }
    }
}

/// A program under way, in a process group of its own, which is killed with this guard.
pub struct Running {
    child: Child,
    words: String,
    stdout: Receiver<Vec<u8>>,
    stderr: Receiver<Vec<u8>>,
}

impl Running {
    fn start(mut command: Command) -> Running {
        let words = format!("{command:?}");
        let mut child = command
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{words} does not start: {error}"));
        let stdout = drained(child.stdout.take().unwrap());
        let stderr = drained(child.stderr.take().unwrap());
        Running { child, words, stdout, stderr }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to the program's standard input, which stays open.
    pub fn type_in(&mut self, input: &[u8]) {
        let stdin = self.child.stdin.as_mut().expect("standard input is closed");
        stdin.write_all(input).and_then(|()| stdin.flush()).unwrap();
    }

    /// Sends a signal to the program itself.
    pub fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(self.group(), signal).unwrap();
    }

    /// Whether the program has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Closes standard input, waits for the end and gives all that was printed.
    pub fn wait(self) -> Done {
        self.finish(None, PATIENCE)
    }

    /// As [`Running::wait`], with `input` on standard input and a limit of its own.
    pub fn finish(mut self, input: Option<Vec<u8>>, limit: Duration) -> Done {
        let stdin = self.child.stdin.take();
        // In a thread: a program that prints before it has read all would block us both.
        thread::spawn(move || {
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                // A program that ends early closes the pipe; its exit status tells.
                let _ = stdin.write_all(&input);
            }
        });
        let status = self.wait_until(Instant::now() + limit);
        let left_open = "ended, but something it left running holds its output open";
        let take = |from: &str| {
            let pipe = if from == "stdout" { &self.stdout } else { &self.stderr };
            pipe.recv_timeout(Duration::from_secs(10))
                .unwrap_or_else(|_| panic!("{} {left_open} ({from})", self.words))
        };
        let (stdout, stderr) = (take("stdout"), take("stderr"));
        let words = self.words.clone();
        Done { words, code: status.code(), signal: status.signal(), stdout, stderr }
    }

    fn wait_until(&mut self, deadline: Instant) -> ExitStatus {
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} hangs", self.words);
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    fn group(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = killpg(self.group(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// Reads a pipe to its end in a thread of its own.
fn drained(mut pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    receiver
}

/// A program that has ended.
pub struct Done {
    /// The command line, for messages.
    pub words: String,
    /// The exit status; none where a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Done {
    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// All that was printed.
    pub fn text(&self) -> String {
        self.out() + &self.err()
    }

    /// Requires exit status 0.
    #[track_caller]
    pub fn succeeds(self) -> Done {
        self.ends(0)
    }

    /// Requires an exit status.
    #[track_caller]
    pub fn ends(self, code: i32) -> Done {
        assert!(
            self.code == Some(code),
            "{} should end with {code}, not {:?} (signal {:?})\nstdout: {}\nstderr: {}",
            self.words,
            self.code,
            self.signal,
            self.out(),
            self.err(),
        );
        self
    }

    /// Requires exit status 1 and a message on stderr that holds each of `parts`, whatever
    /// their case, and that is no panic.
    #[track_caller]
    pub fn fails(self, parts: &[&str]) -> Done {
        let done = self.ends(1);
        done.says(parts);
        done
    }

    /// As [`fails`](Done::fails), of `vdisk run`, whose own failures are told from its program's.
    #[track_caller]
    pub fn fails_to_run(self, parts: &[&str]) -> Done {
        let done = self.ends(125);
        done.says(parts);
        done
    }

    /// Requires exit status 1 or 64, where the contract leaves open which, and a message.
    #[track_caller]
    pub fn refuses(self, parts: &[&str]) -> Done {
        let code = if self.code == Some(64) { 64 } else { 1 };
        let done = self.ends(code);
        assert!(!done.stderr.is_empty(), "{}: no message", done.words);
        done.says(parts);
        done
    }

    /// Requires each of `parts`, whatever their case, on stderr.
    #[track_caller]
    pub fn says(&self, parts: &[&str]) {
        let message = self.err().to_lowercase();
        assert!(!message.contains("panicked"), "{}: {}", self.words, self.err());
        for part in parts {
            assert!(
                message.contains(&part.to_lowercase()),
                "{}: the message should hold {part:?}: {:?}",
                self.words,
                self.err(),
            );
        }
    }
}
