//! `cargo fuzz run change`: see [`vdisk_fuzz::targets::change`].
#![no_main]

vdisk_fuzz::qcow2_target!(change);
