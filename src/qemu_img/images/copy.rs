//! Copying flat disks into another one, sector for sector, and what is left out on the way.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Mutex;

use vdisk::block::{BlockDevice, is_zero};
use vdisk::chain::{Chain, Layer};
use vdisk::copy::queue;

use crate::qemu_img::fail::{Fail, Outcome, reason, report};
use crate::qemu_img::images::status;
use crate::qemu_img::progress::Progress;

/// How far a copy is, is told after so many bytes.
const SHOWN: u64 = 2 << 20;
/// Zeroes that are written at a time.
const ZEROES: u64 = 2 << 20;
/// Less data than this is copied by one thread: it takes no longer, and stands in its order.
const ALONE: u64 = 16 << 20;
/// Zeroes are looked for by sectors.
const SECTOR: u64 = 512;

/// A source, and where it stands in the target.
pub struct Part {
    chain: Chain,
    /// Its layers from the head down.
    pub layers: Vec<Layer>,
    /// Its size in bytes.
    pub size: u64,
    start: u64,
}

impl Part {
    /// The source that begins `start` bytes into the target.
    pub fn new(chain: Chain, start: u64) -> Part {
        Part { layers: chain.all_layers(), size: chain.size(), chain, start }
    }

    /// Bytes that the layer below the source's head could show; 0 without one.
    fn shown_below(&self) -> u64 {
        self.layers.get(1).map_or(0, |layer| layer.image.size())
    }
}

/// How to copy.
pub struct Copying<'a> {
    /// Where to.
    pub target: &'a Chain,
    /// The shortest run of zeroes in bytes that is not written; 0 writes all.
    pub sparse: u64,
    /// Compress every cluster.
    pub compress: bool,
    /// What the source's own layer does not hold shows through from the target's backing file.
    pub has_backing: bool,
    /// Whether the target reads as zeroes where it is not written. All that is not known to is
    /// written, as far as the source goes, and no further.
    pub reads_zero: bool,
    /// Read errors become zeroes.
    pub salvage: bool,
    /// Say nothing about them.
    pub quiet: bool,
    /// Show how far it is.
    pub progress: &'a Mutex<Progress>,
}

/// What a stretch of the source is to the target.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Data,
    Zero,
    /// The target's backing file shows it.
    Backing,
}

/// Copies all parts; the target is durable afterwards, where it was opened to be.
pub fn copy(parts: &[Part], copying: &Copying<'_>) -> Outcome<()> {
    let total: u64 = parts.iter().map(|p| p.size).sum();
    let target = copying.target;
    let details = target.head().image.details().unwrap_or_default();
    let alone = target.all_layers().len() == 1;
    let below = target.all_layers().get(1).map(|layer| layer.image.size());
    let mut run = Run {
        parts,
        copying,
        total,
        work: 0,
        target_below: below.unwrap_or(u64::MAX),
        holds_zeroes: details.version == Some(2) && !alone,
        says_zeroes: details.version >= Some(3) && alone && details.data_file.is_none(),
    };
    // Everything is looked at once first: nothing is written from a source that has no map.
    let (mut at, mut data) = (0, 0);
    while at < total {
        let (what, len) = run.look(at)?;
        data += if what == What::Data { len } else { 0 };
        run.work += if run.is_work(what) { len } else { 0 };
        at += len;
    }
    // What cannot be read is told in its order.
    let alone = data < ALONE || copying.salvage;
    let threads = if alone { 1 } else { queue::threads() };
    let read = |step, buf: &mut Vec<u8>| run.prepare(step, buf);
    queue::run(threads, run.steps(), read, |(step, found), buf| run.write(&step, found, buf))?;
    target.flush().map_err(|e| Fail::new(reason(&e)))
}

struct Run<'a> {
    parts: &'a [Part],
    copying: &'a Copying<'a>,
    total: u64,
    /// Bytes of them that have to be copied.
    work: u64,
    /// Where the target's own backing file ends; all of it where it is not known to have one.
    target_below: u64,
    /// Zeroes are written as data: else the target would go on showing its backing file, which
    /// version 2 images cannot hide otherwise.
    holds_zeroes: bool,
    /// Zeroes are said of each cluster, as QEMU does: what has none is not left for a layer that the
    /// target may be put on.
    says_zeroes: bool,
}

/// What one thread copies at a time.
struct Step {
    at: u64,
    len: u64,
    what: What,
}

/// What a step has to write.
enum Found {
    Zeroes,
    /// The parts of its bytes that hold anything; the rest is zero.
    Runs(Vec<Range<usize>>),
    /// All its bytes as one cluster; compressed, where that makes it smaller.
    Cluster(Option<Vec<u8>>),
}

impl Run<'_> {
    /// Whether the target is written for it.
    fn is_work(&self, what: What) -> bool {
        what == What::Data || what == What::Zero && self.copying.sparse == 0
    }

    /// Says that so much of the work was begun.
    fn tell(&self, work: u64) {
        let part = 100.0 * work as f64 / self.work.max(1) as f64;
        self.copying.progress.lock().unwrap_or_else(|e| e.into_inner()).at(part as f32);
    }

    /// Names the steps in order, from the start of the disk to its end.
    fn steps(&self) -> impl FnMut() -> Outcome<Option<Step>> {
        let (mut at, mut work) = (0, 0);
        // What the source was found to hold, and where that ends: asking the host again for each step
        // costs it a walk over all that follows.
        let mut known = (What::Backing, 0);
        move || {
            while at < self.total {
                if at >= known.1 {
                    let (what, len) = self.look(at)?;
                    known = (what, at + len);
                }
                let step = self.next(at, known.0, known.1 - at);
                at += step.len;
                if self.is_work(known.0) {
                    work += step.len;
                    // Compressed clusters go one by one, the rest in QEMU's steps.
                    if self.copying.compress || at.is_multiple_of(SHOWN) || at >= known.1 {
                        self.tell(work);
                    }
                }
                let idle = step.what == What::Zero && self.copying.reads_zero;
                if step.what != What::Backing && !idle {
                    return Ok(Some(step));
                }
            }
            Ok(None)
        }
    }

    /// The step that begins at `at`, where `len` bytes of the source are alike.
    fn next(&self, at: u64, mut what: What, mut len: u64) -> Step {
        if self.copying.compress {
            let cluster = self.copying.target.head().image.cluster().bytes();
            if len < cluster {
                // Compressed clusters are written whole, whatever is in them.
                (what, len) = (What::Data, cluster.min(self.total - at));
            } else {
                len -= len % cluster;
            }
        }
        if what == What::Zero && self.copying.sparse == 0 {
            what = What::Data;
        }
        if what == What::Data {
            // To a boundary.
            let piece = self.piece();
            len = len.min(piece - at % piece);
        }
        Step { at, len, what }
    }

    /// The most bytes of data in one step, a power of two.
    fn piece(&self) -> u64 {
        let cluster = self.copying.target.head().image.cluster().bytes();
        if self.copying.compress {
            return cluster;
        }
        // Clusters, and blocks that zeroes are looked for in, are written whole.
        queue::PIECE.max(cluster).max(self.copying.sparse.next_power_of_two())
    }

    /// Reads a step, and finds out what is to be written.
    fn prepare(&self, step: Step, buf: &mut Vec<u8>) -> Outcome<(Step, Found)> {
        let Step { at, len, what } = step;
        if what != What::Data {
            return Ok((step, Found::Zeroes));
        }
        buf.resize(buf.len().max(len as usize), 0);
        let bytes = &mut buf[..len as usize];
        self.read(at, bytes)?;
        let found = if !self.copying.compress {
            Found::Runs(data_runs(at, bytes, self.copying.sparse))
        } else if self.copying.sparse > 0 && is_zero(bytes) {
            Found::Zeroes
        } else {
            let packed = self.copying.target.pack(at, bytes);
            Found::Cluster(packed.map_err(|e| write_failed(at, &e))?)
        };
        Ok((step, found))
    }

    fn write(&self, step: &Step, found: Found, buf: &[u8]) -> Outcome<()> {
        let &Step { at, len, .. } = step;
        match found {
            Found::Zeroes => self.zeroes(at, len),
            Found::Runs(runs) => self.plain(at, &buf[..len as usize], runs),
            Found::Cluster(packed) => {
                let written =
                    self.copying.target.write_packed(at, &buf[..len as usize], packed.as_deref());
                written.map_err(|e| write_failed(at, &e))
            }
        }
    }

    /// What stands at `at`, and how far.
    fn look(&self, at: u64) -> Outcome<(What, u64)> {
        let Some(part) = self.parts.iter().find(|p| at < p.start + p.size) else {
            return Ok((What::Zero, self.total - at));
        };
        let pos = at - part.start;
        let left = part.size - pos;
        let layers = if self.copying.has_backing { &part.layers[..1] } else { &part.layers[..] };
        // Past the end of what stands below the source, or of what stands below the target, it
        // changes what is not allocated, or zero, means.
        let ends = [part.shown_below(), self.target_below.saturating_sub(part.start)];
        let ahead = ends.into_iter().filter(|end| pos < *end).min();
        let mut asked =
            ahead.filter(|_| self.copying.has_backing).map_or(left, |e| left.min(e - pos));
        let status = loop {
            let failed = match status::at(layers, pos, asked) {
                Ok(status) => break status,
                Err(e) => e.prefix(format!("error while reading block status at offset {at}: ")),
            };
            if !self.copying.salvage {
                return Err(failed);
            }
            if asked <= SECTOR {
                if !self.copying.quiet {
                    report(format!("warning: {}", failed.text()));
                }
                return Ok((What::Data, asked));
            }
            // Perhaps less of it can be told.
            asked = asked.div_ceil(SECTOR).div_ceil(4) * SECTOR;
        };
        let has_backing = self.copying.has_backing;
        let what = match status {
            status::Status { allocated: false, .. } if has_backing && pos < part.shown_below() => {
                What::Backing
            }
            // The target reads as zeroes there, too.
            status::Status { zero: true, .. } if has_backing && at >= self.target_below => {
                What::Backing
            }
            status::Status { zero: true, .. } => What::Zero,
            _ => What::Data,
        };
        Ok((what, status.len))
    }

    fn zeroes(&self, at: u64, len: u64) -> Outcome<()> {
        if self.copying.reads_zero {
            return Ok(());
        }
        let target = self.copying.target;
        if !self.holds_zeroes {
            let mut done = target.write_zeroes(at, len, true);
            if self.says_zeroes {
                done = done.and_then(|()| target.write_zeroes(at, len, false));
            }
            return done.map_err(|e| write_failed(at, &e));
        }
        let bytes = vec![0; len.min(ZEROES) as usize];
        for pos in (at..at + len).step_by(ZEROES as usize) {
            let part = &bytes[..(at + len - pos).min(ZEROES) as usize];
            target.write_at(pos, &[IoSlice::new(part)]).map_err(|e| write_failed(pos, &e))?;
        }
        Ok(())
    }

    /// Reads across the parts.
    fn read(&self, at: u64, bytes: &mut [u8]) -> Outcome<()> {
        let mut done = 0;
        while done < bytes.len() {
            let pos = at + done as u64;
            let Some(part) = self.parts.iter().find(|p| pos < p.start + p.size) else {
                bytes[done..].fill(0);
                return Ok(());
            };
            let n = ((part.start + part.size - pos) as usize).min(bytes.len() - done);
            self.read_part(part, pos, &mut bytes[done..done + n])?;
            done += n;
        }
        Ok(())
    }

    fn read_part(&self, part: &Part, pos: u64, bytes: &mut [u8]) -> Outcome<()> {
        let from = pos - part.start;
        let failed = match part.chain.read_at(from, &mut [IoSliceMut::new(bytes)]) {
            Ok(()) => return Ok(()),
            Err(e) => e,
        };
        if !self.copying.salvage {
            let why = reason(&failed);
            return Err(Fail::new(format!("error while reading at byte {pos}: {why}")));
        }
        if bytes.len() as u64 > SECTOR {
            // Save what can be read, sector by sector.
            let sectors = bytes.chunks_mut(SECTOR as usize).enumerate();
            for (number, sector) in sectors {
                self.read_part(part, pos + number as u64 * SECTOR, sector)?;
            }
            return Ok(());
        }
        if !self.copying.quiet {
            report(format!("warning: error while reading offset {pos}: {}", reason(&failed)));
        }
        bytes.fill(0);
        Ok(())
    }

    fn plain(&self, at: u64, bytes: &[u8], runs: Vec<Range<usize>>) -> Outcome<()> {
        let mut zero_from = 0;
        for run in runs {
            self.gap(at, zero_from..run.start)?;
            zero_from = run.end;
            let pos = at + run.start as u64;
            let written = self.copying.target.write_at(pos, &[IoSlice::new(&bytes[run])]);
            written.map_err(|e| write_failed(pos, &e))?;
        }
        self.gap(at, zero_from..bytes.len())
    }

    fn gap(&self, at: u64, range: Range<usize>) -> Outcome<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.zeroes(at + range.start as u64, range.len() as u64)
    }
}

fn write_failed(at: u64, error: &vdisk::Error) -> Fail {
    Fail::new(format!("error while writing at byte {at}: {}", reason(error)))
}

/// The parts of `bytes`, which stand at `at`, that are to be written: blocks that hold anything,
/// on boundaries of a power of two up to `sparse`, and those between them that are too few to be
/// left out.
fn data_runs(at: u64, bytes: &[u8], sparse: u64) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    if sparse == 0 {
        runs.push(0..bytes.len());
        return runs;
    }
    let unit = 1u64 << sparse.ilog2();
    let mut start = 0;
    while start < bytes.len() {
        let into = (at + start as u64) % unit;
        let end = (start + (unit - into) as usize).min(bytes.len());
        if !is_zero(&bytes[start..end]) {
            match runs.last_mut() {
                Some(run) if ((start - run.end) as u64) < sparse => run.end = end,
                _ => runs.push(start..end),
            }
        }
        start = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_left_out_in_aligned_blocks() {
        let mut bytes = vec![0; 16384];
        bytes[5000] = 1;
        bytes[13000] = 1;
        assert_eq!(data_runs(0, &bytes, 4096), [4096..8192, 12288..16384]);
        assert_eq!(data_runs(512, &bytes, 4096), [3584..7680, 11776..15872]);
        let starts =
            |sparse| data_runs(0, &bytes, sparse).iter().map(|r| r.start).collect::<Vec<_>>();
        assert_eq!((starts(6144), starts(0)), (vec![4096], vec![0]));
    }
}
