//! `cargo fuzz run bitmaps`: see [`vdisk_fuzz::targets::bitmaps`].
#![no_main]

vdisk_fuzz::qcow2_target!(bitmaps);
