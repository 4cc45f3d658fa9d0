//! Moving what one layer holds into its neighbour, up or down.
//!
//! The disk shows the same before, during and after. What a layer has taken over and made durable
//! can be given back where it came from: then a fold takes hardly more space than one batch.

use std::io::IoSliceMut;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::addr::GuestOffset;
use crate::block::BlockDevice;
use crate::chain::{Chain, Layer};
use crate::copy::queue;
use crate::copy::queue::PIECE;
use crate::copy::transfer::{Part, transfer};
use crate::error::{Error, ErrorKind, Result};
use crate::family::cost::data_bytes;
use crate::image::{Image, Mapping};
use crate::progress::Progress;
use crate::storage::name::directory;

/// What an interrupted merge leaves where one side lost what the other has.
pub(crate) const UNFINISHED: &str =
    "the disk is as it was; the merge is finished by running it again, or by the next writer";
/// Less data than this is copied by one thread: it takes no longer.
const ALONE: u64 = 4 << 20;
/// Bytes that are said to be zero at a time.
const ZEROES: u64 = 64 << 20;
/// The most, and the fewest, bytes of data that are held twice by a fold in batches.
const BATCH: (u64, u64) = (64 << 20, 1 << 20);

/// A fold in batches has about so many at least.
const PARTS: u64 = 16;

/// The layer whose contents others are to hold.
pub(crate) struct Source {
    image: Arc<dyn Image>,
    /// Whether the layers on it may refer to its bytes on the host.
    share: bool,
    /// Whether its zeroes hide anything once it is gone.
    keeps_zeroes: bool,
}

impl Source {
    /// The layer right below a head.
    pub fn below(layer: &Layer, share: bool) -> Source {
        let keeps_zeroes = layer.image.backing().is_some();
        Source { image: layer.image.clone(), share, keeps_zeroes }
    }

    /// A layer that a head is to be put on: the head shows something else, which it is to hold.
    pub fn beside(layer: &Layer) -> Source {
        Source { image: layer.image.clone(), share: false, keeps_zeroes: true }
    }

    /// What stands at `at`, and how far that goes before `to`.
    fn map(&self, at: u64, to: u64) -> Result<(u64, Mapping)> {
        let size = self.image.size();
        if at >= size {
            // The layer ends here and hides what is below it.
            return Ok((to - at, Mapping::Zero { host: None }));
        }
        let extent = self.image.map(GuestOffset(at), (to - at).min(size - at))?;
        Ok((extent.len, extent.mapping))
    }
}

/// What is done, out of what, and whether to go on.
pub(crate) struct Meter<'a, 'b> {
    progress: &'a mut Progress<'b>,
    done: u64,
    total: u64,
    /// What the error says where the user stops it.
    state: &'static str,
    /// Bytes that a thread copies at a time.
    piece: u64,
    threads: usize,
}

impl<'a, 'b> Meter<'a, 'b> {
    pub fn new(progress: &'a mut Progress<'b>, total: u64, state: &'static str) -> Self {
        let threads = if total < ALONE { 1 } else { queue::threads() };
        Meter { progress, done: 0, total, state, piece: PIECE, threads }
    }

    /// Copies `piece` bytes at a time, in one thread: whoever else uses the disk waits for no more
    /// than that.
    pub fn behind_others(self, piece: u64) -> Self {
        Meter { piece, threads: 1, ..self }
    }

    /// Bytes of data that are held twice: no more than a part of all, so that little is copied again
    /// after a crash.
    fn batch(&self, path: &Path) -> Result<u64> {
        Ok(batch(path)?.min((self.total / PARTS).max(BATCH.1)))
    }

    fn add(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        if (self.progress)(self.done.min(self.total), self.total) {
            return Ok(());
        }
        let message = format!("the merge was interrupted: {}", self.state);
        Err(Error::new(ErrorKind::Interrupted, message))
    }
}

/// Makes the head of `chain` hold all that `source` shows, wherever it holds nothing yet. It is not
/// flushed.
pub(crate) fn up(chain: &Chain, source: &Source, progress: &mut Progress<'_>) -> Result<()> {
    let total = data_bytes(&*source.image)?;
    let mut meter = Meter::new(progress, total, "the disk and its snapshots are as they were");
    up_metered(chain, source, &mut meter)
}

/// As [`up`], with a meter of the caller's.
pub(crate) fn up_metered(chain: &Chain, source: &Source, meter: &mut Meter<'_, '_>) -> Result<()> {
    up_range(chain, source, 0..chain.size(), meter)
}

/// What a head takes over from the layer that is to go: an offset, and a length in bytes.
enum Taken {
    Data(u64, u64),
    Zeroes(u64, u64),
}

fn up_range(
    chain: &Chain,
    source: &Source,
    range: Range<u64>,
    meter: &mut Meter<'_, '_>,
) -> Result<()> {
    let (from, to, threads) = (range.start, range.end.min(chain.size()), meter.threads);
    let piece = meter.piece.max(alignment([chain.head().image, source.image.clone()]));
    let mut at = from;
    let next = || {
        while at < to {
            let (start, (len, mapping)) = (at, source.map(at, to)?);
            let taken = match mapping {
                Mapping::Zero { .. } if source.keeps_zeroes => {
                    Taken::Zeroes(start, len.min(ZEROES))
                }
                Mapping::Unallocated | Mapping::Zero { .. } => {
                    at += len;
                    continue;
                }
                // To a boundary: no cluster is two threads' matter.
                _ => Taken::Data(start, len.min(piece - start % piece)),
            };
            let (Taken::Data(_, len) | Taken::Zeroes(_, len)) = taken;
            at += len;
            meter.add(if matches!(taken, Taken::Data(..)) { len } else { 0 })?;
            return Ok(Some(taken));
        }
        Ok(None)
    };
    queue::unordered(threads, next, |taken, _| match taken {
        Taken::Zeroes(at, len) => chain.copy_up_zeroes(at, len),
        Taken::Data(at, len) => {
            if source.share {
                chain.take_shared(&*source.image, at, len)?;
            }
            chain.copy_up(at, len)
        }
    })
}

impl Chain {
    /// Makes the head refer to the bytes that `source`, the layer below it, has on the host,
    /// wherever the head holds nothing. What the host cannot share is left out.
    fn take_shared(&self, source: &dyn Image, at: u64, len: u64) -> Result<()> {
        let layers = self.layers();
        let head = &layers.head.image;
        let _hold = head.hold();
        let unit = head.granularity();
        let (mut pos, end) = (at, at + len);
        while pos < end {
            let here = head.map(GuestOffset(pos), end - pos)?;
            let there = source.map(GuestOffset(pos), here.len)?;
            let len = there.len;
            let cluster = head.cluster();
            let _entry = self.inflight.enter(cluster.floor(pos)..cluster.ceil(pos + len));
            // Whoever was here before may have filled it.
            let here = head.map(GuestOffset(pos), len)?;
            let len = here.len;
            let whole = unit.aligned(pos) && unit.aligned(len);
            let stored = source.stored(&there, GuestOffset(pos));
            let (true, Mapping::Unallocated, Some((file, offset))) = (whole, here.mapping, stored)
            else {
                pos += len;
                continue;
            };
            let token = head.prepare(GuestOffset(pos), len)?;
            let taken = token.len().min(len);
            if token.start().0 == pos
                && token.len() <= len
                && token.share(0, file, offset, taken)?
            {
                token.commit()?;
            }
            pos += taken;
        }
        Ok(())
    }
}

/// Told, before a layer gives back what another one holds by then, up to where on the disk it did.
pub(crate) type Letting<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// As [`up`] for all layers that stand on `source`, which gives back what they hold, `letting` know
/// before. They are flushed.
pub(crate) fn up_in_batches(
    children: &[&Chain],
    layer: &Layer,
    meter: &mut Meter<'_, '_>,
    letting: &mut Letting<'_>,
) -> Result<()> {
    let source = Source::below(layer, false);
    let lower = &source.image;
    let align = alignment(children.iter().map(|c| c.head().image).chain([lower.clone()]));
    let longest = children.iter().map(|child| child.size()).max().unwrap_or_default();
    let mut at = 0;
    while at < lower.size() {
        let end = window(&**lower, at, align, meter.batch(&layer.path)?)?;
        for child in children {
            up_range(child, &source, at..end, meter)?;
            child.flush()?;
        }
        letting(end)?;
        lower.discard(GuestOffset(at), end - at, true)?;
        lower.flush()?;
        at = end;
    }
    for child in children {
        up_range(child, &source, lower.size()..longest, meter)?;
        child.flush()?;
    }
    Ok(())
}

/// Writes what `upper` holds into the chain below it. Where `give_back`, `upper` loses what the chain
/// has by then, `letting` know before. The chain is flushed.
pub(crate) fn down(
    upper: &Layer,
    give_back: bool,
    lower: &Chain,
    meter: &mut Meter<'_, '_>,
    letting: &mut Letting<'_>,
) -> Result<()> {
    let image = &upper.image;
    if image.size() > lower.size() {
        lower.resize(image.size())?;
    }
    let align = alignment([lower.head().image, image.clone()]);
    let mut at = 0;
    while at < image.size() {
        let most = if give_back { meter.batch(&upper.path)? } else { u64::MAX };
        let end = window(&**image, at, align, most)?;
        down_range(image, lower, at..end, meter)?;
        lower.flush()?;
        if give_back {
            letting(end)?;
            image.discard(GuestOffset(at), end - at, true)?;
            image.flush()?;
        }
        at = end;
    }
    Ok(())
}

fn down_range(
    upper: &Arc<dyn Image>,
    lower: &Chain,
    range: Range<u64>,
    meter: &mut Meter<'_, '_>,
) -> Result<()> {
    let threads = meter.threads;
    let align = alignment([lower.head().image, upper.clone()]);
    let piece = meter.piece.max(align);
    let (mut at, to) = (range.start, range.end);
    let next = || {
        let mut part = Part::new(piece);
        while at < to && !part.is_full() {
            let extent = upper.map(GuestOffset(at), to - at)?;
            at += match extent.mapping {
                Mapping::Unallocated => extent.len,
                Mapping::Zero { .. } => part.add_zeroes(at, extent.len),
                Mapping::Data { .. } | Mapping::Compressed { .. } => part.add_data(at, extent.len),
            };
        }
        meter.add(part.data())?;
        Ok(part.filled())
    };
    let read = |mut at: u64, mut bytes: &mut [u8]| {
        while !bytes.is_empty() {
            let extent = upper.map(GuestOffset(at), bytes.len() as u64)?;
            let (here, behind) = bytes.split_at_mut(extent.len as usize);
            upper.read(&extent, extent.start, &mut [IoSliceMut::new(here)])?;
            (at, bytes) = (at + extent.len, behind);
        }
        Ok(())
    };
    transfer(lower, threads, next, read, |error| error)
}

/// Boundaries at which no cluster of any of the images is cut.
fn alignment(images: impl IntoIterator<Item = Arc<dyn Image>>) -> u64 {
    images.into_iter().map(|image| image.cluster().bytes()).max().unwrap_or(1).max(1)
}

/// The end of the part from `at` on that holds about `most` bytes of data.
fn window(image: &dyn Image, at: u64, align: u64, most: u64) -> Result<u64> {
    let (mut pos, mut data, end) = (at, 0, image.size());
    while pos < end && data < most {
        let extent = image.map(GuestOffset(pos), end - pos)?;
        let mut len = extent.len;
        if matches!(extent.mapping, Mapping::Data { .. } | Mapping::Compressed { .. }) {
            len = len.min(most - data).max(1);
            data += len;
        }
        pos += len;
    }
    Ok(pos.checked_next_multiple_of(align).unwrap_or(end).min(end))
}

/// The bytes of the host that are free in the directory of `path`.
pub(crate) fn free_space(path: &Path) -> Result<u64> {
    let stat = nix::sys::statvfs::statvfs(directory(path))
        .map_err(|e| Error::io("the free space could not be told", e.into()).at_path(path))?;
    Ok((stat.blocks_available() as u64).saturating_mul(stat.fragment_size() as u64))
}

/// Bytes of data that a fold in batches holds twice.
pub(crate) fn batch(path: &Path) -> Result<u64> {
    Ok((free_space(path)? / 4).clamp(BATCH.1, BATCH.0))
}
