//! Kernels that a user keeps for disks without one: a directory each, with a kernel and perhaps an
//! initrd that loads modules and goes over to the root.
//!
//! It knows files of the host, no disk and no machine.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::archive::Archive;
use super::form;
use super::modules::needed;
use crate::error::{Error, ErrorKind, Result};

const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
/// An initrd that was made here, which knows how to run a command.
const MADE: &str = "initrd-made";
/// Statically linked programs in one, that the initrd's script calls: Debian's package busybox-static.
pub const PROGRAMS: [&str; 2] = ["/bin/busybox", "/usr/lib/initramfs-tools/bin/busybox"];
const SCRIPT: &str = include_str!("init.sh");
/// Names in the initrd that the script uses.
const DIRECTORIES: [&str; 6] = ["bin", "dev", "proc", "sys", "modules", "root"];

/// What to keep.
pub struct New<'a> {
    /// What it is to be called.
    pub name: &'a str,
    /// The kernel.
    pub kernel: &'a Path,
    /// Its own initrd.
    pub initrd: Option<&'a Path>,
    /// Its modules, such as /lib/modules/VERSION, for an initrd to be made.
    pub modules: Option<&'a Path>,
}

/// A kernel that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// What it is called.
    pub name: String,
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initrd.
    pub initrd: Option<PathBuf>,
    /// Whether that was made here, and so runs the command that [`words`] says.
    pub runs: bool,
    /// What all of it takes, in bytes.
    pub size: u64,
}

/// The directory where kernels are kept.
pub struct Keep(PathBuf);

impl Keep {
    /// Kernels below `directory`, which need not be there.
    pub fn at(directory: PathBuf) -> Keep {
        Keep(directory)
    }

    /// Where they are.
    pub fn place(&self) -> &Path {
        &self.0
    }

    /// Makes that directory, where it is missing.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub fn make(&self) -> Result<()> {
        fs::create_dir_all(&self.0)
            .map_err(|e| Error::io("cannot keep the kernel", e).at_path(&self.0))
    }

    /// Copies a kernel, whole or not at all. One that is there already by that name is refused.
    pub fn add(&self, new: &New<'_>) -> Result<Kept> {
        self.checked(new.name)?;
        let place = self.0.join(new.name);
        if place.exists() {
            let text = format!("there is a kernel {} already: remove it first", new.name);
            return Err(Error::new(ErrorKind::Exists, text));
        }
        let failed = |e| Error::io("cannot keep the kernel", e).at_path(&self.0);
        self.make()?;
        // No name begins with a dot: what is left of an interrupted copy is nobody's kernel.
        let draft = self.0.join(format!(".{}-{}", new.name, std::process::id()));
        let made = fs::create_dir(&draft).map_err(failed).and_then(|()| fill(&draft, new));
        let made = made.and_then(|()| fs::rename(&draft, &place).map_err(failed));
        if let Err(error) = made {
            // Best effort: the first error is the one to report.
            let _ = fs::remove_dir_all(&draft);
            return Err(error);
        }
        self.get(new.name)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
    }

    /// All kernels, by their names.
    pub fn list(&self) -> Result<Vec<Kept>> {
        let failed = |e| Error::io("cannot list the kernels", e).at_path(&self.0);
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut kept = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            if let Some(name) = name.to_str().filter(|name| is_name(name)) {
                kept.extend(self.get(name)?);
            }
        }
        kept.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(kept)
    }

    /// The kernel of that name, where there is one.
    pub fn get(&self, name: &str) -> Result<Option<Kept>> {
        if !is_name(name) {
            return Ok(None);
        }
        let place = self.0.join(name);
        let (kernel, made) = (place.join(KERNEL), place.join(MADE));
        let runs = made.is_file();
        let initrd = if runs { made } else { place.join(INITRD) };
        let len = |path: &Path| fs::metadata(path).ok().filter(|m| m.is_file()).map(|m| m.len());
        let Some(size) = len(&kernel) else { return Ok(None) };
        let more = len(&initrd);
        let size = size + more.unwrap_or(0);
        Ok(Some(Kept { name: name.to_owned(), kernel, initrd: more.map(|_| initrd), runs, size }))
    }

    /// Removes a kernel.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.checked(name)?;
        let Some(kept) = self.get(name)? else {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no kernel {name}")));
        };
        let place = self.0.join(kept.name);
        fs::remove_dir_all(&place)
            .map_err(|e| Error::io("cannot remove the kernel", e).at_path(place))
    }

    fn checked(&self, name: &str) -> Result<()> {
        match is_name(name) {
            true => Ok(()),
            false => Err(Error::invalid(
                "a kernel's name has letters, digits, '.', '_' and '-', begins with none of the last \
                 three, and is 64 characters long at most",
            )),
        }
    }
}

/// The words on a kernel's command line by which an initrd that was made here runs a command, as a host
/// of that name. Bytes that a kernel or a shell would take apart are written as `\\0ooo`.
pub fn words(command: &[&[u8]], host: &str) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+:@%,=".contains(byte);
    let mut line = format!("vdisk.host={host}");
    for word in command {
        line.push_str(" vdisk.word=");
        for byte in *word {
            match plain(byte) {
                true => line.push(char::from(*byte)),
                false => line.push_str(&format!("\\0{byte:03o}")),
            }
        }
    }
    line
}

fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.len() <= 64
        && name.chars().all(fits)
}

fn fill(directory: &Path, new: &New<'_>) -> Result<()> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |e| Error::io("cannot keep the kernel", e).at_path(path)
    };
    let mut start = vec![0; form::START];
    let mut kernel = File::open(new.kernel).map_err(failed(new.kernel))?;
    let len = read_start(&mut kernel, &mut start).map_err(failed(new.kernel))?;
    start.truncate(len);
    if !form::boots(&start) {
        let text = format!("it does not boot here: {}", form::refusal(&start));
        return Err(Error::unsupported(text).at_path(new.kernel));
    }
    copy(new.kernel, &directory.join(KERNEL)).map_err(failed(new.kernel))?;
    let initrd = directory.join(INITRD);
    if let Some(path) = new.initrd {
        copy(path, &initrd).map_err(failed(path))?;
    } else if let Some(modules) = new.modules {
        make_initrd(&directory.join(MADE), modules)?;
    }
    Ok(())
}

fn read_start(file: &mut File, start: &mut [u8]) -> io::Result<usize> {
    let mut bytes = Vec::new();
    file.take(start.len() as u64).read_to_end(&mut bytes)?;
    start.iter_mut().zip(&bytes).for_each(|(to, from)| *to = *from);
    Ok(bytes.len())
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut from = File::open(from)?;
    let mut to = File::create_new(to)?;
    io::copy(&mut from, &mut to)?;
    to.sync_all()
}

/// An initrd that loads what a guest's root needs, mounts it and starts what is in it.
fn make_initrd(path: &Path, modules: &Path) -> Result<()> {
    let modules = needed(modules)?;
    let program = PROGRAMS.iter().map(Path::new).find(|path| path.is_file()).ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            "an initrd needs a statically linked busybox on this host: install one (Debian and \
             Ubuntu: busybox-static)",
        )
    })?;
    let failed = |e| Error::io("cannot make the initrd", e).at_path(path);
    let program = fs::read(program).map_err(failed)?;
    let mut archive = Archive::new(io::BufWriter::new(File::create_new(path).map_err(failed)?));
    let mut write = || {
        DIRECTORIES.iter().try_for_each(|directory| archive.directory(directory))?;
        archive.device("dev/console", (5, 1))?;
        archive.file("bin/busybox", &program)?;
        archive.file("init", SCRIPT.as_bytes())?;
        // The shell goes through them in the order of their names.
        for (number, module) in modules.iter().enumerate() {
            archive.file(&format!("modules/{number:03}-{}.ko", module.name), &module.bytes)?;
        }
        Ok(())
    };
    write().map_err(failed)?;
    let mut file = archive.finish().map_err(failed)?;
    file.flush().map_err(failed)?;
    file.get_ref().sync_all().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_a_command_stand_on_the_command_line_as_they_are() {
        let line = words(&[b"sh", b"-c", b"echo \"a\"\n", b""], "web-1");
        let expected = "vdisk.host=web-1 vdisk.word=sh vdisk.word=-c \
                        vdisk.word=echo\\0040\\0042a\\0042\\0012 vdisk.word=";
        assert_eq!(line, expected);
    }
}
