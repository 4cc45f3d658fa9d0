//! `vdisk exec`: another program in a container that runs as an instance.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use vdisk::container::{Visit, visit};
use vdisk::instance::{Kind, Phase, place};
use vdisk::{Error, ErrorKind, Result};

use super::words::variable;

/// The file in an instance's directory that says how its container is entered.
pub const ENTRANCE: &str = "entrance";

/// Run another command in a container that runs
///
/// It has the container's files, processes and network, the capabilities and system calls of its program, and, where no
/// option says otherwise, its variables, user and directory. Its exit status is returned, as by `vdisk run`. Where the
/// container has no user but root (see `vdisk run --help`), whose a file is to be is not noted for this command: a
/// `chown` to others is refused. A virtual machine is not entered: `vdisk attach` is its console.
#[derive(ClapArgs)]
pub struct ExecArgs {
    /// Set a variable; with the name alone, to what it is here.
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = variable())]
    env: Vec<(OsString, OsString)>,
    /// Start in this directory.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Run as this user of the disk's: names or numbers.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Give the command a terminal, also where input or output is none
    #[arg(short, long)]
    tty: bool,
    /// Input is the command's always
    #[arg(short, long, hide = true)]
    interactive: bool,
    /// The container: its name, its id or the first digits, or its disk.
    #[arg(value_name = "N")]
    instance: String,
    /// The command and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<OsString>,
}

pub fn exec(args: &ExecArgs) -> Result<u8> {
    let record = place::find(&args.instance)?;
    if record.kind == Kind::Machine {
        return Err(Error::unsupported(format!(
            "{} is a virtual machine, which cannot be entered: `vdisk attach {}` is its console",
            record.name, record.name
        )));
    }
    if !record.lives() {
        return Err(Error::new(ErrorKind::NotFound, format!("{} does not run", record.name)));
    }
    if record.phase == Phase::Paused {
        let text = format!("{} is paused: `vdisk resume {}` first", record.name, record.name);
        return Err(Error::new(ErrorKind::InUse, text));
    }
    let path = place::of(&record)?.join(ENTRANCE);
    let entrance = fs::read(&path)
        .map_err(|e| Error::io(format!("{} has not started yet", record.name), e).at_path(path))?;
    let outcome = visit(
        &entrance,
        &Visit {
            command: args.command.clone(),
            env: args.env.clone(),
            workdir: args.workdir.clone(),
            user: args.user.clone(),
            terminal: args.tty,
        },
    )?;
    if let Some(error) = outcome.not_started {
        eprintln!("vdisk: {error}");
    }
    Ok(outcome.status)
}

/// Keeps the way in, whole or not at all.
pub fn keep(path: &Path, way: &[u8]) -> std::io::Result<()> {
    let draft = path.with_extension("new");
    fs::write(&draft, way).and_then(|()| fs::rename(&draft, path))
}
