//! Options with the values that a user, or a default, gave them.

use std::fmt::Write as _;

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::options::known::{Kind, Known, LUKS, QCOW2};
use crate::qemu_img::options::opts::{List, escaped};
use crate::qemu_img::size::{self, Bad};

/// A value, read.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Text(String),
    Number(u64),
    Switch(bool),
}

/// Options with their values.
#[derive(Debug, Clone)]
pub struct Chosen {
    known: Vec<Known>,
    values: Vec<Option<Value>>,
}

impl Chosen {
    /// Reads a list of options that a format and its file know.
    pub fn parse(known: Vec<Known>, text: &str) -> Outcome<Chosen> {
        let mut chosen = Chosen { values: vec![None; known.len()], known };
        for (key, value) in List::parse(text, None).0 {
            chosen.set(&key, &value)?;
        }
        Ok(chosen)
    }

    fn place(&self, key: &str) -> Option<usize> {
        self.known.iter().position(|k| k.name == key)
    }

    /// Sets an option as the user would.
    pub fn set(&mut self, key: &str, value: &str) -> Outcome<()> {
        let unknown = || {
            let creation = match () {
                () if self.knows("encrypt.state") => QCOW2,
                () if self.knows("state") => LUKS,
                () => &[],
            };
            let for_creation = creation.iter().any(|k| k.name == key);
            let hint = if for_creation {
                "\nThis option is only supported for image creation"
            } else {
                ""
            };
            Fail::new(format!("Invalid parameter '{key}'{hint}"))
        };
        let at = self.place(key).ok_or_else(unknown)?;
        self.values[at] = Some(read(key, self.known[at].kind, value)?);
        Ok(())
    }

    /// Fills in the values that the format takes by itself.
    pub fn add_defaults(&mut self) -> Outcome<()> {
        for at in 0..self.known.len() {
            if let (None, Some(value)) = (&self.values[at], self.known[at].default) {
                self.values[at] = Some(read(self.known[at].name, self.known[at].kind, value)?);
            }
        }
        Ok(())
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.values[self.place(key)?].as_ref()
    }

    /// A text option.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.value(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A size or number.
    pub fn number(&self, key: &str) -> Option<u64> {
        match self.value(key) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// A switch.
    pub fn switch(&self, key: &str) -> Option<bool> {
        match self.value(key) {
            Some(Value::Switch(on)) => Some(*on),
            _ => None,
        }
    }

    /// Whether the user, or a default, said anything about the option.
    pub fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// The options that were given and whose names begin with `prefix`.
    pub fn given_with<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'static str> + 'a {
        let given = self.known.iter().zip(&self.values).filter(|(_, value)| value.is_some());
        given.map(|(known, _)| known.name).filter(move |name| name.starts_with(prefix))
    }

    /// Whether the format has such an option.
    pub fn knows(&self, key: &str) -> bool {
        self.place(key).is_some()
    }

    /// All values in one line, each with a space before it.
    pub fn listed(&self) -> String {
        let mut out = String::new();
        for (known, value) in self.known.iter().zip(&self.values) {
            let text = match value {
                None => continue,
                Some(Value::Text(text)) => escaped(text),
                Some(Value::Number(number)) => number.to_string(),
                Some(Value::Switch(on)) => if *on { "on" } else { "off" }.to_owned(),
            };
            let _ = write!(out, " {}={text}", known.name);
        }
        out
    }
}

fn read(key: &str, kind: Kind, value: &str) -> Outcome<Value> {
    match kind {
        Kind::Text => Ok(Value::Text(value.to_owned())),
        Kind::Switch => match value {
            "on" | "yes" | "true" | "y" => Ok(Value::Switch(true)),
            "off" | "no" | "false" | "n" => Ok(Value::Switch(false)),
            _ => Err(Fail::new(format!("Parameter '{key}' expects 'on' or 'off'"))),
        },
        // As the C library reads them: a negative number is one near the top.
        Kind::Number => value
            .parse()
            .or_else(|_| value.parse::<i64>().map(i64::cast_unsigned))
            .map(Value::Number)
            .map_err(|_| Fail::new(format!("Parameter '{key}' expects a number"))),
        Kind::Size => size::parse(value).map(Value::Number).map_err(|bad| match bad {
            Bad::Range => {
                Fail::new(format!("Value '{value}' is out of range for parameter '{key}'"))
            }
            Bad::Syntax => Fail::new(format!(
                "Parameter '{key}' expects a non-negative number below 2^64\nOptional suffix k, M, G, \
                 T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
            )),
        }),
    }
}
