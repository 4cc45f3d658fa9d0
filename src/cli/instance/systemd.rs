//! `vdisk generate systemd`: units for instances.

use clap::{Args as ClapArgs, Subcommand};
use vdisk::Result;
use vdisk::instance::{Record, place};

use crate::cli::fleet::again::Words;
use crate::cli::terminal::output;

/// Print what lets other programs look after an instance
#[derive(ClapArgs)]
pub struct GenerateArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// A systemd unit that runs the instance as it was started
    ///
    /// Root's goes to /etc/systemd/system/NAME.service, a user's to ~/.config/systemd/user/NAME.service; then
    /// `systemctl [--user] enable --now NAME`. systemd restarts it, and its log is the journal's.
    Systemd {
        /// Its name, its id or the first digits, or its disk.
        #[arg(value_name = "N")]
        instance: String,
    },
}

pub fn generate(args: &GenerateArgs) -> Result<u8> {
    let What::Systemd { instance } = &args.what;
    output::text(&unit(&place::find(instance)?)).map(|()| 0)
}

fn unit(record: &Record) -> String {
    let program =
        std::env::current_exe().map_or("/usr/bin/vdisk".into(), |exe| exe.display().to_string());
    let words = foreground(record);
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    let (name, program) = (&record.name, quoted(&program));
    let wanted =
        if nix::unistd::geteuid().is_root() { "multi-user.target" } else { "default.target" };
    format!(
        "[Unit]\n\
         Description=vdisk instance {name}\n\
         Wants=network-online.target\n\
         After=network-online.target\n\n\
         [Service]\n\
         WorkingDirectory={}\n\
         ExecStart={program} {}\n\
         ExecStop={program} stop --time 30 {name}\n\
         TimeoutStopSec=90\n\
         KillMode=mixed\n\
         Delegate=yes\n\
         Restart=on-failure\n\n\
         [Install]\n\
         WantedBy={wanted}\n",
        escaped(&record.directory),
        words.join(" "),
    )
}

/// The words that start it in the foreground, under its name. What it prints is systemd's to keep.
fn foreground(record: &Record) -> Vec<String> {
    let words = Words::of(&record.words).without("detach").without("log_size");
    let words = words.with("name", Some(record.name.as_ref())).all();
    words.iter().map(output::path).collect()
}

/// What systemd.syntax(7) and systemd.service(5) read as this one word.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    let text = escaped(word).replace('$', "$$");
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

fn escaped(word: &str) -> String {
    word.replace('%', "%%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_as_systemd_reads_them() {
        assert_eq!(quoted("web.qcow2"), "web.qcow2");
        assert_eq!(quoted("echo \"$A\" 5%\\"), "\"echo \\\"$$A\\\" 5%%\\\\\"");
        assert_eq!(quoted(""), "\"\"");
    }
}
