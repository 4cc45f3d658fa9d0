//! What a power cut leaves of a directory: all that was synced, and any part of the rest.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use super::scene;
use super::tracer::{Event, FileId};
use crate::dice::Dice;
use crate::recorder::put;

/// Disks write this many bytes whole or not at all.
const SECTOR: usize = 512;

/// What becomes of changes that were not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// All of them are there: the process was killed, and the host goes on.
    Kept,
    /// None of them is.
    Lost,
    /// Any of them are, some torn; of the names' changes, the first so many.
    Mixed,
}

/// A directory as it was before a command changed it.
#[derive(Clone)]
pub struct Directory {
    names: BTreeMap<String, FileId>,
    files: HashMap<FileId, Vec<u8>>,
}

impl Directory {
    /// What `dir` holds, by the ids that `named` gives.
    pub fn read(dir: &Path, named: &[(String, FileId)]) -> Directory {
        let bytes = |(name, id): &(String, FileId)| (*id, fs::read(dir.join(name)).unwrap());
        Directory {
            names: named.iter().cloned().collect(),
            files: named.iter().map(bytes).collect(),
        }
    }

    /// Makes an empty directory `dir` hold this.
    pub fn write(&self, dir: &Path) {
        let mut first: HashMap<FileId, &String> = HashMap::new();
        for (name, id) in &self.names {
            match first.get(id) {
                Some(there) => fs::hard_link(dir.join(there), dir.join(name)).unwrap(),
                None => {
                    fs::write(dir.join(name), &self.files[id]).unwrap();
                    scene::make_private(&dir.join(name));
                    first.insert(*id, name);
                }
            }
        }
    }

    /// The directory after the power was cut when the changes in `log` had been done.
    pub fn after(&self, log: &[Event], rest: Rest, dice: &mut Dice) -> Directory {
        let mut dir = self.clone();
        let (mut data, mut names) = (Vec::new(), Vec::new());
        for (number, event) in log.iter().enumerate() {
            match event {
                Event::Sync { file, upto } => {
                    let done =
                        |(at, event): &(usize, &Event)| at < upto && of(event) == Some(*file);
                    data.extract_if(.., |e| done(e)).for_each(|(_, event)| dir.change(event));
                }
                Event::SyncNames { upto } => {
                    names.extract_if(.., |(at, _)| *at < *upto).for_each(|(_, e)| dir.change(e));
                }
                Event::Said { .. } => {}
                Event::New { .. } => dir.change(event),
                Event::Name { .. } | Event::Rename { .. } | Event::Remove { .. } => {
                    names.push((number, event));
                }
                _ => data.push((number, event)),
            }
        }
        dir.settle(&data, &names, rest, dice);
        dir
    }

    fn settle(
        &mut self,
        data: &[(usize, &Event)],
        names: &[(usize, &Event)],
        rest: Rest,
        dice: &mut Dice,
    ) {
        let kept = match rest {
            Rest::Lost => return,
            Rest::Kept => names.len(),
            Rest::Mixed => dice.below(names.len() as u64 + 1) as usize,
        };
        names.iter().take(kept).for_each(|(_, event)| self.change(event));
        for (_, event) in data {
            match (rest, dice.below(3)) {
                (Rest::Kept, _) | (_, 0) => self.change(event),
                (_, 1) => self.tear(event, dice),
                _ => {}
            }
        }
    }

    /// Some sectors of a write; other changes whole.
    fn tear(&mut self, event: &Event, dice: &mut Dice) {
        let Event::Write { file, offset, bytes } = event else { return self.change(event) };
        let mut at = 0;
        while at < bytes.len() {
            let end = bytes.len().min(at + SECTOR - (*offset as usize + at) % SECTOR);
            if dice.once_in(2) {
                put(self.bytes(*file), *offset as usize + at, &bytes[at..end]);
            }
            at = end;
        }
    }

    fn bytes(&mut self, file: FileId) -> &mut Vec<u8> {
        self.files.get_mut(&file).unwrap()
    }

    fn change(&mut self, event: &Event) {
        match event {
            Event::Write { file, offset, bytes } => put(self.bytes(*file), *offset as usize, bytes),
            Event::Zero { file, offset, len, grow } => {
                let bytes = self.bytes(*file);
                let (from, to) = (*offset as usize, (offset + len) as usize);
                if *grow && bytes.len() < to {
                    bytes.resize(to, 0);
                }
                let to = to.min(bytes.len());
                bytes[from.min(to)..to].fill(0);
            }
            Event::SetLen { file, len } => self.bytes(*file).resize(*len as usize, 0),
            Event::New { file } => drop(self.files.insert(*file, Vec::new())),
            Event::Name { name, file } => drop(self.names.insert(name.clone(), *file)),
            Event::Rename { from, to } => {
                // Two names of one file: rename(2) does nothing.
                if self.names.get(from) == self.names.get(to) {
                    return;
                }
                let file = self.names.remove(from).unwrap();
                self.names.insert(to.clone(), file);
            }
            Event::Remove { name } => drop(self.names.remove(name)),
            Event::Sync { .. } | Event::SyncNames { .. } | Event::Said { .. } => {}
        }
    }
}

/// The file whose contents an event changes.
fn of(event: &Event) -> Option<FileId> {
    match event {
        Event::Write { file, .. } | Event::Zero { file, .. } | Event::SetLen { file, .. } => {
            Some(*file)
        }
        _ => None,
    }
}
