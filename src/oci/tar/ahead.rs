//! A stream that another thread reads ahead, so that undoing its compression goes side by side with what is done with it.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

const PIECE: usize = 256 << 10;
/// Pieces that wait to be taken.
const WAITING: usize = 8;

/// The stream, as it is taken.
pub struct Ahead {
    pieces: Receiver<io::Result<Vec<u8>>>,
    piece: Vec<u8>,
    at: usize,
}

impl Ahead {
    /// Reads `input` ahead until this goes.
    pub fn new(mut input: impl Read + Send + 'static) -> Ahead {
        let (sender, pieces) = sync_channel(WAITING);
        thread::spawn(move || {
            loop {
                let mut piece = Vec::with_capacity(PIECE);
                let read = input.by_ref().take(PIECE as u64).read_to_end(&mut piece);
                let last = !matches!(read, Ok(read) if read > 0);
                // Nobody takes it any more where that fails.
                if sender.send(read.map(|_| piece)).is_err() || last {
                    return;
                }
            }
        });
        Ahead { pieces, piece: Vec::new(), at: 0 }
    }
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            // A reader that ended said so by an empty piece, or an error, once.
            self.piece = self.pieces.recv().unwrap_or_else(|_| Ok(Vec::new()))?;
            self.at = 0;
        }
        let left = self.piece.get(self.at..).unwrap_or_default();
        let len = left.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(left) {
            *to = *from;
        }
        self.at += len;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_out_is_what_went_in_and_errors_too() {
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
        let mut back = Vec::new();
        Ahead::new(io::Cursor::new(bytes.clone())).read_to_end(&mut back).unwrap();
        assert!(back == bytes);
        struct Fails;
        impl Read for Fails {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("no more"))
            }
        }
        let mut back = Vec::new();
        let input = io::Cursor::new(vec![1; 600_000]).chain(Fails);
        assert!(Ahead::new(input).read_to_end(&mut back).is_err());
    }
}
