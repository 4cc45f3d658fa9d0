//! `vdisk run`: a disk, mounted, as the root of a container.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args as ClapArgs;
use vdisk::Result;
use vdisk::container::{self, Limits, Space, Spec};
use vdisk::mount::{self, AttachOptions};

use super::disk::{self, Use};
use super::holding::{self, Files};
use super::{limit, size};

/// Run a command as a container whose root is a disk.
///
/// The command has the disk's files as its root directory, and its own processes, mounts, host
/// name, IPC and network (loopback only). Its exit status is returned: 128 and the number of the
/// signal that ended it; 127 when it is not found, 126 when it cannot be executed. It is process 1
/// of its container, with podman's default capabilities and no seccomp filter: the kernel is what
/// stands between it and the host. When both input and output are a terminal, the command gets one
/// of its own. Needs root.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk; what the command writes goes to its delta.
    disk: PathBuf,
    /// Put all writes into a throw-away delta.
    #[arg(long)]
    ephemeral: bool,
    /// Use this partition's file system (from 1), when the disk has more than one.
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
    /// Limit on memory, swap included, such as 512M.
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<u64>,
    /// Limit on processor time, in processors: 2, 0.5.
    #[arg(long, value_name = "N", value_parser = milli_cpus)]
    cpus: Option<u64>,
    /// Limit on processes and threads at once.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pids: Option<u64>,
    /// Set a variable; with the name alone, to what it is here.
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = variable())]
    env: Vec<(OsString, OsString)>,
    /// Start in this directory.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Run as this user of the disk's: names or numbers.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// The container's host name [default: the disk's name]
    #[arg(long, value_name = "NAME", value_parser = hostname)]
    hostname: Option<String>,
    /// The command and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<OsString>,
}

/// A process of a container on its way inside.
#[derive(ClapArgs)]
pub struct Stage {
    words: Vec<OsString>,
}

/// Enters one stage of a container; only a [`Space`] asks for it.
pub fn stage(stage: &Stage) -> Result<u8> {
    container::stage(&stage.words)
}

/// Runs the command and gives its exit status.
pub fn run(args: &Args) -> Result<u8> {
    // First of all, while there is one thread.
    let space = Space::enter()?;
    let using = Use { ephemeral: args.ephemeral, ..Use::writing() };
    let device = disk::open(&args.disk, &using)?;
    let options = AttachOptions {
        partition: args.partition,
        name: args.disk.display().to_string(),
        ..AttachOptions::default()
    };
    let root = space.root();
    let attached =
        mount::attach(device.clone(), &options, &root).map_err(|e| e.at_path(&args.disk))?;
    // Another disk's `umount` is not to wait until this container ends.
    mount::table::drop_copies(&root);
    let doing = format!("the root of a container ({})", args.command[0].to_string_lossy());
    let files = Files::new(doing, &root, &attached.loop_device())?;
    let disk = std::path::absolute(&args.disk).unwrap_or_else(|_| args.disk.clone());
    let control = holding::serve(&device, &disk, Arc::new(files))?;
    drop(device);
    let outcome = space.run(&root, &spec(args));
    // A write that was lost must not hide behind the command's success.
    let detached = attached.detach().map_err(|e| e.at_path(&args.disk));
    if let Some(control) = control {
        control.end(&detached);
    }
    let outcome = outcome?;
    if let Some(error) = outcome.not_started {
        eprintln!("vdisk: {error}");
    }
    detached.map(|()| outcome.status)
}

fn spec(args: &Args) -> Spec {
    Spec {
        command: args.command.clone(),
        env: args.env.clone(),
        workdir: args.workdir.clone(),
        user: args.user.clone(),
        hostname: args.hostname.clone().unwrap_or_else(|| hostname_of(&args.disk)),
        limits: Limits { memory: args.memory, milli_cpus: args.cpus, pids: args.pids },
        open_files: limit::found(),
    }
}

fn memory(text: &str) -> std::result::Result<u64, String> {
    match size::parse(text)? {
        // Below, the container's own first steps would not fit.
        bytes if bytes < 4 << 20 => Err("must be at least 4M".into()),
        bytes => Ok(bytes),
    }
}

fn milli_cpus(text: &str) -> std::result::Result<u64, String> {
    let cpus: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    // The kernel's shortest quota, a millisecond in a period of 100, and more than any host has.
    if (0.01..=65536.0).contains(&cpus) {
        Ok((cpus * 1000.0).round() as u64)
    } else {
        Err("must be from 0.01 to 65536".into())
    }
}

fn variable() -> impl clap::builder::TypedValueParser<Value = (OsString, OsString)> {
    use clap::builder::TypedValueParser as _;
    clap::builder::OsStringValueParser::new().try_map(|text| {
        let bytes = text.as_bytes();
        let (name, value) = match bytes.iter().position(|&byte| byte == b'=') {
            Some(at) => (&bytes[..at], OsString::from_vec(bytes[at + 1..].to_vec())),
            None => (bytes, std::env::var_os(&text).unwrap_or_default()),
        };
        match name {
            [] => Err("a variable needs a name"),
            name => Ok((OsStr::from_bytes(name).to_owned(), value)),
        }
    })
}

fn hostname(text: &str) -> std::result::Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if !text.is_empty() && text.len() <= 64 && text.chars().all(fits) && !text.starts_with('-') {
        Ok(text.to_owned())
    } else {
        Err("must be at most 64 letters, digits, '-' and '.'".into())
    }
}

/// The disk's file name as a host name: `/srv/web_1.qcow2` is `web-1`.
fn hostname_of(disk: &Path) -> String {
    let stem = disk.file_stem().unwrap_or_default().to_string_lossy();
    let fits = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = stem.chars().map(fits).take(63).collect();
    match name.trim_matches('-') {
        "" => "vdisk".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_users_write_them() {
        assert_eq!(memory("64M"), Ok(64 << 20));
        assert!(memory("0").is_err() && memory("x").is_err());
        assert_eq!(milli_cpus("1.5"), Ok(1500));
        assert!(milli_cpus("0").is_err() && milli_cpus("nan").is_err());
    }

    #[test]
    fn a_disk_lends_its_name_to_the_host() {
        assert_eq!(hostname_of(Path::new("/srv/web_1.qcow2")), "web-1");
        assert_eq!(hostname_of(Path::new("/srv/...")), "vdisk");
    }
}
