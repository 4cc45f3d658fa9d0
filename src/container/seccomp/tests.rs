//! The filter, run here as the kernel would, against podman's own profile.

use std::fs;

use serde_json::Value;

use super::super::caps::{Capabilities, named};
use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

/// Runs the program on a call.
fn judge(program: &[Instruction], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = [0; 64];
    data[0..4].copy_from_slice(&number.to_le_bytes());
    data[4..8].copy_from_slice(&arch.to_le_bytes());
    for (argument, bytes) in arguments.iter().zip(data[16..].chunks_exact_mut(8)) {
        bytes.copy_from_slice(&argument.to_le_bytes());
    }
    let (mut at, mut loaded) = (0, 0);
    loop {
        let Instruction { code, jt, jf, k } = program[at];
        at += 1;
        match code {
            LOAD => {
                let at = k as usize;
                loaded = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
            }
            JUMP => at += k as usize,
            IF_EQUAL => at += usize::from(if loaded == k { jt } else { jf }),
            IF_AT_LEAST => at += usize::from(if loaded >= k { jt } else { jf }),
            RETURN => return k,
            _ => panic!("instruction {code}"),
        }
    }
}

fn numbers(arch: u32) -> Vec<(String, u32)> {
    match arch {
        ARCH_X86_64 => {
            syscalls::x86_64::Sysno::iter().map(|n| (n.name().to_owned(), n as u32)).collect()
        }
        _ => syscalls::x86::Sysno::iter().map(|n| (n.name().to_owned(), n as u32)).collect(),
    }
}

/// What podman's profile says of a call with all arguments 0.
fn podmans(profile: &Value, name: &str, capabilities: CapabilitySet) -> u32 {
    let holds = |rule: &Value, key: &str| {
        let caps = rule[key]["caps"].as_array().cloned().unwrap_or_default();
        let mut caps = caps.iter().map(|cap| named(cap.as_str().unwrap()).unwrap());
        let arches = rule[key]["arches"].as_array().cloned().unwrap_or_default();
        let arches: Vec<_> = arches.iter().map(|arch| arch.as_str().unwrap()).collect();
        (caps.clone().count() + arches.len() > 0).then(|| {
            caps.all(|cap| capabilities.contains(cap))
                && (arches.is_empty() || arches.contains(&"amd64"))
        })
    };
    let fits = |rule: &&Value| {
        let names = rule["names"].as_array().unwrap();
        let arguments = rule["args"].as_array().cloned().unwrap_or_default();
        names.iter().any(|other| other == name)
            && holds(rule, "includes") != Some(false)
            && holds(rule, "excludes") != Some(true)
            && arguments.iter().all(|argument| match argument["op"].as_str().unwrap() {
                "SCMP_CMP_EQ" => argument["value"] == 0,
                "SCMP_CMP_NE" => argument["value"] != 0,
                other => panic!("{other}"),
            })
    };
    let rules: Vec<&Value> = profile["syscalls"].as_array().unwrap().iter().filter(fits).collect();
    // `setns` stands on both sides.
    match rules.iter().find(|rule| rule["action"] == "SCMP_ACT_ERRNO").or(rules.first()) {
        None => failure(libc::ENOSYS),
        Some(rule) if rule["action"] == "SCMP_ACT_ALLOW" => ALLOW,
        Some(rule) => failure(rule["errnoRet"].as_i64().unwrap() as i32),
    }
}

#[test]
fn the_filter_says_what_podmans_profile_says() {
    let Ok(text) = fs::read("/usr/share/containers/seccomp.json") else {
        eprintln!("SKIPPED: podman's profile is not here (golang-github-containers-common)");
        return;
    };
    let profile: Value = serde_json::from_slice(&text).unwrap();
    for (add, drop) in [("", ""), ("sys_admin sys_ptrace sys_time", "sys_chroot"), ("all", "")] {
        let words = |words: &str| words.split_ascii_whitespace().map(str::to_owned).collect();
        let (add, drop): (Vec<_>, Vec<_>) = (words(add), words(drop));
        let capabilities = Capabilities::new(&add, &drop).unwrap().set();
        let program = filter(capabilities);
        assert!(program.len() < 4096, "{}", program.len());
        let younger: Vec<&str> = profile::YOUNGER.split_ascii_whitespace().collect();
        let mut differ = Vec::new();
        for arch in [ARCH_X86_64, ARCH_I386] {
            for (name, number) in numbers(arch) {
                // arch_prctl is known to 32-bit programs by now, and podman's names are older.
                if younger.contains(&name.as_str()) {
                    continue;
                }
                let ours = judge(&program, arch, number, [0; 6]);
                let theirs = podmans(&profile, &name, capabilities);
                if ours != theirs {
                    differ.push(format!("{name}: {ours:x}, podman's {theirs:x}"));
                }
            }
        }
        assert!(differ.is_empty(), "{differ:#?}");
    }
}

#[test]
fn arguments_decide_where_the_profile_says_so() {
    let program = filter(Capabilities::default().set());
    let call = |number: i64, arguments: [u64; 3]| {
        let [a, b, c] = arguments;
        judge(&program, ARCH_X86_64, number as u32, [a, b, c, 0, 0, 0])
    };
    assert_eq!(call(libc::SYS_personality, [8, 0, 0]), ALLOW);
    assert_eq!(call(libc::SYS_personality, [0xffff_ffff, 0, 0]), ALLOW);
    assert_eq!(call(libc::SYS_personality, [0x40000, 0, 0]), failure(libc::ENOSYS));
    assert_eq!(call(libc::SYS_socket, [2, 1, 0]), ALLOW);
    assert_eq!(call(libc::SYS_socket, [16, 3, 0]), ALLOW);
    assert_eq!(call(libc::SYS_socket, [16, 3, 9]), failure(libc::EINVAL));
    // The kernel reads 32 bits: more of them change nothing.
    assert_eq!(call(libc::SYS_socket, [1 << 32 | 16, 3, 9]), failure(libc::EINVAL));
}

#[test]
fn other_worlds_are_shut_out() {
    let program = filter(CapabilitySet::all());
    let number = libc::SYS_getpid as u32;
    assert_eq!(judge(&program, ARCH_X86_64, number, [0; 6]), ALLOW);
    let x32 = judge(&program, ARCH_X86_64, X32 | number, [0; 6]);
    assert_eq!(x32, failure(libc::ENOSYS));
    let arm = judge(&program, 0xc000_00b7, 172, [0; 6]);
    assert_eq!(arm, libc::SECCOMP_RET_KILL_PROCESS);
}
