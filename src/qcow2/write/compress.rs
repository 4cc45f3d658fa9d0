//! Compressed clusters: many share a host cluster, each holding a reference to it.
//!
//! Compressed bytes are written once and never in place: a guest write to such a cluster moves it to
//! a place of its own. Specification: qcow2, "Compressed Clusters Descriptor".

use std::cell::RefCell;
use std::io::IoSlice;

use flate2::{Compress, FlushCompress, Status};
use nix::libc::ENOTSUP;

use crate::addr::{GuestOffset, HostOffset};
use crate::error::{Error, Result};
use crate::qcow2::guard::lock;
use crate::qcow2::header::Compression;
use crate::qcow2::image::{Image, Lost};

/// Readers of the format inflate with a window of 4 KiB.
const WINDOW_BITS: u8 = 12;
/// Deflate's usual balance of speed and size.
const DEFLATE_LEVEL: u32 = 6;

impl Image {
    /// See [`crate::image::Image::pack`].
    pub(in crate::qcow2) fn pack_cluster(
        &self,
        at: GuestOffset,
        bytes: &[u8],
    ) -> Result<Option<Vec<u8>>> {
        self.check_writable()?;
        self.refuse_compression()?;
        let cluster = self.shape.cluster;
        let size = crate::image::Image::size(self);
        let whole = cluster.bytes().min(size.saturating_sub(at.0));
        if !cluster.aligned(at.0) || whole == 0 || bytes.len() as u64 != whole {
            return Err(Error::invalid("only whole clusters are compressed"));
        }
        self.deflate(bytes)
    }

    /// See [`crate::image::Image::write_packed`].
    pub(in crate::qcow2) fn store_packed(&self, at: GuestOffset, packed: &[u8]) -> Result<bool> {
        self.refuse_compression()?;
        let whole = self.shape.cluster.bytes();
        if !self.shape.cluster.aligned(at.0) || packed.is_empty() || packed.len() as u64 >= whole {
            return Err(Error::invalid("only whole clusters are compressed"));
        }
        self.write_back_if_crowded()?;
        self.ensure_table(at)?;
        let len = packed.len() as u64;
        let room = self.make_room(len)?;
        if let Err(error) = self.data.write_compressed(room, &[IoSlice::new(packed)]) {
            self.give_up(room, len);
            return Err(error);
        }
        let Some(entry) = self.shape.with_compressed(room, len) else {
            self.give_up(room, len);
            return Ok(false);
        };
        self.change_entry(at, Lost::Data, |_| entry)?;
        Ok(true)
    }

    fn refuse_compression(&self) -> Result<()> {
        if self.data.is_encrypted() {
            let message = "Compression and encryption not supported at the same time";
            return Err(Error::unsupported(message));
        }
        if self.data.is_external() {
            let message = "an image with an external data file holds no compressed clusters";
            return Err(Error::unsupported(message).with_os_error(ENOTSUP));
        }
        Ok(())
    }

    /// The compressed form of a cluster whose bytes end at the disk's end; `None` where it is not
    /// smaller.
    fn deflate(&self, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
        let size = self.shape.cluster.bytes() as usize;
        let compression = lock(&self.header).compression;
        if bytes.len() == size {
            return compress(compression, bytes);
        }
        let mut padded = vec![0; size];
        padded[..bytes.len()].copy_from_slice(bytes);
        compress(compression, &padded)
    }

    /// A place for compressed bytes, counted.
    fn make_room(&self, len: u64) -> Result<HostOffset> {
        let mut refcounts = lock(&self.refcounts);
        let (room, new) = refcounts.pack(len)?;
        if let Some(run) = new.filter(|run| run.zeroed) {
            // Lengths are counted in sectors, and other programs read whole ones: the file must not
            // end inside the last. Under the lock, because the next bytes may go up to that end.
            let last = run.host.0 + self.shape.cluster.bytes() - 1;
            if let Err(error) = self.data.write_compressed(HostOffset(last), &[IoSlice::new(&[0])])
            {
                drop(refcounts);
                self.give_up(room, len);
                return Err(error);
            }
        }
        Ok(room)
    }

    /// Gives the references of compressed bytes back that nothing came to refer to.
    fn give_up(&self, room: HostOffset, len: u64) {
        let cluster = self.shape.cluster;
        let first = cluster.floor(room.0);
        let clusters = cluster.count(room.0 + len - first);
        // If it fails, the clusters are leaked, which check mends.
        let _ = lock(&self.refcounts).release(HostOffset(first), clusters);
    }
}

/// Compresses a cluster; `None` where the result is not smaller.
fn compress(compression: Compression, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    match compression {
        Compression::Zlib => Ok(deflate(bytes)),
        Compression::Zstd => zstd(bytes),
    }
}

thread_local! {
    /// The compressors of this thread: setting one up costs as much as a small cluster.
    static DEFLATE: RefCell<Compress> = RefCell::new(compressor());
    static ZSTD: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
}

fn compressor() -> Compress {
    let level = flate2::Compression::new(DEFLATE_LEVEL);
    Compress::new_with_window_bits(level, false, WINDOW_BITS)
}

fn deflate(bytes: &[u8]) -> Option<Vec<u8>> {
    // Room for whatever comes out: a stream that is broken off for want of room leaves zlib-rs
    // 0.6.8 with a pending buffer that its reset does not empty.
    let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 8 + 64);
    DEFLATE.with_borrow_mut(|deflate| {
        deflate.reset();
        let done = deflate.compress_vec(bytes, &mut out, FlushCompress::Finish);
        if !matches!(done, Ok(Status::StreamEnd)) {
            *deflate = compressor();
            return None;
        }
        (out.len() < bytes.len()).then_some(out)
    })
}

fn zstd(bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    let failed = |e| Error::io("a cluster could not be compressed", e);
    ZSTD.with_borrow_mut(|kept| {
        let compressor = match kept {
            Some(compressor) => compressor,
            None => kept.insert(
                zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL).map_err(failed)?,
            ),
        };
        let packed = compressor.compress(bytes).map_err(failed)?;
        Ok((packed.len() < bytes.len()).then_some(packed))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::addr::Unit;
    use crate::image::{Compress as _, Image as _, Mapping};
    use crate::qcow2::{CreateOptions, Repair, create};
    use crate::storage::MemoryStorage;

    #[test]
    fn what_does_not_shrink_is_left_alone() {
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(4096)
        .collect();
        for compression in [Compression::Zlib, Compression::Zstd] {
            // Many times: the compressor is used again.
            (0..40).for_each(|_| assert_eq!(compress(compression, &noise).unwrap(), None));
            assert!(compress(compression, &[7; 4096]).unwrap().unwrap().len() < 100);
        }
    }

    #[test]
    fn shared_clusters_are_counted_and_freed() {
        for refcount_bits in [1, 2, 16] {
            let storage = Arc::new(MemoryStorage::default());
            let cluster = Unit::from_bits(12);
            let size = 64 * 4096 - 1000;
            let options = CreateOptions { cluster, refcount_bits, ..CreateOptions::new(size) };
            let image = create(storage, &options).unwrap();
            for number in 0..64u64 {
                let len = 4096.min(size - number * 4096) as usize;
                let bytes: Vec<u8> = (0..len).map(|i| (i % (number as usize + 9)) as u8).collect();
                assert!(image.write_compressed(GuestOffset(number * 4096), &bytes).unwrap());
            }
            image.flush().unwrap();
            let check = image.check(Repair::None).unwrap();
            assert!(check.is_clean(), "{refcount_bits}: {:?}", check.messages);
            assert_eq!(check.compressed_clusters, 64);
            image.discard(GuestOffset(0), 32 * 4096, false).unwrap();
            assert!(image.write_compressed(GuestOffset(0), &[3; 4096]).unwrap());
            image.flush().unwrap();
            assert!(image.write_compressed(GuestOffset(4096), &[4; 4096]).unwrap());
            image.flush().unwrap();
            let check = image.check(Repair::None).unwrap();
            assert!(check.is_clean(), "{refcount_bits}: {:?}", check.messages);
            let extent = image.map(GuestOffset(4096), 4096).unwrap();
            assert!(matches!(extent.mapping, Mapping::Compressed { .. }));
            let mut back = [0; 4096];
            let bufs = &mut [std::io::IoSliceMut::new(&mut back)];
            image.read(&extent, GuestOffset(4096), bufs).unwrap();
            assert_eq!(back, [4; 4096]);
        }
    }
}
