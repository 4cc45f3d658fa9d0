//! Writes a cpio archive in the form that Linux unpacks an initramfs from ("newc",
//! Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! It knows names and bytes, not what they are for.

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER: u32 = 0o020_600;

/// An archive that is being written.
pub struct Archive<W: Write> {
    out: W,
    files: u32,
}

impl<W: Write> Archive<W> {
    /// An archive without files.
    pub fn new(out: W) -> Archive<W> {
        Archive { out, files: 0 }
    }

    /// A directory, after the one that it is in.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY, (0, 0), &[])
    }

    /// A file that everybody may read and execute.
    pub fn file(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        self.entry(path, PROGRAM, (0, 0), bytes)
    }

    /// A character device.
    pub fn device(&mut self, path: &str, device: (u32, u32)) -> io::Result<()> {
        self.entry(path, CHARACTER, device, &[])
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a file of over 4 GiB"))?;
        self.files += 1;
        let links = 1 + u32::from(mode == DIRECTORY);
        // Inode, mode, owner, group, links, time, length, device of the file, device that it is,
        // length of the name with its zero, checksum.
        let name = path.len() as u32 + 1;
        let fields = [self.files, mode, 0, 0, links, 0, len, 0, 0, device.0, device.1, name, 0];
        let mut header = b"070701".to_vec();
        for field in fields {
            write!(header, "{field:08x}")?;
        }
        header.extend_from_slice(path.as_bytes());
        header.push(0);
        self.padded(&header)?;
        self.padded(bytes)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        let padding = (4 - bytes.len() % 4) % 4;
        self.out.write_all(&[0; 4][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_headers_names_and_bytes_on_words_of_four() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev").unwrap();
        archive.device("dev/console", (5, 1)).unwrap();
        archive.file("init", b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(bytes.len().is_multiple_of(4));
        assert_eq!(text.matches("070701").count(), 4);
        assert!(text.contains("init\0\0hello\0\0\x00070701"), "{text:?}");
        assert!(text.contains("00000005000000010000000c00000000dev/console\0"), "{text:?}");
        assert!(text.ends_with("TRAILER!!!\0\0\0\0"), "{text:?}");
    }
}
