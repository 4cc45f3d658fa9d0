//! The flattened map: which lower layer holds a piece of the disk.
//!
//! Lower layers never change, so what was found once stays true: the map is filled a page at a time
//! as it is touched, and bounded. A read costs the same whatever the number of layers.

use std::collections::{HashMap, VecDeque};
use std::io::IoSliceMut;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use foldhash::fast::RandomState;

use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::asymmetric::RwLock;
use crate::block::{fill_zero, with_window};
use crate::chain::Layer;
use crate::error::Result;
use crate::image::{Extent, Mapping};

/// Clusters of the smallest size in the chain that one page maps.
const PAGE_CLUSTERS_BITS: u32 = 9;
/// Pages map no less than this, as a power of two of bytes.
const PAGE_MIN_BITS: u32 = 18;

/// What a page takes besides its runs, in runs: places in two collections, and the allocator's.
const PAGE_COST: usize = 4;

/// The layers below the head as one map.
pub(crate) struct Flat {
    /// From the layer below the head down to the base.
    layers: Vec<Layer>,
    page: Unit,
    /// The most runs that are kept.
    capacity: usize,
    pages: RwLock<Pages>,
}

#[derive(Default)]
struct Pages {
    by_index: HashMap<u64, Kept, RandomState>,
    /// Page numbers in the order in which they are considered for eviction.
    turn: VecDeque<u64>,
    /// Runs that are kept, with what their pages take.
    runs: usize,
}

struct Kept {
    page: Box<[Run]>,
    used: AtomicBool,
}

/// A piece of the disk that one layer maps in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The extent in its layer. [`Mapping::Unallocated`] where no layer holds anything.
    pub extent: Extent,
    /// The layer's place below the head, from 0.
    pub layer: u32,
}

impl Run {
    fn end(&self) -> u64 {
        self.extent.start.0 + self.extent.len
    }

    /// Whether no layer holds the piece.
    pub fn is_hole(&self) -> bool {
        self.extent.mapping == Mapping::Unallocated
    }

    /// Whether the piece reads as zeroes.
    pub fn is_zero(&self) -> bool {
        matches!(self.extent.mapping, Mapping::Zero { .. } | Mapping::Unallocated)
    }
}

impl Flat {
    /// The map over `layers`, keeping about `memory` bytes of it.
    pub fn new(layers: Vec<Layer>, memory: u64) -> Flat {
        let smallest = layers.iter().map(|l| l.image.cluster().bits()).min().unwrap_or(16);
        let page = Unit::from_bits((smallest + PAGE_CLUSTERS_BITS).max(PAGE_MIN_BITS));
        let capacity = (memory as usize / size_of::<Run>()).max(1024);
        Flat { layers, page, capacity, pages: RwLock::default() }
    }

    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// An empty map over other layers that may take as much memory.
    pub fn over(&self, layers: Vec<Layer>) -> Flat {
        Flat::new(layers, (self.capacity * size_of::<Run>()) as u64)
    }

    /// Puts another image of the same file in a layer's place: the map stays right.
    pub fn replace(&mut self, number: usize, layer: Layer) -> Option<Layer> {
        self.layers.get_mut(number).map(|old| std::mem::replace(old, layer))
    }

    /// The run that holds the byte at `at`, cut to begin there and to be at most `len` bytes.
    pub fn find(&self, at: GuestOffset, len: u64) -> Result<Run> {
        if self.layers.is_empty() {
            let mapping = Mapping::Unallocated;
            return Ok(Run { extent: Extent { start: at, len, mapping }, layer: 0 });
        }
        let run = cut(self.run_at(at)?, at, len);
        if run.is_hole() && run.extent.len < len && self.page.aligned(run.end()) {
            return self.beyond(run, len);
        }
        Ok(run)
    }

    /// Carries a hole that reaches the end of its page on, as far as no layer holds anything: a
    /// huge empty disk is not gone through page by page.
    fn beyond(&self, mut run: Run, len: u64) -> Result<Run> {
        let from = GuestOffset(run.end());
        let mut open = len - run.extent.len;
        for layer in &self.layers {
            let left = layer.image.size().saturating_sub(from.0);
            if left == 0 {
                // Its end hides what lies below.
                break;
            }
            let extent = layer.image.map(from, open.min(left));
            let extent = extent.map_err(|e| e.at_path(&layer.path))?;
            if extent.mapping != Mapping::Unallocated {
                return Ok(run);
            }
            open = extent.len;
        }
        run.extent.len += open;
        Ok(run)
    }

    /// Whether a range is known to read as zeroes without reading it.
    pub fn is_zero(&self, from: u64, to: u64) -> Result<bool> {
        let mut pos = from;
        while pos < to {
            let run = self.find(GuestOffset(pos), to - pos)?;
            if !run.is_zero() {
                return Ok(false);
            }
            pos += run.extent.len;
        }
        Ok(true)
    }

    /// Reads from the lower layers.
    pub fn read(&self, at: GuestOffset, len: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let mut done = 0;
        while done < len {
            let pos = at + done;
            let run = self.find(pos, len - done)?;
            with_window(bufs, done, run.extent.len, |target| {
                if run.is_zero() {
                    fill_zero(target);
                    return Ok(());
                }
                let layer = &self.layers[run.layer as usize];
                let read = layer.image.read(&run.extent, pos, target);
                read.map_err(|e| e.at_path(&layer.path))
            })?;
            done += run.extent.len;
        }
        Ok(())
    }

    /// The run of its page that holds the byte at `at`. It is copied under the lock: a reference to
    /// the page would be counted in a place where all threads meet.
    fn run_at(&self, at: GuestOffset) -> Result<Run> {
        let index = self.page.index(at.0);
        let pages = self.pages.read();
        if let Some(kept) = pages.by_index.get(&index) {
            if !kept.used.load(Ordering::Relaxed) {
                kept.used.store(true, Ordering::Relaxed);
            }
            return Ok(run_in(&kept.page, at));
        }
        drop(pages);
        let start = index << self.page.bits();
        let page = self.resolve(start, start.saturating_add(self.page.bytes()))?;
        let run = run_in(&page, at);
        let mut pages = self.pages.write();
        pages.keep(index, page.into(), self.capacity);
        Ok(run)
    }

    /// Asks the layers from the top down; each is asked only for what those above left open.
    fn resolve(&self, start: u64, end: u64) -> Result<Vec<Run>> {
        let mut runs = Vec::new();
        let mut open = vec![(start, end)];
        for (number, layer) in self.layers.iter().enumerate() {
            let mut below = Vec::new();
            for (from, to) in open {
                resolve_in(layer, number as u32, from..to, &mut runs, &mut below)
                    .map_err(|e| e.at_path(&layer.path))?;
            }
            open = below;
            if open.is_empty() {
                break;
            }
        }
        runs.extend(open.into_iter().map(|(from, to)| empty(from, to, 0)));
        runs.sort_unstable_by_key(|r| r.extent.start);
        runs.dedup_by(|next, before| join(before, next));
        Ok(runs)
    }
}

impl Pages {
    fn keep(&mut self, index: u64, page: Box<[Run]>, capacity: usize) {
        if self.by_index.contains_key(&index) {
            return;
        }
        let cost = |page: &[Run]| page.len() + PAGE_COST;
        while self.runs + cost(&page) > capacity {
            let Some(victim) = self.turn.pop_front() else { break };
            let Some(kept) = self.by_index.get_mut(&victim) else { continue };
            if std::mem::take(kept.used.get_mut()) {
                self.turn.push_back(victim);
            } else {
                self.runs -= cost(&kept.page);
                self.by_index.remove(&victim);
            }
        }
        self.runs += cost(&page);
        self.turn.push_back(index);
        self.by_index.insert(index, Kept { page, used: AtomicBool::new(false) });
    }
}

/// The run of `page` that holds the byte at `at`. A page's runs cover it without gaps.
fn run_in(page: &[Run], at: GuestOffset) -> Run {
    let index = page.partition_point(|r| r.end() <= at.0);
    page.get(index).copied().unwrap_or_else(|| empty(at.0, u64::MAX, 0))
}

/// Finds what `layer` says of a range: its runs, and what it leaves to the layers below.
fn resolve_in(
    layer: &Layer,
    number: u32,
    range: Range<u64>,
    runs: &mut Vec<Run>,
    below: &mut Vec<(u64, u64)>,
) -> Result<()> {
    let size = layer.image.size();
    let (mut pos, to) = (range.start, range.end);
    while pos < to.min(size) {
        let extent = layer.image.map(GuestOffset(pos), to.min(size) - pos)?;
        if extent.mapping == Mapping::Unallocated {
            match below.last_mut() {
                Some((_, end)) if *end == pos => *end = pos + extent.len,
                _ => below.push((pos, pos + extent.len)),
            }
        } else {
            runs.push(Run { extent, layer: number });
        }
        pos += extent.len;
    }
    // A layer that ends earlier than those above it hides what lies below its end.
    if pos < to {
        runs.push(empty(pos, to, number));
    }
    Ok(())
}

fn empty(from: u64, to: u64, layer: u32) -> Run {
    let mapping = Mapping::Unallocated;
    Run { extent: Extent { start: GuestOffset(from), len: to - from, mapping }, layer }
}

/// Makes `before` take `next` in, if they are one run.
fn join(before: &mut Run, next: &Run) -> bool {
    let follows = match (before.extent.mapping, next.extent.mapping) {
        (Mapping::Data { host: a, .. }, Mapping::Data { host: b, .. }) => {
            before.layer == next.layer && a.checked_add(before.extent.len) == Some(b)
        }
        (Mapping::Zero { host: Some(a) }, Mapping::Zero { host: Some(b) }) => {
            before.layer == next.layer && a.checked_add(before.extent.len) == Some(b)
        }
        (Mapping::Compressed { .. }, _) | (_, Mapping::Compressed { .. }) => false,
        (a, b) => a == b && before.layer == next.layer,
    };
    if follows {
        before.extent.len += next.extent.len;
    }
    follows
}

/// The part of `run` from `at` on, at most `len` bytes.
fn cut(run: Run, at: GuestOffset, len: u64) -> Run {
    let skip = at - run.extent.start;
    let mapping = match run.extent.mapping {
        Mapping::Data { host, exclusive } => {
            Mapping::Data { host: HostOffset(host.0 + skip), exclusive }
        }
        Mapping::Zero { host: Some(host) } => {
            Mapping::Zero { host: Some(HostOffset(host.0 + skip)) }
        }
        other => other,
    };
    let len = (run.extent.len - skip).min(len);
    Run { extent: Extent { start: at, len, mapping }, layer: run.layer }
}
