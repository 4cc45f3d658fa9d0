//! Compressed clusters: inflating one, and keeping the last ones.
//!
//! Specification: qcow2, "Compressed Clusters Descriptor".

use std::io::Read;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::qcow2::header::Compression;

/// Inflated clusters that are kept: guests read a compressed cluster in small pieces.
const KEPT: usize = 8;

/// The last inflated clusters.
pub(in crate::qcow2) struct Inflated {
    pub compression: Compression,
    /// By descriptor, the most recent last.
    clusters: Vec<(u64, Arc<[u8]>)>,
}

impl Inflated {
    pub fn new(compression: Compression) -> Inflated {
        Inflated { compression, clusters: Vec::new() }
    }

    /// Forgets everything: host clusters are about to be given another use.
    pub fn clear(&mut self) {
        self.clusters.clear();
    }

    pub fn find(&self, descriptor: u64) -> Option<Arc<[u8]>> {
        self.clusters.iter().find(|(d, _)| *d == descriptor).map(|(_, c)| c.clone())
    }

    pub fn keep(&mut self, descriptor: u64, cluster: Arc<[u8]>) {
        if self.clusters.len() == KEPT {
            self.clusters.remove(0);
        }
        self.clusters.push((descriptor, cluster));
    }
}

/// Decompresses one cluster of `size` bytes; bytes after its end are ignored.
pub(super) fn decompress(compression: Compression, packed: &[u8], size: usize) -> Result<Vec<u8>> {
    let mut cluster = vec![0; size];
    let done = match compression {
        Compression::Zlib => flate2::read::DeflateDecoder::new(packed).read_exact(&mut cluster),
        Compression::Zstd => zstd::stream::read::Decoder::new(packed).and_then(|mut decoder| {
            // The engine's own memory is bounded by the cluster: the frame's window has to be.
            decoder.window_log_max(WINDOW_LOG_MAX)?;
            decoder.read_exact(&mut cluster)
        }),
    };
    match done {
        Ok(()) => Ok(cluster),
        Err(_) => Err(Error::corrupt("a compressed cluster cannot be decompressed")),
    }
}

/// The largest zstd window, as a power of two: four times the largest cluster.
const WINDOW_LOG_MAX: u32 = 23;
