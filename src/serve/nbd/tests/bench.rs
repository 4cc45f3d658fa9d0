//! A server of a disk in memory, and a client that says what it is told to.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::super::{Contexts, Export, Server, Tls};
use crate::block::{BlockDevice, BlockExtent, BlockStatus, check_range, total, total_mut};
use crate::nbd::wire::{self, Fields, Request, chunk, option, reply};
use crate::nbd::{Address, Client, Target};
use crate::serve::socket::Listener;
use crate::{Error, ErrorKind, Result};

pub const SIZE: usize = 8 << 20;
/// Reads and writes of this byte fail.
pub const BAD: u64 = 7 << 20;
/// Who reads this byte waits until the door is open.
pub const DOOR: u64 = 6 << 20;
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A disk in memory; runs of 4096 zero bytes count as nothing stored.
pub struct Ram {
    pub bytes: Mutex<Vec<u8>>,
    pub flushes: AtomicU32,
    read_only: bool,
    open: Mutex<bool>,
    opened: Condvar,
}

impl Ram {
    fn range(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>> {
        check_range(offset, len, self.size())?;
        if (offset..offset + len).contains(&BAD) {
            return Err(Error::new(ErrorKind::Io, "a bad place"));
        }
        Ok(offset as usize..(offset + len) as usize)
    }

    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl BlockDevice for Ram {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let range = self.range(offset, total_mut(bufs))?;
        if range.contains(&(DOOR as usize)) {
            let open = self.open.lock().unwrap();
            drop(self.opened.wait_timeout_while(open, PATIENCE, |open| !*open).unwrap());
        }
        let bytes = self.bytes.lock().unwrap();
        let mut from = &bytes[range];
        for buf in bufs {
            let (now, rest) = from.split_at(buf.len());
            buf.copy_from_slice(now);
            from = rest;
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        assert!(!self.read_only, "a write reached a read-only disk");
        let range = self.range(offset, total(bufs))?;
        let all: Vec<u8> = bufs.iter().flat_map(|b| b.to_vec()).collect();
        self.bytes.lock().unwrap()[range].copy_from_slice(&all);
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<()> {
        assert!(!self.read_only, "a write reached a read-only disk");
        let range = self.range(offset, len)?;
        self.bytes.lock().unwrap()[range].fill(0);
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn flush(&self) -> Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<BlockExtent>> {
        check_range(offset, len, self.size())?;
        let bytes = self.bytes.lock().unwrap();
        let (mut at, end) = (offset, offset + len);
        let mut found: Vec<BlockExtent> = Vec::new();
        while at < end {
            let next = (at / 4096 * 4096 + 4096).min(end);
            let zero = bytes[at as usize..next as usize].iter().all(|b| *b == 0);
            let status = if zero { BlockStatus::Zero } else { BlockStatus::Data };
            let full = found.len() == limit;
            match found.last_mut() {
                Some(last) if last.status == status => last.len += next - at,
                _ if full => break,
                _ => found.push(BlockExtent { offset: at, len: next - at, status }),
            }
            at = next;
        }
        Ok(found)
    }
}

pub struct Bench {
    pub dir: tempfile::TempDir,
    pub disk: Arc<Ram>,
    pub server: Server,
}

impl Bench {
    pub fn new(read_only: bool) -> Bench {
        Bench::with(read_only, Tls::Off)
    }

    pub fn with(read_only: bool, tls: Tls) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(Ram {
            bytes: Mutex::new(vec![0; SIZE]),
            flushes: AtomicU32::new(0),
            read_only,
            open: Mutex::default(),
            opened: Condvar::new(),
        });
        let listener = Listener::unix(&dir.path().join("s")).unwrap();
        let (name, description) = ("disk".to_owned(), "words".to_owned());
        let contexts = Contexts::default();
        let export = Export { device: disk.clone(), name, description, contexts };
        Bench { server: Server::start(export, listener, tls).unwrap(), dir, disk }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub fn client(&self) -> Client {
        let target = Target {
            address: Address::Unix(self.path()),
            export: Some("disk".into()),
            context: None,
            tls: None,
        };
        Client::connect(&target, false).unwrap()
    }

    /// A connection that has agreed on the export.
    pub fn raw(&self, structured: bool) -> Raw {
        let mut raw = Raw::greeted(&self.path());
        if structured {
            assert_eq!(raw.option(option::STRUCTURED_REPLY, &[]), [(reply::ACK, vec![])]);
            let query = [wire::counted("disk"), vec![0, 0, 0, 1], wire::counted("base:allocation")];
            raw.option(option::SET_META_CONTEXT, &query.concat());
        }
        raw.option(option::GO, &[wire::counted("disk"), vec![0, 0]].concat());
        raw
    }
}

/// A client of the plainest kind.
pub struct Raw<S = UnixStream>(pub S);

impl Raw {
    pub fn greeted(path: &Path) -> Raw {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut raw = Raw(stream);
        let greeting: [u8; 18] = raw.receive();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(greeting[16..], [0, 3]);
        raw.send(&3u32.to_be_bytes());
        raw
    }
}

impl<S: Read + Write> Raw<S> {
    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server hung up, whatever it said before.
    pub fn is_over(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    /// All replies to an option, up to the last one: codes and data.
    pub fn option(&mut self, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&wire::option_bytes(number, data));
        let mut replies = Vec::new();
        loop {
            let head: [u8; 20] = self.receive();
            let mut fields = Fields(&head);
            assert_eq!(fields.u64(), Some(wire::OPTION_REPLY));
            assert_eq!(fields.u32(), Some(number));
            let code = fields.u32().unwrap();
            let len = fields.u32().unwrap();
            replies.push((code, self.bytes(len as usize)));
            if code == reply::ACK || code & reply::ERROR != 0 {
                return replies;
            }
        }
    }

    pub fn ask(&mut self, request: Request) {
        self.send(&request.encode());
    }

    /// A simple reply: cookie and code.
    pub fn simple(&mut self) -> (u64, u32) {
        let head: [u8; 16] = self.receive();
        let mut fields = Fields(&head);
        assert_eq!(fields.u32(), Some(wire::SIMPLE_REPLY));
        let code = fields.u32().unwrap();
        (fields.u64().unwrap(), code)
    }

    /// A part of a reply: cookie, kind, whether it is the last, payload.
    pub fn part(&mut self) -> (u64, u16, bool, Vec<u8>) {
        let head: [u8; 20] = self.receive();
        let mut fields = Fields(&head);
        assert_eq!(fields.u32(), Some(wire::STRUCTURED_REPLY));
        let flags = fields.u16().unwrap();
        let kind = fields.u16().unwrap();
        let cookie = fields.u64().unwrap();
        let len = fields.u32().unwrap();
        (cookie, kind, flags & chunk::DONE != 0, self.bytes(len as usize))
    }

    /// The code of a failure told in a part.
    pub fn failure(&mut self) -> u32 {
        let (_, kind, last, bytes) = self.part();
        assert_eq!((kind, last), (chunk::ERROR, true));
        Fields(&bytes).u32().unwrap()
    }
}
