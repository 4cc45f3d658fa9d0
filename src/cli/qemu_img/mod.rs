//! A drop-in for qemu-img: its commands, options, texts and exit statuses, on this engine.
//!
//! One file per command. The rest of the room: [`args`] reads options as getopt does, [`opts`]
//! lists of key and value, [`name`] the names of images, [`open`] opens them, [`fail`] says what
//! went wrong in QEMU's words. It knows the library like any other part of the command line.

mod amend;
mod args;
mod bench;
mod bitmap;
mod bitmaps;
mod bottom;
mod check;
mod check_foreign;
mod commit;
mod compare;
mod convert;
mod copy;
mod create;
mod create_foreign;
mod create_options;
mod crypt;
mod data_file;
mod dd;
mod fail;
mod faults;
mod faulty;
mod format;
mod info;
mod info_foreign;
mod json;
mod keys;
mod leftover;
mod map;
mod measure;
mod name;
mod nbd;
mod open;
mod opts;
mod progress;
mod rebase;
mod resize;
mod secret;
mod size;
mod snapshot;
mod status;
mod tree;
mod window;

use std::ffi::OsString;
use std::process::ExitCode;

use fail::{Fail, Outcome};

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
    let args: Vec<String> = args.map(|a| a.to_string_lossy().into_owned()).collect();
    let ended = dispatch(&args);
    ExitCode::from(ended.unwrap_or_else(|fail| fail.report()))
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
