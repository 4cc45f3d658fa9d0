//! `vdisk logs`: what an instance prints.

use std::io::{self, ErrorKind as IoErrorKind};
use std::path::Path;
use std::time::Duration;

use clap::Args as ClapArgs;
use vdisk::instance::{Record, Tail, place};
use vdisk::{Error, ErrorKind, Result};

use crate::cli::terminal::{output, stop};

/// Between two looks at a log that is followed.
const LOOK: Duration = Duration::from_millis(50);

/// Show what a detached instance has printed
///
/// The last of it is kept, 10 MiB at least and 20 MiB at most, or as `--log-size` of `run` and `boot` says.
#[derive(ClapArgs)]
pub struct LogsArgs {
    /// Its name, its id or the first digits, or its disk.
    #[arg(value_name = "N")]
    instance: String,
    /// Go on until it ends.
    #[arg(short, long)]
    follow: bool,
}

pub fn logs(args: &LogsArgs) -> Result<u8> {
    let record = place::find(&args.instance)?;
    let asked = stop::on_signals()?;
    let mut tail = open(&record, Tail::open)?;
    loop {
        // Before the log is read to its end: nothing is added then.
        let lives = || place::find(&record.id).is_ok_and(|now| now.lives());
        let goes_on = args.follow && !asked.asked() && lives();
        print(&mut tail)?;
        if !goes_on {
            return Ok(0);
        }
        std::thread::sleep(LOOK);
    }
}

/// Opens the log of an instance, which one in the foreground has not.
pub(super) fn open(record: &Record, how: fn(&Path) -> io::Result<Tail>) -> Result<Tail> {
    let dir = place::of(record)?;
    how(&dir).map_err(|e| match e.kind() {
        IoErrorKind::NotFound if !record.detached => {
            let text = format!("{} prints where it was started: it has no log", record.name);
            Error::new(ErrorKind::NotFound, text)
        }
        _ => Error::io("the log cannot be read", e).at_path(&dir),
    })
}

/// Prints what is new in a log.
pub(super) fn print(tail: &mut Tail) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let failed = |e| Error::io("the log cannot be read", e);
    while let length @ 1.. = tail.read(&mut buffer).map_err(failed)? {
        output::bytes(buffer.get(..length).unwrap_or_default())?;
    }
    Ok(())
}
