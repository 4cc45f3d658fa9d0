//! Long extents out of single table entries, and the reading that every format shares.

use std::io::IoSliceMut;
use std::sync::Arc;

use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::block;
use crate::error::{Error, Result};
use crate::image::{Extent, Mapping};
use crate::storage::Storage;

/// How many table entries one call to `map` looks at: bounds its time on any image.
const STEPS: usize = 1 << 16;

/// What the foreign formats report as their cluster: nothing is allocated in them, so it is only the
/// unit in which others account for them and which a delta on them is made with. Their own blocks,
/// of up to 256 MiB, would make each first write to such a delta copy as much.
pub(super) const CLUSTER: Unit = Unit::from_bits(16);

/// A table entry's meaning: how the bytes from the asked position on are mapped, and how many.
pub(super) type Piece = (Mapping, u64);

/// Plain data that nobody may overwrite.
pub(super) fn data(host: u64) -> Mapping {
    Mapping::Data { host: HostOffset(host), exclusive: false }
}

/// `len`, cut at the disk's end; an error where `at` is at or past it.
pub(super) fn clip(at: GuestOffset, len: u64, size: u64) -> Result<u64> {
    match size.checked_sub(at.0) {
        Some(rest) if rest > 0 && len > 0 => Ok(len.min(rest)),
        _ => Err(Error::invalid(format!(
            "{len} bytes at guest offset {at} cannot be mapped on a disk of {size} bytes"
        ))),
    }
}

/// The longest extent from `at`, at most `len` bytes, that `piece` describes. `piece` answers for
/// a guest offset and never with length 0.
pub(super) fn longest(
    at: GuestOffset,
    len: u64,
    mut piece: impl FnMut(u64) -> Result<Piece>,
) -> Result<Extent> {
    let (mapping, mut have) = piece(at.0)?;
    for _ in 0..STEPS {
        if have >= len {
            break;
        }
        // A damaged entry further on is reported to whoever asks about that place.
        match at.0.checked_add(have).map(&mut piece) {
            Some(Ok((next, more))) if continues(mapping, have, next) => have += more,
            _ => break,
        }
    }
    Ok(Extent { start: at, len: have.min(len), mapping })
}

fn continues(first: Mapping, len: u64, next: Mapping) -> bool {
    match (first, next) {
        (Mapping::Data { host: a, .. }, Mapping::Data { host: b, .. }) => {
            a.checked_add(len) == Some(b)
        }
        (Mapping::Compressed { .. }, _) => false,
        _ => first == next,
    }
}

/// The extent with its host bytes `base` further on.
pub(super) fn shift(extent: Extent, base: u64) -> Extent {
    match extent.mapping {
        Mapping::Data { host, .. } => Extent { mapping: data(host.0 + base), ..extent },
        Mapping::Zero { host: Some(host) } => {
            Extent { mapping: Mapping::Zero { host: Some(HostOffset(host.0 + base)) }, ..extent }
        }
        _ => extent,
    }
}

/// Takes [`shift`] back.
pub(super) fn unshift(extent: Extent, base: u64) -> Result<Extent> {
    let Mapping::Data { host, .. } = extent.mapping else { return Ok(extent) };
    let host = host.0.checked_sub(base).ok_or_else(|| Error::invalid("not this image's extent"))?;
    Ok(Extent { mapping: data(host), ..extent })
}

/// The first part of plain data that the host stores, or holds as a hole.
pub(super) fn narrow(storage: &Arc<dyn Storage>, extent: Extent) -> Result<Extent> {
    let Mapping::Data { host, .. } = extent.mapping else { return Ok(extent) };
    let end = host.0.saturating_add(extent.len);
    let zero = |to: u64| Extent {
        len: to.min(end) - host.0,
        mapping: Mapping::Zero { host: Some(host) },
        ..extent
    };
    Ok(match storage.next_data(host.0)? {
        None => zero(end),
        Some((data, _)) if data > host.0 => zero(data),
        Some((_, hole)) => Extent { len: hole.clamp(host.0 + 1, end) - host.0, ..extent },
    })
}

/// How far `at` lies inside an extent; an error unless `len` bytes from there do too.
pub(super) fn skip(extent: &Extent, at: GuestOffset, len: u64) -> Result<u64> {
    at.0.checked_sub(extent.start.0)
        .filter(|skip| skip.checked_add(len).is_some_and(|end| end <= extent.len))
        .ok_or_else(|| {
            Error::invalid(format!(
                "{len} bytes at guest offset {at} are not within the extent of {} bytes at {}",
                extent.len, extent.start
            ))
        })
}

/// Reads plain data or zeroes of an extent.
pub(super) fn read(
    storage: &Arc<dyn Storage>,
    extent: &Extent,
    at: GuestOffset,
    bufs: &mut [IoSliceMut<'_>],
) -> Result<()> {
    let skip = skip(extent, at, block::total_mut(bufs))?;
    match extent.mapping {
        Mapping::Data { host, .. } => {
            let host = host.checked_add(skip).ok_or_else(|| Error::invalid("not an extent"))?;
            storage.read_at(host.0, bufs)
        }
        Mapping::Zero { .. } => {
            block::fill_zero(bufs);
            Ok(())
        }
        Mapping::Compressed { .. } | Mapping::Unallocated => {
            Err(Error::invalid("this layer holds no plain data there"))
        }
    }
}

/// Fills `bufs` from the unpacked bytes of a compressed block, from its byte `from` on.
pub(super) fn copy(block: &[u8], from: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
    let mut rest =
        usize::try_from(from).ok().and_then(|from| block.get(from..)).unwrap_or_default();
    for buf in bufs {
        let (now, later) = rest.split_at_checked(buf.len()).ok_or_else(|| {
            Error::corrupt(format!("a compressed block holds only {} bytes", block.len()))
        })?;
        buf.copy_from_slice(now);
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_on_the_host_become_one_extent() {
        let hosts = [100u64, 110, 120, 500];
        let piece = |pos: u64| {
            let host = hosts.get(pos as usize / 10).ok_or_else(|| Error::corrupt("end"))?;
            Ok((data(host + pos % 10), 10 - pos % 10))
        };
        let extent = longest(GuestOffset(5), 1000, piece).unwrap();
        assert_eq!((extent.start.0, extent.len, extent.mapping), (5, 25, data(105)));
        assert_eq!(longest(GuestOffset(5), 7, piece).unwrap().len, 7);
        assert_eq!(longest(GuestOffset(30), 99, piece).unwrap().len, 10);
        assert!(longest(GuestOffset(40), 1, piece).is_err());
    }

    #[test]
    fn a_read_outside_its_extent_is_refused() {
        let extent = Extent { start: GuestOffset(10), len: 10, mapping: data(0) };
        assert_eq!(skip(&extent, GuestOffset(12), 8).unwrap(), 2);
        assert!(skip(&extent, GuestOffset(12), 9).is_err());
        assert!(skip(&extent, GuestOffset(9), 1).is_err());
    }
}
