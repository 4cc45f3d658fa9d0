//! The checksums of metadata (kernel: Documentation/filesystems/ext4/checksums.rst).

/// CRC32C of `bytes` after what gave `seed`, without the usual inversions: those of the file
/// system go on from one to the next.
pub fn checksum(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// The CRC16 of the descriptors of block groups, where the file system has no other checksums.
pub fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0xa001 } else { 0 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_check_strings() {
        assert_eq!(!checksum(u32::MAX, b"123456789"), 0xe306_9283);
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
        let whole = checksum(7, b"abcdef");
        assert_eq!(checksum(checksum(7, b"abc"), b"def"), whole);
    }
}
