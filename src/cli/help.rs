//! What the command says of itself: its verbs by what they are for, man pages, completions.
//!
//! All of it is made from the `Args` of the verbs; only the groups stand here.

use std::fs;
use std::path::PathBuf;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use vdisk::{Error, Result};

use crate::cli::Cli;
use crate::cli::terminal::output;

/// The verbs by what they are for, in the order of the help.
const GROUPS: [(&str, &[&str]); 7] = [
    (
        "Disks",
        &[
            "create", "clone", "info", "tree", "resize", "rebase", "commit", "compact", "unseal",
            "rm",
        ],
    ),
    ("Snapshots", &["snapshot"]),
    (
        "Contents",
        &["ls", "cat", "cp", "apply", "read", "write", "map", "compare", "convert", "check"],
    ),
    ("Images", &["import", "export", "pull", "push", "image"]),
    ("Use", &["mount", "umount", "run", "boot", "measure", "kernel", "serve"]),
    (
        "Instances",
        &[
            "ps", "exec", "inspect", "logs", "start", "stop", "kill", "pause", "resume", "wait",
            "attach", "stats", "roll", "generate",
        ],
    ),
    ("More", &["qemu-img", "completions", "help"]),
];

/// Print the completions of a shell
///
/// bash: `vdisk completions bash > /usr/share/bash-completion/completions/vdisk`; zsh: into a file `_vdisk` in a
/// directory of `$fpath`; fish: into `~/.config/fish/completions/vdisk.fish`.
#[derive(clap::Args)]
pub struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Write the man pages, vdisk(1) and one for each verb, into a directory
#[derive(clap::Args)]
pub struct ManualArgs {
    /// The directory, which is made where it is missing.
    directory: PathBuf,
}

/// The command with its help by groups.
pub fn command() -> Command {
    let command = Cli::command();
    let template = template(&command);
    command.help_template(template)
}

fn template(command: &Command) -> String {
    let mut text = String::from("{about}\n\n{usage-heading} {usage}\n");
    for (group, verbs) in GROUPS {
        text.push_str(&format!("\n{group}:\n"));
        for verb in verbs {
            let about = command.find_subcommand(verb).and_then(|c| c.get_about());
            let about = about.map_or("Say how a verb is used".to_owned(), ToString::to_string);
            text.push_str(&format!("  {verb:<12} {}\n", first_line(&about)));
        }
    }
    text + "\nOptions:\n{options}\n\n`vdisk VERB --help` says more.\n"
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// Prints completions.
pub fn completions(args: &CompletionsArgs) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "vdisk", &mut script);
    output::bytes(&script)?;
    Ok(0)
}

/// Writes man pages.
pub fn manual(args: &ManualArgs) -> Result<u8> {
    fs::create_dir_all(&args.directory)
        .map_err(|e| Error::io("could not be made", e).at_path(&args.directory))?;
    clap_mangen::generate_to(Cli::command(), &args.directory)
        .map_err(|e| Error::io("could not be written to", e).at_path(&args.directory))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_stands_in_one_group() {
        let grouped: Vec<&str> =
            GROUPS.iter().flat_map(|(_, verbs)| verbs.iter().copied()).collect();
        let mut command = Cli::command();
        command.build();
        for verb in command.get_subcommands().filter(|c| !c.is_hide_set()) {
            let times = grouped.iter().filter(|name| **name == verb.get_name()).count();
            assert_eq!(times, 1, "{}", verb.get_name());
        }
        for name in grouped {
            assert!(command.find_subcommand(name).is_some(), "{name}");
        }
    }
}
