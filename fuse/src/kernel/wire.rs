//! The layout of FUSE's requests and replies (`linux/fuse.h`, 7.31 to 7.45) as bytes. Knows no
//! file and no device.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use crate::attr::{Attr, StatFs, Time};
use crate::files::{Caller, Entry};

/// The newest minor version that this speaks.
pub(crate) const MINOR: u32 = 42;
/// The oldest one: every structure here has its full length since then, and more.
pub(crate) const OLDEST_MINOR: u32 = 31;
/// `struct fuse_in_header`.
pub(crate) const IN_HEADER: usize = 40;
/// `struct fuse_out_header`.
pub(crate) const OUT_HEADER: usize = 16;

/// `enum fuse_opcode`, as far as it is answered with more than `ENOSYS`.
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const TMPFILE: u32 = 51;
}

/// Flags of INIT, both words as one.
pub(crate) mod init {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(crate) const EXPORT_SUPPORT: u64 = 1 << 4;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const DONT_MASK: u64 = 1 << 6;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(crate) const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub(crate) const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub(crate) const PASSTHROUGH: u64 = 1 << 37;
}

/// `FOPEN_*`.
pub(crate) mod fopen {
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    pub(crate) const NOFLUSH: u32 = 1 << 5;
    pub(crate) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    pub(crate) const PASSTHROUGH: u32 = 1 << 7;
}

/// `FATTR_*`: which fields of SETATTR count.
pub(crate) mod fattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const CTIME: u32 = 1 << 10;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// `enum fuse_notify_code`.
pub(crate) const NOTIFY_INVAL_INODE: i32 = 2;
pub(crate) const NOTIFY_STORE: i32 = 4;
pub(crate) const NOTIFY_PRUNE: i32 = 9;

/// `struct fuse_in_header`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) caller: Caller,
}

fn short() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// Takes a request apart from front to back.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// The header of a request and what follows it, without the extensions at its end.
    pub(crate) fn request(bytes: &'a [u8]) -> io::Result<(Header, Reader<'a>)> {
        let mut at = Reader(bytes);
        let len = at.u32()? as usize;
        let opcode = at.u32()?;
        let unique = at.u64()?;
        let node = at.u64()?;
        let caller = Caller { uid: at.u32()?, gid: at.u32()?, pid: at.u32()? };
        let extensions = usize::from(at.u16()?) * 8;
        at.u16()?;
        let body = len.checked_sub(IN_HEADER + extensions).ok_or_else(short)?;
        let body = at.0.get(..body).ok_or_else(short)?;
        Ok((Header { opcode, unique, node, caller }, Reader(body)))
    }

    pub(crate) fn bytes(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(len).ok_or_else(short)?;
        self.0 = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk::<N>().ok_or_else(short)?;
        self.0 = rest;
        Ok(*front)
    }

    pub(crate) fn u16(&mut self) -> io::Result<u16> {
        Ok(u16::from_ne_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_ne_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from_ne_bytes(self.array()?))
    }

    /// A string with a NUL byte behind it.
    pub(crate) fn name(&mut self) -> io::Result<&'a OsStr> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or_else(short)?;
        let name = self.bytes(end)?;
        self.bytes(1)?;
        Ok(OsStr::from_bytes(name))
    }

    /// A name that can stand in a directory. The kernel sends no other.
    pub(crate) fn component(&mut self) -> io::Result<&'a OsStr> {
        let name = self.name()?;
        match name.as_bytes() {
            b"" | b"." | b".." => Err(short()),
            bytes if bytes.contains(&b'/') => Err(short()),
            _ => Ok(name),
        }
    }
}

/// A reply being put together; starts with room for its header. Of the buffer only the first `len`
/// bytes count: it is not cleared between replies, as some are a megabyte.
pub(crate) struct Reply {
    buffer: Vec<u8>,
    len: usize,
}

impl Reply {
    pub(crate) fn new(buffer: Vec<u8>) -> Reply {
        let mut reply = Reply { buffer, len: 0 };
        reply.add(OUT_HEADER);
        reply
    }

    /// The allocation, to be used again.
    pub(crate) fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }

    /// Bytes behind the header.
    pub(crate) fn len(&self) -> usize {
        self.len.saturating_sub(OUT_HEADER)
    }

    /// Drops what stands behind the header from byte `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(OUT_HEADER + len);
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Reply {
        self.bytes(&value.to_ne_bytes())
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Reply {
        self.bytes(&value.to_ne_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Reply {
        self.bytes(&value.to_ne_bytes())
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Reply {
        for (to, from) in self.add(bytes.len()).iter_mut().zip(bytes) {
            *to = *from;
        }
        self
    }

    /// `len` more bytes, with anything in them.
    fn add(&mut self, len: usize) -> &mut [u8] {
        let start = self.len;
        self.len += len;
        if self.buffer.len() < self.len {
            self.buffer.resize(self.len, 0);
        }
        self.buffer.get_mut(start..self.len).unwrap_or_default()
    }

    /// Room for `len` bytes behind what is there, with anything in them; what is not filled is cut
    /// by [`truncate`](Reply::truncate).
    pub(crate) fn room(&mut self, len: usize) -> &mut [u8] {
        self.add(len)
    }

    /// The whole reply, its header filled in. `error` is 0 or a number from errno(3).
    pub(crate) fn finish(&mut self, unique: u64, error: i32) -> &[u8] {
        self.finish_with(unique, error, 0)
    }

    /// As [`finish`](Reply::finish), where `more` bytes will follow.
    pub(crate) fn finish_with(&mut self, unique: u64, error: i32, more: usize) -> &[u8] {
        let header = header(unique, error, self.len + more);
        for (to, from) in self.buffer.iter_mut().zip(header) {
            *to = from;
        }
        self.whole()
    }

    /// What [`finish`](Reply::finish) has made.
    pub(crate) fn whole(&self) -> &[u8] {
        self.buffer.get(..self.len).unwrap_or_default()
    }

    /// `struct fuse_attr`.
    pub(crate) fn attr(&mut self, attr: &Attr) -> &mut Reply {
        self.u64(attr.ino).u64(attr.size).u64(attr.blocks);
        for time in [attr.atime, attr.mtime, attr.ctime] {
            self.u64(time.sec.cast_unsigned());
        }
        for time in [attr.atime, attr.mtime, attr.ctime] {
            self.u32(time.nsec);
        }
        self.u32(attr.mode).u32(attr.nlink).u32(attr.uid).u32(attr.gid);
        self.u32(encode_device(attr.rdev)).u32(attr.blksize).u32(0)
    }

    /// `struct fuse_entry_out`; without an entry, one that says that there is no such name. The
    /// name may be kept for `ttl`, the attributes for `keep`.
    pub(crate) fn entry(
        &mut self,
        entry: Option<&Entry>,
        ttl: Duration,
        keep: Duration,
    ) -> &mut Reply {
        let (node, generation, attr) = match entry {
            Some(entry) => (entry.node, entry.generation, entry.attr),
            None => (0, 0, Attr::default()),
        };
        self.u64(node).u64(generation).u64(ttl.as_secs()).u64(keep.as_secs());
        self.u32(ttl.subsec_nanos()).u32(keep.subsec_nanos()).attr(&attr)
    }

    /// `struct fuse_attr_out`.
    pub(crate) fn attr_out(&mut self, attr: &Attr, ttl: Duration) -> &mut Reply {
        self.u64(ttl.as_secs()).u32(ttl.subsec_nanos()).u32(0).attr(attr)
    }

    /// `struct fuse_dirent`, padded to 8 bytes.
    pub(crate) fn dirent(&mut self, ino: u64, place: u64, kind: u32, name: &OsStr) -> &mut Reply {
        let name = name.as_bytes();
        let padding = name.len().next_multiple_of(8) - name.len();
        self.u64(ino).u64(place).u32(u32::try_from(name.len()).unwrap_or(0)).u32(kind >> 12);
        self.bytes(name).bytes(&[0; 8][..padding])
    }

    /// `struct fuse_kstatfs`.
    pub(crate) fn statfs(&mut self, fs: &StatFs) -> &mut Reply {
        self.u64(fs.blocks).u64(fs.bfree).u64(fs.bavail).u64(fs.files).u64(fs.ffree);
        self.u32(fs.bsize).u32(fs.namelen).u32(fs.frsize);
        self.bytes(&[0; 28])
    }
}

/// `struct fuse_out_header` of a reply of `len` bytes, itself among them.
pub(crate) fn header(unique: u64, error: i32, len: usize) -> [u8; OUT_HEADER] {
    let mut header = [0; OUT_HEADER];
    let words = [
        u32::try_from(len).unwrap_or(u32::MAX),
        error.checked_neg().unwrap_or(-libc::EIO).cast_unsigned(),
    ];
    let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).chain(unique.to_ne_bytes());
    for (to, from) in header.iter_mut().zip(bytes) {
        *to = from;
    }
    header
}

/// The kernel's 32 bits for a device number (`new_encode_dev`).
pub(crate) fn encode_device(device: u64) -> u32 {
    let (major, minor) = (libc::major(device), libc::minor(device));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// And back.
pub(crate) fn decode_device(device: u32) -> u64 {
    libc::makedev((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xfff00))
}

/// A time as a request has it.
pub(crate) fn time(sec: u64, nsec: u32) -> Time {
    Time { sec: sec.cast_signed(), nsec: nsec.min(999_999_999) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_number_survives_the_kernels_encoding() {
        for (major, minor) in [(0, 0), (8, 1), (7, 300), (0xfff, 0xf_ffff)] {
            let device = libc::makedev(major, minor);
            assert_eq!(decode_device(encode_device(device)), device, "{major}:{minor}");
        }
    }

    #[test]
    fn a_request_that_is_cut_short_or_lies_about_its_length_is_refused() {
        let mut bytes = vec![0u8; IN_HEADER];
        bytes.extend_from_slice(b"name\0");
        bytes[..4].copy_from_slice(&45u32.to_ne_bytes());
        let (_, mut body) = Reader::request(&bytes).unwrap();
        assert_eq!(body.component().unwrap(), "name");
        assert!(body.u32().is_err());
        assert!(Reader::request(&bytes[..44]).is_err());
        bytes[36] = 200;
        assert!(Reader::request(&bytes).is_err());
        assert!(Reader(b"..\0").component().is_err());
        assert!(Reader(b"no end").name().is_err());
    }
}
