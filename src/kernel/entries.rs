//! The Boot Loader Specification's entries (UAPI.1, type 1): one file a kernel in `loader/entries`.
//!
//! It knows their text and their order; where the files lie is its caller's.

use std::cmp::Ordering;

use super::choice::{Choice, expand};
use super::environment::Environment;
use super::place::Place;
use super::version::compare;
use crate::error::Result;

/// One entry.
#[derive(Debug, Default, PartialEq, Eq)]
struct Entry {
    /// The name of its file, without `.conf` and without the tries that are left.
    id: String,
    /// No try is left: it has been found not to boot.
    bad: bool,
    version: String,
    machine: String,
    sort_key: String,
    architecture: String,
    linux: String,
    initrds: Vec<String>,
    options: Vec<String>,
}

/// What the entries of a directory `boot` choose, the default first.
pub fn choices(place: &Place, boot: &str, environment: &Environment) -> Result<Vec<Choice>> {
    let directory = format!("{boot}/loader/entries");
    let mut entries = Vec::new();
    for name in place.names(&directory)? {
        if let Some(id) = name.strip_suffix(".conf")
            && let Some(text) = place.text(&format!("{directory}/{name}"))?
        {
            entries.push(parse(id, &text));
        }
    }
    // What is for another machine, or is no Linux kernel (`efi`, `uki`), is not for this one.
    let ours = |entry: &Entry| matches!(entry.architecture.as_str(), "" | "x64");
    entries.retain(|entry| !entry.linux.is_empty() && ours(entry));
    entries.sort_by(order);
    let default = place.text(&format!("{boot}/loader/loader.conf"))?;
    let default = default.as_deref().and_then(default_of);
    let default = default.or_else(|| environment.get("saved_entry"));
    if let Some(pattern) = default {
        // A stable sort: those that match come first, in their order.
        entries.sort_by_key(|entry| !matches(&pattern, &entry.id));
    }
    Ok(entries.into_iter().map(|entry| chosen(entry, &directory, environment)).collect())
}

fn chosen(entry: Entry, directory: &str, environment: &Environment) -> Choice {
    Choice {
        from: format!("{directory}/{}.conf", entry.id),
        kernel: entry.linux,
        // Variables are GRUB's: a list of initrds may hold one that is for the user to fill.
        initrds: entry.initrds.into_iter().filter(|path| !path.starts_with('$')).collect(),
        options: expand(&entry.options.join(" "), &|name| environment.get(name)),
        ..Choice::default()
    }
}

fn parse(file: &str, text: &str) -> Entry {
    let (id, bad) = tries(file);
    let mut entry = Entry { id: id.to_owned(), bad, ..Entry::default() };
    for line in text.lines() {
        let line = line.trim();
        let Some((key, value)) = line.split_once(|c: char| c.is_ascii_whitespace()) else {
            continue;
        };
        let value = value.trim().to_owned();
        match key {
            "version" => entry.version = value,
            "machine-id" => entry.machine = value.to_ascii_lowercase(),
            "sort-key" => entry.sort_key = value,
            "architecture" => entry.architecture = value.to_ascii_lowercase(),
            "linux" => entry.linux = value,
            // One key for each, but GRUB's own entries have several in one.
            "initrd" => entry.initrds.extend(value.split_ascii_whitespace().map(str::to_owned)),
            "options" => entry.options.push(value),
            _ => {}
        }
    }
    entry
}

/// An entry's name without its counter of tries: `name+LEFT` or `name+LEFT-DONE`; whether none is left.
fn tries(name: &str) -> (&str, bool) {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let Some((id, counter)) = name.rsplit_once('+') else { return (name, false) };
    let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
    match number(left) && number(done) {
        true => (id, left.bytes().all(|b| b == b'0')),
        false => (name, false),
    }
}

/// The specification's order ("Sorting"): what works first, keys before none, newer versions first.
fn order(a: &Entry, b: &Entry) -> Ordering {
    let keyed = |entry: &Entry| !entry.sort_key.is_empty();
    let by_key = match (keyed(a), keyed(b)) {
        (true, true) => a
            .sort_key
            .cmp(&b.sort_key)
            .then_with(|| a.machine.cmp(&b.machine))
            .then_with(|| compare(&b.version, &a.version)),
        (a, b) => b.cmp(&a),
    };
    a.bad.cmp(&b.bad).then(by_key).then_with(|| compare(&b.id, &a.id))
}

/// What loader.conf says is the default: a pattern of names.
fn default_of(text: &str) -> Option<String> {
    let value = |line: &str| {
        let (key, value) = line.trim().split_once(|c: char| c.is_ascii_whitespace())?;
        (key == "default").then(|| value.trim().to_owned())
    };
    text.lines().filter_map(value).next_back().filter(|name| !name.starts_with('@'))
}

/// Whether a name fits a pattern with `*` and `?`, with or without `.conf`, as loaders differ there.
fn matches(pattern: &str, id: &str) -> bool {
    let file = format!("{id}.conf");
    fits(pattern.as_bytes(), id.as_bytes()) || fits(pattern.as_bytes(), file.as_bytes())
}

fn fits(pattern: &[u8], name: &[u8]) -> bool {
    // Where to go on when what follows the last star does not fit.
    let (mut p, mut n, mut again) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                again = Some((p + 1, n));
                p += 1;
            }
            Some(c) if *c == b'?' || Some(c) == name.get(n) => (p, n) = (p + 1, n + 1),
            _ => match again {
                Some((after, at)) => {
                    again = Some((after, at + 1));
                    (p, n) = (after, at + 1);
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_key_by_key() {
        let text = "# a comment\ntitle Fedora\nversion 6.5\nmachine-id ABC\nlinux /a/linux\n\
                    initrd /ucode.img\ninitrd\t/a/initrd $tuned\noptions root=UUID=1 ro\noptions quiet\n";
        let entry = parse("abc-6.5+2-1", text);
        assert_eq!((entry.id.as_str(), entry.bad), ("abc-6.5", false));
        assert_eq!((entry.linux.as_str(), entry.machine.as_str()), ("/a/linux", "abc"));
        assert_eq!(entry.initrds, ["/ucode.img", "/a/initrd", "$tuned"]);
        assert_eq!(entry.options, ["root=UUID=1 ro", "quiet"]);
        assert_eq!(
            (tries("x+0-3"), tries("x+y"), tries("x+3")),
            (("x", true), ("x+y", false), ("x", false))
        );
    }

    #[test]
    fn newer_versions_come_first_and_what_has_failed_last() {
        let entry = |id: &str, key: &str, version: &str| Entry {
            sort_key: key.into(),
            version: version.into(),
            ..parse(id, "")
        };
        let mut entries = [
            entry("zzz", "", ""),
            entry("m-0-rescue", "", "0-rescue"),
            entry("b", "arch", "6.9"),
            entry("a", "arch", "6.10"),
            entry("c+0", "aaa", "7"),
            entry("m-6.2", "", ""),
            entry("m-6.12", "", ""),
        ];
        entries.sort_by(order);
        let ids: Vec<_> = entries.iter().map(|entry| entry.id.as_str()).collect();
        assert_eq!(ids, ["a", "b", "zzz", "m-6.12", "m-6.2", "m-0-rescue", "c"]);
    }

    #[test]
    fn a_default_is_a_pattern() {
        assert_eq!(default_of("timeout 3\ndefault  arch-*\n#default x\n"), Some("arch-*".into()));
        assert_eq!(default_of("default @saved\n"), None);
        assert!(
            matches("arch-*", "arch-lts") && matches("a?c.conf", "abc") && matches("*c*", "abcd")
        );
        assert!(!matches("arch-*", "debian") && !matches("a?c", "ac") && !matches("", "a"));
        assert!(matches("*a*b*c", "xaxbxabc") && !matches("*a*b*c", "xaxbxab"));
    }
}
