//! What every command promises: help, version, exit statuses, streams.

use crate::host::{VDISK, Work};

#[test]
fn help_goes_to_stdout_and_ends_well() {
    let work = Work::new();
    let help = work.vdisk("--help").succeeds();
    assert!(help.out().contains("Usage"), "{}", help.out());
    assert!(help.stderr.is_empty(), "{}", help.err());
}

#[test]
fn the_version_is_the_packages_version() {
    let version = Work::new().vdisk("--version").succeeds().out();
    assert_eq!(version.trim(), concat!("vdisk ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_ends_with_64_and_says_what_on_stderr() {
    let work = Work::new();
    for words in ["", "frobnicate", "--frobnicate"] {
        let done = work.vdisk(words).ends(64);
        assert!(done.stdout.is_empty(), "vdisk {words}: {}", done.out());
        assert!(done.err().contains("Usage"), "vdisk {words}: {}", done.err());
    }
}

#[test]
fn every_verb_tells_its_own_help() {
    let work = Work::new();
    let verbs = [
        "create", "clone", "info", "tree", "check", "map", "compare", "convert", "read", "write",
        "mount", "umount", "run", "boot", "snapshot",
    ];
    let nouns =
        ["create", "list", "revert", "delete", "merge"].map(|verb| format!("snapshot {verb}"));
    for verb in verbs.into_iter().chain(nouns.iter().map(String::as_str)) {
        let help = work.vdisk(&format!("{verb} --help")).succeeds();
        assert!(help.out().contains("Usage"), "{verb}: {}", help.out());
        work.vdisk(&format!("{verb} --no-such-option")).ends(64);
    }
}

#[test]
fn every_verb_has_a_man_page_and_a_completion() {
    let work = Work::new();
    work.vdisk("manual man").succeeds();
    let help = work.vdisk("--help").succeeds().out();
    // A group's verbs are indented; options begin with a dash.
    let verbs = help.lines().filter_map(|line| line.strip_prefix("  "));
    let verbs = verbs.filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()));
    let verbs: Vec<&str> = verbs.filter_map(|line| line.split(' ').next()).collect();
    assert!(verbs.len() > 20, "{verbs:?}");
    for shell in ["bash", "zsh", "fish"] {
        let script = work.vdisk(&format!("completions {shell}")).succeeds().out();
        for verb in &verbs {
            assert!(script.contains(verb), "{shell}: {verb}");
        }
    }
    for verb in verbs.iter().filter(|verb| **verb != "help") {
        let page = String::from_utf8(work.bytes(format!("man/vdisk-{verb}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{verb}: {page}");
    }
    assert!(!work.bytes("man/vdisk-snapshot-merge.1").is_empty());
}

#[test]
fn a_reader_that_leaves_early_is_no_panic() {
    let work = Work::new();
    work.vdisk("create disk.qcow2 64M").succeeds();
    let script = format!("{VDISK} read disk.qcow2 0 64M | head -c 5");
    let done = work.run("sh", ["-c", &script]).succeeds();
    assert_eq!(done.stdout, [0; 5]);
    done.says(&[]);
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let work = Work::new();
    work.vdisk("create disk.qcow2 1M").succeeds();
    for words in ["read disk.qcow2 0 1M", "info disk.qcow2", "map --json disk.qcow2"] {
        let script = format!("{VDISK} {words} >/dev/full");
        work.run("sh", ["-c", &script]).fails(&["space"]);
    }
}
