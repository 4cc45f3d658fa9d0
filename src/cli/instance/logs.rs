//! `vdisk logs` and `vdisk attach`: what an instance prints, and its console.

use std::io::ErrorKind as IoErrorKind;
use std::time::Duration;

use clap::Args as ClapArgs;
use vdisk::instance::{Tail, place};
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
    let dir = place::of(&record)?;
    let failed = |e| Error::io("the log cannot be read", e).at_path(&dir);
    let mut tail = Tail::open(&dir).map_err(|e| match e.kind() {
        IoErrorKind::NotFound if !record.detached => {
            let text = format!("{} prints where it was started: it has no log", record.name);
            Error::new(ErrorKind::NotFound, text)
        }
        _ => failed(e),
    })?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        // Before the log is read to its end: nothing is added then.
        let lives = || place::find(&record.id).is_ok_and(|now| now.lives());
        let goes_on = args.follow && !asked.asked() && lives();
        while let length @ 1.. = tail.read(&mut buffer).map_err(failed)? {
            output::bytes(buffer.get(..length).unwrap_or_default())?;
        }
        if !goes_on {
            return Ok(0);
        }
        std::thread::sleep(LOOK);
    }
}
