//! Compressed streams, told by how they begin.

use std::io::{BufRead, BufReader, Read};

use liblzma::bufread::XzDecoder;
use liblzma::stream::{CONCATENATED, Stream};

use crate::error::{Error, Result};

/// Memory that the frames of a zstd stream may ask for: two to the power of this.
const WINDOW: u32 = 27;
/// Memory that an xz stream may ask for, in bytes: as much as a frame of zstd's, and what goes with it.
const MEMORY: u64 = (1 << WINDOW) + (1 << 20);
const PIECE: usize = 256 << 10;

/// What is in `input`: gzip, zstd and xz are undone, all else is taken as it is.
///
/// # Errors
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) names another compression.
pub fn plain(input: impl Read + Send + 'static) -> Result<Box<dyn Read + Send>> {
    let mut input = BufReader::with_capacity(PIECE, input);
    let begin = input.fill_buf().map_err(|e| Error::io("cannot be read", e))?;
    Ok(match begin {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = zstd::stream::read::Decoder::with_buffer(input);
            let mut decoder = decoder.map_err(|e| Error::io("zstd cannot be begun", e))?;
            decoder.window_log_max(WINDOW).map_err(|e| Error::io("zstd cannot be begun", e))?;
            Box::new(decoder)
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            // A header alone can ask for 4 GiB.
            let decoder = Stream::new_stream_decoder(MEMORY, CONCATENATED);
            let decoder = decoder.map_err(|e| Error::io("xz cannot be begun", e.into()))?;
            Box::new(XzDecoder::new_stream(input, decoder))
        }
        [b'B', b'Z', b'h', ..] => return Err(Error::unsupported("is compressed with bzip2")),
        _ => Box::new(input),
    })
}
