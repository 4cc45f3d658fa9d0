//! `cargo fuzz run snapshots`: see [`vdisk_fuzz::targets::snapshots`].
#![no_main]

vdisk_fuzz::qcow2_target!(snapshots);
