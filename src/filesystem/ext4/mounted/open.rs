//! Opens a file system: what it is, what its journal and its orphans leave to do.

use std::io::IoSliceMut;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Condvar, Mutex, RwLock};

use super::super::bytes::{be32, le32, put, put32, wide};
use super::super::checksum::checksum;
use super::super::superblock::{self, Superblock};
use super::super::{Ext4, journal};
use super::part::Part;
use super::state::blocks::Blocks;
use super::state::log::Log;
use super::state::{Counts, MOST, State};
use super::{Clock, Mounted, STRIPES, Tx};
use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};

const INCOMPAT_RECOVER: u32 = 0x4;
/// Features beyond the reader's that a writer may meet without knowing more of them: sparse_super,
/// large_file, huge_file, uninit_bg, dir_nlink, extra_isize, metadata_csum, verity.
const RO_COMPAT_WRITABLE: u32 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40 | 0x400 | 0x8000;
const INCOMPAT_MMP: u32 = 0x100;
/// What features are called that keep a file system from being written.
const NAMES: &[(u32, &str)] = &[
    (0x4, "btree_dir"),
    (0x80, "has_snapshot"),
    (0x100, "quota"),
    (0x200, "bigalloc"),
    (0x800, "replica"),
    (0x1000, "read-only"),
    (0x2000, "project"),
    (0x4000, "shared_blocks"),
    (0x1_0000, "orphan_present"),
];
/// The fewest blocks of a block group.
const FEWEST: u64 = 256;

/// How to open a file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Changes nothing, and reads what the journal holds from there. Implied by a read-only disk.
    pub read_only: bool,
    /// Writes metadata to its place without the journal. What is interrupted then is lost: for a file system that
    /// nobody sees before it is closed.
    pub unjournaled: bool,
    /// Where times come from.
    pub clock: Clock,
}

impl Mounted {
    /// Opens the file system in the `len` bytes of `device` from `offset` on. Where it was in use
    /// and may be written, what its journal says is done first.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for what is no file system; [`ErrorKind::Unsupported`] names what it
    /// has that cannot be read, or written.
    pub fn open(
        device: Arc<dyn BlockDevice>,
        offset: u64,
        len: u64,
        options: Options,
    ) -> Result<Mounted> {
        let read_only = options.read_only || device.read_only();
        let raw = raw_superblock(device.as_ref(), offset, len)?;
        let sb = Superblock::parse(&raw)?;
        if !read_only {
            writable(&sb)?;
        }
        let mut part = Part::new(device.clone(), offset, len, sb.block_size);
        let recovers = sb.journal.is_some();
        if recovers {
            let recovered = recover(device.as_ref(), offset, &part, read_only)?;
            part = part.with_journal(if read_only { recovered } else { Default::default() });
        }
        let mut raw = vec![0; superblock::LEN];
        part.read(
            superblock::AT / part.block as u64,
            superblock::AT % part.block as u64,
            &mut raw,
        )?;
        let sb = Superblock::parse(&raw)?;
        if sb.block_size != part.block {
            return Err(Error::corrupt("ext4: the journal changes the size of blocks"));
        }
        sound(&sb, &part)?;
        let unclean = recovers || sb.journal_inode == 0 && sb.state & 1 == 0;
        let mounted = Mounted::new(part, sb, &raw, Options { read_only, ..options });
        if !read_only {
            mounted.prepare(unclean, !options.unjournaled)?;
        }
        Ok(mounted)
    }

    fn new(part: Part, sb: Superblock, raw: &[u8], options: Options) -> Mounted {
        let high = if sb.incompat & 0x80 != 0 { le32(raw, 0x158) } else { 0 };
        let counts = Counts {
            free_blocks: wide(high, le32(raw, 0xc)),
            free_inodes: le32(raw, 0x10),
            orphan: le32(raw, 0xe8),
        };
        let generation = match options.clock {
            Clock::Fixed { generation, .. } => generation,
            Clock::Host => {
                let seed = checksum(u32::MAX, raw) ^ std::process::id();
                let (time, nanoseconds) = options.clock.now();
                checksum(seed, &(time ^ i64::from(nanoseconds) << 20).to_le_bytes())
            }
        };
        Mounted {
            state: Mutex::new(State {
                blocks: Blocks::new(sb.block_size, sb.blocks),
                counts,
                touched: Default::default(),
                checked: Default::default(),
                freed: Default::default(),
                freeing: Default::default(),
                in_use: false,
                most: MOST,
                frozen: false,
            }),
            part,
            sb,
            read_only: options.read_only,
            clock: options.clock,
            log: Mutex::new(None),
            thawed: Condvar::new(),
            gate: RwLock::new(()),
            stripes: (0..STRIPES).map(|_| RwLock::new(())).collect(),
            held: Mutex::default(),
            failed: AtomicBool::new(false),
            generation: AtomicU32::new(generation),
        }
    }

    /// Makes a file system one that can be written.
    fn prepare(&self, unclean: bool, journaled: bool) -> Result<()> {
        if journaled && self.sb.journal_inode != 0 {
            let places = self.look(|tx| tx.journal_places(self.sb.journal_inode))?;
            let log = Log::open(&self.part, places)?;
            self.state().most = MOST.min(log.most() / 2);
            *self.log.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(log);
        }
        if unclean {
            let counted = self.look(|tx| tx.count_free())?;
            let mut state = self.state();
            (state.counts.free_blocks, state.counts.free_inodes) = counted;
        }
        self.settle_orphans()
    }
}

impl Tx<'_> {
    /// Where the blocks of the journal stand.
    fn journal_places(&mut self, number: u32) -> Result<Vec<u64>> {
        let corrupt = |what: &str| Error::corrupt(format!("ext4: the journal {what}"));
        let inode = self.inode(number)?;
        let blocks = inode.size() / self.fs.sb.block_size as u64;
        if !inode.is_regular() || blocks > self.fs.sb.blocks.min(1 << 23) {
            return Err(corrupt("is no file"));
        }
        let mut places = Vec::new();
        while (places.len() as u64) < blocks {
            let stretch = self.stretch(&inode, places.len() as u64)?;
            let place = stretch.place.filter(|_| stretch.written);
            let place = place.ok_or_else(|| corrupt("has a hole"))?;
            let len = stretch.len.min(blocks - places.len() as u64);
            places.extend(place..place + len);
        }
        Ok(places)
    }

    /// The free blocks and inodes of all groups.
    fn count_free(&mut self) -> Result<(u64, u32)> {
        let (mut blocks, mut inodes) = (0u64, 0u32);
        for number in 0..u32::try_from(self.fs.sb.groups()).unwrap_or(u32::MAX) {
            let group = self.group(number)?;
            blocks += u64::from(group.free_blocks);
            inodes = inodes.saturating_add(group.free_inodes);
        }
        Ok((blocks, inodes))
    }
}

fn raw_superblock(device: &dyn BlockDevice, offset: u64, len: u64) -> Result<Vec<u8>> {
    let there = device.size().saturating_sub(offset).min(len);
    if there < superblock::AT + superblock::LEN as u64 {
        return Err(Error::corrupt("ext4: there is no superblock"));
    }
    let mut raw = vec![0; superblock::LEN];
    device.read_at(offset + superblock::AT, &mut [IoSliceMut::new(&mut raw)])?;
    Ok(raw)
}

/// Fails, naming them, where features forbid to write.
fn writable(sb: &Superblock) -> Result<()> {
    let refused = |what: &str| {
        let text =
            format!("ext4: has {what}, with which it can only be read here, or mounted by root");
        Err(Error::new(ErrorKind::Unsupported, text))
    };
    if sb.incompat & INCOMPAT_MMP != 0 {
        return refused("mmp");
    }
    let unknown = sb.ro_compat & !RO_COMPAT_WRITABLE;
    let named: Vec<&str> =
        NAMES.iter().filter(|(bit, _)| unknown & bit != 0).map(|(_, name)| *name).collect();
    match (unknown, named.is_empty()) {
        (0, _) => Ok(()),
        (_, false) => refused(&named.join(", ")),
        (_, true) => refused(&format!("unknown features ({unknown:#x})")),
    }
}

/// Fails where the superblock's numbers do not belong together.
fn sound(sb: &Superblock, part: &Part) -> Result<()> {
    let believable = |fine: bool, what: &str| match fine {
        true => Ok(()),
        false => Err(Error::corrupt(format!("ext4: the superblock's {what} is not believable"))),
    };
    let bits = sb.block_size as u64 * 8;
    believable(sb.blocks > sb.first_data_block && sb.first_data_block <= 1, "number of blocks")?;
    let fits = sb.blocks.checked_mul(sb.block_size as u64).is_some_and(|bytes| bytes <= part.len());
    if !fits {
        return Err(Error::corrupt("ext4: the file system is longer than what it stands on"));
    }
    // What a group of clusters has more of than bits is read and never allocated.
    let few = sb.blocks_per_group <= bits || sb.ro_compat & 0x200 != 0;
    believable(few && sb.blocks_per_group >= FEWEST, "number of blocks in a group")?;
    believable(u64::from(sb.inodes_per_group) <= bits, "number of inodes in a group")?;
    let inodes = sb.groups().checked_mul(sb.inodes_per_group.into());
    believable(inodes == Some(sb.inodes.into()), "number of inodes")?;
    believable(sb.first_inode > super::ROOT && sb.first_inode <= sb.inodes, "first inode")
}

/// What the journal says is done, on the disk where it may be written.
fn recover(
    device: &dyn BlockDevice,
    offset: u64,
    part: &Part,
    read_only: bool,
) -> Result<journal::Journal> {
    let go_on = || false;
    let old = Ext4::open(device, offset, part.len(), &go_on)?;
    if read_only {
        return Ok(old.into_journal());
    }
    if old.may_be_behind() {
        return Err(Error::unsupported(
            "ext4: was in use and makes fast commits, which are not replayed here: mount it once \
             as root",
        ));
    }
    let mut blocks: Vec<u64> = old.journal.blocks().collect();
    blocks.sort_unstable();
    for number in blocks {
        part.write(number, 0, &old.block(number)?)?;
    }
    part.flush()?;
    if let Some(number) = old.superblock.journal
        && old.journal.next != 0
    {
        let place = old.inode(number)?.run(&old, 0)?.place;
        let place = place.ok_or_else(|| Error::corrupt("ext4: the journal has a hole"))?;
        let mut raw = vec![0; part.block];
        part.read(place, 0, &mut raw)?;
        empty_journal(&mut raw, old.journal.next);
        part.write(place, 0, &raw)?;
        part.flush()?;
    }
    let (block, at) = (superblock::AT / part.block as u64, superblock::AT as usize % part.block);
    let mut raw = vec![0; part.block];
    part.read(block, 0, &mut raw)?;
    let superblock = raw.get_mut(at..at + superblock::LEN).unwrap_or_default();
    put32(superblock, 0x60, le32(superblock, 0x60) & !INCOMPAT_RECOVER);
    if le32(superblock, 0x64) & super::RO_COMPAT_CHECKSUMS != 0 {
        let sum = checksum(u32::MAX, superblock.get(..0x3fc).unwrap_or_default());
        put32(superblock, 0x3fc, sum);
    }
    part.write(block, 0, &raw)?;
    part.flush()?;
    Ok(old.into_journal())
}

/// Says in a journal's superblock that nothing is left to do.
fn empty_journal(raw: &mut [u8], next: u32) {
    put(raw, 0x1c, &[0; 4]);
    // The kernel goes on after a gap too, so that nothing that is left in the ring fits.
    put(raw, 0x18, &next.wrapping_add(1).max(1).to_be_bytes());
    if be32(raw, 0x28) & 0x18 != 0 {
        put(raw, 0xfc, &[0; 4]);
        let sum = checksum(u32::MAX, raw.get(..1024).unwrap_or_default());
        put(raw, 0xfc, &sum.to_be_bytes());
    }
}
