//! The words by which an instance was started, told apart, so that it can be started under another name or
//! on another disk: which are options, which one names its disk, and which are its program's.

use std::ffi::{OsStr, OsString};
use std::sync::OnceLock;

use clap::{Arg, Command};

/// Which command lines there are.
static KNOWN: OnceLock<fn() -> Command> = OnceLock::new();

/// Says which command lines there are.
pub fn know(command: fn() -> Command) {
    let _ = KNOWN.set(command);
}

/// A command line of `vdisk run` or `vdisk boot`, behind the program's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    /// An option by the name that the program knows it by, with its value.
    Option { id: String, words: Vec<OsString> },
    /// The verb.
    Verb(OsString),
    /// What is run: a disk or an image.
    Disk(OsString),
    /// The program's own words, and whatever is not known.
    Other(Vec<OsString>),
}

impl Words {
    /// Tells the words of a command line apart.
    pub fn of<W: AsRef<OsStr>>(words: &[W]) -> Words {
        // Made once: it takes milliseconds.
        static BUILT: OnceLock<Command> = OnceLock::new();
        let known = BUILT.get_or_init(|| {
            let mut known = KNOWN.get().map_or_else(Command::default, |command| command());
            known.build();
            known
        });
        let words: Vec<&OsStr> = words.iter().map(AsRef::as_ref).collect();
        Words(parts(known, &words))
    }

    /// The same words in their order.
    pub fn all(&self) -> Vec<OsString> {
        let words = |part: &Part| match part {
            Part::Option { words, .. } | Part::Other(words) => words.clone(),
            Part::Verb(word) | Part::Disk(word) => vec![word.clone()],
        };
        self.0.iter().flat_map(words).collect()
    }

    /// Without an option.
    #[must_use]
    pub fn without(mut self, option: &str) -> Words {
        self.0.retain(|part| !matches!(part, Part::Option { id, .. } if id == option));
        self
    }

    /// With an option in the place of all of the same name.
    #[must_use]
    pub fn with(self, option: &str, value: Option<&OsStr>) -> Words {
        let mut words = self.without(option);
        let own = std::iter::once(OsString::from(format!("--{option}")));
        let own = own.chain(value.map(OsStr::to_owned)).collect();
        let verb = words.0.iter().position(|part| matches!(part, Part::Verb(_)));
        let part = Part::Option { id: option.to_owned(), words: own };
        words.0.insert(verb.map_or(0, |verb| verb + 1), part);
        words
    }

    /// On another disk or image.
    #[must_use]
    pub fn on(mut self, disk: &OsStr) -> Words {
        for part in &mut self.0 {
            if let Part::Disk(word) = part {
                disk.clone_into(word);
            }
        }
        self
    }
}

fn parts(root: &Command, words: &[&OsStr]) -> Vec<Part> {
    let (mut command, mut parts) = (root, Vec::new());
    let (mut rest, mut disk, mut escaped) = (words, false, false);
    while let Some((word, behind)) = rest.split_first() {
        let text = word.to_string_lossy();
        let option = if escaped { None } else { option(command, &text) };
        match (option, std::ptr::eq(command, root)) {
            (Some((ids, values)), _) => {
                let (value, behind) = behind.split_at(values.min(behind.len()));
                parts.extend(options(ids, word, value));
                rest = behind;
                continue;
            }
            (None, true) => {
                command = root.find_subcommand(&*text).unwrap_or(root);
                parts.push(Part::Verb((*word).to_owned()));
            }
            (None, false) if disk => break,
            (None, false) if *word == "--" && !escaped => {
                escaped = true;
                parts.push(Part::Other(vec![(*word).to_owned()]));
            }
            (None, false) => {
                disk = true;
                parts.push(Part::Disk((*word).to_owned()));
            }
        }
        rest = behind;
    }
    let words: Vec<OsString> = rest.iter().map(|word| (*word).to_owned()).collect();
    parts.extend(Some(Part::Other(words)).filter(|_| !rest.is_empty()));
    parts
}

/// The options that a word stands for, several where they have one letter each, and how many of the words
/// that follow are the value of the last.
fn option(command: &Command, word: &str) -> Option<(Vec<String>, usize)> {
    let takes = |arg: &Arg| arg.get_action().takes_values();
    let own = |arg: &Arg| arg.get_id().as_str().to_owned();
    if let Some(long) = word.strip_prefix("--") {
        let (name, value) = long.split_once('=').map_or((long, None), |(n, v)| (n, Some(v)));
        let arg = command.get_arguments().find(|arg| arg.get_long() == Some(name))?;
        return Some((vec![own(arg)], usize::from(takes(arg) && value.is_none())));
    }
    let letters = word.strip_prefix('-').filter(|letters| !letters.is_empty())?;
    let mut ids = Vec::new();
    for (at, letter) in letters.char_indices() {
        let arg = command.get_arguments().find(|arg| arg.get_short() == Some(letter))?;
        ids.push(own(arg));
        if takes(arg) {
            return Some((ids, usize::from(at + letter.len_utf8() == letters.len())));
        }
    }
    Some((ids, 0))
}

/// Each option for itself: `-dt` is `-d -t`, and `-dwx` is `-d -wx`.
fn options(ids: Vec<String>, word: &OsStr, value: &[&OsStr]) -> Vec<Part> {
    let value = value.iter().map(|word| (*word).to_owned());
    let last = ids.len().saturating_sub(1);
    let text = word.to_string_lossy().into_owned();
    if last == 0 {
        let words = std::iter::once(word.to_owned()).chain(value).collect();
        return ids.into_iter().map(|id| Part::Option { id, words: Vec::clone(&words) }).collect();
    }
    let letters: Vec<char> = text.chars().skip(1).collect();
    let of = |(at, id): (usize, String)| {
        let own: String = match at == last {
            true => letters.iter().skip(at).collect(),
            false => letters.iter().skip(at).take(1).collect(),
        };
        let value = value.clone().filter(|_| at == last);
        let words = std::iter::once(OsString::from(format!("-{own}"))).chain(value).collect();
        Part::Option { id, words }
    };
    ids.into_iter().enumerate().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Words {
        know(crate::cli::help::command);
        Words::of(&text.split_whitespace().collect::<Vec<_>>())
    }

    fn text(words: &Words) -> String {
        words.all().join(OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn a_command_line_is_told_apart_and_stays_what_it_was() {
        for line in [
            "run -d --name web --env A=b debian:12 -- sh -c x",
            "--wait 3 run -dt -e A --rm box sh --rm -d",
            "boot vm.qcow2 --cpus 2 --detach -- init --name x",
            "run -- box sh",
        ] {
            let told = text(&words(line));
            assert_eq!(told.replace("-d -t", "-dt"), line);
        }
    }

    #[test]
    fn options_before_and_behind_the_disk_are_found_and_the_program_s_are_not() {
        let other = |line: &str| {
            let words = words(line).without("detach").with("name", Some(OsStr::new("n")));
            text(&words.on(OsStr::new("new")))
        };
        assert_eq!(other("run -d --name web web sh -d web"), "run --name n new sh -d web");
        assert_eq!(other("run web --detach --name=web sh web"), "run --name n new sh web");
        assert_eq!(other("--wait 3 run -td web"), "--wait 3 run --name n -t new");
        assert_eq!(other("boot --memory 1G vm --name v -d -- c vm"), {
            "boot --name n --memory 1G new -- c vm"
        });
        assert_eq!(other("run -e web -w /d web -e x"), "run --name n -e web -w /d new -e x");
        assert_eq!(other("run -- web -d"), "run --name n -- new -d");
    }
}
