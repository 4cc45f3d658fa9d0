//! Addresses to devices: one bus for ports, one for memory-mapped registers.
//!
//! It knows ranges and bytes, not what any device is.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};

/// A device at a range of addresses.
pub trait BusDevice: Send + Sync {
    /// Fills `data` from the register at `offset` in the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` to the register at `offset` in the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Devices by address.
#[derive(Default)]
pub struct Bus {
    devices: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Puts `device` at `len` addresses from `base`. Fails when another one is there.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<()> {
        let end = base.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or_else(|| Error::invalid("a device's address range is not one"))?;
        let below = self.devices.range(..end).next_back();
        if below.is_some_and(|(start, (len, _))| start + len > base) {
            return Err(Error::invalid(format!("two devices at address {base:#x}")));
        }
        self.devices.insert(base, (len, device));
        Ok(())
    }

    /// Reads from the device there; all ones where there is none, as on a PC.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device there; lost where there is none.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &dyn BusDevice)> {
        let (base, (len, device)) = self.devices.range(..=address).next_back()?;
        let offset = address - base;
        (offset < *len).then_some((offset, &**device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tag(u8);

    impl BusDevice for Tag {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn each_address_belongs_to_one_device() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, Arc::new(Tag(0x40))).unwrap();
        bus.insert(0x14, 4, Arc::new(Tag(0x80))).unwrap();
        assert!(bus.insert(0x13, 1, Arc::new(Tag(0))).is_err());
        assert!(bus.insert(0x0c, 5, Arc::new(Tag(0))).is_err());
        assert!(bus.insert(u64::MAX, 2, Arc::new(Tag(0))).is_err());
        let at = |address| {
            let mut data = [0];
            bus.read(address, &mut data);
            data[0]
        };
        assert_eq!(
            [at(0xf), at(0x10), at(0x13), at(0x14), at(0x18)],
            [0xff, 0x40, 0x43, 0x80, 0xff]
        );
    }
}
