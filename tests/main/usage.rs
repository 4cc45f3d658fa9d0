//! What every command promises: help, version, exit statuses, streams.

use crate::host::Work;

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
