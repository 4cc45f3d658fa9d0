//! `vdisk run`: a disk, mounted, as the root of a container.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args as ClapArgs;
use clap::ValueEnum;
use vdisk::container::{self, Capabilities, Limits, Network, Outset, Publish, Space, Spec, Volume};
use vdisk::control::place;
use vdisk::instance::alone::Alone;
use vdisk::instance::link::Link;
use vdisk::instance::signal;
use vdisk::instance::{Kind, Record};
use vdisk::mount::table;
use vdisk::oci::config::RunConfig;
use vdisk::{Error, Result};

use super::exec;
use super::named::Named;
use super::root::{Begun, Source};
use super::start::{self, About, As, Keeping, Part};
use super::switches::{OfContainer, console};
use super::words::{
    Entrypoint, Security, entrypoint, hostname, hostname_of, memory, milli_cpus, rate, security,
    variable, volume,
};
use crate::cli::fleet::many;
use crate::cli::image::Which;
use crate::cli::measure::marks::{ENDED, Marks, STARTED};
use crate::cli::open::limit;
use crate::cli::open::options::Opening;

/// The exit status where the container, not its program, has failed: podman's.
pub const FAILED: u8 = 125;

/// Run a command as a container whose root is a disk, or an image.
///
/// Without a command, what the disk's or the image's configuration says is run: its entrypoint and
/// command. Its variables, user and working directory, which is made where it is missing, count wherever no
/// option says otherwise, and its stop signal is what `vdisk stop` sends. A command takes the place of its command; with an entrypoint,
/// it is the entrypoint's arguments. Its volumes are directories of the disk like all others, and ports
/// that it exposes are opened by --publish only.
///
/// Of an image a clone is run that goes when it ends; with --name it is kept, and run again the next
/// time, until `vdisk rm N`.
///
/// It is an instance: `vdisk ps` lists it, `vdisk stop`, `kill`, `pause`, `exec`, `wait` and `inspect` find it.
/// Without --name, --detach, --rm or --restart it is forgotten when it ends.
///
/// The command has the disk's files as its root directory, and its own processes, mounts, host
/// name, IPC and network. Its exit status is returned: 128 and the number of the signal that ended
/// it; 127 when it is not found, 126 when it cannot be executed, 125 when the container failed. It
/// is process 1 of its container, with podman's default capabilities and system calls. When both
/// input and output are a terminal, the command gets one of its own.
///
/// An ordinary user's container is in a user namespace: its root is he, and its other users are
/// those that /etc/subuid and /etc/subgid lend to him. Where there are none, root is its only user;
/// whose a file is to be is noted in the disk all the same.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk, to whose delta goes what the command writes; or an image.
    #[arg(value_name = "DISK|IMAGE")]
    disk: PathBuf,
    /// Put all writes into a throw-away delta.
    #[arg(long, conflicts_with_all = ["overlay", "read_only"])]
    ephemeral: bool,
    /// Run on what snapshot NAME holds, with --ephemeral, --overlay or --read-only
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// Put all writes into the directory UPPER, in the form of overlayfs
    #[arg(long, value_name = "UPPER", conflicts_with = "io_bps")]
    overlay: Option<PathBuf>,
    /// A directory for the overlay to work in, on UPPER's file system; UPPER.work by default
    #[arg(long, value_name = "DIR", requires = "overlay")]
    work: Option<PathBuf>,
    /// Refuse all changes of the root
    #[arg(long)]
    read_only: bool,
    /// Serve ext2, ext3 or ext4 without the kernel's driver, as for an ordinary user
    #[arg(long)]
    user_space: bool,
    #[command(flatten)]
    opening: Opening,
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
    /// Limit on what is read from the disk, and on what is written to it, each second: 20M
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    io_bps: Option<u64>,
    /// Show a directory or file of the host's at DIR in the container
    #[arg(short, long, value_name = "SOURCE:DIR[:ro]", value_parser = volume())]
    volume: Vec<Volume>,
    /// What the command reaches: itself, what the host reaches as the host, or in user space
    #[arg(long, value_name = "none|host|user", hide_possible_values = true)]
    net: Option<Net>,
    /// Let a port of the host's lead into the container; implies --net user
    #[arg(short, long, value_name = "[IP:]HOSTPORT:PORT[/udp]")]
    publish: Vec<Publish>,
    /// Allow a capability besides the default ones; `all` for all
    #[arg(long, value_name = "CAP", value_delimiter = ',')]
    cap_add: Vec<String>,
    /// Take a capability away; `all` for all
    #[arg(long, value_name = "CAP", value_delimiter = ',')]
    cap_drop: Vec<String>,
    /// no-new-privileges: set-user-id files give no rights. seccomp=unconfined: all system calls
    #[arg(long, value_name = "OPTION", value_parser = security)]
    security_opt: Vec<Security>,
    /// Give the command a terminal, also where input or output is none; with --detach, `vdisk attach` is the
    /// way to it
    #[arg(short, long)]
    tty: bool,
    /// Input is the command's always
    #[arg(short, long, hide = true)]
    interactive: bool,
    /// Set a variable; with the name alone, to what it is here.
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = variable())]
    env: Vec<(OsString, OsString)>,
    /// Start in this directory.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Run as this user of the disk's: names or numbers.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// What `vdisk stop` sends, by name or number [default: what the configuration says, or TERM]
    #[arg(long, value_name = "SIGNAL", value_parser = signal::parse)]
    stop_signal: Option<i32>,
    /// The container's host name [default: the disk's name]
    #[arg(long, value_name = "NAME", value_parser = hostname)]
    hostname: Option<String>,
    /// What is run before the command, instead of the configuration's entrypoint and command: a program, or a JSON
    /// list of words; nothing where it is empty
    #[arg(long, value_name = "CMD", value_parser = entrypoint)]
    entrypoint: Option<Entrypoint>,
    #[command(flatten)]
    store: Which,
    #[command(flatten)]
    keeping: Keeping,
    /// Tell a FIFO when the command starts and ends
    #[arg(long, hide = true, value_name = "FILE")]
    marks: Option<PathBuf>,
    /// The command and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// What a container reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Net {
    None,
    Host,
    User,
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
    if let Some(count) = args.keeping.many()? {
        return many::run(&args.keeping, count);
    }
    let named = start::named(&args.disk, &args.keeping, &args.store)?;
    let config = named.config(&args.opening)?;
    let about = || {
        let command = command(args, &config)?;
        Ok(About {
            kind: Kind::Container,
            named: args.disk.clone(),
            command: command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
            stop_signal: match args.stop_signal {
                Some(signal) => signal,
                None => start::stop_signal(&config.stop_signal)?,
            },
            exposed_ports: config.exposed_ports.clone(),
        })
    };
    match start::part(&args.keeping, &named, &args.store, about)? {
        Part::Done(status) => Ok(status),
        Part::Run(instance) => contain(args, &named, &config, instance),
    }
}

/// Runs the container in this process.
fn contain(args: &Args, named: &Named, config: &RunConfig, instance: As) -> Result<u8> {
    let instance = Instance::of(instance)?;
    let mut spec = spec(args, config)?;
    let source = source(args, named, &spec)?;
    // First of all, while there is one thread.
    place::settle();
    let limits = Limits { memory: args.memory, milli_cpus: args.cpus, pids: args.pids };
    let mut outset = Outset::new(&limits)?;
    let begun = Begun::start(&source, &mut outset)?;
    // Another disk's `umount` is not to wait until this container ends.
    let mut space = Space::enter(outset, table::drop_copies)?;
    let marks = Marks::to(args.marks.as_deref())?;
    if marks.heard() {
        let marks = marks.clone();
        spec.started = Some(Arc::new(move |_| marks.say(STARTED)));
    }
    if let (Instance::Turn(dir, _), true) = (&instance, args.tty && args.keeping.detach) {
        spec.console = Some(Arc::new(console(dir)?));
    }
    let alone = instance.serve(OfContainer(space.handle()), &mut spec)?;
    if let Some(why) = space.why_one() {
        eprintln!("vdisk: warning: the container's only user is root: {why}");
    }
    let root = begun.mount(&source, &space)?;
    spec.owners = root.owners();
    let at = space.root();
    let outcome = space.run(&at, &spec);
    marks.say(ENDED);
    // A write that was lost must not hide behind the command's success.
    let ended = root.end();
    drop(space);
    let outcome = outcome?;
    if let Some(alone) = alone {
        alone.end(outcome.status);
    }
    if let Some(error) = outcome.not_started {
        eprintln!("vdisk: {error}");
    }
    ended.map(|()| outcome.status)
}

/// How others reach what runs in this process.
enum Instance {
    Nobody,
    Turn(PathBuf, Link),
    Alone(Box<Record>),
}

impl Instance {
    /// Called first of all, outside of the container's namespaces.
    fn of(instance: As) -> Result<Instance> {
        Ok(match instance {
            As::Nobody => Instance::Nobody,
            As::Turn(dir) => Instance::Turn(dir.clone(), Link::connect(&dir)?),
            As::Alone(record) => Instance::Alone(record),
        })
    }

    /// Lets them steer it, and enter it when it has started. Threads are started.
    fn serve(self, switches: OfContainer, spec: &mut Spec) -> Result<Option<Alone>> {
        let switches = Arc::new(switches);
        let (dir, told, alone): (_, Arc<dyn Fn() + Send + Sync>, _) = match self {
            Instance::Nobody => return Ok(None),
            Instance::Turn(dir, link) => {
                link.serve(switches)?;
                (dir, Arc::new(move || link.started()), None)
            }
            Instance::Alone(record) => {
                // Where they cannot be told of it, it runs all the same.
                let Ok(alone) = Alone::serve(*record, switches) else { return Ok(None) };
                (alone.dir()?, Arc::new(alone.started()), Some(alone))
            }
        };
        let (entrance, before) = (dir.join(exec::ENTRANCE), spec.started.take());
        spec.started = Some(Arc::new(move |way| {
            if let Some(before) = &before {
                before(way);
            }
            // Without it the container runs all the same, and nobody can be let in.
            let _ = exec::keep(&entrance, way);
            told();
        }));
        Ok(alone)
    }
}

fn source<'a>(args: &'a Args, named: &'a Named, spec: &Spec) -> Result<Source<'a>> {
    if args.snapshot.is_some() && !args.ephemeral && !args.read_only && args.overlay.is_none() {
        return Err(Error::invalid(
            "a snapshot does not change: run on it with --ephemeral, --overlay or --read-only",
        ));
    }
    let kept = args.read_only || args.overlay.is_some();
    Ok(Source {
        disk: &named.disk,
        opening: &args.opening,
        partition: args.partition,
        snapshot: args.snapshot.as_deref(),
        ephemeral: args.ephemeral || (named.is_ephemeral() && !kept),
        read_only: args.read_only,
        user_space: args.user_space,
        upper: args.overlay.as_deref().map(|upper| (upper, args.work.as_deref())),
        rate: args.io_bps,
        program: spec.command.first().map_or_else(String::new, |c| c.to_string_lossy().into()),
    })
}

/// What is run: the entrypoint, and the command or what stands for it.
fn command(args: &Args, config: &RunConfig) -> Result<Vec<OsString>> {
    let words = |words: &[String]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let (mut all, usual) = match &args.entrypoint {
        Some(Entrypoint(own)) => (own.clone(), Vec::new()),
        None => (words(&config.entrypoint), words(&config.cmd)),
    };
    all.extend(if args.command.is_empty() { usual } else { args.command.clone() });
    if all.is_empty() {
        let text = "says nothing about what is run in it: a command is needed";
        return Err(Error::invalid(text).at_path(&args.disk));
    }
    Ok(all)
}

/// The configuration's variables, and the user's, which win.
fn variables(args: &Args, config: &RunConfig) -> Vec<(OsString, OsString)> {
    let split = |text: &String| {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        (OsString::from(name), OsString::from(value))
    };
    let named = config.env.iter().filter(|text| !text.is_empty() && !text.starts_with('='));
    named.map(split).chain(args.env.iter().cloned()).collect()
}

fn spec(args: &Args, config: &RunConfig) -> Result<Spec> {
    let network = match (args.net, args.publish.is_empty()) {
        (Some(Net::Host), true) => Network::Host,
        (Some(Net::None) | None, true) => Network::None,
        (Some(Net::User), _) | (None, false) => Network::User(args.publish.clone()),
        (Some(Net::Host | Net::None), false) => {
            return Err(Error::invalid("ports are published with --net user only"));
        }
    };
    let has = |option| args.security_opt.contains(&option);
    Ok(Spec {
        command: command(args, config)?,
        env: variables(args, config),
        make_workdir: args.workdir.is_none(),
        workdir: args.workdir.clone().or_else(|| said(&config.workdir).map(PathBuf::from)),
        user: args.user.clone().or_else(|| said(&config.user).map(str::to_owned)),
        hostname: args.hostname.clone().unwrap_or_else(|| host(args)),
        open_files: limit::found(),
        read_only: args.read_only,
        volumes: args.volume.clone(),
        network,
        capabilities: Capabilities::new(&args.cap_add, &args.cap_drop).map_err(Error::invalid)?,
        no_new_privileges: has(Security::NoNewPrivileges),
        unfiltered: has(Security::Unfiltered),
        terminal: args.tty,
        console: None,
        owners: None,
        started: None,
    })
}

/// What a configuration says, where it says something.
fn said(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

fn host(args: &Args) -> String {
    hostname_of(args.keeping.name.as_deref().map_or(args.disk.as_path(), Path::new))
}
