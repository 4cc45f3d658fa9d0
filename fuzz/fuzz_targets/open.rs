//! `cargo fuzz run open`: see [`vdisk_fuzz::targets::open`].
#![no_main]

vdisk_fuzz::qcow2_target!(open);
