//! Block requests as a guest writes them (virtio 1.2, 5.2.6): from an untrusted descriptor chain to
//! a [`Command`].
//!
//! Nothing here knows a disk. A chain is read once; what it says is checked for form alone, and all
//! that is allocated is bounded by [`MAX_SEGMENTS`].

use std::ops::Deref;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Memory;
use super::config::{MAX_RANGES, MAX_SEGMENTS};

/// The unit of all positions and lengths in requests, in bytes, whatever the disk's block size.
pub const SECTOR: u64 = 512;

/// What a request begins with (virtio 5.2.6, `virtio_blk_req`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// One range of a discard or write zeroes request (`virtio_blk_discard_write_zeroes`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Segment {
    sector: U64,
    num_sectors: U32,
    flags: U32,
}

/// Length in bytes of one range of a discard or write zeroes request.
const RANGE: usize = size_of::<Segment>();
const _: () = assert!(size_of::<Header>() == 16 && RANGE == 16);

/// Why a request fails: the status byte that its driver gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// VIRTIO_BLK_S_IOERR: malformed, out of bounds, or the host failed.
    Io,
    /// VIRTIO_BLK_S_UNSUPP: a request or a flag that this device does not have.
    Unsupported,
}

/// The chain has no status byte to answer in: the device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unanswerable;

/// Pieces of guest memory, in order.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: u64,
}

impl<'m> Buffers<'m> {
    /// The total length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, none of them empty.
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// Fills the front from `bytes`; returns how many fitted.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        for slice in &self.slices {
            let take = rest.len().min(slice.len());
            slice.copy_from(&rest[..take]);
            rest = &rest[take..];
        }
        bytes.len() - rest.len()
    }

    fn push(&mut self, slice: VolatileSlice<'m>) {
        if !slice.is_empty() {
            self.len += slice.len() as u64;
            self.slices.push(slice);
        }
    }

    /// Takes the first `out.len()` bytes off; `false` when there are fewer.
    fn take_front(&mut self, out: &mut [u8]) -> bool {
        if self.len < out.len() as u64 {
            return false;
        }
        let mut filled = 0;
        let mut rest = Buffers::default();
        for slice in std::mem::take(&mut self.slices) {
            let take = (out.len() - filled).min(slice.len());
            slice.copy_to(&mut out[filled..filled + take]);
            filled += take;
            if let Ok(after) = slice.offset(take) {
                rest.push(after);
            }
        }
        *self = rest;
        true
    }

    /// Takes the last byte off; `None` when there is none.
    fn take_last(&mut self) -> Option<VolatileSlice<'m>> {
        let slice = self.slices.pop()?;
        self.len -= slice.len() as u64;
        let (front, last) = slice.split_at(slice.len().checked_sub(1)?).ok()?;
        self.push(front);
        Some(last)
    }
}

/// A stretch of the disk in sectors, as a guest names it: not yet checked against any size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// The flags as found; bit 0 is `unmap`.
    pub flags: u32,
}

/// What a guest asks for.
#[derive(Debug)]
pub enum Command<'m> {
    /// Fill the buffers, at least one and whole sectors.
    Read {
        /// First sector.
        sector: u64,
        /// Where the bytes go.
        into: Buffers<'m>,
    },
    /// Write the buffers, at least one and whole sectors.
    Write {
        /// First sector.
        sector: u64,
        /// Where the bytes come from.
        from: Buffers<'m>,
    },
    /// Make all completed writes durable.
    Flush,
    /// The contents of these ranges no longer matter.
    Discard(Vec<Extent>),
    /// These ranges are to read as zeroes.
    WriteZeroes(Vec<Extent>),
    /// Fill in the disk's id.
    GetId(Buffers<'m>),
}

/// A request with its way back.
#[derive(Debug)]
pub struct Request<'m> {
    /// What is asked for, or why that is refused at once.
    pub command: Result<Command<'m>, Refusal>,
    /// The one byte that takes the status.
    pub status: VolatileSlice<'m>,
    /// Bytes that the guest can be given, the status byte left out.
    pub room: u64,
}

/// Reads one request from its chain.
///
/// Any framing is taken (virtio 2.7.4): a header may be spread over descriptors or share one with
/// data; the status is the last byte that the device may write.
pub fn parse<'m>(
    chain: DescriptorChain<impl Deref<Target = Memory>>,
    memory: &'m Memory,
) -> Result<Request<'m>, Unanswerable> {
    let Gathered { readable, mut writable, status, fault } = gather(chain, memory)?;
    let room = match fault {
        // How many bytes come before the status is unknown: no answer fills them.
        true => u64::MAX,
        // The status byte is the last of the writable ones, and not part of the data.
        false => writable.take_last().map(|_| writable.len()).ok_or(Unanswerable)?,
    };
    let command = if fault { Err(Refusal::Io) } else { command(readable, writable) };
    Ok(Request { command, status, room })
}

struct Gathered<'m> {
    readable: Buffers<'m>,
    writable: Buffers<'m>,
    status: VolatileSlice<'m>,
    /// The buffers are incomplete or in the wrong order: refuse.
    fault: bool,
}

/// Walks the chain to its end, so that a refusal finds the status byte too.
fn gather<'m>(
    chain: DescriptorChain<impl Deref<Target = Memory>>,
    memory: &'m Memory,
) -> Result<Gathered<'m>, Unanswerable> {
    let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
    let mut fault = false;
    let mut last: Option<Descriptor> = None;
    let mut complete = false;
    for descriptor in chain {
        complete = !descriptor.has_next();
        if descriptor.len() == 0 {
            continue;
        }
        last = Some(descriptor);
        let buffers = match descriptor.is_write_only() {
            true => &mut writable,
            // Everything the device reads comes before everything it writes (virtio 2.7.4.2).
            false if !writable.is_empty() => {
                fault = true;
                continue;
            }
            false => &mut readable,
        };
        // Header and status may have a descriptor each beside the data.
        let full = buffers.slices.len() > MAX_SEGMENTS as usize + 2;
        fault |= full || !collect(&descriptor, memory, buffers);
    }
    // A chain that stops although a descriptor announced another one runs in a loop, leaves its
    // table, or is longer than the queue: where it was to end is unknown.
    let end = last.filter(|d| complete && d.is_write_only()).ok_or(Unanswerable)?;
    let at = end.addr().0.checked_add(u64::from(end.len()) - 1).ok_or(Unanswerable)?;
    let status = slices(memory, at, 1).and_then(|mut s| s.pop()).ok_or(Unanswerable)?;
    Ok(Gathered { readable, writable, status, fault })
}

/// Adds the descriptor's memory to `buffers`; `false` when some of it does not exist.
fn collect<'m>(descriptor: &Descriptor, memory: &'m Memory, buffers: &mut Buffers<'m>) -> bool {
    match slices(memory, descriptor.addr().0, descriptor.len() as usize) {
        Some(found) => {
            found.into_iter().for_each(|slice| buffers.push(slice));
            true
        }
        None => false,
    }
}

/// The guest memory at an address: one slice for each region it touches, of which there are two.
fn slices(memory: &Memory, address: u64, len: usize) -> Option<Vec<VolatileSlice<'_>>> {
    memory
        .get_slices(GuestAddress(address), len, Permissions::ReadWrite)
        .ok()?
        .collect::<Result<Vec<_>, _>>()
        .ok()
}

fn command<'m>(mut readable: Buffers<'m>, writable: Buffers<'m>) -> Result<Command<'m>, Refusal> {
    let mut header = Header::new_zeroed();
    if !readable.take_front(header.as_mut_bytes()) {
        return Err(Refusal::Io);
    }
    let sector = header.sector.get();
    match header.kind.get() {
        VIRTIO_BLK_T_IN => Ok(Command::Read { sector, into: whole_sectors(writable)? }),
        VIRTIO_BLK_T_OUT => Ok(Command::Write { sector, from: whole_sectors(readable)? }),
        VIRTIO_BLK_T_FLUSH => Ok(Command::Flush),
        VIRTIO_BLK_T_DISCARD => Ok(Command::Discard(ranges(readable)?)),
        VIRTIO_BLK_T_WRITE_ZEROES => Ok(Command::WriteZeroes(ranges(readable)?)),
        VIRTIO_BLK_T_GET_ID if writable.is_empty() => Err(Refusal::Io),
        VIRTIO_BLK_T_GET_ID => Ok(Command::GetId(writable)),
        _ => Err(Refusal::Unsupported),
    }
}

fn whole_sectors(buffers: Buffers<'_>) -> Result<Buffers<'_>, Refusal> {
    if buffers.is_empty() || !buffers.len().is_multiple_of(SECTOR) {
        return Err(Refusal::Io);
    }
    Ok(buffers)
}

/// The ranges of a discard or write zeroes request (virtio 5.2.6, `virtio_blk_discard_write_zeroes`).
fn ranges(mut buffers: Buffers<'_>) -> Result<Vec<Extent>, Refusal> {
    let bounded = buffers.len() <= u64::from(MAX_RANGES) * RANGE as u64;
    if buffers.is_empty() || !bounded || !buffers.len().is_multiple_of(RANGE as u64) {
        return Err(Refusal::Io);
    }
    let mut bytes = vec![0; buffers.len() as usize];
    if !buffers.take_front(&mut bytes) {
        return Err(Refusal::Io);
    }
    let ranges = <[Segment]>::ref_from_bytes(&bytes).map_err(|_| Refusal::Io)?;
    let extent = |range: &Segment| Extent {
        sector: range.sector.get(),
        sectors: range.num_sectors.get(),
        flags: range.flags.get(),
    };
    Ok(ranges.iter().map(extent).collect())
}
