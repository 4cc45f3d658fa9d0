//! What a file's first bytes say about its format.
//!
//! Only for files that a user names without a format: what a guest wrote may say anything, so a
//! layer named inside an image is never probed.

/// How many bytes of a file's beginning [`foreign`] needs at most; fewer will do for a shorter file.
pub const HEAD: usize = 4096;

/// How far before a file's end stands what [`dmg`] looks at.
pub const TAIL: u64 = 512;

/// A descriptor is text; a longer file that begins like one is somebody's disk.
const MAX_TEXT: u64 = 1 << 20;

/// A Parallels disk whose table counts in sectors.
const PARALLELS: &[u8] = b"WithoutFreeSpace";
/// One whose table counts in blocks.
pub(super) const PARALLELS_EXTENDED: &[u8; 16] = b"WithouFreSpacExt";
/// What makes a cloop image mount itself.
const CLOOP: &[u8] = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 \
    /dev/cloop $1\n";

/// The foreign format of a file of `len` bytes that begins with `head`, as qemu-img names it: all that
/// QEMU knows by their beginning, also those that are not read here.
///
/// A fixed VHD is not recognised: its one mark is a footer behind the guest's data. Nor is LUKS 2: QEMU
/// does not know it, and disks that a guest encrypted as a whole begin so, whose bytes are what their
/// user wants.
pub fn foreign(head: &[u8], len: u64) -> Option<&'static str> {
    match head {
        _ if vmdk_sparse(head) || (vmdk_descriptor(head) && len <= MAX_TEXT) => Some("vmdk"),
        _ if vhd(head) => Some("vpc"),
        _ if vhdx(head) => Some("vhdx"),
        _ if vdi(head) => Some("vdi"),
        _ if crate::luks::probe(head) => Some("luks"),
        _ if qcow(head) => Some("qcow"),
        _ if qed(head) => Some("qed"),
        _ if parallels(head) => Some("parallels"),
        _ if bochs(head) => Some("bochs"),
        _ if head.starts_with(CLOOP) => Some("cloop"),
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

/// A qcow of version 1; later versions are qcow2.
pub fn qcow(head: &[u8]) -> bool {
    head.starts_with(b"QFI\xfb\0\0\0\x01")
}

/// A QED.
pub fn qed(head: &[u8]) -> bool {
    head.starts_with(b"QED\0")
}

/// A Parallels disk, of either kind, in the one version that there is.
pub fn parallels(head: &[u8]) -> bool {
    (head.starts_with(PARALLELS) || head.starts_with(PARALLELS_EXTENDED))
        && head.get(16..20) == Some(&[2, 0, 0, 0])
}

/// A growing disk of Bochs: magic, type and subtype, and one of two versions.
fn bochs(head: &[u8]) -> bool {
    let text = |at: usize, text: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(text));
    text(0, b"Bochs Virtual HD Image\0")
        && text(32, b"Redolog\0")
        && text(48, b"Growing\0")
        && (text(64, &[0, 0, 1, 0]) || text(64, &[0, 0, 2, 0]))
}

/// An Apple disk image: `tail` begins [`TAIL`] bytes before the file's end. Its mark stands behind data that a guest
/// may have written, so that the file's name has to say it as well.
pub fn dmg(name: &[u8], tail: &[u8]) -> bool {
    name.to_ascii_lowercase().ends_with(b".dmg") && tail.starts_with(b"koly")
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
        assert_eq!(probe(b"QFI\xfb\0\0\0\x01"), Some("qcow"));
        assert_eq!(probe(b"QFI\xfb\0\0\0\x02"), None);
        assert_eq!(probe(b"QED\0"), Some("qed"));
        assert_eq!(probe(b"WithoutFreeSpace\x02\0\0\0"), Some("parallels"));
        assert_eq!(probe(b"WithouFreSpacExt\x03\0\0\0"), None);
        assert_eq!(probe(CLOOP), Some("cloop"));
        let mut head = [0; 512];
        head[..22].copy_from_slice(b"Bochs Virtual HD Image");
        head[32..39].copy_from_slice(b"Redolog");
        head[48..55].copy_from_slice(b"Growing");
        assert_eq!(probe(&head), None);
        head[66] = 2;
        assert_eq!(probe(&head), Some("bochs"));
        assert!(dmg(b"a.DMG", b"koly\0") && !dmg(b"a.img", b"koly\0") && !dmg(b"a.dmg", b""));
    }
}
