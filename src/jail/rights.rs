//! What the superuser may do that no work on disks needs: given up, since a filter on calls cannot tell
//! which file in /proc or /sys a name means.

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// What stays: to read, write and make files as their owner would, and what the kernel asks `CAP_SYS_ADMIN`
/// for: attributes of files, a file system at rest.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MAC_ADMIN)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SYS_ADMIN)
    .union(CapabilitySet::SYS_RESOURCE);

/// Gives them up but for `more`, for this thread and those that it starts.
pub(super) fn drop_idle(more: CapabilitySet) -> Result<(), String> {
    let kept = KEPT | more;
    let failed = |e| format!("rights cannot be given up ({e})");
    let CapabilitySets { effective, permitted, .. } = capabilities(None).map_err(failed)?;
    let less = CapabilitySets {
        effective: effective & kept,
        permitted: permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, less).map_err(failed)
}
