//! What processes use: memory of a tree of them, processor time of those that have ended.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use crate::cli::instance::stats::{Process, descends, page_size, processes, ticks_a_second};

/// Memory of a tree of processes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Of this program's processes.
    pub own: u64,
    /// Of all others.
    pub others: u64,
}

impl Memory {
    /// What the process and all that descend from it take now; what several share is divided among them.
    pub fn of(pid: u32) -> Memory {
        let (all, program) = (processes(), file("/proc/self/exe"));
        let mut memory = Memory::default();
        for (member, process) in all.iter().filter(|(member, _)| descends(&all, **member, pid)) {
            let bytes = share(*member).unwrap_or_else(|| pages(process));
            match program.is_some() && file(&format!("/proc/{member}/exe")) == program {
                true => memory.own += bytes,
                false => memory.others += bytes,
            }
        }
        memory
    }

    /// The most of each.
    pub fn most(self, other: Memory) -> Memory {
        Memory { own: self.own.max(other.own), others: self.others.max(other.others) }
    }
}

fn pages(process: &Process) -> u64 {
    process.pages.saturating_mul(page_size())
}

/// A process's share of what it has resident (proc_pid_smaps(5)).
fn share(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn file(path: &str) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// The processor time of this process's children that have ended, and of theirs (proc_pid_stat(5)).
pub fn of_ended() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Field 3, the state, is the first behind the name.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u64>().ok());
    let ticks = number(16).unwrap_or(0) + number(17).unwrap_or(0);
    Duration::from_micros(ticks.saturating_mul(1_000_000) / ticks_a_second())
}
