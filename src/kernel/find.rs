//! Which of the kernels in a disk is booted: what the disk's own boot loader would start.
//!
//! In this order: entries of the Boot Loader Specification, the default entry of GRUB's menu, that of
//! SYSLINUX's, the newest kernel by its file's name. It knows the files of a disk and no machine.

use std::fs::File;
use std::sync::Arc;

use super::choice::Choice;
use super::environment::Environment;
use super::place::{Place, Places, device, name};
use super::{Found, entries, extlinux, form, grub, newest};
use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};

/// Where a file system may keep what is booted: in the root's directory, or it is that directory.
const BOOTS: [&str; 2] = ["/boot", ""];
const GRUBS: [&str; 2] = ["grub/grub.cfg", "grub2/grub.cfg"];
/// The most kernels of one kind that are tried.
const MOST: usize = 64;

/// Finds the kernel in a disk, as [`Found`] says it; where `rooted`, the user says which root it gets.
///
/// # Errors
/// [`ErrorKind::NotFound`] says what was looked at where there is none; [`ErrorKind::Unsupported`] names
/// the form of one that does not boot.
pub fn find(disk: &Arc<dyn BlockDevice>, rooted: bool) -> Result<Found> {
    let mut places = Places::of(disk)?;
    let Some(choice) = choose(&mut places)? else { return Err(nothing(&places)) };
    let place = places.all.get(choice.place).ok_or_else(|| nothing(&places))?;
    let start = place.start(&choice.kernel, form::START)?;
    if !form::boots(&start) {
        return Err(Error::unsupported(format!(
            "{} on {} does not boot here: {}",
            choice.kernel,
            name(place.partition),
            form::refusal(&start)
        )));
    }
    let mut kernel = memory_file("kernel")?;
    place.copy(&choice.kernel, &mut kernel)?;
    let mut initrd = None;
    for path in &choice.initrds {
        if initrd.is_none() {
            initrd = Some(memory_file("initrd")?);
        }
        if let Some(file) = &mut initrd {
            place.copy(path, file)?;
        }
    }
    let options = if rooted { choice.options.clone() } else { with_root(&choice, &places)? };
    let (from, path, initrds) = (choice.from, choice.kernel, choice.initrds);
    let partition = place.partition;
    Ok(Found {
        from,
        partition,
        path,
        initrds,
        options,
        kernel,
        initrd,
        passed_over: places.passed_over,
    })
}

/// A file of this process's memory.
fn memory_file(name: &str) -> Result<File> {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC);
    fd.map(File::from).map_err(|e| Error::io("cannot make a file in memory", e.into()))
}

fn nothing(places: &Places) -> Error {
    let mut looked: Vec<_> = places.all.iter().map(|place| name(place.partition)).collect();
    let foreign = places.foreign.iter().map(|(partition, driver)| {
        format!("{} ({driver}, which only the kernel reads)", name(*partition))
    });
    let copied = match places.foreign.is_empty() {
        true => "",
        false => " (root can copy them out of where `vdisk mount` shows that)",
    };
    looked.extend(foreign);
    let seen = match looked.as_slice() {
        [] => "it has no file system that is known".to_owned(),
        _ => format!("looked at: {}", looked.join(", ")),
    };
    let passed = places.passed_over.iter().map(|text| format!("; {text}")).collect::<String>();
    Error::new(
        ErrorKind::NotFound,
        format!(
            "no kernel was found in the disk ({seen}{passed}): pass one with --kernel (and its initrd \
             with --initrd){copied}, or keep one for images without by `vdisk kernel add`"
        ),
    )
}

fn choose(places: &mut Places) -> Result<Option<Choice>> {
    let kinds: [(&str, Kind); 4] = [
        ("the entries in loader/entries", by_entries),
        ("GRUB's configuration", by_grub),
        ("SYSLINUX's configuration", by_extlinux),
        ("the kernels in /boot", by_name),
    ];
    for (what, kind) in kinds {
        for at in 0..places.all.len() {
            for boot in BOOTS {
                match kind(&places.all, at, boot) {
                    Ok(Some(found)) => return Ok(Some(found)),
                    Ok(None) => {}
                    // What cannot be read may not be needed.
                    Err(error) => places.passed_over.push(format!("{what}: {error}")),
                }
            }
        }
    }
    Ok(None)
}

type Kind = fn(&[Place], usize, &str) -> Result<Option<Choice>>;

/// The first of some choices whose kernel is there.
fn first(found: Vec<Choice>, at: usize, place: &Place, boot: &str) -> Option<Choice> {
    let mut found = found.into_iter().take(MOST);
    found.find_map(|choice| Choice { place: at, ..choice }.settle(place, boot))
}

fn by_entries(places: &[Place], at: usize, boot: &str) -> Result<Option<Choice>> {
    let Some(place) = places.get(at) else { return Ok(None) };
    let found = entries::choices(place, boot, &Environment::of(place, boot))?;
    Ok(first(found, at, place, boot))
}

fn by_grub(places: &[Place], at: usize, boot: &str) -> Result<Option<Choice>> {
    let Some(place) = places.get(at) else { return Ok(None) };
    let environment = Environment::of(place, boot);
    for file in GRUBS {
        let path = format!("{boot}/{file}");
        let Some(text) = place.text(&path)? else { continue };
        let Some((mut choice, uuid)) = grub::choice(&text, &environment) else { continue };
        choice.from = format!("{path}: {}", choice.from);
        let named =
            uuid.and_then(|id| places.iter().position(|p| p.uuid().eq_ignore_ascii_case(&id)));
        // It may have been written on another machine: then its own file system is the next guess.
        let tried = named.into_iter().chain([at]).chain(0..places.len());
        for other in tried {
            let Some(place) = places.get(other) else { continue };
            if let Some(found) = (Choice { place: other, ..choice.clone() }).settle(place, "/boot")
            {
                return Ok(Some(found));
            }
        }
    }
    Ok(None)
}

fn by_extlinux(places: &[Place], at: usize, boot: &str) -> Result<Option<Choice>> {
    let Some(place) = places.get(at) else { return Ok(None) };
    for file in extlinux::FILES {
        let path = format!("{boot}/{file}");
        let Some(text) = place.text(&path)? else { continue };
        let Some(choice) = extlinux::choice(&text) else { continue };
        let from = format!("{path}: {}", choice.from);
        let choice = Choice { from, place: at, ..choice };
        // Paths count from the configuration's own directory too.
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        let found = choice.clone().settle(place, directory).or_else(|| choice.settle(place, boot));
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn by_name(places: &[Place], at: usize, boot: &str) -> Result<Option<Choice>> {
    let Some(place) = places.get(at) else { return Ok(None) };
    let found = newest::choices(boot, &place.names(if boot.is_empty() { "/" } else { boot })?);
    Ok(first(found, at, place, ""))
}

/// The choice's words with a root: the one that they name, in a form that a kernel without an initrd
/// understands too, or the file system that looks like a root.
fn with_root(choice: &Choice, places: &Places) -> Result<String> {
    let words: Vec<_> = choice.options.split_ascii_whitespace().collect();
    let said = words.iter().rev().find_map(|word| word.strip_prefix("root="));
    let by_id = said.and_then(|root| root.strip_prefix("UUID="));
    let root = match (said, by_id) {
        // An initrd finds file systems by their names.
        (Some(_), _) if !choice.initrds.is_empty() => return Ok(choice.options.clone()),
        (Some(_), Some(id)) => {
            let id = id.trim_matches('"');
            let named = places.all.iter().find(|place| place.uuid().eq_ignore_ascii_case(id));
            named.map(|place| place.partition).or_else(|| root_of(places))
        }
        (Some(root), None) if root.starts_with("LABEL=") => root_of(places),
        (Some(_), None) => return Ok(choice.options.clone()),
        (None, _) => root_of(places),
    };
    let Some(root) = root else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "{} was found, but no file system that looks like a root: say which with --append \
                 root=/dev/vdaN",
                choice.kernel
            ),
        ));
    };
    let others = words.iter().filter(|word| !word.starts_with("root="));
    let root = format!("root={}", device(root));
    let words: Vec<_> = std::iter::once(root.as_str()).chain(others.copied()).collect();
    Ok(words.join(" "))
}

/// The partition of the first root that can be read, or of the only one of which just the kernel
/// knows.
fn root_of(places: &Places) -> Option<Option<u32>> {
    let read = places.all.iter().find(|place| place.is_root()).map(|place| place.partition);
    let mut foreign = places.foreign.iter();
    read.or_else(|| match (foreign.next(), foreign.next()) {
        (Some((partition, _)), None) => Some(*partition),
        _ => None,
    })
}
