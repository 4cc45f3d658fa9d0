//! A place that is written over and is nothing, to whoever looks, until it is whole: its first bytes,
//! which tell what it is, are held back.
//!
//! For places that cannot be replaced in one step, as a file is: a device.

use std::io::{IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Storage;
use crate::error::Result;

/// How many bytes are held back.
const FRONT: usize = 512;

/// A storage whose first bytes are zeroes until it is [finished](Unfinished::finish).
pub struct Unfinished {
    inner: Arc<dyn Storage>,
    front: Mutex<Vec<u8>>,
}

impl Unfinished {
    /// Takes the first bytes off `inner`, durably. To whoever writes here they are still there.
    pub fn begin(inner: Arc<dyn Storage>) -> Result<Unfinished> {
        let mut front = vec![0; inner.len()?.min(FRONT as u64) as usize];
        inner.read_exact_at(0, &mut front)?;
        inner.write_all_at(0, &vec![0; front.len()])?;
        inner.sync()?;
        Ok(Unfinished { inner, front: Mutex::new(front) })
    }

    /// Makes all that was written durable, and then the first bytes.
    pub fn finish(&self) -> Result<()> {
        self.inner.sync()?;
        self.inner.write_all_at(0, &self.front())?;
        self.inner.sync()
    }

    fn front(&self) -> MutexGuard<'_, Vec<u8>> {
        self.front.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What becomes zero is zero in front, too.
    fn clear(&self, offset: u64, len: u64) {
        let mut front = self.front();
        let end = offset.saturating_add(len).min(front.len() as u64) as usize;
        if let Some(part) = front.get_mut(offset.min(FRONT as u64) as usize..end) {
            part.fill(0);
        }
    }
}

impl Storage for Unfinished {
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }

    fn is_fixed(&self) -> bool {
        self.inner.is_fixed()
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.inner.read_at(offset, bufs)?;
        let front = self.front();
        let mut at = offset as usize;
        for buf in bufs.iter_mut().take_while(|_| offset < FRONT as u64) {
            let have = front.get(at..).unwrap_or_default();
            buf.iter_mut().zip(have).for_each(|(byte, held)| *byte = *held);
            at += buf.len();
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        if offset >= FRONT as u64 {
            return self.inner.write_at(offset, bufs);
        }
        let mut bytes: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        let mut front = self.front();
        let held = front.get_mut(offset as usize..).unwrap_or_default();
        for (held, byte) in held.iter_mut().zip(&mut bytes) {
            *held = std::mem::take(byte);
        }
        self.inner.write_all_at(offset, &bytes)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.clear(offset, len);
        self.inner.punch_hole(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.clear(offset, len);
        self.inner.write_zeroes(offset, len)
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let front = (FRONT as u64).min(self.len()?);
        if offset < front {
            return Ok(Some((offset, front)));
        }
        self.inner.next_data(offset)
    }

    fn allocated(&self) -> Result<u64> {
        self.inner.allocated()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn the_front_shows_when_all_is_there() {
        let below = Arc::new(MemoryStorage::new(vec![7; 4096]));
        let held = Unfinished::begin(below.clone()).unwrap();
        let read = || {
            let mut bytes = vec![0; 2000];
            held.read_at(0, &mut bytes.chunks_mut(300).map(IoSliceMut::new).collect::<Vec<_>>())
                .unwrap();
            bytes
        };
        assert_eq!(read(), vec![7; 2000]);
        held.write_at(100, &[IoSlice::new(&[1; 300]), IoSlice::new(&[2; 300])]).unwrap();
        held.write_zeroes(10, 20).unwrap();
        held.write_all_at(1000, &[3; 10]).unwrap();
        let mut want = vec![7; 4096];
        want[100..400].fill(1);
        want[400..700].fill(2);
        want[10..30].fill(0);
        want[1000..1010].fill(3);
        assert_eq!(read(), want[..2000]);
        let now = below.to_vec();
        assert!(now[..512].iter().all(|b| *b == 0) && now[512..] == want[512..]);
        held.finish().unwrap();
        assert_eq!(below.to_vec(), want);
    }
}
