//! `cargo fuzz run repair`: see [`vdisk_fuzz::targets::repair`].
#![no_main]

vdisk_fuzz::qcow2_target!(repair);
