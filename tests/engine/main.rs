//! The engine under torture, through the library's public interface: random use against a model,
//! crashes at every point, failing storage, many threads, hostile files.
//!
//! What a user's script can know is tested next door, in `tests/main`. Every random test prints its
//! seed when it fails; `VDISK_SEED` runs it again. `VDISK_PROPTEST_CASES` sets how many cases the
//! random tests run; without it they stop after some seconds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../main/host.rs"]
#[allow(dead_code, reason = "shared with the black-box tests")]
mod host;
#[path = "../main/require.rs"]
#[allow(dead_code, reason = "shared with the black-box tests")]
mod require;

#[path = "../../fuzz/src/inside.rs"]
mod inside;
#[path = "../../fuzz/src/mutation.rs"]
mod mutation;
#[path = "../../fuzz/src/overlay.rs"]
mod overlay;
#[path = "../../fuzz/src/peers.rs"]
mod peers;
#[path = "../../fuzz/src/shapes.rs"]
mod shapes;
#[path = "../../fuzz/src/targets.rs"]
mod targets;

mod bitmaps;
mod bitmaps_carried;
mod crash;
mod crash_data;
mod crash_kinds;
mod dice;
mod emptied;
mod face;
mod family;
mod faults;
mod filesystem;
mod fuzz;
mod fuzz_inside;
mod fuzz_overlay;
mod fuzz_peers;
mod hostile;
mod internal;
mod labels;
mod live;
mod live_batches;
mod live_faults;
mod model;
mod outside;
mod planned;
mod processes;
mod property;
mod recorder;
mod repair;
mod reshape;
// It reads a traced command's registers.
#[cfg(target_arch = "x86_64")]
mod sweep;
mod threads;
mod world;
