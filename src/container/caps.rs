//! Capabilities by name, and what of them a container has.

use rustix::thread::CapabilitySet;

/// podman's default capabilities (containers.conf(5), `default_capabilities`).
const DEFAULT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SYS_CHROOT);

/// All that there are: 0 to 40.
const EVERY: CapabilitySet = CapabilitySet::from_bits_retain((1 << 41) - 1);

/// What a container's programs may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities(CapabilitySet);

impl Default for Capabilities {
    fn default() -> Capabilities {
        Capabilities(DEFAULT)
    }
}

impl Capabilities {
    /// podman's defaults without those of `drop`, and with those of `add`: names with or without
    /// `CAP_`, in any case, or `all`. As in podman, `all` counts before any other name.
    ///
    /// # Errors
    /// The name that is none, or that stands on both sides.
    pub fn new(add: &[String], drop: &[String]) -> Result<Capabilities, String> {
        let all = |names: &[String]| names.iter().any(|name| name.eq_ignore_ascii_case("all"));
        let mut set = match (all(add), all(drop)) {
            (true, true) => return Err("all capabilities cannot be both added and dropped".into()),
            (true, false) => EVERY,
            (false, true) => CapabilitySet::empty(),
            (false, false) => DEFAULT,
        };
        let named = |names: &[String]| {
            let plain = names.iter().filter(|name| !name.eq_ignore_ascii_case("all"));
            plain.map(|name| named(name)).collect::<Result<Vec<_>, _>>()
        };
        let (add, drop) = (named(add)?, named(drop)?);
        if let Some(both) = add.iter().find(|one| drop.contains(one)) {
            let name = both.iter_names().next().map_or("", |(name, _)| name);
            return Err(format!("{name} cannot be both added and dropped"));
        }
        add.into_iter().for_each(|one| set.insert(one));
        drop.into_iter().for_each(|one| set.remove(one));
        Ok(Capabilities(set))
    }

    /// As a set.
    pub(super) fn set(self) -> CapabilitySet {
        self.0
    }

    /// As the number that [`from_bits`](Capabilities::from_bits) reads.
    pub(super) fn bits(self) -> u64 {
        self.0.bits()
    }

    pub(super) fn from_bits(bits: u64) -> Capabilities {
        Capabilities(CapabilitySet::from_bits_retain(bits))
    }
}

/// One capability.
pub(super) fn named(name: &str) -> Result<CapabilitySet, String> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    CapabilitySet::from_name(short).ok_or_else(|| format!("there is no capability {name:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &str) -> Vec<String> {
        words.split_ascii_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn capabilities_are_added_and_dropped_as_podman_does() {
        let new = |add: &str, drop: &str| {
            Capabilities::new(&words(add), &words(drop)).map(Capabilities::bits)
        };
        assert_eq!(new("", ""), Ok(0x8004_05fb));
        assert_eq!(new("cap_net_raw", "CHOWN"), Ok(0x8004_05fb & !1 | 1 << 13));
        assert_eq!(new("", "all"), Ok(0));
        assert_eq!(new("CHOWN", "ALL"), Ok(1));
        assert!(new("ALL", "").unwrap() >> 40 == 1);
        assert!(new("kill", "KILL").is_err());
        assert!(new("fly", "").unwrap_err().contains("fly"));
    }
}
