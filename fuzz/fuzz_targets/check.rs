//! `cargo fuzz run check`: see [`vdisk_fuzz::targets::check`].
#![no_main]

vdisk_fuzz::qcow2_target!(check);
