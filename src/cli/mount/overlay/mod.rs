//! `vdisk mount --overlay`, and the program `vdisk-overlay` that mount(8), fstab and podman run: an
//! overlay of directories, or over the files in a disk, at a directory.

mod ready;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vdisk::chain::Chain;
use vdisk::control::{self, place};
use vdisk::jail::{Jail, Reach};
use vdisk::{Error, Result};
use vdisk_fuse::Server;
use vdisk_fuse::files::Keeping;
use vdisk_fuse::mount::MountOptions;
use vdisk_fuse::server::OVERLAY_SUBTYPE;

use crate::cli::instance::holding::Bystander;
use crate::cli::mount::apart::{directory, serve_apart};
use crate::cli::mount::daemon as mount_daemon;
use crate::cli::mount::outside::Outside;
use crate::cli::open::disk::{self, Use};
use crate::cli::open::jail;
use crate::cli::open::options::Opening;
use crate::cli::terminal::stop;
pub use ready::Ready;

/// The name under which the program is a mount helper.
pub const NAME: &str = OVERLAY_SUBTYPE;
/// The verb of the process that serves.
pub const DAEMON: &str = "overlay-daemon";
/// How many requests are worked on at a time.
const THREADS: usize = 4;
/// Nobody else changes what an overlay shows.
const FOREVER: Duration = Duration::from_secs(86400);

/// An overlay to be mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Uppermost first: directories, and disks whose files are meant.
    pub lowers: Vec<PathBuf>,
    /// What of a disk is meant, and how it is opened.
    pub of_disk: OfDisk,
    /// The directory that takes the changes.
    pub upper: Option<PathBuf>,
    /// The directory to work in; beside the upper one where it is not named.
    pub work: Option<PathBuf>,
    /// Where to mount.
    pub dir: PathBuf,
    /// Options as mount(8) names them.
    options: Vec<String>,
    source: Option<String>,
}

/// What of a disk is laid under an overlay.
#[derive(clap::Args, Debug, Clone, Default, PartialEq, Eq)]
pub struct OfDisk {
    #[command(flatten)]
    pub opening: Opening,
    #[arg(long)]
    pub snapshot: Option<String>,
    #[arg(long)]
    pub partition: Option<u32>,
}

impl OfDisk {
    fn words(&self) -> Vec<OsString> {
        let mut words = self.opening.words();
        words.extend(self.snapshot.iter().map(|name| format!("--snapshot={name}").into()));
        words.extend(self.partition.iter().map(|number| format!("--partition={number}").into()));
        words
    }

    /// The disk at `path`, for reading.
    fn disk(&self, path: &Path) -> Result<Arc<Chain>> {
        let using = Use { snapshot: self.snapshot.as_deref(), ..Use::reading() };
        disk::open(path, &self.opening.holding(using))
    }
}

impl Wanted {
    /// What `vdisk mount` asks for.
    pub fn new(upper: &Path, lowers: &[PathBuf], work: Option<&Path>, dir: &Path) -> Wanted {
        Wanted {
            lowers: lowers.to_vec(),
            upper: Some(upper.to_owned()),
            work: work.map(Path::to_owned),
            dir: dir.to_owned(),
            ..Wanted::default()
        }
    }

    /// Means this of the disks among its layers.
    pub fn of_disk(self, of_disk: OfDisk) -> Wanted {
        Wanted { of_disk, ..self }
    }

    /// Whether a layer is a disk: what whoever wrote that made of device files is not to be trusted.
    fn has_disk(&self) -> bool {
        self.lowers.iter().any(|path| !path.is_dir())
    }

    /// Refuses every change.
    pub fn read_only(mut self, read_only: bool) -> Wanted {
        self.options.extend(read_only.then(|| "ro".into()));
        self
    }

    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|other| other == option)
    }

    /// Whether what is written may be lost with the machine.
    fn is_volatile(&self) -> bool {
        self.has("volatile") || self.has("nofsync")
    }

    /// Whether an option is on, by itself or by default; the last word counts.
    fn on(&self, option: &str, otherwise: bool) -> bool {
        let off = format!("no{option}");
        let said = self.options.iter().rev().find(|other| **other == option || **other == off);
        said.map_or(otherwise, |word| word == option)
    }

    /// Reads options as they stand behind `-o`.
    fn read(&mut self, list: &[u8]) -> Result<()> {
        for word in split(list, b',') {
            let (key, value) = match word.iter().position(|byte| *byte == b'=') {
                Some(at) => (&word[..at], Some(&word[at + 1..])),
                None => (word.as_slice(), None),
            };
            match (key, value) {
                (b"lowerdir", Some(value)) => {
                    self.lowers = split(value, b':').iter().map(|dir| path(dir)).collect();
                }
                (b"upperdir", Some(value)) => self.upper = Some(path(value)),
                (b"workdir", Some(value)) => self.work = Some(path(value)),
                (b"fsname", Some(value)) => {
                    self.source = Some(String::from_utf8_lossy(value).into_owned());
                }
                _ => self.option(&String::from_utf8_lossy(&word))?,
            }
        }
        Ok(())
    }

    fn option(&mut self, word: &str) -> Result<()> {
        const KNOWN: [&str; 14] = [
            "ro",
            "rw",
            "suid",
            "nosuid",
            "dev",
            "nodev",
            "exec",
            "noexec",
            "userxattr",
            "volatile",
            "stackable",
            "allow_other",
            "fsync",
            "nofsync",
        ];
        const ALWAYS: [&str; 6] = [
            "redirect_dir=on",
            "index=on",
            "xino=on",
            "xino=auto",
            "metacopy=off",
            "nfs_export=off",
        ];
        if KNOWN.contains(&word) {
            self.options.push(word.to_owned());
        } else if !idle(word) && !ALWAYS.contains(&word) {
            return Err(Error::invalid(format!("an overlay has no mount option {word:?}")));
        }
        Ok(())
    }

    /// The words that name the same overlay to the serving process.
    fn words(&self) -> Vec<OsString> {
        let mut words = Vec::new();
        for (key, paths) in [
            ("--lower", self.lowers.iter().collect::<Vec<_>>()),
            ("--upper", self.upper.iter().collect()),
            ("--work", self.work.iter().collect()),
        ] {
            for path in paths {
                words.extend([key.into(), path.clone().into()]);
            }
        }
        for option in &self.options {
            words.extend(["--option".into(), option.into()]);
        }
        if let Some(source) = &self.source {
            words.extend(["--source".into(), source.into()]);
        }
        words.extend(self.of_disk.words());
        words.push(self.dir.clone().into());
        words
    }

    /// All paths in full: the serving process stands elsewhere.
    fn settle(&mut self) -> Result<()> {
        self.dir = directory(&self.dir)?;
        self.settle_layers()
    }

    fn settle_layers(&mut self) -> Result<()> {
        if self.lowers.is_empty() {
            return Err(Error::invalid("an overlay needs a lower directory"));
        }
        if let (Some(upper), None) = (&self.upper, &self.work) {
            self.work = Some(beside(upper)?);
        }
        for path in self.lowers.iter_mut().chain(&mut self.upper).chain(&mut self.work) {
            *path = path
                .canonicalize()
                .map_err(|e| Error::io("cannot use this layer", e).at_path(&*path))?;
        }
        Ok(())
    }
}

/// Whether a mount option is always so, is the kernel's own business, or is for other programs to
/// read.
pub fn idle(word: &str) -> bool {
    const IDLE: [&str; 22] = [
        "",
        "defaults",
        "default_permissions",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "owner",
        "group",
        "nofail",
        "_netdev",
        "atime",
        "noatime",
        "relatime",
        "norelatime",
        "strictatime",
        "nodiratime",
        "diratime",
        "lazytime",
        "nolazytime",
        "async",
    ];
    IDLE.contains(&word)
        || ["x-", "comment=", "subtype=", "context=", "user="].iter().any(|p| word.starts_with(p))
}

/// The directory beside the upper one to work in, made where it is missing.
fn beside(upper: &Path) -> Result<PathBuf> {
    let failed = |e| Error::io("cannot use this upper directory", e).at_path(upper);
    let full = upper.canonicalize().map_err(failed)?;
    let mut name = full.file_name().unwrap_or_default().to_owned();
    name.push(".work");
    let work = full.with_file_name(name);
    match std::fs::create_dir(&work) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::io("cannot make the directory to work in", e).at_path(&work))
        }
        _ => Ok(work),
    }
}

/// Splits at a byte that stands for itself behind a backslash.
pub fn split(list: &[u8], at: u8) -> Vec<Vec<u8>> {
    let mut words = vec![Vec::new()];
    let mut bytes = list.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == at {
            words.push(Vec::new());
        } else if let Some(last) = words.last_mut() {
            last.push(byte);
            if byte == b'\\' {
                last.extend(bytes.next());
            }
        }
    }
    words
}

/// A word without the backslashes that protect its commas and colons.
pub fn plain(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut bytes = word.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => plain.extend(bytes.next()),
            byte => plain.push(byte),
        }
    }
    plain
}

fn path(word: &[u8]) -> PathBuf {
    OsString::from_vec(plain(word)).into()
}

/// The overlay that is wanted, its disks open, and the jail in which it is laid and works. In a user namespace
/// only `user.` attributes are its user's to set.
pub fn prepare(mut wanted: Wanted, user_namespace: bool) -> Result<(Ready, Jail)> {
    wanted.options.extend(user_namespace.then(|| "userxattr".into()));
    wanted.settle_layers()?;
    let ready = Ready::open(wanted)?;
    let jail = ready.jail()?;
    Ok((ready, jail))
}

/// Mounts an overlay and returns when it can be used.
pub fn start(mut wanted: Wanted) -> Result<u8> {
    wanted.settle()?;
    serve_apart(DAEMON, wanted.words())
}

/// The program `vdisk-overlay`: `vdisk-overlay [SOURCE] DIR [-o OPTION,...]`.
pub fn helper(words: impl Iterator<Item = OsString>) -> Result<u8> {
    let mut wanted = Wanted::default();
    let mut plain = Vec::new();
    let mut words = words;
    while let Some(word) = words.next() {
        let bytes = word.as_bytes();
        match bytes {
            b"-o" => wanted.read(words.next().unwrap_or_default().as_bytes())?,
            // What mount(8) says besides: the type, and a namespace that it has entered already.
            b"-t" | b"-N" => drop(words.next()),
            b"-s" | b"-f" | b"-n" | b"-v" => {}
            b"--version" | b"-V" => {
                println!("{NAME} {}", env!("CARGO_PKG_VERSION"));
                return Ok(0);
            }
            b"--help" | b"-h" => {
                println!(
                    "usage: {NAME} [SOURCE] DIR -o lowerdir=DIR[:DIR...][,upperdir=DIR,workdir=DIR]"
                );
                return Ok(0);
            }
            _ => match bytes.strip_prefix(b"-o") {
                Some(list) => wanted.read(list)?,
                None if bytes.starts_with(b"-") => {
                    return Err(Error::invalid(format!("{NAME} has no option {word:?}")));
                }
                None => plain.push(word),
            },
        }
    }
    match plain.len() {
        1 | 2 => {}
        _ => return Err(Error::invalid(format!("usage: {NAME} [SOURCE] DIR -o OPTIONS"))),
    }
    wanted.dir = plain.pop().unwrap_or_default().into();
    let source = plain.pop().map(|source| source.to_string_lossy().into_owned());
    wanted.source = wanted.source.or(source);
    start(wanted)
}

/// What the serving process is told.
#[derive(clap::Args)]
pub struct Args {
    #[arg(long)]
    lower: Vec<PathBuf>,
    #[arg(long)]
    upper: Option<PathBuf>,
    #[arg(long)]
    work: Option<PathBuf>,
    #[arg(long)]
    option: Vec<String>,
    #[arg(long)]
    source: Option<String>,
    #[command(flatten)]
    of_disk: OfDisk,
    dir: PathBuf,
}

/// Serves an overlay until it is unmounted.
pub fn serve(args: &Args) -> Result<u8> {
    mount_daemon::leave_caller();
    let ending = stop::hold_endings()?;
    let wanted = Wanted {
        lowers: args.lower.clone(),
        of_disk: args.of_disk.clone(),
        upper: args.upper.clone(),
        work: args.work.clone(),
        dir: args.dir.clone(),
        options: args.option.clone(),
        source: args.source.clone(),
    };
    let mounting = mount_options(&wanted);
    let read_only = mounting.read_only;
    // Before this process knows anything.
    let outside = Outside::start_to_mount_files(&args.dir, mounting)?;
    let ready = Ready::open(wanted)?;
    let bound = control::Server::bind(&place::mounting(), Arc::new(Bystander))?;
    let mut jail = ready.jail()?;
    jail.reach(&place::directory()?, Reach::Sockets);
    jail::close(jail)?;
    let overlay = ready.lay()?;
    let (number, connection) = outside.mount_files(read_only)?;
    let keeping = Keeping { ttl: FOREVER, writeback: false };
    let failed = |e| Error::io("cannot serve over FUSE", e).at_path(&args.dir);
    let served = bound
        .also(&place::mount(&number))
        .and_then(|()| Server::files_on(connection, overlay, keeping, THREADS).map_err(failed));
    let server = served.inspect_err(|_| outside.detach())?;
    let end = outside.clone();
    let started = bound.serve().and_then(|control| {
        mount_daemon::when_asked(ending, move || end.unmount())?;
        mount_daemon::announced(control)
    });
    let control = match started {
        Ok(control) => control,
        Err(error) => {
            outside.detach();
            let _ = server.join();
            return Err(error);
        }
    };
    let ended = server.join().map_err(|e| Error::io("the FUSE server failed", e));
    control.end(&ended);
    ended.map(|()| 0)
}

fn mount_options(wanted: &Wanted) -> MountOptions {
    let root = nix::unistd::geteuid().is_root();
    MountOptions {
        source: wanted.source.clone().unwrap_or_else(|| NAME.into()),
        subtype: NAME.into(),
        others: root || wanted.has("allow_other"),
        read_only: wanted.has("ro") || wanted.upper.is_none(),
        suid: wanted.on("suid", root && !wanted.has_disk()),
        dev: wanted.on("dev", root && !wanted.has_disk()),
        exec: wanted.on("exec", true),
        ..MountOptions::default()
    }
}

/// Whether the program was called as the mount helper: by mount.fuse, or by mount(8) itself.
pub fn called(name: &OsStr) -> bool {
    let name = Path::new(name).file_name();
    name.is_some_and(|name| name == NAME || name == "mount.fuse.vdisk-overlay")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_with_their_escapes_and_unknown_ones_refused() {
        let mut wanted = Wanted::default();
        wanted
            .read(br"rw,lowerdir=/a\:b:/c\,d:/e,upperdir=/u,workdir=/w,nosuid,x-a=b,suid")
            .unwrap();
        assert_eq!(wanted.lowers, ["/a:b", "/c,d", "/e"].map(PathBuf::from));
        assert_eq!(wanted.upper, Some("/u".into()));
        assert!(wanted.on("suid", false));
        assert!(!wanted.on("dev", false));
        assert!(wanted.read(b"nonsense").is_err());
        assert!(wanted.read(b"metacopy=on").is_err());
    }
}
