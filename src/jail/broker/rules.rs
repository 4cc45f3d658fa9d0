//! Which names are a disk's, and what may be done to the files that have them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::storage::name::Form;

/// What may be done to a file by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum May {
    /// All: opened for writing, made, named, renamed, removed.
    All = 1,
    /// Opened for writing, where it is there.
    Write,
    /// Removed.
    Remove,
}

impl May {
    pub(super) fn of(number: u32) -> Option<May> {
        [May::All, May::Write, May::Remove].into_iter().find(|may| *may as u32 == number)
    }
}

/// The names in one directory.
#[derive(Debug, Default)]
pub(super) struct Rules {
    pub names: Vec<(OsString, May)>,
    pub forms: Vec<Form>,
    /// Of one of the forms, and not the disk's.
    pub others: Vec<OsString>,
}

impl Rules {
    /// Whether that may be done to the file of this name.
    pub fn allow(&self, name: &OsStr, wanted: May) -> bool {
        let bytes = name.as_bytes();
        if matches!(bytes, b"" | b"." | b"..") || bytes.iter().any(|byte| matches!(byte, b'/' | 0))
        {
            return false;
        }
        let mut known = self.names.iter().filter(|(known, _)| known == name);
        known.any(|(_, may)| *may == May::All || *may == wanted)
            || self.forms.iter().any(|form| form.middle(bytes).is_some())
                && !self.others.iter().any(|other| other == name)
    }

    /// Whether files are made here.
    pub fn make_files(&self) -> bool {
        !self.forms.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::name::Differs;

    #[test]
    fn names_of_the_disk_are_allowed_and_no_others() {
        let form = Form { before: "web@".into(), differs: Differs::Digits(4), behind: ".q".into() };
        let names = vec![
            ("web.q".into(), May::All),
            ("data".into(), May::Write),
            ("sock".into(), May::Remove),
        ];
        let rules = Rules { names, forms: vec![form], others: vec!["web@beef.q".into()] };
        let all = [May::All, May::Write, May::Remove];
        let may = |name: &str| all.map(|wanted| rules.allow(OsStr::new(name), wanted));
        assert_eq!(may("web.q"), [true; 3]);
        assert_eq!(may("web@0123.q"), [true; 3]);
        assert_eq!(may("data"), [false, true, false]);
        assert_eq!(may("sock"), [false, false, true]);
        let others = ["web@beef.q", "web@012.q", "web", "WEB.q", "web.q/", "./web.q", "../web.q"];
        for name in others.into_iter().chain(["", ".", "..", "/", "web.q\0", "web@../.q"]) {
            assert_eq!(may(name), [false; 3], "{name}");
        }
    }
}
