//! The black-box tests: the `vdisk` command as a user meets it, judged by its contract and by QEMU.
//!
//! One harness, so that the binary is linked once. A module is a theme; a test's name is a sentence.
//! Nothing here may use the library: what these tests know, a user's script can know.

// Clippy's leave for tests covers `#[test]` functions only; here the harness may panic too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod certificates;
mod dice;
mod host;
mod identity;
mod puppet;
mod registry_server;
mod require;
mod same_calls;
mod same_overlay;
mod same_tree;
mod someone;
mod tls_clients;
mod twin;

mod about;
mod apply;
mod bases;
mod bitmaps;
mod boot;
mod boot_kernel;
mod boot_refused;
mod broker;
mod broker_told;
mod chains;
mod clones;
mod closed;
mod container;
mod container_killed;
mod container_terminal;
mod convert;
mod create;
mod devices;
mod drop_in;
mod elsewhere;
mod exports;
mod exports_tls;
mod files;
mod filesystem;
mod filesystem_twin;
mod filesystem_users;
mod fleet;
mod formats;
mod images;
mod images_debian;
mod images_hostile;
mod inspect;
mod instances;
mod instances_inside;
mod interop;
mod jail;
mod jail_commands;
mod jail_mounts;
mod labels;
mod links;
mod live;
mod live_tree;
mod measure;
mod moments;
mod mount;
mod mount_helper;
mod mount_raw;
mod names;
mod overlay;
mod owners;
mod pictures;
mod podman;
mod posix;
mod reach;
mod registry;
mod run_user;
mod scale;
mod secrets;
mod serve;
mod serve_contexts;
mod serve_guest;
mod serve_tls;
mod snapshots;
mod space;
mod stand_ins;
mod targets;
mod turns;
mod undo;
mod usage;
mod wrong_use;
