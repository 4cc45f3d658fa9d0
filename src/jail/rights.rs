//! What the superuser may do that no work on disks needs: given up, since a filter on calls cannot tell
//! which file in /proc or /sys a name means.

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// To read, write, make and name files as their owner would, on a full disk, too.
pub(super) const NAMES: CapabilitySet = CapabilitySet::DAC_OVERRIDE
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::SYS_RESOURCE);

/// The same, to say who owns them, and what the kernel asks `CAP_SYS_ADMIN` for: attributes of files, a file
/// system at rest.
pub(super) const FILES: CapabilitySet = NAMES
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MAC_ADMIN)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SYS_ADMIN);

/// Gives up all but these, for this thread and those that it starts.
pub(super) fn keep(kept: CapabilitySet) -> Result<(), String> {
    let failed = |e| format!("rights cannot be given up ({e})");
    let CapabilitySets { effective, permitted, .. } = capabilities(None).map_err(failed)?;
    let less = CapabilitySets {
        effective: effective & kept,
        permitted: permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, less).map_err(failed)
}
