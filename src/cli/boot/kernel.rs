//! Which kernel a guest gets: one that is named, one that is found in its disk, one that is kept.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdisk::block::BlockDevice;
use vdisk::kernel::Found;
use vdisk::kernel::kept::{Keep, Kept, words as words_of};
use vdisk::vm::Source;
use vdisk::{Error, ErrorKind, Result};

use super::search;
use crate::cli::instance::words::hostname_of;

/// What stands first on every guest's command line: later words win.
const FIRST: &str = "reboot=k panic=-1";
const CONSOLE: &str = "console=ttyS0";

/// What the user says.
pub struct Wanted<'a> {
    /// A file, or the name of a kernel that is kept.
    pub kernel: Option<&'a Path>,
    /// A file.
    pub initrd: Option<&'a Path>,
    /// Words for the command line.
    pub append: &'a str,
    /// A command to run instead of what the disk starts.
    pub command: &'a [OsString],
    pub read_only: bool,
    /// The kernels that are kept, where there is a place for them.
    pub keep: Option<Keep>,
}

/// The bytes of a kernel and of what it starts with.
pub struct Sources {
    pub kernel: Source,
    pub initrd: Option<Source>,
}

/// A kernel and all that belongs to it.
pub struct Chosen {
    /// Where it comes from, in words.
    pub from: String,
    /// Where it stands: a path of the host, or of the disk.
    pub kernel: PathBuf,
    pub partition: Option<u32>,
    pub initrds: Vec<PathBuf>,
    pub passed_over: Vec<String>,
    pub command_line: String,
    pub sources: Sources,
}

impl Wanted<'_> {
    /// Whether the user says which file system is the root.
    fn rooted(&self) -> bool {
        self.append.split_ascii_whitespace().any(|word| word.starts_with("root="))
    }

    /// The kernel for a guest with this first disk.
    pub fn choose(&self, disk: &Arc<dyn BlockDevice>, path: &Path) -> Result<Chosen> {
        if !self.command.is_empty() {
            return self.for_command(path);
        }
        if let Some(kernel) = self.kernel {
            return self.named(kernel);
        }
        match search::find(disk, self.rooted(), path) {
            Ok(found) => self.found(found, path),
            Err(error) if error.kind() == ErrorKind::NotFound => match self.only_kept()? {
                Some(kept) => self.kept(&kept),
                None => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// A file of that name, or where there is none, a kernel that is kept.
    fn named(&self, kernel: &Path) -> Result<Chosen> {
        let plain = kernel.file_name().is_some_and(|name| name == kernel.as_os_str());
        if !kernel.exists()
            && plain
            && let Some(name) = kernel.to_str()
            && let Some(keep) = &self.keep
            && let Some(kept) = keep.get(name)?
        {
            return self.kept(&kept);
        }
        self.of_host("--kernel".into(), kernel, self.initrd)
    }

    /// A kernel that is kept, with an initrd that runs the command.
    fn for_command(&self, disk: &Path) -> Result<Chosen> {
        let needs = || {
            Error::unsupported(
                "a command runs in a guest by a kernel that is kept with its modules: `vdisk kernel \
                 add NAME KERNEL --modules /lib/modules/VERSION`",
            )
        };
        if self.initrd.is_some() {
            return Err(Error::invalid(
                "a command runs by the initrd that is kept: leave --initrd out",
            ));
        }
        let kept = match (self.kernel.map(Path::to_str), &self.keep) {
            (Some(name), Some(keep)) => name.map_or(Ok(None), |name| keep.get(name))?,
            _ => self.only_kept()?,
        };
        let kept = kept.filter(|kept| kept.runs).ok_or_else(needs)?;
        let words: Vec<_> = self.command.iter().map(|word| word.as_bytes()).collect();
        let words = words_of(&words, &hostname_of(disk));
        let mut chosen = self.kept(&kept)?;
        chosen.command_line = format!("{} quiet {words}", chosen.command_line);
        Ok(chosen)
    }

    /// The kernel that is kept, where it is the only one: of several the user names one.
    fn only_kept(&self) -> Result<Option<Kept>> {
        let Some(keep) = &self.keep else { return Ok(None) };
        let mut all = keep.list()?;
        if all.len() > 1 {
            let names: Vec<_> = all.iter().map(|kept| kept.name.as_str()).collect();
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "no kernel was found in the disk, and several are kept: say which with --kernel \
                     ({})",
                    names.join(", ")
                ),
            ));
        }
        Ok(all.pop())
    }

    fn kept(&self, kept: &Kept) -> Result<Chosen> {
        let from = format!("the kernel {} that is kept", kept.name);
        self.of_host(from, &kept.kernel, self.initrd.or(kept.initrd.as_deref()))
    }

    fn of_host(&self, from: String, kernel: &Path, initrd: Option<&Path>) -> Result<Chosen> {
        let sources = Sources {
            kernel: Source::open(kernel, "kernel")?,
            initrd: initrd.map(|path| Source::open(path, "initrd")).transpose()?,
        };
        Ok(Chosen {
            from,
            kernel: kernel.to_owned(),
            partition: None,
            initrds: initrd.map(Path::to_owned).into_iter().collect(),
            passed_over: Vec::new(),
            command_line: self.line("root=/dev/vda"),
            sources,
        })
    }

    fn found(&self, found: Found, disk: &Path) -> Result<Chosen> {
        let source = |path: &str, file| Source {
            name: PathBuf::from(format!("{}:{path}", disk.display())),
            file,
        };
        let kernel = source(&found.path, found.kernel);
        let initrds = match self.initrd {
            Some(path) => vec![path.to_owned()],
            None => found.initrds.iter().map(PathBuf::from).collect(),
        };
        let initrd = match self.initrd {
            Some(path) => Some(Source::open(path, "initrd")?),
            None => found.initrd.map(|file| source(&found.initrds.join(","), file)),
        };
        Ok(Chosen {
            from: found.from,
            kernel: found.path.into(),
            partition: found.partition,
            initrds,
            passed_over: found.passed_over,
            command_line: self.line(&found.options),
            sources: Sources { kernel, initrd },
        })
    }

    /// What the disk says between what every guest is told and what the user says. The console that is
    /// named last is the one that the guest's own programs get.
    fn line(&self, options: &str) -> String {
        let is_access = |word: &str| word == "ro" || word == "rw";
        let mut words = vec![FIRST];
        words.extend(options.split_ascii_whitespace());
        if self.read_only {
            words.push("ro");
        } else if !words.iter().any(|word| is_access(word)) {
            words.push("rw");
        }
        let consoles = words.iter().rev().find_map(|word| word.strip_prefix("console="));
        if !consoles.is_some_and(|console| console.starts_with("ttyS0")) {
            words.push(CONSOLE);
        }
        let line = words.join(" ");
        format!("{line} {}", self.append).trim_end().to_owned()
    }
}
