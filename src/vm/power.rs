//! The power management registers of ACPI's fixed hardware (ACPI 6.5, 4.8.3): how a guest powers off.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::bus::BusDevice;
use super::control::{Control, Ended};

/// First port: the event status register. No event ever comes.
pub const BASE: u64 = 0x600;
/// Offset of the event enable register.
const ENABLE: u64 = 2;
/// Offset of the control register.
pub const CONTROL: u64 = 4;
/// Number of ports.
pub const LEN: u64 = 6;

/// The sleep type that stands for "off".
pub const OFF: u8 = 5;

/// Control register: the guest, not firmware, has the registers.
const ENABLED: u16 = 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 7;
const SLEEP: u16 = 1 << 13;

/// The registers.
pub struct Power {
    control: Arc<Control>,
    /// Guests read back which events they have enabled.
    enabled: AtomicU16,
}

impl Power {
    /// Registers with which the guest ends itself.
    pub fn new(control: Arc<Control>) -> Power {
        Power { control, enabled: AtomicU16::new(0) }
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match offset {
            ENABLE => self.enabled.load(Ordering::Relaxed),
            CONTROL => ENABLED,
            _ => 0,
        };
        for (byte, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [low, high, ..] = data else { return };
        let value = u16::from_le_bytes([*low, *high]);
        let off = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == u16::from(OFF);
        match offset {
            ENABLE => self.enabled.store(value, Ordering::Relaxed),
            CONTROL if off && value & SLEEP != 0 => self.control.end(Ok(Ended::PowerOff)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sleep_type_for_off_ends_the_guest() {
        let control = Arc::new(Control::new().unwrap());
        let power = Power::new(Arc::clone(&control));
        let mut value = [9; 2];
        power.read(CONTROL, &mut value);
        assert_eq!(value, [1, 0]);
        power.write(ENABLE, &[0x20, 1]);
        power.read(ENABLE, &mut value);
        assert_eq!(value, [0x20, 1]);
        power.write(CONTROL, &(3 << 10 | SLEEP).to_le_bytes());
        power.write(CONTROL, &(5u16 << 10).to_le_bytes());
        power.write(0, &(5 << 10 | SLEEP).to_le_bytes());
        assert!(!control.over());
        power.write(CONTROL, &(5 << 10 | SLEEP).to_le_bytes());
        assert_eq!(control.wait().unwrap(), Ended::PowerOff);
    }
}
