//! Lists of `key=value`, separated by commas; a doubled comma stands for one in a value.

use crate::qemu_img::fail::{Fail, Outcome};

/// A list in the order in which it was given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct List(pub Vec<(String, String)>);

impl List {
    /// Splits `text`. A key without value means "on", or "off"
    /// where it begins with "no"; the first element may leave out `implied`.
    pub fn parse(text: &str, implied: Option<&str>) -> List {
        let mut list = Vec::new();
        for (number, element) in elements(text).into_iter().enumerate() {
            let pair = match element.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None => match implied.filter(|_| number == 0) {
                    Some(key) => (key.to_owned(), element),
                    None => match element.strip_prefix("no") {
                        Some(key) => (key.to_owned(), "off".to_owned()),
                        None => (element, "on".to_owned()),
                    },
                },
            };
            list.push(pair);
        }
        List(list)
    }

    /// The key's last value.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

/// The elements between single commas, with doubled ones made one.
fn elements(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut current = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            current.push(c);
        } else if chars.next_if_eq(&',').is_some() {
            current.push(',');
        } else {
            found.push(std::mem::take(&mut current));
        }
    }
    if !current.is_empty() {
        found.push(current);
    }
    found
}

/// Joins the values of several `-o` into one text.
///
/// # Errors
/// For a text whose commas would be read otherwise after joining.
pub fn joined<'a>(texts: impl Iterator<Item = &'a str>) -> Outcome<Option<String>> {
    let mut all: Option<String> = None;
    for text in texts {
        if !stands_alone(text) {
            return Err(Fail::new(format!("Invalid option list: {text}")));
        }
        all = Some(match all {
            Some(before) => format!("{before},{text}"),
            None => text.to_owned(),
        });
    }
    Ok(all)
}

/// Whether no comma at an end of `text` could join with another one.
fn stands_alone(text: &str) -> bool {
    let trailing = text.len() - text.trim_end_matches(',').len();
    let empty = elements(text).iter().any(|e| e.is_empty() || e.starts_with(','));
    !text.is_empty() && !empty && !text.starts_with(',') && trailing.is_multiple_of(2)
}

/// Whether the list asks for help about its keys.
pub fn asks_for_help(text: &str) -> bool {
    elements(text).iter().any(|e| e == "help" || e == "?")
}

/// A value as it stands in a list.
pub fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubled_commas_belong_to_the_value() {
        let list = List::parse("backing_file=a,,b,size=1M,lazy", None);
        assert_eq!(list.get("backing_file"), Some("a,b"));
        assert_eq!((list.get("size"), list.get("lazy")), (Some("1M"), Some("on")));
        assert_eq!(List::parse("x,id=1", Some("driver")).get("driver"), Some("x"));
        assert_eq!(List::parse("nolazy", None).get("lazy"), Some("off"));
        assert!(asks_for_help("a=1,?") && !asks_for_help("backing_file=a,,help"));
    }

    #[test]
    fn lists_that_would_join_with_others_are_refused() {
        for bad in ["", "backing_file=x,", ",help", ",,", ","] {
            assert!(joined([bad].into_iter()).is_err(), "{bad}");
        }
        let all = joined(["a=1", "b=2,,3"].into_iter()).unwrap();
        assert_eq!(all.as_deref(), Some("a=1,b=2,,3"));
    }
}
