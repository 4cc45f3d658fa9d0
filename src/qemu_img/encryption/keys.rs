//! The key slots of LUKS images, as `amend` changes them.

use std::time::Duration;

use vdisk::luks::{Header, NO_SLOT, Options, Passphrase, SLOTS};
use vdisk::{Error, ErrorKind, Result};

use crate::qemu_img::encryption::secret;
use crate::qemu_img::fail::{Fail, Outcome, reason};
use crate::qemu_img::options::chosen::Chosen;

/// A change of key slots.
pub enum Change {
    /// One more passphrase.
    Add {
        /// The one that opens the image now.
        current: Passphrase,
        new: Passphrase,
        slot: Option<usize>,
        time: Duration,
    },
    /// A slot, or all that a passphrase opens, become empty.
    Erase { slot: Option<usize>, old: Option<Passphrase> },
}

/// Reads what `amend` is to do from options whose names begin with `prefix`; `None` where none of
/// them is given. `current` opens the image.
pub fn read(chosen: &Chosen, prefix: &str, current: Option<&str>) -> Outcome<Option<Change>> {
    if prefix.is_empty() || chosen.given_with(prefix).next().is_some() {
        let get = |name: &str| chosen.text(&format!("{prefix}{name}"));
        let number = |name: &str| chosen.number(&format!("{prefix}{name}"));
        return match get("state") {
            None => Err(Fail::new("Parameter 'state' is missing")),
            Some("active") => add(get, number, current).map(Some),
            Some("inactive") => erase(get, number).map(Some),
            Some(other) => {
                Err(Fail::new(format!("Parameter 'state' does not accept value '{other}'")))
            }
        };
    }
    Ok(None)
}

fn add<'a>(
    get: impl Fn(&str) -> Option<&'a str>,
    number: impl Fn(&str) -> Option<u64>,
    current: Option<&str>,
) -> Outcome<Change> {
    let new = get("new-secret")
        .ok_or_else(|| Fail::new("'new-secret' is required to activate a keyslot"))?;
    if get("old-secret").is_some() {
        return Err(Fail::new("'old-secret' must not be given when activating keyslots"));
    }
    let slot = number("keyslot").map(slot).transpose()?;
    let time = number("iter-time").filter(|t| *t > 0).map(Duration::from_millis);
    Ok(Change::Add {
        current: secret::lookup(current.unwrap_or_default())?,
        new: secret::lookup(new)?,
        slot,
        time: time.unwrap_or(Options::default().iter_time),
    })
}

fn erase<'a>(
    get: impl Fn(&str) -> Option<&'a str>,
    number: impl Fn(&str) -> Option<u64>,
) -> Outcome<Change> {
    if get("new-secret").is_some() {
        return Err(Fail::new("'new-secret' must not be given when erasing keyslots"));
    }
    if number("iter-time").is_some() {
        return Err(Fail::new("'iter-time' must not be given when erasing keyslots"));
    }
    let old = get("old-secret").map(secret::lookup).transpose()?;
    let slot = number("keyslot").map(slot).transpose()?;
    if slot.is_none() && old.is_none() {
        return Err(Fail::new(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in \
             them must be given",
        ));
    }
    Ok(Change::Erase { slot, old })
}

fn slot(number: u64) -> Outcome<usize> {
    // A negative number is shown as the C type that it becomes.
    let shown = number as u32;
    usize::try_from(number).ok().filter(|n| *n < SLOTS).ok_or_else(|| {
        let last = SLOTS - 1;
        Fail::new(format!("Invalid keyslot {shown} specified, must be between 0 and {last}"))
    })
}

/// Why a change of key slots failed.
pub fn failed(error: &Error) -> Fail {
    Fail::new(match error.message() {
        NO_SLOT => "Invalid password, cannot unlock any keyslot".to_owned(),
        _ => reason(error),
    })
}

impl Change {
    /// Makes the change; `force` even where keys, and all data with the last one, are lost.
    pub fn make(&self, header: &mut Header, area: &mut [u8], force: bool) -> Result<()> {
        match self {
            Change::Add { current, new, slot, time } => {
                let free = free_slot(header, *slot, force)?;
                let cipher = header.unlock(area, current.bytes())?;
                header.add_key(area, free, &cipher, new.bytes(), *time)
            }
            Change::Erase { slot: Some(slot), old } => {
                if let Some(old) = old
                    && !opened(header, area, old)?.contains(slot)
                {
                    return refuse(format!(
                        "Given keyslot {slot} doesn't contain the given old password for erase operation"
                    ));
                }
                erase_slot(header, area, *slot, force)
            }
            Change::Erase { slot: None, old } => {
                let Some(old) = old else { return Ok(()) };
                let matching = opened(header, area, old)?;
                if matching.is_empty() {
                    return refuse("No keyslots match given (old) password for erase operation");
                }
                if !force && matching.len() == header.active_slots().count() {
                    return refuse(
                        "All the active keyslots match the (old) password that was given and erasing \
                         them will erase all the data in the image irreversibly - refusing operation",
                    );
                }
                matching.into_iter().try_for_each(|slot| header.erase_key(area, slot, force))
            }
        }
    }
}

/// The slots that `passphrase` opens.
fn opened(header: &Header, area: &[u8], passphrase: &Passphrase) -> Result<Vec<usize>> {
    // This bounds the work that the header may ask for.
    match header.find(area, passphrase.bytes())? {
        None => Ok(Vec::new()),
        Some(_) => header.opened_by(area, passphrase.bytes()),
    }
}

fn free_slot(header: &Header, wanted: Option<usize>, force: bool) -> Result<usize> {
    let is_active = |slot: usize| header.active_slots().any(|active| active == slot);
    match wanted {
        Some(slot) if !force && is_active(slot) => {
            refuse(format!("Refusing to overwrite active keyslot {slot} - please erase it first"))
        }
        Some(slot) => Ok(slot),
        None => match (0..SLOTS).find(|slot| !is_active(*slot)) {
            Some(slot) => Ok(slot),
            None => refuse("Can't add a keyslot - all keyslots are in use"),
        },
    }
}

fn erase_slot(header: &mut Header, area: &mut [u8], slot: usize, force: bool) -> Result<()> {
    if !force && !header.active_slots().any(|active| active == slot) {
        return refuse(format!("Given keyslot {slot} is already erased (inactive) "));
    }
    if !force && header.active_slots().count() == 1 {
        return refuse(format!(
            "Attempt to erase the only active keyslot {slot} which will erase all the data in the image \
             irreversibly - refusing operation"
        ));
    }
    header.erase_key(area, slot, force)
}

fn refuse<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::new(ErrorKind::Denied, text))
}
