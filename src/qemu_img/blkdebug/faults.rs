//! `blkdebug`: faults that the user asks for, at a step of the format's driver or at once.
//!
//! A rule waits for an event: a step that an engine announces to its storage, or "none", which
//! happens when the image is opened. A rule that injects errors is active from its event on, until
//! an event makes others active; a rule that sets the state decides which rules the next events
//! reach. `faulty` has the images and storages that do what the rules say.

use std::sync::Mutex;

use vdisk::{Error, Result};

use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::size;

/// Rules speak of sectors.
const SECTOR: u64 = 512;

/// What is done to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    Map,
}

impl Doing {
    /// All but looking at the map, by their names.
    const CHANGES: [(&str, Doing); 5] = [
        ("read", Doing::Read),
        ("write", Doing::Write),
        ("write-zeroes", Doing::WriteZeroes),
        ("discard", Doing::Discard),
        ("flush", Doing::Flush),
    ];
}

/// The events that there are.
const EVENTS: &str = "l1_update l1_grow.alloc_table l1_grow.write_table l1_grow.activate_table \
    l2_load l2_update l2_update_compressed l2_alloc.cow_read l2_alloc.write read_aio \
    read_backing_aio read_compressed write_aio write_compressed vmstate_load vmstate_save cow_read \
    cow_write reftable_load reftable_grow reftable_update refblock_load refblock_update \
    refblock_update_part refblock_alloc refblock_alloc.hookup refblock_alloc.write \
    refblock_alloc.write_blocks refblock_alloc.write_table refblock_alloc.switch_table \
    cluster_alloc cluster_alloc_bytes cluster_free flush_to_os flush_to_disk pwritev_rmw.head \
    pwritev_rmw.after_head pwritev_rmw.tail pwritev_rmw.after_tail pwritev pwritev_zero \
    pwritev_done empty_image_prepare l1_shrink.write_table l1_shrink.free_l2_clusters cor_write \
    cluster_alloc_space none";

/// What a rule does when its event happens.
#[derive(Debug, Clone)]
enum Action {
    Fail(Fault),
    SetState(u64),
}

/// An error that is injected.
#[derive(Debug, Clone)]
struct Fault {
    doing: Vec<Doing>,
    sector: Option<u64>,
    errno: i32,
    once: bool,
}

#[derive(Debug)]
struct Rule {
    event: String,
    /// The state in which the rule is looked at; 0 for any.
    state: u64,
    action: Action,
}

/// The faults of one image.
#[derive(Debug)]
pub struct Faults {
    machine: Mutex<Machine>,
    has_rules: bool,
}

#[derive(Debug)]
struct Machine {
    /// `None`: it has struck, and does so once.
    rules: Vec<Option<Rule>>,
    state: u64,
    /// The rules that strike now, the last one first.
    active: Vec<usize>,
}

impl Faults {
    /// Reads rules: those of the file `config`, and those given in place as `section.number.key`.
    pub fn read(config: Option<&str>, given: &[(String, String)]) -> Outcome<Faults> {
        let mut sections = Vec::new();
        if let Some(path) = config {
            let text = std::fs::read_to_string(path).map_err(|e| {
                let why =
                    e.raw_os_error().map_or_else(|| e.to_string(), crate::qemu_img::fail::os_text);
                Fail::new(format!("Could not read blkdebug config file: {why}"))
            })?;
            sections = from_text(&text);
        }
        for (key, value) in given {
            let Some((place, key)) = key.rsplit_once('.') else { continue };
            match sections.iter_mut().find(|(name, _)| name == place) {
                Some((_, pairs)) => pairs.push((key.to_owned(), value.clone())),
                None => sections.push((place.to_owned(), vec![(key.to_owned(), value.clone())])),
            }
        }
        let named = |what: &'static str| {
            sections.iter().filter(move |(name, _)| name.starts_with(what)).map(|(_, pairs)| pairs)
        };
        let mut rules = Vec::new();
        for pairs in named("inject-error") {
            rules.push(Some(Rule::inject(pairs)?));
        }
        for pairs in named("set-state") {
            rules.push(Some(Rule::set_state(pairs)?));
        }
        Ok(Faults::new(rules))
    }

    fn new(rules: Vec<Option<Rule>>) -> Faults {
        let has_rules = !rules.is_empty();
        let machine = Mutex::new(Machine { rules, state: 1, active: Vec::new() });
        let faults = Faults { machine, has_rules };
        faults.happens("none");
        faults
    }

    /// Something happens: rules that wait for it are followed.
    pub fn happens(&self, event: &str) {
        if !self.has_rules {
            return;
        }
        let mut machine = self.machine.lock().unwrap_or_else(|e| e.into_inner());
        let Machine { rules, state, active } = &mut *machine;
        let (mut next, mut hit) = (*state, Vec::new());
        for (number, rule) in rules.iter().enumerate().rev() {
            let Some(rule) = rule.as_ref().filter(|r| r.event == event) else { continue };
            if rule.state != 0 && rule.state != *state {
                continue;
            }
            match rule.action {
                Action::Fail(_) => hit.insert(0, number),
                Action::SetState(new) => next = new,
            }
        }
        if !hit.is_empty() {
            *active = hit;
        }
        *state = next;
    }

    /// Fails where an active rule says so.
    pub fn strike(&self, doing: Doing, offset: u64, len: u64) -> Result<()> {
        if !self.has_rules {
            return Ok(());
        }
        let mut machine = self.machine.lock().unwrap_or_else(|e| e.into_inner());
        let Machine { rules, active, .. } = &mut *machine;
        let fault = |number: &usize| match rules.get(*number)?.as_ref()?.action {
            Action::Fail(ref fault) if fault.hits(doing, offset, len) => Some(fault.clone()),
            _ => None,
        };
        let found = active.iter().find_map(|number| Some((*number, fault(number)?)));
        let Some((number, fault)) = found.filter(|(_, fault)| fault.errno != 0) else {
            return Ok(());
        };
        if fault.once {
            rules[number] = None;
        }
        let source = std::io::Error::from_raw_os_error(fault.errno);
        Err(Error::io("an injected fault", source).at_offset(offset))
    }
}

impl Fault {
    fn hits(&self, doing: Doing, offset: u64, len: u64) -> bool {
        let inside = |sector: u64| {
            let at = sector.saturating_mul(SECTOR);
            at >= offset && at < offset.saturating_add(len)
        };
        self.doing.contains(&doing) && self.sector.is_none_or(inside)
    }
}

/// The value of a key in one section.
struct Pairs<'a>(&'a [(String, String)]);

impl Pairs<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    fn number(&self, key: &str) -> Outcome<Option<u64>> {
        let bad = |_| Fail::new(format!("Parameter '{key}' expects a number"));
        self.get(key).map(|text| size::parse(text).map_err(bad)).transpose()
    }

    fn event(&self) -> Outcome<String> {
        let event = self.get("event").ok_or_else(|| Fail::new("Missing event name for rule"))?;
        if EVENTS.split_whitespace().any(|known| known == event) {
            return Ok(event.to_owned());
        }
        Err(Fail::new(format!("invalid parameter value: {event}")))
    }
}

impl Rule {
    fn inject(pairs: &[(String, String)]) -> Outcome<Rule> {
        let pairs = Pairs(pairs);
        let event = pairs.event()?;
        let named = |name: &str| Doing::CHANGES.iter().find(|(n, _)| *n == name).map(|(_, d)| *d);
        let doing = match pairs.get("iotype") {
            None => Doing::CHANGES.iter().map(|(_, doing)| *doing).collect(),
            Some("block-status") => vec![Doing::Map],
            Some(name) => {
                let bad = || Fail::new(format!("invalid parameter value: {name}"));
                vec![named(name).ok_or_else(bad)?]
            }
        };
        // What blkdebug calls -1 is any sector.
        let sector = match pairs.get("sector") {
            Some("-1") => None,
            _ => pairs.number("sector")?,
        };
        let errno = pairs.number("errno")?.and_then(|n| i32::try_from(n).ok());
        let once = matches!(pairs.get("once"), Some("on" | "true" | "yes"));
        let errno = errno.unwrap_or(nix::libc::EIO);
        let action = Action::Fail(Fault { doing, sector, errno, once });
        Ok(Rule { event, state: pairs.number("state")?.unwrap_or(0), action })
    }

    fn set_state(pairs: &[(String, String)]) -> Outcome<Rule> {
        let pairs = Pairs(pairs);
        let action = Action::SetState(pairs.number("new_state")?.unwrap_or(0));
        let state = pairs.number("state")?.unwrap_or(0);
        Ok(Rule { event: pairs.event()?, state, action })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(text: &str) -> Faults {
        let sections = from_text(text);
        let rule = |(name, pairs): &Section| match name.as_str() {
            "set-state" => Rule::set_state(pairs),
            _ => Rule::inject(pairs),
        };
        Faults::new(sections.iter().map(|s| Some(rule(s).unwrap())).collect())
    }

    #[test]
    fn rules_strike_their_sectors_and_once_only_where_they_say_so() {
        let faults = faults(
            "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nonce = \"on\"\n\
             [inject-error]\nevent = \"none\"\niotype = \"block-status\"\nsector = \"3\"\n",
        );
        assert!(faults.strike(Doing::Map, 0, 1536).is_ok());
        assert!(faults.strike(Doing::Map, 0, 1537).is_err());
        assert!(faults.strike(Doing::Read, 0, 512).is_ok());
        faults.happens("read_aio");
        assert_eq!(faults.strike(Doing::Read, 0, 512).unwrap_err().raw_os_error(), Some(5));
        assert!(faults.strike(Doing::Read, 0, 512).is_ok());
    }

    #[test]
    fn a_rule_waits_for_its_event_in_its_state() {
        let faults = faults(
            "[inject-error]\nevent = \"l2_update\"\nstate = \"2\"\n\
             [set-state]\nevent = \"cluster_free\"\nstate = \"1\"\nnew_state = \"2\"\n",
        );
        let write = || faults.strike(Doing::Write, 0, 512);
        faults.happens("l2_update");
        assert!(write().is_ok());
        faults.happens("cluster_free");
        assert!(write().is_ok());
        faults.happens("l2_update");
        assert!(write().is_err() && write().is_err());
    }
}
