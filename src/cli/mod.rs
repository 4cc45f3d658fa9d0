//! The command line: one file per noun, one `Args` and one `run` per verb.
//!
//! Only this room prints, exits and parses arguments.

mod ask;
mod boot;
mod bytes;
mod check;
mod clone;
mod commit;
mod compact;
mod compare;
mod convert;
mod create;
mod disk;
mod held;
mod holding;
mod info;
mod limit;
mod map;
mod memory;
mod mount;
mod mount_daemon;
mod mount_snapshots;
mod output;
mod passphrase;
mod picture;
mod qemu_img;
mod rebase;
mod resize;
mod run;
mod serve;
mod size;
mod snapshot;
mod stop;
mod tree;
mod umount;

use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Boot(boot::Args),
    Create(create::Args),
    Mount(mount::Args),
    #[command(hide = true)]
    MountDaemon(mount::Args),
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
    Read(bytes::ReadArgs),
    Umount(umount::Args),
    Write(bytes::WriteArgs),
    Run(run::Args),
    Serve(serve::Args),
    /// Do as qemu-img does: `vdisk qemu-img --help` says more.
    #[command(name = qemu_img::NAME, disable_help_flag = true)]
    QemuImg(qemu_img::Args),
    #[command(name = vdisk::container::STAGE, hide = true)]
    ContainerStage(run::Stage),
}

/// Exit status of a command that failed.
const FAILED: u8 = 1;
/// Exit status of wrong usage.
const USAGE: u8 = 64;

/// Parses the command line, runs the command and says how it ended.
///
/// A program that is called as `qemu-img`, and `vdisk qemu-img`, reads its command line as that does.
pub fn run() -> ExitCode {
    limit::raise();
    let mut words = std::env::args_os();
    let called = words.next().unwrap_or_default();
    if Path::new(&called).file_name().is_some_and(|name| name == qemu_img::NAME) {
        return qemu_img::run(words);
    }
    if words.next().is_some_and(|verb| verb == qemu_img::NAME) {
        return qemu_img::run(words);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            // A closed stdout or stderr leaves nobody to tell.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    passphrase::keep(cli.passphrase_file);
    memory::keep(cli.cache_size);
    let result = match &cli.verb {
        Verb::Boot(args) => boot::run(args),
        Verb::Create(args) => create::run(args),
        Verb::Mount(args) => mount::run(args),
        Verb::MountDaemon(args) => mount_daemon::run(args),
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
        Verb::Read(args) => bytes::read(args),
        Verb::Umount(args) => umount::run(args),
        Verb::Write(args) => bytes::write(args),
        Verb::Run(args) => run::run(args),
        Verb::Serve(args) => serve::run(args),
        Verb::QemuImg(args) => return qemu_img::run(args.words.iter().cloned()),
        Verb::ContainerStage(args) => run::stage(args),
    };
    result.map_or_else(
        |error| {
            eprintln!("vdisk: {error}");
            ExitCode::from(FAILED)
        },
        ExitCode::from,
    )
}
