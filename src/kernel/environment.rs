//! GRUB's environment block (`grubenv`): the variables that it keeps from one start to the next.
//!
//! It knows a file's text.

use std::collections::BTreeMap;

use super::place::Place;

/// Variables by name.
#[derive(Debug, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// What is kept in a directory `boot`; nothing where there is nothing.
    pub fn of(place: &Place, boot: &str) -> Environment {
        let read =
            |directory: &str| place.text(&format!("{boot}/{directory}/grubenv")).ok().flatten();
        ["grub2", "grub"]
            .into_iter()
            .find_map(read)
            .map_or_else(Environment::default, |text| parse(&text))
    }

    /// What a variable is, unless empty.
    pub fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).filter(|value| !value.is_empty()).cloned()
    }

    /// Sets a variable.
    pub fn set(&mut self, name: &str, value: String) {
        self.0.insert(name.to_owned(), value);
    }
}

fn parse(text: &str) -> Environment {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pair = |line: &str| {
        let (name, value) = line.split_once('=')?;
        // A backslash stands before itself.
        Some((name.to_owned(), value.replace("\\\\", "\\")))
    };
    Environment(lines.filter_map(pair).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_lines_and_padding() {
        let kept =
            parse("# GRUB Environment Block\nsaved_entry=abc-6.1\nempty=\nkernelopts=a=b c\n#####");
        assert_eq!(kept.get("saved_entry").as_deref(), Some("abc-6.1"));
        assert_eq!(kept.get("kernelopts").as_deref(), Some("a=b c"));
        assert_eq!((kept.get("empty"), kept.get("other")), (None, None));
    }
}
