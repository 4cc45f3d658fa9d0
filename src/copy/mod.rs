//! Bytes from disk to disk in several threads: conversion, transfer, comparison, differences.
//!
//! It knows open disks, and no tree but the moments between which a difference is asked for.

mod compare;
mod convert;
pub mod diff;
pub mod queue;
mod room;
pub mod transfer;

pub use compare::{Difference, compare};
pub use convert::{Copying, Target, convert, convert_onto, copy_into};
