//! A keyboard controller with nothing attached: guests ask it to reset the machine.
//!
//! It answers its own commands, so that a guest that looks for a keyboard finds none at once
//! instead of waiting for replies.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::bus::BusDevice;
use super::control::{Control, Ended};

/// Data port.
pub const BASE: u64 = 0x60;
/// Ports from the data port to the command port.
pub const LEN: u64 = 5;

const DATA: u64 = 0;
/// Offset of the command port.
pub const COMMAND: u64 = 4;

/// Status: a byte waits at the data port.
const OUTPUT_FULL: u8 = 0x01;
/// Status: the last byte written was a command.
const WAS_COMMAND: u8 = 0x08;

const READ_CONFIG: u8 = 0x20;
const WRITE_CONFIG: u8 = 0x60;
const TEST_MOUSE_PORT: u8 = 0xa9;
const TEST_CONTROLLER: u8 = 0xaa;
const TEST_KEYBOARD_PORT: u8 = 0xab;
const LOOP_MOUSE: u8 = 0xd3;
/// The command that resets the machine.
pub const RESET: u8 = 0xfe;

const CONTROLLER_GOOD: u8 = 0x55;
/// A port's clock line is stuck: nothing is plugged in.
const PORT_BAD: u8 = 0x01;

/// The controller.
pub struct Controller {
    control: Arc<Control>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    config: u8,
    /// The command whose parameter the next data byte is.
    command: Option<u8>,
    output: VecDeque<u8>,
}

impl Controller {
    /// A controller whose reset command ends the guest.
    pub fn new(control: Arc<Control>) -> Controller {
        Controller { control, state: Mutex::default() }
    }

    fn command(&self, state: &mut State, byte: u8) {
        state.command = None;
        state.output.clear();
        match byte {
            READ_CONFIG => state.output.push_back(state.config),
            TEST_CONTROLLER => state.output.push_back(CONTROLLER_GOOD),
            TEST_KEYBOARD_PORT | TEST_MOUSE_PORT => state.output.push_back(PORT_BAD),
            WRITE_CONFIG | LOOP_MOUSE => state.command = Some(byte),
            RESET => self.control.end(Ok(Ended::Reset)),
            _ => {}
        }
    }

    fn data(state: &mut State, byte: u8) {
        match state.command.take() {
            Some(WRITE_CONFIG) => state.config = byte,
            // Not what was sent: there is no mouse to echo it.
            Some(LOOP_MOUSE) => state.output.push_back(!byte),
            _ => {}
        }
    }
}

impl BusDevice for Controller {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in data {
            *byte = match offset {
                DATA => state.output.pop_front().unwrap_or(0),
                COMMAND if state.output.is_empty() => WAS_COMMAND,
                COMMAND => WAS_COMMAND | OUTPUT_FULL,
                _ => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in data {
            match offset {
                DATA => Controller::data(&mut state, *byte),
                COMMAND => self.command(&mut state, *byte),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_tests_well_and_its_reset_ends_the_guest() {
        let control = Arc::new(Control::new().unwrap());
        let controller = Controller::new(Arc::clone(&control));
        let read = |offset| {
            let mut byte = [0];
            controller.read(offset, &mut byte);
            byte[0]
        };
        controller.write(COMMAND, &[TEST_CONTROLLER]);
        assert_eq!(read(COMMAND) & OUTPUT_FULL, OUTPUT_FULL);
        assert_eq!(read(DATA), CONTROLLER_GOOD);
        assert_eq!(read(COMMAND) & OUTPUT_FULL, 0);
        controller.write(COMMAND, &[WRITE_CONFIG]);
        controller.write(DATA, &[0x42]);
        controller.write(COMMAND, &[READ_CONFIG]);
        assert_eq!(read(DATA), 0x42);
        assert!(!control.over());
        controller.write(COMMAND, &[RESET]);
        assert_eq!(control.wait(|| {}).unwrap(), Ended::Reset);
    }
}
