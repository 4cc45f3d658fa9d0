//! `blkdebug`: an image whose reads, writes or map fail where the user says so.
//!
//! Rules that fail reads and writes of the guest's data, and the map, are known. Those that wait for
//! a step inside the format's driver, such as the update of an L1 table, are refused by name.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vdisk::addr::{GuestOffset, Unit};
use vdisk::block::{total, total_mut};
use vdisk::image::{Allocation, Backing, Details, Extent, Hold, Identity, Image};
use vdisk::{Error, Result};

use super::fail::{Fail, Outcome};
use super::size;

/// Rules speak of sectors.
const SECTOR: u64 = 512;

/// What is done to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Read,
    Write,
    Map,
}

/// One fault.
#[derive(Debug)]
struct Rule {
    doing: Vec<Doing>,
    sector: Option<u64>,
    errno: i32,
    once: bool,
    spent: AtomicBool,
}

/// The faults of one image.
#[derive(Debug, Default)]
pub struct Faults {
    rules: Vec<Rule>,
}

impl Faults {
    /// Reads rules: those of the file `config`, and those given in place as `section.number.key`.
    pub fn read(config: Option<&str>, given: &[(String, String)]) -> Outcome<Faults> {
        let mut sections = Vec::new();
        if let Some(path) = config {
            let text = std::fs::read_to_string(path)
                .map_err(|e| Fail::new(format!("Could not read blkdebug config file: {e}")))?;
            sections = from_text(&text);
        }
        for (key, value) in given {
            let Some((place, key)) = key.rsplit_once('.') else { continue };
            match sections.iter_mut().find(|(name, _)| name == place) {
                Some((_, pairs)) => pairs.push((key.to_owned(), value.clone())),
                None => sections.push((place.to_owned(), vec![(key.to_owned(), value.clone())])),
            }
        }
        let mut rules = Vec::new();
        for (name, pairs) in &sections {
            if name.starts_with("inject-error") {
                rules.push(Rule::read(pairs)?);
            }
        }
        Ok(Faults { rules })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    fn strike(&self, doing: Doing, offset: u64, len: u64) -> Result<()> {
        let inside = |sector: u64| {
            let at = sector.saturating_mul(SECTOR);
            at >= offset && at < offset.saturating_add(len)
        };
        for rule in &self.rules {
            let hits = rule.doing.contains(&doing) && rule.sector.is_none_or(inside);
            if hits && !(rule.once && rule.spent.swap(true, Ordering::Relaxed)) {
                let source = std::io::Error::from_raw_os_error(rule.errno);
                return Err(Error::io("an injected fault", source).at_offset(offset));
            }
        }
        Ok(())
    }
}

impl Rule {
    fn read(pairs: &[(String, String)]) -> Outcome<Rule> {
        let get = |key: &str| pairs.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let number = |key: &str| -> Outcome<Option<u64>> {
            let bad = |_| Fail::new(format!("Parameter '{key}' expects a number"));
            get(key).map(|text| size::parse(text).map_err(bad)).transpose()
        };
        let doing = match (get("event").unwrap_or("none"), get("iotype")) {
            ("none", None) => vec![Doing::Read, Doing::Write],
            ("none" | "read_aio", Some("read")) | ("read_aio", None) => vec![Doing::Read],
            ("none" | "write_aio", Some("write")) | ("write_aio", None) => vec![Doing::Write],
            ("none", Some("block-status")) => vec![Doing::Map],
            (event, _) => {
                return Err(Fail::new(format!("blkdebug event '{event}' is not supported")));
            }
        };
        let errno = number("errno")?.and_then(|n| i32::try_from(n).ok());
        Ok(Rule {
            doing,
            // What blkdebug calls -1 is any sector.
            sector: if get("sector") == Some("-1") { None } else { number("sector")? },
            errno: errno.unwrap_or(nix::libc::EIO),
            once: matches!(get("once"), Some("on" | "true" | "yes")),
            spent: AtomicBool::new(false),
        })
    }
}

type Section = (String, Vec<(String, String)>);

/// The sections of a configuration file with their keys and values.
fn from_text(text: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            sections.push((name.trim().to_owned(), Vec::new()));
        } else if let (Some((key, value)), Some((_, pairs))) =
            (line.split_once('='), sections.last_mut())
        {
            pairs.push((key.trim().to_owned(), value.trim().trim_matches('"').to_owned()));
        }
    }
    sections
}

/// An image with faults.
pub struct Faulty {
    inner: Arc<dyn Image>,
    faults: Faults,
}

impl Faulty {
    /// `inner`, failing as `faults` say.
    pub fn new(inner: Arc<dyn Image>, faults: Faults) -> Faulty {
        Faulty { inner, faults }
    }
}

impl Image for Faulty {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn cluster(&self) -> Unit {
        self.inner.cluster()
    }

    fn granularity(&self) -> Unit {
        self.inner.granularity()
    }

    fn backing(&self) -> Option<Backing> {
        self.inner.backing()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn hold(&self) -> Hold<'_> {
        self.inner.hold()
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        self.inner.map(at, len)
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        self.faults.strike(Doing::Map, extent.start.0, extent.len)?;
        self.inner.narrow(extent)
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.faults.strike(Doing::Read, at.0, total_mut(bufs))?;
        self.inner.read(extent, at, bufs)
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.faults.strike(Doing::Write, at.0, total(bufs))?;
        self.inner.overwrite(extent, at, bufs)
    }

    fn prepare(&self, at: GuestOffset, len: u64) -> Result<Box<dyn Allocation + '_>> {
        self.faults.strike(Doing::Write, at.0, len)?;
        self.inner.prepare(at, len)
    }

    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        self.inner.zero(at, len, unmap)
    }

    fn discard(&self, at: GuestOffset, len: u64, expose: bool) -> Result<()> {
        self.inner.discard(at, len, expose)
    }

    fn identity(&self) -> Result<Identity> {
        self.inner.identity()
    }

    fn set_identity(&self, identity: &Identity) -> Result<()> {
        self.inner.set_identity(identity)
    }

    fn details(&self) -> Option<Details> {
        self.inner.details()
    }

    fn write_compressed(&self, at: GuestOffset, bytes: &[u8]) -> Result<bool> {
        self.faults.strike(Doing::Write, at.0, bytes.len() as u64)?;
        self.inner.write_compressed(at, bytes)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.inner.resize(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_strike_their_sectors_and_once_only_where_they_say_so() {
        let text = "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nonce = \"on\"\n\
                    [inject-error]\nevent = \"none\"\niotype = \"block-status\"\nsector = \"3\"\n";
        let mut rules = Vec::new();
        for (_, pairs) in from_text(text) {
            rules.push(Rule::read(&pairs).unwrap());
        }
        let faults = Faults { rules };
        assert!(faults.strike(Doing::Write, 0, 512).is_ok());
        assert_eq!(faults.strike(Doing::Read, 0, 512).unwrap_err().raw_os_error(), Some(5));
        assert!(faults.strike(Doing::Read, 0, 512).is_ok());
        assert!(faults.strike(Doing::Map, 0, 1536).is_ok());
        assert!(faults.strike(Doing::Map, 0, 1537).is_err());
    }
}
