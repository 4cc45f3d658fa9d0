//! The bodies of the fuzz targets over what other programs say over sockets, with a seed: clients and a server of NBD,
//! and a virtual machine's side of vhost-user.

use std::panic;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::dice::{Dice, rounds};
use crate::hostile::patiently;
use crate::peers;

/// Whether a thread of a server has panicked: whoever speaks with it sees only that it is gone.
static PANICKED: AtomicBool = AtomicBool::new(false);

/// Runs `body` with bytes that `said` makes, and removes the socket of that name at the end.
fn speak(name: &'static str, said: fn(&mut Dice) -> Vec<u8>, body: fn(&[u8])) {
    static WATCHING: Once = Once::new();
    WATCHING.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let thread = thread::current();
            let of_server = |name: &str| name.starts_with("nbd") || name.starts_with("vhost");
            PANICKED.fetch_or(thread.name().is_some_and(of_server), Ordering::SeqCst);
            before(info);
        }));
    });
    let _socket = Socket(name);
    rounds(2, |dice| {
        let bytes = said(dice);
        patiently(|| body(&bytes));
        assert!(!PANICKED.load(Ordering::SeqCst), "{bytes:?}");
    });
}

struct Socket(&'static str);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(peers::path(self.0));
    }
}

fn bytes(dice: &mut Dice, most: u64) -> Vec<u8> {
    let len = 1 + dice.below(most);
    (0..len).map(|_| dice.next() as u8).collect()
}

/// Mostly of somebody who is past the handshake.
fn past_handshake(dice: &mut Dice) -> Vec<u8> {
    let mut said = bytes(dice, 300);
    if !dice.once_in(4) {
        said[0] |= 3;
    }
    said
}

#[test]
fn whatever_a_client_of_nbd_says_it_is_answered_or_left() {
    speak("nbd", past_handshake, peers::nbd_client_says);
}

#[test]
fn whatever_a_server_of_nbd_says_its_client_comes_to_an_end() {
    speak("server", past_handshake, peers::nbd_server_says);
}

/// Descriptors and heads in the rings where the guest has them, kicks, and messages between.
fn guest(dice: &mut Dice) -> Vec<u8> {
    let mut said = vec![dice.next() as u8];
    if !dice.once_in(4) {
        said[0] |= 1;
    }
    for _ in 0..1 + dice.below(24) {
        let word = |what: u8, data: &[u8]| [&[what, data.len() as u8], data].concat();
        let more = match dice.below(8) {
            0..=2 => {
                // An address, a length, flags, and the next one.
                let at = 16 * dice.below(16) as u16;
                let anywhere = dice.next();
                let place = dice.pick(&[0x7000_0000, 0x7000_3000, 0x7003_ffff, anywhere]);
                let len = dice.pick(&[1u32, 16, 512, 4096, u32::MAX]);
                let links = [dice.below(8) as u16, dice.below(20) as u16];
                let links = links.map(u16::to_le_bytes).concat();
                let data = [&place.to_le_bytes()[..], &len.to_le_bytes(), &links].concat();
                word(0xe0, &[&at.to_le_bytes()[..], &data].concat())
            }
            3 | 4 => {
                // What is ready: how many, and which.
                let ready = dice.below(18) as u16;
                let heads = [0, ready].map(u16::to_le_bytes).concat();
                let heads = [&heads[..], &bytes(dice, 32)].concat();
                word(0xe0, &[&0x1000u16.to_le_bytes()[..], &heads].concat())
            }
            // The head of a request.
            5 => word(
                0xe0,
                &[&[0, 0x30, dice.below(16) as u8, 0, 0, 0][..], &bytes(dice, 12)].concat(),
            ),
            6 => word(0xf0, &[]),
            _ => {
                let what = dice.next() as u8;
                word(what, &bytes(dice, 80))
            }
        };
        said.extend(more);
    }
    said
}

#[test]
fn whatever_a_virtual_machine_says_it_is_answered_or_left() {
    speak("vhost", guest, peers::vhost_says);
}
