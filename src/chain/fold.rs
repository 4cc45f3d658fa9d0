//! Moving what one layer holds into its neighbour, up or down.
//!
//! The disk shows the same before, during and after. What a layer has taken over and made durable
//! can be given back where it came from: then a fold takes hardly more space than one batch.

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

use super::cost::data_bytes;
use super::merge::Progress;
use super::plan::free_space;
use super::{Chain, Layer};
use crate::addr::GuestOffset;
use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, Mapping};

/// Bytes that are copied at a time.
const CHUNK: u64 = 2 << 20;
/// Bytes that are said to be zero at a time.
const ZEROES: u64 = 64 << 20;
/// The most, and the fewest, bytes of data that are held twice by a fold in batches.
const BATCH: (u64, u64) = (64 << 20, 1 << 20);

/// A fold in batches has about so many at least.
const PARTS: u64 = 16;

/// The layer whose contents others are to hold.
pub(super) struct Source {
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
}

/// What is done, out of what, and whether to go on.
pub(super) struct Meter<'a, 'b> {
    progress: &'a mut Progress<'b>,
    done: u64,
    total: u64,
    /// What the error says where the user stops it.
    state: &'static str,
    /// Bytes that are copied at a time.
    chunk: u64,
}

impl<'a, 'b> Meter<'a, 'b> {
    pub fn new(progress: &'a mut Progress<'b>, total: u64, state: &'static str) -> Self {
        Meter { progress, done: 0, total, state, chunk: CHUNK }
    }

    /// Copies `chunk` bytes at a time: whoever else uses the disk waits for no more than that.
    pub fn in_chunks(self, chunk: u64) -> Self {
        Meter { chunk, ..self }
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
pub(super) fn up(chain: &Chain, source: &Source, progress: &mut Progress<'_>) -> Result<()> {
    let total = data_bytes(&*source.image)?;
    let mut meter = Meter::new(progress, total, "the disk and its snapshots are as they were");
    up_metered(chain, source, &mut meter)
}

/// As [`up`], with a meter of the caller's.
pub(super) fn up_metered(chain: &Chain, source: &Source, meter: &mut Meter<'_, '_>) -> Result<()> {
    up_range(chain, source, (0, chain.size()), meter)
}

fn up_range(
    chain: &Chain,
    source: &Source,
    (from, to): (u64, u64),
    meter: &mut Meter<'_, '_>,
) -> Result<()> {
    let to = to.min(chain.size());
    let size = source.image.size();
    let mut at = from;
    while at < to {
        let (len, mapping) = if at < size {
            let extent = source.image.map(GuestOffset(at), (to - at).min(size - at))?;
            (extent.len, extent.mapping)
        } else {
            // The layer ends here and hides what is below it.
            (to - at, Mapping::Zero { host: None })
        };
        let mut len = len;
        match mapping {
            Mapping::Unallocated => {}
            Mapping::Zero { .. } if source.keeps_zeroes => {
                len = len.min(ZEROES);
                chain.adopt_zeroes(at, len)?;
                meter.add(0)?;
            }
            Mapping::Zero { .. } => {}
            Mapping::Data { .. } | Mapping::Compressed { .. } => {
                len = len.min(meter.chunk);
                if source.share {
                    chain.take_shared(&*source.image, at, len)?;
                }
                chain.adopt(at, len)?;
                meter.add(len)?;
            }
        }
        at += len;
    }
    Ok(())
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
pub(super) type Letting<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// As [`up`] for all layers that stand on `source`, which gives back what they hold, `letting` know
/// before. They are flushed.
pub(super) fn up_in_batches(
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
            up_range(child, &source, (at, end), meter)?;
            child.flush()?;
        }
        letting(end)?;
        lower.discard(GuestOffset(at), end - at, true)?;
        lower.flush()?;
        at = end;
    }
    for child in children {
        up_range(child, &source, (lower.size(), longest), meter)?;
        child.flush()?;
    }
    Ok(())
}

/// Writes what `upper` holds into the chain below it. Where `give_back`, `upper` loses what the chain
/// has by then, `letting` know before. The chain is flushed.
pub(super) fn down(
    (upper, give_back): (&Layer, bool),
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
        down_range(&**image, lower, (at, end), meter)?;
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
    upper: &dyn Image,
    lower: &Chain,
    (from, to): (u64, u64),
    meter: &mut Meter<'_, '_>,
) -> Result<()> {
    let mut buf = vec![0; meter.chunk.min(to - from) as usize];
    let mut at = from;
    while at < to {
        let extent = upper.map(GuestOffset(at), to - at)?;
        let mut len = extent.len;
        match extent.mapping {
            Mapping::Unallocated => {}
            Mapping::Zero { .. } => lower.write_zeroes(at, len, true)?,
            Mapping::Data { .. } | Mapping::Compressed { .. } => {
                len = len.min(meter.chunk);
                let bytes = &mut buf[..len as usize];
                upper.read(&extent, extent.start, &mut [IoSliceMut::new(bytes)])?;
                lower.write_at(at, &[IoSlice::new(bytes)])?;
                meter.add(len)?;
            }
        }
        at += len;
    }
    Ok(())
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

/// Bytes of data that a fold in batches holds twice.
pub(super) fn batch(path: &Path) -> Result<u64> {
    Ok((free_space(path)? / 4).clamp(BATCH.1, BATCH.0))
}
