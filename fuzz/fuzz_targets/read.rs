//! `cargo fuzz run read`: see [`vdisk_fuzz::targets::read`].
#![no_main]

vdisk_fuzz::qcow2_target!(read);
