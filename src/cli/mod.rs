//! The command line: one file per noun, one `Args` and one `run` per verb.
//!
//! Only this room prints, exits and parses arguments.

mod boot;
mod disk;
mod files;
mod fleet;
mod help;
mod image;
mod inside;
mod instance;
mod measure;
mod mount;
pub(crate) mod open;
mod report;
mod snapshot;
mod terminal;

use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{FromArgMatches, Parser, Subcommand};

use crate::{qemu_img, say};
use disk::{bytes, clone, commit, compact, convert, create, rebase, resize, rm};
use fleet::{again, roll};
use instance::{attach, exec, list, logs, run, serve, start, stats, steer, systemd};
use mount::{daemon as mount_daemon, overlay, umount};
use open::{jail, limit, memory, passphrase, turn};
use report::{check, compare, info, map, tree};
use terminal::size;

/// Base disks, linked clones and snapshots for virtual machines and containers.
#[derive(Parser)]
#[command(name = "vdisk", version)]
struct Cli {
    /// File whose bytes are the passphrase of encrypted disks.
    #[arg(long, global = true, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
    /// Memory for a disk's tables, 32M by default; also from VDISK_CACHE_SIZE.
    #[arg(long, global = true, value_name = "SIZE", value_parser = size::parse)]
    cache_size: Option<u64>,
    /// Seconds to wait for another command that has the disk for a moment.
    #[arg(long, global = true, value_name = "S", default_value = "10", value_parser = turn::seconds)]
    wait: Duration,
    /// Bound what this process can do while it works on disks, which may be hostile: docs/jail.md
    #[arg(long, global = true, value_name = "require|best|off", value_enum, default_value_t = jail::Mode::Best, hide_possible_values = true)]
    jail: jail::Mode,
    #[arg(long = start::OPTION, hide = true, value_name = "ROLE")]
    instance_role: Option<std::ffi::OsString>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Boot(Box<boot::Args>),
    Kernel(boot::keep::Args),
    Create(create::Args),
    Mount(mount::Args),
    #[command(hide = true)]
    MountDaemon(mount::Args),
    #[command(name = overlay::DAEMON, hide = true)]
    OverlayDaemon(overlay::Args),
    Ls(files::ListArgs),
    Cat(files::CatArgs),
    Cp(files::CopyArgs),
    Apply(files::ApplyArgs),
    Clone(clone::Args),
    Unseal(clone::UnsealArgs),
    Snapshot(snapshot::Args),
    Tree(tree::Args),
    Rebase(rebase::Args),
    Commit(commit::Args),
    Info(info::Args),
    Check(check::Args),
    Map(map::Args),
    Compact(compact::Args),
    Compare(compare::Args),
    Convert(convert::Args),
    Resize(resize::Args),
    Rm(rm::Args),
    Read(bytes::ReadArgs),
    Umount(umount::Args),
    Write(bytes::WriteArgs),
    Run(Box<run::Args>),
    Exec(exec::ExecArgs),
    Ps(list::PsArgs),
    Roll(Box<roll::Args>),
    #[command(name = fleet::disk::VERB, hide = true)]
    RollDisk(fleet::disk::Args),
    Measure(Box<measure::Args>),
    #[command(name = measure::disk::VERB, hide = true)]
    MeasureDisk(measure::disk::Args),
    Start(steer::StartArgs),
    Stop(steer::StopArgs),
    Kill(steer::KillArgs),
    Pause(steer::PauseArgs),
    Resume(steer::ResumeArgs),
    Wait(steer::WaitArgs),
    Inspect(list::InspectArgs),
    Logs(logs::LogsArgs),
    Attach(attach::AttachArgs),
    Stats(stats::StatsArgs),
    Generate(systemd::GenerateArgs),
    Serve(serve::Args),
    /// Do as qemu-img does: `vdisk qemu-img --help` says more.
    #[command(name = qemu_img::NAME, disable_help_flag = true)]
    QemuImg(qemu_img::Args),
    Import(image::ImportArgs),
    Export(image::export::Args),
    Pull(image::registry::PullArgs),
    Push(Box<image::registry::PushArgs>),
    Image(image::Args),
    Completions(help::CompletionsArgs),
    #[command(hide = true)]
    Manual(help::ManualArgs),
    #[command(name = vdisk::container::STAGE, hide = true)]
    ContainerStage(run::Stage),
}

impl Verb {
    /// Whether it holds a disk for as long as somebody uses it, and not for as long as its own work
    /// takes.
    fn stays(&self) -> bool {
        matches!(
            self,
            Verb::Boot(_)
                | Verb::Mount(_)
                | Verb::MountDaemon(_)
                | Verb::OverlayDaemon(_)
                | Verb::Run(_)
                | Verb::Serve(_)
                | Verb::ContainerStage(_)
        )
    }

    /// Whether it works in a jail, or says itself where it does not.
    fn is_jailed(&self) -> bool {
        matches!(
            self,
            Verb::Apply(_)
                | Verb::Boot(_)
                | Verb::Cat(_)
                | Verb::Check(_)
                | Verb::Clone(_)
                | Verb::Commit(_)
                | Verb::Compact(_)
                | Verb::Compare(_)
                | Verb::Convert(_)
                | Verb::Cp(_)
                | Verb::Create(_)
                | Verb::Export(_)
                | Verb::Image(_)
                | Verb::Import(_)
                | Verb::Info(_)
                | Verb::Kernel(_)
                | Verb::Ls(_)
                | Verb::Map(_)
                | Verb::Measure(_)
                | Verb::MeasureDisk(_)
                | Verb::Mount(_)
                | Verb::MountDaemon(_)
                | Verb::OverlayDaemon(_)
                | Verb::Pull(_)
                | Verb::Push(_)
                | Verb::Read(_)
                | Verb::Rebase(_)
                | Verb::Resize(_)
                | Verb::Rm(_)
                | Verb::Roll(_)
                | Verb::RollDisk(_)
                | Verb::Run(_)
                | Verb::Serve(_)
                | Verb::Snapshot(_)
                | Verb::Tree(_)
                | Verb::Unseal(_)
                | Verb::Write(_)
        )
    }

    fn run(&self) -> vdisk::Result<ExitCode> {
        if !self.is_jailed() {
            jail::refuse("this command works without")?;
        }

        let status = match self {
            Verb::Boot(args) => boot::run(args),
            Verb::Kernel(args) => boot::keep::run(args),
            Verb::Create(args) => create::run(args),
            Verb::Mount(args) => mount::run(args),
            Verb::Ls(args) => files::list(args),
            Verb::Cat(args) => files::cat(args),
            Verb::Cp(args) => files::copy(args),
            Verb::Apply(args) => files::apply(args),
            Verb::MountDaemon(args) => mount_daemon::run(args),
            Verb::OverlayDaemon(args) => overlay::serve(args),
            Verb::Clone(args) => clone::run(args),
            Verb::Unseal(args) => clone::unseal(args),
            Verb::Snapshot(args) => snapshot::run(args),
            Verb::Tree(args) => tree::run(args),
            Verb::Rebase(args) => rebase::run(args),
            Verb::Commit(args) => commit::run(args),
            Verb::Info(args) => info::run(args),
            Verb::Check(args) => check::run(args),
            Verb::Map(args) => map::run(args),
            Verb::Compact(args) => compact::run(args),
            Verb::Compare(args) => compare::run(args),
            Verb::Convert(args) => convert::run(args),
            Verb::Resize(args) => resize::run(args),
            Verb::Rm(args) => rm::run(args),
            Verb::Read(args) => bytes::read(args),
            Verb::Umount(args) => umount::run(args),
            Verb::Write(args) => bytes::write(args),
            Verb::Run(args) => run::run(args),
            Verb::Exec(args) => exec::exec(args),
            Verb::Ps(args) => list::ps(args),
            Verb::Roll(args) => roll::run(args),
            Verb::RollDisk(args) => fleet::disk::run(args),
            Verb::Measure(args) => measure::run(args),
            Verb::MeasureDisk(args) => measure::disk::run(args),
            Verb::Start(args) => steer::start(args),
            Verb::Stop(args) => steer::stop(args),
            Verb::Kill(args) => steer::kill(args),
            Verb::Pause(args) => steer::pause(args),
            Verb::Resume(args) => steer::resume(args),
            Verb::Wait(args) => steer::wait(args),
            Verb::Inspect(args) => list::inspect(args),
            Verb::Logs(args) => logs::logs(args),
            Verb::Attach(args) => attach::attach(args),
            Verb::Stats(args) => stats::stats(args),
            Verb::Generate(args) => systemd::generate(args),
            Verb::Serve(args) => serve::run(args),
            Verb::QemuImg(args) => return Ok(qemu_img::run(args.words.iter().cloned())),
            Verb::Import(args) => image::import(args),
            Verb::Export(args) => image::export::run(args),
            Verb::Pull(args) => image::registry::run_pull(args),
            Verb::Push(args) => image::registry::run_push(args),
            Verb::Image(args) => image::run(args),
            Verb::Completions(args) => help::completions(args),
            Verb::Manual(args) => help::manual(args),
            Verb::ContainerStage(args) => run::stage(args),
        };
        status.map(ExitCode::from)
    }
}

/// Exit status of a command that failed.
const FAILED: u8 = 1;
/// Exit status of wrong usage.
const USAGE: u8 = 64;

/// The whole program: what `main` calls, and no other.
pub fn main() -> ExitCode {
    let ended = run();
    vdisk::jail::broker::leave();
    match say::finish() {
        Ok(()) => ended,
        Err(error) => {
            eprintln!("vdisk: standard output could not be written: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Parses the command line, runs the command and says how it ended.
///
/// A program that is called as `qemu-img`, and `vdisk qemu-img`, reads its command line as that does;
/// one that is called as `vdisk-overlay`, or with a mount helper's words, as a mount helper does.
fn run() -> ExitCode {
    limit::raise();
    let mut words = std::env::args_os();
    let called = words.next().unwrap_or_default();
    if Path::new(&called).file_name().is_some_and(|name| name == qemu_img::NAME) {
        return qemu_img::run(words);
    }
    if overlay::called(&called) {
        return told(overlay::helper(words).map(ExitCode::from), FAILED);
    }
    let mut all: Vec<_> = std::env::args_os().collect();
    match mount::helper::means(&called, all.get(1..).unwrap_or_default()) {
        Some(Err(error)) => return told(Err(error), FAILED),
        Some(Ok(words)) => all = words,
        None if words.next().is_some_and(|verb| verb == qemu_img::NAME) => {
            return qemu_img::run(words);
        }
        None => {}
    }
    let parsed = help::command().try_get_matches_from(all);
    let parsed = parsed.and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            // A closed stdout or stderr leaves nobody to tell.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    start::keep_role(cli.instance_role);
    again::know(help::command);
    passphrase::keep(cli.passphrase_file);
    memory::keep(cli.cache_size);
    jail::keep(cli.jail);
    turn::queue(cli.verb.stays(), cli.wait);
    let failed = if let Verb::Run(_) | Verb::Exec(_) = cli.verb { run::FAILED } else { FAILED };
    told(turn::take(cli.wait, || cli.verb.run()), failed)
}

fn told(result: vdisk::Result<ExitCode>, failed: u8) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("vdisk: {error}");
        ExitCode::from(failed)
    })
}
