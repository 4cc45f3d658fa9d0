//! `vdisk stats`: what instances use of the host.

use std::collections::BTreeMap;
use std::fs;

use clap::Args as ClapArgs;
use serde_json::{Value, json};
use vdisk::Result;
use vdisk::instance::{Record, place};

use crate::cli::terminal::{output, size};

/// Show what instances use: processor time, memory, processes
///
/// An instance's own processes are counted, and those that hold its disk and show it: memory is what they have resident,
/// pages that they share counted for each.
#[derive(ClapArgs)]
pub struct StatsArgs {
    /// Names, ids or their first digits, or disks; all that run where none is named.
    #[arg(value_name = "N")]
    instances: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What one process uses (proc_pid_stat(5)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Process {
    /// The process that started it.
    pub parent: u32,
    /// Clock ticks of processor time.
    pub ticks: u64,
    /// Pages that it has resident.
    pub pages: u64,
}

pub fn stats(args: &StatsArgs) -> Result<u8> {
    let found = match args.instances.is_empty() {
        true => place::list()?.into_iter().filter(Record::lives).collect(),
        false => args.instances.iter().map(|word| place::find(word)).collect::<Result<Vec<_>>>()?,
    };
    let all = processes();
    let rows: Vec<Value> = found.iter().map(|record| of(record, &all)).collect();
    if args.json {
        return output::json(&rows).map(|()| 0);
    }
    let mut text =
        format!("{:<12}  {:<24}  {:>10}  {:>10}  {:>5}\n", "ID", "NAME", "CPU", "MEMORY", "PIDS");
    for (record, row) in found.iter().zip(&rows) {
        let number = |key: &str| row.get(key).and_then(Value::as_u64).unwrap_or(0);
        let cpu = format!("{:.2} s", number("cpu_usec") as f64 / 1e6);
        let (memory, pids) = (size::human(number("memory")), number("processes"));
        text += &format!(
            "{:<12}  {:<24}  {cpu:>10}  {memory:>10}  {pids:>5}\n",
            record.id, record.name
        );
    }
    output::text(&text).map(|()| 0)
}

/// What an instance's process and all that descend from it use together.
fn of(record: &Record, all: &BTreeMap<u32, Process>) -> Value {
    let ours: Vec<&Process> = match record.lives() {
        true => all
            .iter()
            .filter(|(pid, _)| descends(all, **pid, record.pid))
            .map(|(_, used)| used)
            .collect(),
        false => Vec::new(),
    };
    let (tick, page) = (ticks_a_second(), page_size());
    let ticks: u64 = ours.iter().map(|used| used.ticks).sum();
    let pages: u64 = ours.iter().map(|used| used.pages).sum();
    json!({
        "id": record.id,
        "name": record.name,
        "cpu_usec": ticks.saturating_mul(1_000_000) / tick,
        "memory": pages.saturating_mul(page),
        "processes": ours.len(),
    })
}

/// Whether the process is `of`, or descends from it.
pub fn descends(all: &BTreeMap<u32, Process>, pid: u32, of: u32) -> bool {
    let mut at = pid;
    for _ in 0..all.len() {
        if at == of {
            return true;
        }
        match all.get(&at) {
            Some(process) => at = process.parent,
            None => return false,
        }
    }
    false
}

/// Clock ticks in a second.
pub fn ticks_a_second() -> u64 {
    setting(nix::unistd::SysconfVar::CLK_TCK, 100)
}

/// Bytes of a page.
pub fn page_size() -> u64 {
    setting(nix::unistd::SysconfVar::PAGE_SIZE, 4096)
}

fn setting(which: nix::unistd::SysconfVar, usual: u64) -> u64 {
    let found = nix::unistd::sysconf(which).ok().flatten();
    found.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(usual)
}

/// All processes of this host.
pub fn processes() -> BTreeMap<u32, Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let used = |pid: u32| used(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?);
    pids.filter_map(|pid| Some((pid, used(pid)?))).collect()
}

/// The name, which stands before all other fields in parentheses, may hold anything.
fn used(stat: &str) -> Option<Process> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // Field 3, the state, is the first of these.
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let parent = u32::try_from(number(4)?).ok()?;
    Some(Process { parent, ticks: number(14)? + number(15)?, pages: number(24)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc_is_read_behind_any_name() {
        let stat = "7 (a) b) S 3 7 7 0 -1 4194560 1 2 3 4 50 60 0 0 20 0 1 0 9 8192 21 1 1 1";
        assert_eq!(used(stat), Some(Process { parent: 3, ticks: 110, pages: 21 }));
        assert_eq!(used("7 (a"), None);
    }
}
