//! The power management registers of ACPI's fixed hardware (ACPI 6.5, 4.8.3): how a guest powers off,
//! and its power button.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::bus::BusDevice;
use super::control::{Control, Ended};

/// First port: the event status register.
pub const BASE: u64 = 0x600;
const STATUS: u64 = 0;
/// Offset of the event enable register.
const ENABLE: u64 = 2;
/// Offset of the control register.
pub const CONTROL: u64 = 4;
/// Number of ports.
pub const LEN: u64 = 6;

/// The sleep type that stands for "off".
pub const OFF: u8 = 5;

/// Event registers: the power button.
const BUTTON: u16 = 1 << 8;
/// Control register: the guest, not firmware, has the registers.
const ENABLED: u16 = 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 7;
const SLEEP: u16 = 1 << 13;

/// Sets the level of the line by which events are told.
type Line = Box<dyn Fn(bool) + Send + Sync>;

/// The registers.
pub struct Power {
    control: Arc<Control>,
    events: Mutex<Events>,
    line: OnceLock<Line>,
}

#[derive(Default)]
struct Events {
    status: u16,
    enabled: u16,
}

impl Power {
    /// Registers with which the guest ends itself.
    pub fn new(control: Arc<Control>) -> Power {
        Power { control, events: Mutex::default(), line: OnceLock::new() }
    }

    /// Connects the line to the guest's interrupt controller. The first one counts.
    pub fn connect(&self, line: Line) {
        let _ = self.line.set(line);
    }

    /// Presses the power button: a guest that listens to it shuts down.
    pub fn press(&self) {
        let mut events = self.events();
        events.status |= BUTTON;
        self.tell(&events);
    }

    fn events(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The line is up while an event is there that the guest wants to hear of.
    fn tell(&self, events: &Events) {
        if let Some(line) = self.line.get() {
            line(events.status & events.enabled != 0);
        }
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let events = self.events();
        let value = match offset {
            STATUS => events.status,
            ENABLE => events.enabled,
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
        let mut events = self.events();
        match offset {
            // A one takes its event back (ACPI 4.8.3.1.1).
            STATUS => events.status &= !value,
            ENABLE => events.enabled = value,
            CONTROL if off && value & SLEEP != 0 => self.control.end(Ok(Ended::PowerOff)),
            _ => return,
        }
        self.tell(&events);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn get(power: &Power, offset: u64) -> u16 {
        let mut value = [9; 2];
        power.read(offset, &mut value);
        u16::from_le_bytes(value)
    }

    #[test]
    fn only_the_sleep_type_for_off_ends_the_guest() {
        let control = Arc::new(Control::new().unwrap());
        let power = Power::new(Arc::clone(&control));
        assert_eq!(get(&power, CONTROL), 1);
        power.write(ENABLE, &[0x20, 1]);
        assert_eq!(get(&power, ENABLE), 0x120);
        power.write(CONTROL, &(3 << 10 | SLEEP).to_le_bytes());
        power.write(CONTROL, &(5u16 << 10).to_le_bytes());
        power.write(0, &(5 << 10 | SLEEP).to_le_bytes());
        assert!(!control.over());
        power.write(CONTROL, &(5 << 10 | SLEEP).to_le_bytes());
        assert_eq!(control.wait(|| {}).unwrap(), Ended::PowerOff);
    }

    #[test]
    fn the_button_holds_its_line_up_until_the_guest_has_taken_the_event() {
        let power = Power::new(Arc::new(Control::new().unwrap()));
        let level = Arc::new(AtomicBool::new(false));
        let line = Arc::clone(&level);
        power.connect(Box::new(move |up| line.store(up, Ordering::SeqCst)));
        power.press();
        assert!(!level.load(Ordering::SeqCst), "nobody listens yet");
        power.write(ENABLE, &BUTTON.to_le_bytes());
        assert!(level.load(Ordering::SeqCst));
        assert_eq!(get(&power, STATUS), BUTTON);
        power.write(STATUS, &1u16.to_le_bytes());
        assert!(level.load(Ordering::SeqCst), "another event was taken back");
        power.write(STATUS, &BUTTON.to_le_bytes());
        assert!(!level.load(Ordering::SeqCst));
        assert_eq!(get(&power, STATUS), 0);
    }
}
