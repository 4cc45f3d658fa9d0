//! What is said between a jailed process and its broker: what a packet holds. A file goes with some.

use std::io;

/// The most bytes of a packet: two names and what goes before them.
pub(super) const MAX: usize = 1024;
/// The most bytes of a name.
const NAME_MAX: usize = 255;
/// What it is, the length of the first name, a directory, a number.
const HEAD: usize = 8;

/// What a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Word {
    // What the broker is told before the jail is closed.
    /// A directory, open: the next one.
    Place = 1,
    /// A name in it that is the disk's, and by the number what may be done to it.
    Name,
    /// How names are called that are the disk's.
    Form,
    /// A name that is not.
    Other,
    /// That is all: its own jail is closed.
    Close,
    // What it is asked afterwards.
    Open = 16,
    Create,
    Nameless,
    Give,
    Link,
    Rename,
    Remove,
}

impl Word {
    const ALL: [Word; 12] = [
        Word::Place,
        Word::Name,
        Word::Form,
        Word::Other,
        Word::Close,
        Word::Open,
        Word::Create,
        Word::Nameless,
        Word::Give,
        Word::Link,
        Word::Rename,
        Word::Remove,
    ];
}

/// What is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    pub word: Word,
    /// Which directory.
    pub place: u16,
    pub number: u32,
    pub first: &'a [u8],
    pub second: &'a [u8],
}

impl<'a> Packet<'a> {
    pub fn new(word: Word, place: u16) -> Packet<'a> {
        Packet { word, place, number: 0, first: &[], second: &[] }
    }

    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let too_long = || io::Error::from_raw_os_error(libc::ENAMETOOLONG);
        let len = u8::try_from(self.first.len()).map_err(|_| too_long())?;
        if self.second.len() > NAME_MAX {
            return Err(too_long());
        }
        let mut bytes = vec![self.word as u8, len];
        bytes.extend(self.place.to_le_bytes());
        bytes.extend(self.number.to_le_bytes());
        bytes.extend([self.first, self.second].concat());
        Ok(bytes)
    }

    /// `None` for what is none.
    pub fn decode(bytes: &'a [u8]) -> Option<Packet<'a>> {
        let (head, rest) = bytes.split_at_checked(HEAD)?;
        let &[word, len, p0, p1, n0, n1, n2, n3] = head else { return None };
        let word = Word::ALL.into_iter().find(|known| *known as u8 == word)?;
        let (first, second) = rest.split_at_checked(len.into())?;
        let (place, number) = (u16::from_le_bytes([p0, p1]), u32::from_le_bytes([n0, n1, n2, n3]));
        (second.len() <= NAME_MAX).then_some(Packet { word, place, number, first, second })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_says_what_was_said_and_nothing_is_read_past_its_end() {
        for word in Word::ALL {
            let packet = Packet { word, place: 7, number: 1 << 30, first: b"one", second: b"two" };
            let bytes = packet.encode().unwrap();
            assert_eq!(Packet::decode(&bytes), Some(packet));
            // Without its end it says less, or nothing.
            for len in 0..bytes.len() {
                let less = Packet::decode(&bytes[..len]);
                assert!(less.is_none_or(|less| len >= HEAD + 3 && less.second.len() < 3));
            }
        }
        assert_eq!(Packet::decode(&[0; 20]), None);
        assert_eq!(Packet::decode(&[Word::Open as u8; MAX]), None);
        let long = [b'x'; 256];
        let of = |first, second| Packet { first, second, ..Packet::new(Word::Link, 0) }.encode();
        assert!(of(&long, b"").is_err() && of(b"", &long).is_err());
    }
}
