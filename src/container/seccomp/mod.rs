//! The filter on a container's system calls, as a program for the kernel (seccomp(2), BPF).
//!
//! One section for x86-64 and one for 32-bit programs, each a search tree over the numbers of the
//! calls. Calls that are always allowed cost nothing after the first: the kernel keeps a map of
//! them.

pub(super) mod notify;
mod profile;

use std::collections::BTreeMap;
use std::str::FromStr;

use nix::libc;
use rustix::thread::CapabilitySet;

use super::sys::Instruction;
use profile::{Condition, Verdict};

const ARCH_X86_64: u32 = 0xc000_003e;
const ARCH_I386: u32 = 0x4000_0003;
/// Set in the number of a call of the x32 ABI, which kernels hardly have any more.
const X32: u32 = 0x4000_0000;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// What is done about one call: conditions and verdicts, the first that fits.
type Cases = Vec<(&'static [Condition], Verdict)>;

/// Calls from this number on, up to the next segment.
struct Segment {
    first: u32,
    cases: Cases,
}

/// The filter for a container with these capabilities.
pub(super) fn filter(capabilities: CapabilitySet) -> Vec<Instruction> {
    let of = |number: &dyn Fn(&str) -> Option<u32>| {
        let mut program = vec![load(NUMBER)];
        program.extend(tree(&segments(capabilities, number)));
        program
    };
    let wide = of(&|name| syscalls::x86_64::Sysno::from_str(name).ok().map(|n| n as u32));
    let narrow = of(&|name| syscalls::x86::Sysno::from_str(name).ok().map(|n| n as u32));
    let mut program = vec![load(ARCH)];
    program.extend(unless_equal(ARCH_X86_64, wide));
    program.extend(unless_equal(ARCH_I386, narrow));
    // No other can be executed here.
    program.push(give(libc::SECCOMP_RET_KILL_PROCESS));
    program
}

fn statement(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

fn load(offset: u32) -> Instruction {
    statement(LOAD, offset)
}

fn give(verdict: u32) -> Instruction {
    statement(RETURN, verdict)
}

/// `body`, passed over where what was loaded is another value.
fn unless_equal(value: u32, body: Vec<Instruction>) -> Vec<Instruction> {
    let over = body.len() as u32;
    let mut program = vec![Instruction { code: IF_EQUAL, jt: 1, jf: 0, k: value }];
    program.push(statement(JUMP, over));
    program.extend(body);
    program
}

/// The numbers that there are, as segments that are treated alike.
fn segments(capabilities: CapabilitySet, number: &dyn Fn(&str) -> Option<u32>) -> Vec<Segment> {
    let mut calls: BTreeMap<u32, Cases> = BTreeMap::new();
    for rule in profile::rules() {
        let counts = rule.with.is_none_or(|one| capabilities.contains(one))
            && rule.without.is_none_or(|one| !capabilities.contains(one));
        for number in rule.names.split_ascii_whitespace().filter_map(number) {
            if counts {
                calls.entry(number).or_default().push((rule.conditions, rule.verdict));
            }
        }
    }
    let mut segments = vec![Segment { first: 0, cases: Vec::new() }];
    let mut add = |first: u32, cases: Cases| match segments.last_mut() {
        Some(last) if last.cases == cases => {}
        Some(last) if last.first == first => last.cases = cases,
        _ => segments.push(Segment { first, cases }),
    };
    let mut next = 0;
    for (number, cases) in calls {
        if number > next {
            add(next, Vec::new());
        }
        add(number, cases);
        next = number + 1;
    }
    add(next, Vec::new());
    // x32 has numbers of its own: none of them is known.
    debug_assert!(next < X32);
    segments
}

/// A binary search over segments for the number that was loaded.
fn tree(segments: &[Segment]) -> Vec<Instruction> {
    if let [one] = segments {
        return leaf(&one.cases);
    }
    let (below, above) = segments.split_at(segments.len() / 2);
    let Some(first) = above.first().map(|segment| segment.first) else { return Vec::new() };
    let below = tree(below);
    let mut program = vec![
        Instruction { code: IF_AT_LEAST, jt: 0, jf: 1, k: first },
        statement(JUMP, below.len() as u32),
    ];
    program.extend(below);
    program.extend(tree(above));
    program
}

fn leaf(cases: &Cases) -> Vec<Instruction> {
    let mut program = Vec::new();
    for (conditions, verdict) in cases {
        let value = match verdict {
            Verdict::Allow => libc::SECCOMP_RET_ALLOW,
            Verdict::Fail(number) => failure(*number),
        };
        // Each condition is a load and a comparison; where it fails, the rest is passed over.
        let len = conditions.len() * 2 + 1;
        for (at, condition) in conditions.iter().enumerate() {
            let over = (len - at * 2 - 2) as u8;
            // The low half comes first on this machine.
            program.push(load(ARGUMENTS + 8 * u32::from(condition.argument)));
            program.push(Instruction { code: IF_EQUAL, jt: 0, jf: over, k: condition.value });
        }
        program.push(give(value));
        if conditions.is_empty() {
            return program;
        }
    }
    program.push(give(failure(libc::ENOSYS)));
    program
}

fn failure(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number.cast_unsigned() & libc::SECCOMP_RET_DATA
}

#[cfg(test)]
mod tests;
