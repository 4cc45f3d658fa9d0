//! Where two disks differ, if they do.

use std::io::IoSliceMut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::block::{BlockDevice, BlockStatus, is_zero};
use crate::error::{Error, ErrorKind, Result};

/// Bytes that one thread compares at a time.
const PIECE: u64 = 1 << 20;
/// How far a stretch of zeroes is followed at once.
const FAR: u64 = 1 << 30;
/// Both disks are read at once by this many threads.
const THREADS: usize = 2;

/// How two disks compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// The first byte that differs; a disk that ends earlier counts as zeroes there.
    pub offset: Option<u64>,
    /// Whether the disks have different sizes.
    pub sizes_differ: bool,
}

/// Compares the contents of two disks. Stretches in which neither stores anything are not read.
/// `progress` hears how many bytes are done, from many threads.
pub fn compare(
    a: &dyn BlockDevice,
    b: &dyn BlockDevice,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Difference> {
    let total = a.size().max(b.size());
    let first = AtomicU64::new(u64::MAX);
    let (next, done) = (Mutex::new(0), AtomicU64::new(0));
    work(THREADS, || {
        let (mut left, mut right) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
        loop {
            let (pos, end) = {
                let mut next = next.lock().unwrap_or_else(|e| e.into_inner());
                let skipped = skip_zeroes(a, b, *next, total)?;
                done.fetch_add(skipped - *next, Ordering::Relaxed);
                let end = (skipped - skipped % PIECE).saturating_add(PIECE).min(total);
                *next = end;
                (skipped, end)
            };
            // Earlier pieces are all taken by now: none of those still to come is earlier.
            if pos >= end || first.load(Ordering::Acquire) < pos {
                return Ok(());
            }
            let len = (end - pos) as usize;
            read_or_zero(a, pos, &mut left[..len])?;
            read_or_zero(b, pos, &mut right[..len])?;
            if left[..len] != right[..len] {
                let at = left[..len].iter().zip(&right[..len]).position(|(x, y)| x != y);
                first.fetch_min(pos + at.unwrap_or(0) as u64, Ordering::AcqRel);
                return Ok(());
            }
            progress(done.fetch_add(end - pos, Ordering::Relaxed) + end - pos);
        }
    })?;
    let offset = Some(first.into_inner()).filter(|at| *at != u64::MAX);
    Ok(Difference { offset, sizes_differ: a.size() != b.size() })
}

/// The first byte from `pos` on that either disk may store.
fn skip_zeroes(a: &dyn BlockDevice, b: &dyn BlockDevice, mut pos: u64, end: u64) -> Result<u64> {
    while pos < end {
        let zeroes = zeroes_at(a, pos, end)?.min(zeroes_at(b, pos, end)?);
        if zeroes == 0 {
            break;
        }
        pos += zeroes;
    }
    Ok(pos)
}

/// How many bytes from `pos` on are known to read as zeroes.
fn zeroes_at(disk: &dyn BlockDevice, pos: u64, end: u64) -> Result<u64> {
    if pos >= disk.size() {
        return Ok(end - pos);
    }
    // The answer for data is not needed in full.
    let first = disk.extents(pos, PIECE.min(disk.size() - pos), 1)?;
    let Some(extent) = first.first().filter(|e| e.status == BlockStatus::Zero) else {
        return Ok(0);
    };
    if extent.len < PIECE {
        return Ok(extent.len);
    }
    // Bounded, because the other disk may end the stretch soon.
    let rest = disk.extents(pos, FAR.min(disk.size() - pos), 1)?;
    Ok(rest.first().map_or(extent.len, |e| e.len))
}

fn read_or_zero(disk: &dyn BlockDevice, pos: u64, buf: &mut [u8]) -> Result<()> {
    let have = disk.size().saturating_sub(pos).min(buf.len() as u64) as usize;
    let (front, back) = buf.split_at_mut(have);
    if !is_zero(back) {
        back.fill(0);
    }
    if have == 0 { Ok(()) } else { disk.read_at(pos, &mut [IoSliceMut::new(front)]) }
}

/// Runs `job` in `threads` threads; the first error is the result.
fn work(threads: usize, job: impl Fn() -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(&job)).collect();
        let mut result = Ok(());
        for thread in running {
            let ended = thread.join().unwrap_or_else(|_| {
                Err(Error::new(
                    ErrorKind::Io,
                    "a thread of the comparison ended by a fault in vdisk",
                ))
            });
            result = result.and(ended);
        }
        result
    })
}
