//! What a file's first bytes say about its format.
//!
//! Only for files that a user names without a format: what a guest wrote may say anything, so a
//! layer named inside an image is never probed.

/// How many bytes of a file's beginning [`foreign`] needs at most; fewer will do for a shorter file.
pub const HEAD: usize = 4096;

/// A descriptor is text; a longer file that begins like one is somebody's disk.
const MAX_TEXT: u64 = 1 << 20;

/// The foreign format of a file of `len` bytes that begins with `head`, as qemu-img names it.
///
/// A fixed VHD is not recognised: its one mark is a footer behind the guest's data.
pub fn foreign(head: &[u8], len: u64) -> Option<&'static str> {
    match head {
        _ if vmdk_sparse(head) || (vmdk_descriptor(head) && len <= MAX_TEXT) => Some("vmdk"),
        _ if vhd(head) => Some("vpc"),
        _ if vhdx(head) => Some("vhdx"),
        _ if vdi(head) => Some("vdi"),
        _ if crate::luks::probe(head) => Some("luks"),
        _ => None,
    }
}

/// A VMDK: a sparse extent's magic, or the text of a descriptor.
pub fn vmdk(head: &[u8]) -> bool {
    vmdk_sparse(head) || vmdk_descriptor(head)
}

fn vmdk_sparse(head: &[u8]) -> bool {
    head.starts_with(b"KDMV") || head.starts_with(b"COWD")
}

/// A descriptor's first line that is neither blank nor a comment names its version.
fn vmdk_descriptor(head: &[u8]) -> bool {
    let mut lines = head.split(|&b| b == b'\n').map(<[u8]>::trim_ascii);
    lines
        .find(|line| !line.is_empty() && !line.starts_with(b"#"))
        .is_some_and(|line| matches!(line, b"version=1" | b"version=2" | b"version=3"))
}

/// A dynamic or differencing VHD: a copy of the footer stands first.
pub fn vhd(head: &[u8]) -> bool {
    head.starts_with(b"conectix")
}

/// A VHDX: its file type identifier.
pub fn vhdx(head: &[u8]) -> bool {
    head.starts_with(b"vhdxfile")
}

/// A VDI: the signature that follows the banner.
pub fn vdi(head: &[u8]) -> bool {
    head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_known_by_its_first_bytes() {
        let probe = |head: &[u8]| foreign(head, head.len() as u64);
        assert_eq!(probe(b"KDMV\x01\0\0\0"), Some("vmdk"));
        assert_eq!(probe(b"# Disk DescriptorFile\r\n \r\nversion=1\r\n"), Some("vmdk"));
        assert_eq!(probe(b"# Disk DescriptorFile\nversion=10\n"), None);
        assert_eq!(foreign(b"version=1\n", (1 << 20) + 1), None);
        assert_eq!(probe(b"conectix"), Some("vpc"));
        assert_eq!(probe(b"vhdxfile"), Some("vhdx"));
        let mut head = [0; 512];
        head[0x40..0x44].copy_from_slice(&0xbeda_107fu32.to_le_bytes());
        assert_eq!(probe(&head), Some("vdi"));
        assert_eq!(
            (probe(b"LUKS\xba\xbe\0\x01"), probe(b"LUKS\xba\xbe\0\x02")),
            (Some("luks"), None)
        );
        assert_eq!((probe(&[]), probe(&[0; 4096]), probe(b"QFI\xfb")), (None, None, None));
    }
}
