//! The options of one command as getopt reads them: short ones in clusters, long ones by any
//! unambiguous beginning, operands anywhere between.

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::options::objects;

/// An option that a command knows.
#[derive(Clone, Copy)]
pub struct Opt {
    /// What the command asks for: the short letter, else the long name.
    key: &'static str,
    long: Option<&'static str>,
    takes_value: bool,
}

/// A flag with a short letter.
pub const fn flag(key: &'static str) -> Opt {
    Opt { key, long: None, takes_value: false }
}

/// An option with a short letter and a value.
pub const fn value(key: &'static str) -> Opt {
    Opt { key, long: None, takes_value: true }
}

/// A flag with a long name only.
pub const fn long(key: &'static str) -> Opt {
    Opt { key, long: Some(key), takes_value: false }
}

/// An option with a long name only, and a value.
pub const fn long_value(key: &'static str) -> Opt {
    Opt { key, long: Some(key), takes_value: true }
}

impl Opt {
    /// The same option under a long name as well.
    pub const fn or(self, name: &'static str) -> Opt {
        Opt { long: Some(name), ..self }
    }
}

/// What the user gave.
#[derive(Debug, Default)]
pub struct Given {
    options: Vec<(&'static str, String)>,
    /// The operands in order.
    pub names: Vec<String>,
    /// Whether help was asked for.
    pub help: bool,
}

/// Reads `args` by `known`; every command knows `-h` and `--help`.
pub fn parse(args: &[String], known: &[Opt]) -> Outcome<Given> {
    let mut given = Given::default();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            given.names.extend(rest.by_ref().cloned());
        } else if let Some(text) = arg.strip_prefix("--") {
            given.long(arg, text, known, &mut rest)?;
        } else if arg.len() > 1 && arg.starts_with('-') {
            given.short(&arg[1..], known, &mut rest)?;
        } else {
            given.names.push(arg.clone());
        }
    }
    for text in given.all("object") {
        objects::define(text).map_err(|e| e.with_code(object_status(known)))?;
    }
    Ok(given)
}

/// The exit status of a command whose objects are wrong: of `compare`, 1 is that images differ.
fn object_status(known: &[Opt]) -> u8 {
    let compares = known.iter().any(|opt| opt.key == "s" && !opt.takes_value);
    if compares { 2 } else { 1 }
}

impl Given {
    fn long<'a>(
        &mut self,
        arg: &str,
        text: &str,
        known: &[Opt],
        rest: &mut impl Iterator<Item = &'a String>,
    ) -> Outcome<()> {
        let (name, attached) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, None),
        };
        let named = |o: &&Opt| o.long.is_some_and(|l| l.starts_with(name));
        let exact = known.iter().find(|o| o.long == Some(name));
        let mut begun = known.iter().filter(named);
        let found = exact.or_else(|| begun.next().filter(|_| begun.next().is_none()));
        let Some(opt) = found else {
            if !name.is_empty() && "help".starts_with(name) {
                self.help = true;
                return Ok(());
            }
            return Err(Fail::usage(format!("unrecognized option '{arg}'")));
        };
        let value = match (opt.takes_value, attached) {
            (true, Some(value)) => value,
            (true, None) => rest.next().cloned().ok_or_else(|| missing(arg))?,
            (false, None) => String::new(),
            (false, Some(_)) => return Err(Fail::usage(format!("unrecognized option '{arg}'"))),
        };
        self.options.push((opt.key, value));
        Ok(())
    }

    fn short<'a>(
        &mut self,
        cluster: &str,
        known: &[Opt],
        rest: &mut impl Iterator<Item = &'a String>,
    ) -> Outcome<()> {
        for (at, letter) in cluster.char_indices() {
            let after = &cluster[at + letter.len_utf8()..];
            let mut bytes = [0; 4];
            let name: &str = letter.encode_utf8(&mut bytes);
            let Some(opt) = known.iter().find(|o| o.key == name) else {
                if letter == 'h' {
                    self.help = true;
                    continue;
                }
                return Err(Fail::usage(format!("unrecognized option '-{letter}'")));
            };
            if !opt.takes_value {
                self.options.push((opt.key, String::new()));
                continue;
            }
            let value = match after {
                "" => rest.next().cloned().ok_or_else(|| missing(&format!("-{letter}")))?,
                attached => attached.to_owned(),
            };
            self.options.push((opt.key, value));
            return Ok(());
        }
        Ok(())
    }

    /// Whether the option was given.
    pub fn has(&self, key: &str) -> bool {
        self.options.iter().any(|(k, _)| *k == key)
    }

    /// The option's last value.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.options.iter().rev().find(|(k, _)| *k == key).map(|(_, v)| v.as_str())
    }

    /// All values of the option, in order.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.options.iter().filter(move |(k, _)| *k == key).map(|(_, v)| v.as_str())
    }

    /// All options in the order in which they were given.
    pub fn in_order(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.options.iter().map(|(k, v)| (*k, v.as_str()))
    }

    /// The one operand of a command that takes one.
    pub fn only_name(&self) -> Outcome<&str> {
        match &self.names[..] {
            [one] => Ok(one),
            _ => Err(Fail::usage("Expecting one image file name")),
        }
    }
}

fn missing(option: &str) -> Fail {
    Fail::usage(format!("missing argument for option '{option}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Opt] = &[
        value("f"),
        flag("q"),
        long_value("output"),
        long("image-opts"),
        flag("U").or("force-share"),
    ];

    fn given(args: &[&str]) -> Outcome<Given> {
        parse(&args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>(), KNOWN)
    }

    #[test]
    fn options_stand_anywhere_and_the_last_wins() {
        let g = given(&["a", "-qf", "raw", "--out=json", "-fqcow2", "b", "--", "-c"]).unwrap();
        assert_eq!(g.names, ["a", "b", "-c"]);
        assert_eq!((g.get("f"), g.get("output"), g.has("q")), (Some("qcow2"), Some("json"), true));
        assert!(given(&["--force"]).unwrap().has("U"));
    }

    #[test]
    fn what_is_not_known_is_named() {
        assert!(given(&["--foo"]).unwrap_err().text().contains("unrecognized option '--foo'"));
        assert!(given(&["-qx"]).unwrap_err().text().contains("unrecognized option '-x'"));
        assert!(given(&["-f"]).unwrap_err().text().contains("missing argument for option '-f'"));
    }
}
