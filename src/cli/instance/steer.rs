//! `vdisk stop`, `kill`, `pause`, `resume` and `wait`: what is asked of instances that run.

use std::time::Duration;

use clap::Args as ClapArgs;
use vdisk::Result;
use vdisk::instance::{self, Order, Record, ask, place, signal};

use super::start;
use crate::cli::open::turn;
use crate::cli::terminal::{output, stop};

/// Start instances again that have ended, detached, as they were started
///
/// Their disks, options and ids are the same. An instance of an image runs in its clone as that is, whatever
/// image has the name by now.
#[derive(ClapArgs)]
pub struct StartArgs {
    /// Names, ids or their first digits, or disks.
    #[arg(value_name = "N", required = true)]
    instances: Vec<String>,
}

/// Stop instances: ask, wait, and end them then
///
/// A container is asked by its stop signal, SIGTERM by default, a virtual machine by its power button.
#[derive(ClapArgs)]
pub struct StopArgs {
    /// Names, ids or their first digits, or disks.
    #[arg(value_name = "N", required = true)]
    instances: Vec<String>,
    /// Seconds to wait until they are ended.
    #[arg(short, long, value_name = "S", default_value = "10", value_parser = turn::seconds)]
    time: Duration,
}

/// Send a signal to an instance, KILL by default
#[derive(ClapArgs)]
pub struct KillArgs {
    /// Its name, its id or the first digits, or its disk.
    #[arg(value_name = "N")]
    instance: String,
    /// A name or number. KILL, TERM and its stop signal keep it from being started again.
    #[arg(default_value = "KILL", value_parser = signal::parse)]
    signal: i32,
}

/// Stop all of an instance where it is
///
/// Its disk may be written meanwhile by what was under way, and `vdisk snapshot create` works as ever.
#[derive(ClapArgs)]
pub struct PauseArgs {
    /// Names, ids or their first digits, or disks.
    #[arg(value_name = "N", required = true)]
    instances: Vec<String>,
}

/// Let an instance go on that was paused
#[derive(ClapArgs)]
pub struct ResumeArgs {
    /// Names, ids or their first digits, or disks.
    #[arg(value_name = "N", required = true)]
    instances: Vec<String>,
}

/// Wait for an instance's end, and print its exit status
#[derive(ClapArgs)]
pub struct WaitArgs {
    /// Names, ids or their first digits, or disks.
    #[arg(value_name = "N", required = true)]
    instances: Vec<String>,
}

pub fn start(args: &StartArgs) -> Result<u8> {
    each(&args.instances, |record| match record.lives() {
        true => Ok(()),
        false => start::begin_again(record).and_then(|id| output::text(&format!("{id}\n"))),
    })
}

pub fn stop(args: &StopArgs) -> Result<u8> {
    let patience = u64::try_from(args.time.as_millis()).unwrap_or(u64::MAX);
    each(&args.instances, |record| {
        if !record.lives() {
            return Ok(());
        }
        match ask(record, Order::Stop { patience, again: false }, &mut |_, _| true) {
            // It has ended just now.
            Err(e) if place::find(&record.id).is_ok_and(|now| now.lives()) => Err(e),
            _ => Ok(()),
        }
    })
}

pub fn kill(args: &KillArgs) -> Result<u8> {
    let record = place::find(&args.instance)?;
    ask(&record, Order::Kill { signal: args.signal }, &mut |_, _| true).map(|_| 0)
}

pub fn pause(args: &PauseArgs) -> Result<u8> {
    each(&args.instances, |record| ask(record, Order::Pause, &mut |_, _| true).map(drop))
}

pub fn resume(args: &ResumeArgs) -> Result<u8> {
    each(&args.instances, |record| ask(record, Order::Resume, &mut |_, _| true).map(drop))
}

pub fn wait(args: &WaitArgs) -> Result<u8> {
    let asked = stop::on_signals()?;
    let found = args.instances.iter().map(|word| place::find(word)).collect::<Result<Vec<_>>>()?;
    for record in found {
        let status = match record.lives() {
            true => instance::ended(&record, &mut |_, _| !asked.asked())?,
            false => record.status,
        };
        output::text(&status.map_or("lost\n".to_owned(), |status| format!("{status}\n")))?;
    }
    Ok(0)
}

/// Does the same to each, and says the first that failed at the end.
fn each(words: &[String], mut what: impl FnMut(&Record) -> Result<()>) -> Result<u8> {
    let mut result = Ok(0);
    for word in words {
        let done = place::find(word).and_then(|record| what(&record));
        if let Err(error) = done {
            match &result {
                Ok(_) => result = Err(error),
                Err(_) => eprintln!("vdisk: {error}"),
            }
        }
    }
    result
}
