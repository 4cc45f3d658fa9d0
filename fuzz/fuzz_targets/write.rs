//! `cargo fuzz run write`: see [`vdisk_fuzz::targets::write`].
#![no_main]

vdisk_fuzz::qcow2_target!(write);
