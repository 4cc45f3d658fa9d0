//! Numbers out of byte strings: 0 where the string ends before.

/// Two bytes, low one first.
pub fn le16(bytes: &[u8], at: usize) -> u16 {
    take(bytes, at).map_or(0, u16::from_le_bytes)
}

/// Four bytes, low one first.
pub fn le32(bytes: &[u8], at: usize) -> u32 {
    take(bytes, at).map_or(0, u32::from_le_bytes)
}

/// Two bytes, high one first: the journal's order.
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    take(bytes, at).map_or(0, u16::from_be_bytes)
}

/// Four bytes, high one first.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    take(bytes, at).map_or(0, u32::from_be_bytes)
}

/// A number of which the halves stand apart.
pub fn wide(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// Stores bytes, where there is room for all of them.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    let end = at.checked_add(value.len());
    if let Some(place) = end.and_then(|end| bytes.get_mut(at..end)) {
        place.copy_from_slice(value);
    }
}

/// Stores two bytes, low one first.
pub fn put16(bytes: &mut [u8], at: usize, value: u16) {
    put(bytes, at, &value.to_le_bytes());
}

/// Stores four bytes, low one first.
pub fn put32(bytes: &mut [u8], at: usize, value: u32) {
    put(bytes, at, &value.to_le_bytes());
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}
