//! The files in a disk's directory that name others as their backing file: clones that left no word in
//! their base, and copies of the disk itself.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::family::names::{disks_beside, frozen_id};
use crate::family::scan::peek_all;
use crate::family::standing;
use crate::family::standing::Standing;
use crate::family::tree::{Family, Member};
use crate::image::Role;
use crate::open::gate;
use crate::open::gate::{file_key, same_file};
use crate::storage::follow;

/// Files in the same directory that name `layer` as their backing file.
pub fn clones_of(layer: &Path) -> Result<Vec<PathBuf>> {
    let layer = &follow(layer)?;
    let beside = disks_beside(layer)?;
    let mut clones = Vec::new();
    // Nearly all of thousands of clones name their base in the same way.
    let mut known: Option<(String, bool)> = None;
    for (path, peek) in peek_all(beside) {
        let Some(backing) = peek.identity.backing else { continue };
        let is_layer = match known.take() {
            Some((name, is_layer)) if name == backing.name => is_layer,
            _ => gate::resolve(&path, &backing.name).is_ok_and(|below| same_file(&below, layer)),
        };
        known = Some((backing.name, is_layer));
        if is_layer {
            clones.push(path);
        }
    }
    Ok(clones)
}

/// Device and inode number of a file, which all its names share.
type FileKey = (u64, u64);

/// The files in a disk's directory that name others as their backing file: read once, asked often.
pub(crate) struct Beside {
    /// Who is not of the disk, by the file that is named.
    on: HashMap<FileKey, Vec<PathBuf>>,
    /// Other heads that have the same right to the disk's layers.
    rivals: Vec<PathBuf>,
}

impl Beside {
    /// Reads the headers of all files in the directory of the disk.
    pub fn read(family: &Family) -> Result<Beside> {
        let (head, disk) = (&family.head.path, family.head.label.disk);
        let own: HashSet<FileKey> = family.members().filter_map(|m| file_key(&m.path)).collect();
        let mut beside = Beside { on: HashMap::new(), rivals: Vec::new() };
        for (path, peek) in peek_all(disks_beside(head)?) {
            if file_key(&path).is_none_or(|key| own.contains(&key)) {
                continue;
            }
            let label = peek.identity.label.as_ref();
            let same_disk =
                label.is_some_and(|l| l.disk == disk && matches!(l.role, Role::Head | Role::Base));
            if same_disk && family.inherited && frozen_id(&path).is_none() {
                beside.rivals.push(path.clone());
            }
            let Some(backing) = peek.identity.backing else { continue };
            let below = gate::resolve(&path, &backing.name).ok();
            let Some(below) = below.and_then(|below| file_key(&below)) else { continue };
            beside.on.entry(below).or_default().push(path);
        }
        Ok(beside)
    }

    /// Who stands on `member` that is not of its disk.
    pub fn standing_on(&self, member: &Member) -> Standing {
        let on = file_key(&member.path).and_then(|key| self.on.get(&key));
        Standing::by_label(&member.path, &member.label, None)
            .with(on.into_iter().flatten().cloned())
    }

    /// Whether nobody but its own disk stands on `member`, as far as is known, and no other head has
    /// the same right to it.
    pub fn is_own(&self, member: &Member) -> bool {
        self.rivals.is_empty() && self.standing_on(member).is_nobody()
    }

    /// Refuses to change what a disk shows on which other disks stand.
    pub fn refuse_head(&self, family: &Family) -> Result<()> {
        let on = file_key(&family.head.path).and_then(|key| self.on.get(&key));
        standing::refuse_children(&family.head.path, on.map_or(&[], Vec::as_slice))
    }

    /// Refuses to change or drop a layer on which others than its own disk stand, or that another head
    /// has the same right to.
    pub fn refuse_clones(&self, member: &Member, family: &Family) -> Result<()> {
        if !self.rivals.is_empty() {
            let message = format!(
                "is one of several files that say they are one disk, whose snapshots they share: {}. \
                 Give the one that owns them the name that their files begin with, or make the others \
                 disks of their own with `vdisk clone --full`, or say --even-if-cloned",
                standing::list(&self.rivals)
            );
            return Err(Error::new(ErrorKind::Sealed, message).at_path(&family.head.path));
        }
        let what = format!("the layer of snapshot '{}'", member.label.name);
        self.standing_on(member).refuse(&member.path, &what)
    }
}
