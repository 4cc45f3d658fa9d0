//! A drop-in for qemu-img: its commands, options, texts and exit statuses, on this engine.
//!
//! One file per command in [`commands`]. The rest of the room: [`options`] reads command lines as
//! getopt does and lists of key and value, [`names`] the names of images, [`images`] opens them,
//! [`foreign`] is of other programs' formats, [`jail`] bounds what a
//! command can do, [`fail`] says what went wrong in QEMU's words. It knows the
//! library like any other part of the command line.

mod blkdebug;
mod commands;
mod encryption;
mod fail;
mod foreign;
mod images;
mod jail;
mod json;
mod names;
mod options;
mod progress;
mod size;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use vdisk::storage::{Manners, set_manners};

use commands::{
    amend, bench, bitmap, check, commit, compare, convert, create, dd, info, map, measure, rebase,
    resize, snapshot,
};
use fail::{Fail, Outcome};
use names::name;

/// What the program is called when it is this.
pub const NAME: &str = "qemu-img";

/// The command line as `vdisk` lists it; [`run`] reads it itself.
#[derive(clap::Args)]
pub struct Args {
    /// A command of qemu-img with its options.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<OsString>,
}

/// The commands, as the help lists them.
const COMMANDS: &[(&str, Command)] = &[
    ("amend", amend::run),
    ("bench", bench::run),
    ("bitmap", bitmap::run),
    ("check", check::run),
    ("commit", commit::run),
    ("compare", compare::run),
    ("convert", convert::run),
    ("create", create::run),
    ("dd", dd::run),
    ("info", info::run),
    ("map", map::run),
    ("measure", measure::run),
    ("rebase", rebase::run),
    ("resize", resize::run),
    ("snapshot", snapshot::run),
];

type Command = fn(&[String]) -> Outcome;

/// Runs one qemu-img command line; `args` are those after the program's name.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    // QEMU's waits for nobody; who does wait knows that it will soon be gone.
    set_manners(Manners { passing: true, wait: Duration::ZERO });
    // It follows the names in images.
    vdisk::open::follow_links();
    let ended = args.map(word).collect::<Outcome<Vec<String>>>().and_then(|args| dispatch(&args));
    ExitCode::from(ended.unwrap_or_else(|fail| fail.report()))
}

/// A word of a command line. One that is not UTF-8 would become the name of another file.
fn word(word: OsString) -> Outcome<String> {
    word.into_string().map_err(|word| {
        Fail::new(format!("'{}' is not UTF-8, and no option or name can be here", word.display()))
    })
}

fn dispatch(args: &[String]) -> Outcome {
    let mut args = args;
    loop {
        match args {
            [] => return Err(Fail::usage("Not enough arguments")),
            [first, ..] if matches!(first.as_str(), "-h" | "--help") => {
                print!("{}", help());
                return Ok(0);
            }
            [first, ..] if matches!(first.as_str(), "-V" | "--version") => {
                println!("qemu-img version 10.0.2 (vdisk {})", env!("CARGO_PKG_VERSION"));
                return Ok(0);
            }
            [first, _, rest @ ..] if matches!(first.as_str(), "-T" | "--trace") => args = rest,
            [first, ..] if first.starts_with('-') => {
                return Err(Fail::usage(format!("unrecognized option '{first}'")));
            }
            [name, rest @ ..] => {
                let command = COMMANDS.iter().find(|(known, _)| known == name);
                let Some((_, run)) = command else {
                    return Err(Fail::usage(format!("Command not found: {name}")));
                };
                if rest.iter().take_while(|a| *a != "--").any(|a| a == "--help" || a == "-h") {
                    print!("{}", help());
                    return Ok(0);
                }
                return run(rest);
            }
        }
    }
}

fn help() -> String {
    let names: Vec<&str> = COMMANDS.iter().map(|(name, _)| *name).collect();
    format!(
        "usage: qemu-img [standard options] command [command options]\nQEMU disk image utility, as \
         vdisk does it\n\nCommands: {}\n\nSupported formats: {}\n",
        names.join(" "),
        name::FORMATS.join(" ")
    )
}
