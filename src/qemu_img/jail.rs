//! The jail around a command: files are read wherever names lead, as QEMU follows them, and written where
//! the command line says. There is nothing to say about it, as QEMU says nothing.

use std::path::{Path, PathBuf};

use vdisk::jail::Mode;
use vdisk::storage::device::is_device;
use vdisk::storage::name::directory;

use crate::cli::open::rest::Rest;

/// Commands that write nothing.
const LOOKS: &[&str] = &["info", "map", "compare", "measure"];
/// Options that a word of their own follows, which is no file that is made.
const VALUES: &str = "fFOoBblStTmr";
/// How the command line names a server, in any of its ways: who asks one makes connections.
const SERVERS: &[&str] = &["nbd:", "nbd+", "nbds", "=nbd", "\"nbd"];

/// Closes the jail for `command`, whose command line goes on with `words`.
pub fn close(command: &str, words: &[String]) {
    if words.iter().any(|word| SERVERS.iter().any(|server| word.contains(server)))
        || super::images::open::trusts_names()
    {
        return;
    }
    let mut rest = Rest::new().read(Path::new("/"));
    let made = made(command, words);
    for path in made.iter().flat_map(|word| pieces(word)) {
        rest = if is_device(&path) { rest.disk(&path) } else { rest.made(&path) };
    }
    for path in if LOOKS.contains(&command) { Vec::new() } else { named(words) } {
        rest = match command {
            "commit" => rest.chain(&path),
            _ if made.is_some() => rest.base(&path),
            _ => rest.disk(&path),
        };
    }
    let _ = rest.close_as(Mode::Best);
}

/// The word that names the file that a command makes.
fn made<'w>(command: &str, words: &'w [String]) -> Option<&'w str> {
    let mut names = Vec::new();
    let mut is_value = false;
    for word in words {
        let is_option = word.starts_with('-') && word.len() > 1;
        if !is_option && !is_value {
            names.push(word.as_str());
        }
        is_value = is_option && word.len() == 2 && word.ends_with(|c| VALUES.contains(c));
    }
    match command {
        "create" => names.first().copied(),
        "convert" => names.last().copied(),
        "dd" => words.iter().find_map(|word| word.strip_prefix("of=")),
        _ => None,
    }
}

/// The files that are named. Some names are meant from where another file is.
fn named(words: &[String]) -> Vec<PathBuf> {
    let names: Vec<PathBuf> = words.iter().flat_map(|word| pieces(word)).collect();
    let mut from: Vec<&Path> = names.iter().map(|name| directory(name)).collect();
    from.sort();
    from.dedup();
    let here = names.iter().cloned();
    let there = from.iter().flat_map(|dir| names.iter().map(|name| dir.join(name)));
    let mut found: Vec<PathBuf> =
        here.chain(there).filter(|path| path.is_file() || is_device(path)).collect();
    found.sort();
    found.dedup();
    found
}

/// What of a word can be a name: a word stands for itself, behind a protocol or a key, or in a list of such.
fn pieces(word: &str) -> Vec<PathBuf> {
    let parts = word.split([',', '=', '"']).chain([word]);
    let parts = parts.flat_map(|part| [Some(part), part.strip_prefix("file:")]);
    let parts = parts.flatten().filter(|part| !part.is_empty() && !part.starts_with('-'));
    let mut paths: Vec<PathBuf> = parts.map(PathBuf::from).collect();
    paths.sort();
    paths.dedup();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_that_is_made_is_found_among_the_words() {
        let made = |line: &str| {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            made(&words[0], &words[1..]).map(str::to_owned)
        };
        assert_eq!(made("create -q -f qcow2 new 8M").unwrap(), "new");
        assert_eq!(made("create -b base -F raw -f qcow2 new").unwrap(), "new");
        assert_eq!(made("convert a b -O qcow2 -p").unwrap(), "b");
        assert_eq!(made("convert -O raw a dir/b").unwrap(), "dir/b");
        assert_eq!(made("dd if=a of=b bs=1M").unwrap(), "b");
        assert_eq!(made("resize a 8M"), None);
    }

    #[test]
    fn names_stand_also_in_lists() {
        let has = |word: &str, path: &str| pieces(word).contains(&PathBuf::from(path));
        assert!(has("driver=qcow2,file.filename=/a/b", "/a/b"));
        assert!(has(r#"json:{"driver":"raw","file":{"filename":"/a"}}"#, "/a"));
        assert!(has("file:c", "c") && has("a=b", "a=b"));
    }
}
