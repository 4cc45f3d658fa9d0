//! The search for a kernel in a disk: done by a copy of this process, in a jail of its own, which hands over what it
//! has found. This process reads nothing of what the disk's file systems hold.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vdisk::beside::Child;
use vdisk::block::BlockDevice;
use vdisk::control::Failure;
use vdisk::jail::{Jail, Work};
use vdisk::kernel::{self, Found};
use vdisk::{Error, Result};

use crate::cli::inside::{link::Link, told};
use crate::cli::open::jail;

/// What was found; its files come behind it.
#[derive(Debug, Serialize, Deserialize)]
struct Said {
    from: String,
    partition: Option<u32>,
    path: String,
    initrds: Vec<String>,
    options: String,
    passed_over: Vec<String>,
    has_initrd: bool,
}

/// Finds the kernel in the disk that is called `name`, as [`kernel::find`] does. To be called while this process has
/// one thread.
///
/// # Errors
/// As there, at that name.
pub fn find(disk: &Arc<dyn BlockDevice>, rooted: bool, name: &Path) -> Result<Found> {
    let (link, its) = Link::pair().map_err(lost)?;
    let search = || {
        let closed = jail::close_untold(Jail::new(Work::Search));
        let found = closed.and_then(|_| kernel::find(disk, rooted));
        u8::from(say(&its, found.map_err(|e| e.at_path(name))).is_err())
    };
    let searching = Child::start_with_all(search).map_err(lost)?;
    drop(its);
    let found = hear(&link);
    drop(searching);
    found
}

fn say(link: &Link, found: Result<Found>) -> io::Result<()> {
    let Found { from, partition, path, initrds, options, kernel, initrd, passed_over } = match found
    {
        Ok(found) => found,
        Err(error) => return link.say(&Err::<Said, _>(Failure::from(&error))),
    };
    let has_initrd = initrd.is_some();
    let said = Said { from, partition, path, initrds, options, passed_over, has_initrd };
    link.say(&Ok::<_, Failure>(said))?;
    [Some(kernel), initrd].iter().flatten().try_for_each(|file| link.hand(file.as_fd()))
}

fn hear(link: &Link) -> Result<Found> {
    let heard = link.hear::<std::result::Result<Said, Failure>>().map_err(lost)?;
    let heard = heard.ok_or_else(|| lost(io::ErrorKind::UnexpectedEof.into()))?;
    let Said { from, partition, path, initrds, options, passed_over, has_initrd } =
        heard.map_err(told)?;
    let kernel = file(link)?;
    let initrd = has_initrd.then(|| file(link)).transpose()?;
    Ok(Found { from, partition, path, initrds, options, kernel, initrd, passed_over })
}

/// A file of bytes: who reads anything else may wait for ever.
fn file(link: &Link) -> Result<File> {
    let file = link.handed().map(File::from).map_err(lost)?;
    let is_file = file.metadata().is_ok_and(|meta| meta.is_file());
    if is_file { Ok(file) } else { Err(lost(io::ErrorKind::InvalidData.into())) }
}

fn lost(error: io::Error) -> Error {
    Error::io("the process that looks for a kernel in the disk was lost", error)
}
