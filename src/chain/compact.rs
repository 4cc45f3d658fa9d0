//! Giving unused space of a disk's head back to the host, while the disk is in use.

use std::io::IoSliceMut;

use crate::addr::GuestOffset;
use crate::block::{BlockDevice, check_range};
use crate::chain::{Chain, Layers};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Mapping;
use crate::progress::Progress;
use crate::storage::Storage;

/// Bytes that are looked at in one go.
const CHUNK: u64 = 1 << 20;

/// What a compaction gave back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes of the disk that were stored, and read as zeroes.
    pub zeroes: u64,
    /// Bytes of the host that the head took before.
    pub before: u64,
    /// Bytes of the host that it takes now.
    pub after: u64,
}

/// What a compaction would give back, as far as it can be told without doing it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compactable {
    /// Bytes of the disk that are stored, and read as zeroes.
    pub zeroes: u64,
    /// Bytes that the host stores for parts of the file that nothing uses.
    pub unused: u64,
    /// Bytes of the host that the head takes now.
    pub before: u64,
}

impl Compactable {
    /// Bytes that the host gets back.
    pub fn freed(&self) -> u64 {
        self.zeroes.saturating_add(self.unused).min(self.before)
    }
}

impl Chain {
    /// What [`compact`](Chain::compact) would give back. Reads all data that the head stores.
    pub fn plan_compact(&self, progress: &mut Progress<'_>) -> Result<Compactable> {
        let zeroes = self.each_zero(progress, &|at, len| {
            Ok(if self.is_stored(&self.layers(), at, len)? { len } else { 0 })
        })?;
        let head = self.head();
        let unused = head.image.unused().map_err(|e| e.at_path(&head.path))?;
        Ok(Compactable { zeroes, unused, before: self.allocated()? })
    }

    /// Gives back what the head stores without need: clusters that read as zeroes, clusters that
    /// nothing refers to, and the file's tail. What the disk shows does not change.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`] where `progress` asked to stop; what was given back stays so.
    pub fn compact(&self, progress: &mut Progress<'_>) -> Result<Compacted> {
        let before = self.allocated()?;
        let zeroes = self.each_zero(progress, &|at, len| self.drop_zero(at, len))?;
        // The second pass writes down what the first one made free.
        self.flush()?;
        self.flush()?;
        let head = self.head();
        head.image.give_back().map_err(|e| e.at_path(&head.path))?;
        let layers = self.layers_alone();
        layers.head.image.shorten().map_err(|e| e.at_path(&layers.head.path))?;
        drop(layers);
        Ok(Compacted { zeroes, before, after: self.allocated()? })
    }

    fn allocated(&self) -> Result<u64> {
        self.head().file.allocated()
    }

    /// Calls `act` with each cluster of data in the head that is all zero, and sums up what it says.
    fn each_zero(
        &self,
        progress: &mut Progress<'_>,
        act: &dyn Fn(u64, u64) -> Result<u64>,
    ) -> Result<u64> {
        let unit = self.head().image.cluster();
        let (mut at, mut sum) = (0, 0);
        let mut buf = vec![0; CHUNK.max(unit.bytes()) as usize];
        loop {
            let size = self.size();
            if at >= size {
                return Ok(sum);
            }
            let mut next = self.skip_unstored(at, size)?;
            if next == at {
                next = (at + buf.len() as u64).min(size);
                let bytes = &mut buf[..(next - at) as usize];
                self.read_at(at, &mut [IoSliceMut::new(bytes)])?;
                for (number, cluster) in (0..).zip(bytes.chunks(unit.bytes() as usize)) {
                    if cluster.iter().all(|b| *b == 0) {
                        let start = at + number * unit.bytes();
                        sum += act(start, cluster.len() as u64)?;
                    }
                }
            }
            at = next;
            if !progress(at, size) {
                let message = "the compaction was interrupted: the disk shows what it showed";
                return Err(Error::new(ErrorKind::Interrupted, message));
            }
        }
    }

    /// The first cluster from `at`, which begins one, on that the head may store data in.
    fn skip_unstored(&self, at: u64, size: u64) -> Result<u64> {
        let layers = self.layers();
        let head = &layers.head.image;
        let _hold = head.hold();
        let extent = head.map(GuestOffset(at), size - at)?;
        let extent = head.narrow(extent)?;
        let end = at + extent.len;
        Ok(match extent.mapping {
            Mapping::Data { .. } => at,
            _ if end >= size => size,
            _ => head.cluster().floor(end),
        })
    }

    /// Unmaps one cluster, if it is still data and all zero now that nobody can write it.
    fn drop_zero(&self, at: u64, len: u64) -> Result<u64> {
        let layers = self.layers_alone();
        let head = &layers.head.image;
        // The disk may be another size by now.
        let cut =
            check_range(at, len, head.size()).is_err() || !self.is_stored(&layers, at, len)?;
        if cut {
            return Ok(0);
        }
        let mut bytes = vec![0; len as usize];
        layers.read(GuestOffset(at), &mut [IoSliceMut::new(&mut bytes)])?;
        if bytes.iter().any(|b| *b != 0) {
            return Ok(0);
        }
        match head.zero(GuestOffset(at), len, true) {
            // The format cannot say that a cluster is zero: it stays as it is.
            Err(e) if e.kind() == ErrorKind::Unsupported => Ok(0),
            done => done.map(|()| len).map_err(|e| e.at_path(&layers.head.path)),
        }
    }

    /// Whether the head stores data anywhere in a range.
    fn is_stored(&self, layers: &Layers, at: u64, len: u64) -> Result<bool> {
        let (mut pos, end) = (at, at + len);
        while pos < end {
            let extent = layers.head.image.map(GuestOffset(pos), end - pos)?;
            let extent = layers.head.image.narrow(extent)?;
            if matches!(extent.mapping, Mapping::Data { .. }) {
                return Ok(true);
            }
            pos += extent.len;
        }
        Ok(false)
    }
}
