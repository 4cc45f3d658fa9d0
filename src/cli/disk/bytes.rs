//! `vdisk read` and `vdisk write`: bytes between a disk and the standard streams.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::path::PathBuf;

use clap::Args as ClapArgs;
use vdisk::block::{BlockDevice, check_range};
use vdisk::{Error, Result};

use crate::cli::open::disk::{self, Use};
use crate::cli::open::jail;
use crate::cli::open::options::{Moment, Opening};
use crate::cli::terminal::size;

/// Bytes that are moved at a time.
const CHUNK: u64 = 1 << 20;

/// Write bytes of a disk to standard output.
#[derive(ClapArgs)]
pub struct ReadArgs {
    /// The disk.
    disk: PathBuf,
    /// The first byte.
    #[arg(value_parser = size::parse)]
    offset: u64,
    /// How many bytes.
    #[arg(value_parser = size::parse)]
    length: u64,
    #[command(flatten)]
    moment: Moment,
    #[command(flatten)]
    opening: Opening,
    /// Read it although a base has changed under it.
    #[arg(long)]
    accept_base: bool,
}

/// Write standard input into a disk.
#[derive(ClapArgs)]
pub struct WriteArgs {
    /// The disk.
    disk: PathBuf,
    /// Where the first byte goes.
    #[arg(value_parser = size::parse)]
    offset: u64,
    #[command(flatten)]
    opening: Opening,
}

pub fn read(args: &ReadArgs) -> Result<u8> {
    let using = Use { accept_base: args.accept_base, ..args.opening.reading(&args.moment) };
    let disk = disk::open(&args.disk, &using)?;
    jail::close_on_open_files()?;
    check_range(args.offset, args.length, disk.size()).map_err(|e| e.at_path(&args.disk))?;
    let mut out = std::io::stdout().lock();
    let mut buf = vec![0; args.length.min(CHUNK) as usize];
    let (mut at, end) = (args.offset, args.offset + args.length);
    while at < end {
        let n = (end - at).min(CHUNK) as usize;
        disk.read_at(at, &mut [IoSliceMut::new(&mut buf[..n])])?;
        match out.write_all(&buf[..n]) {
            // A reader that has seen enough is no failure.
            Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(0),
            done => done.map_err(|e| Error::io("standard output could not be written", e))?,
        }
        at += n as u64;
    }
    out.flush().map_err(|e| Error::io("standard output could not be written", e))?;
    Ok(0)
}

pub fn write(args: &WriteArgs) -> Result<u8> {
    let disk = disk::open(&args.disk, &args.opening.writing())?;
    jail::close_on_changes(&disk)?;
    let mut input = std::io::stdin().lock();
    let mut buf = vec![0; CHUNK as usize];
    let mut at = args.offset;
    loop {
        let n = fill(&mut input, &mut buf)?;
        if n == 0 {
            break;
        }
        disk.write_at(at, &[IoSlice::new(&buf[..n])]).map_err(|e| e.at_path(&args.disk))?;
        at += n as u64;
    }
    disk.flush()?;
    Ok(0)
}

/// Reads until the buffer is full or the input ends.
pub fn fill(input: &mut impl Read, buf: &mut [u8]) -> Result<usize> {
    let mut have = 0;
    while have < buf.len() {
        match input.read(&mut buf[have..]) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("standard input could not be read", e)),
        }
    }
    Ok(have)
}
