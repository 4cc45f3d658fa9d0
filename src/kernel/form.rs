//! What form a kernel is in, told from its first bytes: to refuse by name what does not boot.
//!
//! It knows bytes, no file and no disk.

/// Bytes that [`refusal`] looks at.
pub const START: usize = 0x400;

/// Whether these bytes begin a kernel that the machine can load: an x86-64 ELF file, or a bzImage.
pub fn boots(start: &[u8]) -> bool {
    start.starts_with(b"\x7fELF") || start.get(0x202..0x206) == Some(b"HdrS")
}

/// Why a file that begins with these bytes is no kernel to boot.
pub fn refusal(start: &[u8]) -> String {
    let packed = |how: &str, with: &str| {
        format!(
            "it is a kernel compressed with {how} as a whole, which no x86 machine starts: unpack it \
             ({with}) and pass it with --kernel"
        )
    };
    let has = |at: usize, bytes: &[u8]| start.get(at..at + bytes.len()) == Some(bytes);
    match () {
        () if start.is_empty() => "it is empty".into(),
        () if has(0, b"\x1f\x8b") => packed("gzip", "gunzip"),
        () if has(0, b"\x28\xb5\x2f\xfd") => packed("zstd", "unzstd"),
        () if has(0, b"\xfd7zXZ\0") => packed("xz", "unxz"),
        () if has(0, b"\x5d\0\0") => packed("lzma", "unlzma"),
        () if has(0, b"BZh") => packed("bzip2", "bunzip2"),
        () if has(0, b"\x02\x21\x4c\x18") || has(0, b"\x04\x22\x4d\x18") => packed("lz4", "unlz4"),
        () if has(0, b"\x89LZO") => packed("lzo", "lzop -d"),
        () if has(0, b"MZ") && has(4, b"zimg") => {
            "it is an EFI zboot kernel, which only firmware starts: pass the kernel that is packed in \
             it with --kernel"
                .into()
        }
        () if has(56, b"ARM\x64") => "it is a kernel for arm64, and this machine is x86-64".into(),
        () if has(56, b"RSC\x05") => "it is a kernel for RISC-V, and this machine is x86-64".into(),
        () if has(0, b"MZ") => {
            "it is an EFI program (a unified kernel image, or a boot loader), which only firmware \
             starts: pass the kernel in it with --kernel (`objcopy -O binary -j .linux`)"
                .into()
        }
        () if has(0, b"\x27\x05\x19\x56") => "it is an image for U-Boot".into(),
        () => "it is neither ELF nor bzImage".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_that_does_not_boot_has_a_name() {
        let mut arm = vec![0; 64];
        arm[56..60].copy_from_slice(b"ARM\x64");
        let cases: [(&[u8], &str); 8] = [
            (b"\x1f\x8b\x08", "gzip"),
            (b"\x28\xb5\x2f\xfd\0", "zstd"),
            (b"\xfd7zXZ\0\0", "xz"),
            (b"\x02\x21\x4c\x18", "lz4"),
            (b"MZ\0\0zimg", "zboot"),
            (b"MZ\x90\0", "unified"),
            (&arm, "arm64"),
            (b"hello", "neither"),
        ];
        for (start, name) in cases {
            assert!(!boots(start), "{name}");
            assert!(refusal(start).contains(name), "{name}: {}", refusal(start));
        }
        let mut image = vec![0; START];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(boots(&image) && boots(b"\x7fELF\x02"));
    }
}
