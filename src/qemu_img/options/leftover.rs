//! Options of images that change nothing here, and those that no driver knows: a user who wrote one
//! of the latter meant something, and is told.

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::options::opts::List;

/// What every driver knows.
const ANY: [&str; 8] = [
    "auto-read-only",
    "cache.direct",
    "cache.no-flush",
    "detect-zeroes",
    "discard",
    "force-share",
    "node-name",
    "read-only",
];
const QCOW2: [&str; 12] = [
    "cache-clean-interval",
    "cache-size",
    "data-file",
    "discard-no-unref",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "overlap-check",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "refcount-cache-size",
];
/// The beginnings of options that are lists themselves.
const QCOW2_LISTS: [&str; 2] = ["encrypt.", "overlap-check."];
const FILE: [&str; 7] = [
    "aio",
    "aio-max-batch",
    "drop-cache",
    "dynamic-auto-read-only",
    "locking",
    "pr-manager",
    "x-check-cache-dropped",
];
const NULL: [&str; 2] = ["latency-ns", "read-zeroes"];

/// Refuses what is left of the options of an image of this format.
pub fn of_format(format: &str, left: &List) -> Outcome<()> {
    let known = |key: &str| match format {
        "qcow2" => QCOW2.contains(&key) || QCOW2_LISTS.iter().any(|list| key.starts_with(list)),
        _ => false,
    };
    match unknown(left, known) {
        None => Ok(()),
        Some(key) => {
            Err(Fail::new(format!("Block format '{format}' does not support the option '{key}'")))
        }
    }
}

/// Refuses what is left of the options of a protocol.
pub fn of_protocol(driver: &str, left: &List) -> Outcome<()> {
    let known = |key: &str| match driver {
        "file" | "host_device" => FILE.contains(&key),
        _ => NULL.contains(&key),
    };
    match unknown(left, known) {
        None => Ok(()),
        Some(key) => {
            Err(Fail::new(format!("Block protocol '{driver}' doesn't support the option '{key}'")))
        }
    }
}

fn unknown(left: &List, known: impl Fn(&str) -> bool) -> Option<&str> {
    let keys = left.0.iter().map(|(key, _)| key.as_str());
    keys.filter(|key| !ANY.contains(key)).find(|key| !known(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_driver_knows_is_named() {
        let list = |text| List::parse(text, None);
        assert!(of_format("qcow2", &list("discard=unmap,overlap-check.main-header=on")).is_ok());
        assert!(of_protocol("file", &list("locking=off,aio=native")).is_ok());
        for (driver, text) in [("qcow2", "foo=1"), ("raw", "lazy-refcounts=on")] {
            let key = text.split('=').next().unwrap();
            let why = format!("Block format '{driver}' does not support the option '{key}'");
            assert_eq!(of_format(driver, &list(text)).unwrap_err().text(), why);
        }
        let why = "Block protocol 'file' doesn't support the option 'foo'";
        assert_eq!(of_protocol("file", &list("foo=1")).unwrap_err().text(), why);
    }
}
