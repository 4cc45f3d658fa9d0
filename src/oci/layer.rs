//! A layer of an image as a sealed delta.
//!
//! The same layers give the same bytes and the same ids on every host: the file system has a fixed id and clock, and a
//! delta's clusters stand in the order of the disk, whatever the order was in which they were written.

use std::io::{IoSlice, IoSliceMut, Read};
use std::path::Path;
use std::sync::Arc;

use super::digest::Digest;
use super::tar::{Unpacked, unpack};
use crate::addr::{GuestOffset, Unit};
use crate::block::BlockDevice;
use crate::chain::{Chain, Layer};
use crate::change::{Clone, mark};
use crate::error::Result;
use crate::filesystem::ext4::mounted::{Clock, Format as FileSystem, Mounted, Options, format};
use crate::image::{Backing, Clones, Id, Identity, Image, Label, Mapping, Parent, Role};
use crate::open::Format;
use crate::open::{OpenOptions, open_layers};
use crate::qcow2::{self, CreateOptions};
use crate::storage::Draft;

/// Counted up when the same layers would give other bytes than before.
const VERSION: u32 = 2;
/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;

/// A layer that stands in a chain of an image's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerId {
    /// The chain's digest.
    pub chain: Digest,
    /// The disk's size in bytes.
    pub size: u64,
}

impl LayerId {
    /// The name of its file.
    pub fn file_name(&self) -> String {
        format!("{}-{}.qcow2", self.chain.hex(), self.size)
    }

    /// Whether a file is called as a layer's is.
    pub fn is_file_name(path: &Path) -> bool {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        name.get(..64).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit))
            && name.get(64) == Some(&b'-')
            && name.ends_with(b".qcow2")
    }

    /// The ids of its disk, of the layer and of its contents: nothing else decides them.
    fn ids(&self) -> [Id; 3] {
        ["disk", "layer", "content"].map(|what| {
            let text = format!("vdisk {what} {VERSION} {} {}", self.size, self.chain);
            let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, ..] =
                Digest::of(text.as_bytes()).0;
            uuid::Builder::from_custom_bytes([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
                .into_uuid()
        })
    }

    fn label(&self, below: Option<LayerId>) -> Label {
        let [disk, layer, content] = self.ids();
        let parent = below.map(|below| {
            let [_, layer, content] = below.ids();
            Parent { layer, content, stamp: None }
        });
        // From the beginning it is known that all clones are counted.
        let clones = Some(Clones::default());
        Label { disk, layer, content, parent, role: Role::Base, clones, ..Label::new() }
    }
}

/// Makes the delta of one layer, `id`, on the one `below`, in `dir`; `tar` is what it holds. It is durable and
/// sealed then. Until then nothing has its name.
///
/// # Errors
/// As [`unpack`].
pub fn make(
    dir: &Path,
    id: LayerId,
    below: Option<LayerId>,
    tar: impl Read,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<Unpacked> {
    let path = dir.join(id.file_name());
    let backing = below.map(|below| Backing {
        name: below.file_name(),
        format: Some(Format::Qcow2.name().to_owned()),
    });
    let lower = match below {
        Some(below) => {
            let options = OpenOptions { unprotected: true, ..OpenOptions::default() };
            open_layers(&dir.join(below.file_name()), &options)?.all_layers()
        }
        None => Vec::new(),
    };
    // It is written where it is never seen: without a name, it goes with this process.
    let work = empty(&path, id, backing.clone())?;
    let chain = Arc::new(Chain::new(work.layer(&path), lower.clone(), OpenOptions::CACHE));
    let unpacked = fill(chain.clone(), id, below.is_none(), tar, go_on)?;
    chain.flush()?;
    let last = empty(&path, id, backing.clone())?;
    let target = Chain::new(last.layer(&path), lower, OpenOptions::CACHE);
    in_order(&chain, &target)?;
    drop(chain);
    target.flush()?;
    drop(target);
    let identity = Identity { label: Some(id.label(below)), backing, vouched: true };
    last.image.set_identity(&identity)?;
    if let Some(below) = below {
        let [disk, ..] = id.ids();
        let [_, layer, content] = below.ids();
        let parent = Parent { layer, content, stamp: None };
        mark(&dir.join(below.file_name()), parent, &[Clone { disk, path: &path }])?;
    }
    last.draft.publish()?;
    Ok(unpacked)
}

/// A new delta without a name.
struct Empty {
    draft: Draft,
    image: Arc<dyn Image>,
}

impl Empty {
    fn layer(&self, path: &Path) -> Layer {
        Layer {
            path: path.to_owned(),
            format: Format::Qcow2,
            image: self.image.clone(),
            file: self.draft.file().clone(),
        }
    }
}

fn empty(path: &Path, id: LayerId, backing: Option<Backing>) -> Result<Empty> {
    let options = CreateOptions {
        // What a file system changes is 4 KiB at a time: no whole cluster is copied for it.
        extended_l2: true,
        cluster: Unit::from_bits(16),
        backing,
        ..CreateOptions::new(id.size)
    };
    let draft = Draft::new(path)?;
    let image = qcow2::create(draft.storage(), &options)?;
    Ok(Empty { draft, image: Arc::new(image) })
}

/// Makes the file system, where there is none yet, and puts the layer's files on what is in it.
fn fill(
    device: Arc<dyn BlockDevice>,
    id: LayerId,
    first: bool,
    tar: impl Read,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<Unpacked> {
    let seed = Digest::of(format!("vdisk file system {VERSION}").as_bytes()).0;
    let half = |at: usize| {
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(seed.iter().skip(at)).for_each(|(to, from)| *to = *from);
        bytes
    };
    if first {
        let how = FileSystem { uuid: half(0), hash_seed: half(16), seconds: 0 };
        format(&device, id.size, &how)?;
    }
    let [a, b, c, d, ..] = id.chain.0;
    let clock = Clock::Fixed { seconds: 0, generation: u32::from_le_bytes([a, b, c, d]) };
    let options = Options { unjournaled: true, clock, ..Options::default() };
    let fs = Mounted::open(device, 0, id.size, options)?;
    let unpacked = unpack(&fs, tar, go_on)?;
    fs.close()?;
    Ok(unpacked)
}

/// Copies what the head of `from` holds into `to`, in the order of the disk.
fn in_order(from: &Chain, to: &Chain) -> Result<()> {
    let head = from.head().image;
    let (mut at, end) = (0, head.size());
    let mut buffer = vec![0; PIECE as usize];
    while at < end {
        let extent = head.map(GuestOffset(at), (end - at).min(PIECE))?;
        match extent.mapping {
            Mapping::Unallocated => {}
            Mapping::Zero { .. } => to.write_zeroes(at, extent.len, true)?,
            Mapping::Data { .. } | Mapping::Compressed { .. } => {
                let bytes = buffer.get_mut(..extent.len as usize).unwrap_or_default();
                head.read(&extent, extent.start, &mut [IoSliceMut::new(bytes)])?;
                to.write_at(at, &[IoSlice::new(bytes)])?;
            }
        }
        at += extent.len;
    }
    Ok(())
}
