//! What the fuzz targets and the seeded run in `tests/engine/fuzz.rs` share: images of all shapes, a
//! mutation that knows where an image keeps what, and one body for each target.

//!
//! With AddressSanitizer and coverage, on the stable toolchain, whose runtimes it ships:
//!
//! ```text
//! cargo install cargo-fuzz
//! mkdir corpus && VDISK_SHAPES=$PWD/corpus cargo test --test engine fuzz::
//! RUSTC_BOOTSTRAP=1 cargo fuzz run read corpus -- -timeout=10 -malloc_limit_mb=256 -rss_limit_mb=1024
//! ```
//!
//! The corpus is one of qcow2 images; `foreign` takes what is in `testdata/formats`, unpacked, with
//! `-max_len=4400000`, `archive` small archives. `devices`, `filesystem`, `fat`, `partitions`, `overlay`,
//! `nbd_client_says`, `nbd_server_says` and `vhost_says` need none; the last three take `ASAN_OPTIONS=detect_leaks=0`, as their servers' threads may
//! be about to end when leaks are looked for. A limit of 256 MiB is the product's; what lies above it is the
//! sanitizer's.
//!
//! Where other programs work beside it, `-timeout=120`: what counts is the processor time, and instrumented code
//! takes ten times as much.

#![allow(missing_docs, reason = "for the targets beside it only")]

#[path = "../../tests/engine/dice.rs"]
pub mod dice;
pub mod inside;
pub mod mutation;
pub mod overlay;
pub mod peers;
pub mod shapes;
pub mod targets;

/// A target whose bytes are a qcow2 image, with a mutator that knows where its numbers are. Where
/// there is no corpus, it begins with the images of [`shapes`].
#[macro_export]
macro_rules! qcow2_target {
    ($name:ident) => {
        libfuzzer_sys::fuzz_target!(|bytes: &[u8]| $crate::targets::$name(bytes));
        libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, most: usize, seed: u32| {
            $crate::mutated(data, size, most, seed)
        });
    };
}

/// libFuzzer's mutator: damages the first `size` of `data`, which has room for `most` bytes.
/// Returns how many there are.
pub fn mutated(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    static SHAPES: std::sync::LazyLock<Vec<shapes::Shape>> = std::sync::LazyLock::new(shapes::all);
    let mut dice = dice::Dice::new(u64::from(seed));
    let mut file = data.get(..size).unwrap_or_default().to_vec();
    // What is too short to be an image leads nowhere.
    if file.len() < 512 || dice.once_in(50) {
        let shape = &SHAPES[dice.below(SHAPES.len() as u64) as usize];
        file.clone_from(&shape.bytes);
    }
    mutation::mutate(&mut file, &mut dice);
    let len = file.len().min(most).min(data.len());
    data[..len].copy_from_slice(&file[..len]);
    len
}
