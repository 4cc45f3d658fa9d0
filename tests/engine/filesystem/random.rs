//! Random operations on a file system and on its model.

use vdisk::internals::filesystem::ext4::mounted::{
    Allocation, Change, Mounted, Need, New, Onto, Place, ROOT, Seek,
};

use super::model::File;
use crate::dice::Dice;

/// A file system, its model, and which inode is which file.
pub struct Pair<'a> {
    pub fs: &'a Mounted,
    pub files: Vec<File>,
    pub inodes: Vec<u32>,
    /// Files that have a name.
    pub named: Vec<usize>,
    /// The longest file.
    pub longest: u64,
    pub extents: bool,
}

const NAMES: u64 = 40;

fn name(dice: &mut Dice) -> Vec<u8> {
    let number = dice.below(NAMES);
    let mut name = format!("n{number}").into_bytes();
    match number % 5 {
        0 => name.resize(255, b'x'),
        1 => name.extend([0xff, 0xc3, b'\n', b' ']),
        2 => name.resize(60, b'y'),
        _ => {}
    }
    name
}

impl Pair<'_> {
    pub fn new(fs: &Mounted, longest: u64, extents: bool) -> Pair<'_> {
        let known = fs.attributes(ROOT).unwrap();
        let owner = (known.uid, known.gid);
        let root = File { mode: known.mode, links: known.links - 1, owner, ..File::default() };
        Pair { fs, files: vec![root], inodes: vec![ROOT], named: vec![0], longest, extents }
    }

    fn directory(&self, dice: &mut Dice) -> usize {
        let all: Vec<usize> =
            self.named.iter().copied().filter(|n| self.files[*n].is_directory()).collect();
        dice.pick(&all)
    }

    fn regular(&self, dice: &mut Dice) -> Option<usize> {
        let all: Vec<usize> =
            self.named.iter().copied().filter(|n| self.files[*n].is_regular()).collect();
        (!all.is_empty()).then(|| dice.pick(&all))
    }

    /// Does something.
    pub fn step(&mut self, dice: &mut Dice) {
        crate::dice::operation();
        match dice.below(100) {
            0..20 => self.create(dice),
            20..30 => self.remove(dice),
            30..42 => self.rename(dice),
            42..46 => self.link(dice),
            46..66 => self.write(dice),
            66..74 => self.truncate(dice),
            74..82 => self.allocate(dice),
            82..90 => self.attribute(dice),
            90..94 => self.change(dice),
            94..98 => self.look(dice),
            _ if dice.once_in(3) => self.fs.sync().unwrap(),
            _ => {}
        }
    }

    fn create(&mut self, dice: &mut Dice) {
        let (directory, name) = (self.directory(dice), name(dice));
        let mode = dice.pick(&[0x8000u16, 0x8000, 0x4000, 0xa000, 0x1000, 0x2000]) | 0o640;
        let mode = if mode & 0xf000 == 0xa000 { 0xa000 | 0o777 } else { mode };
        let target = vec![b't'; dice.pick(&[1, 59, 60, 61, 900])];
        let target = if mode & 0xf000 == 0xa000 { target } else { Vec::new() };
        let (uid, gid) = (dice.pick(&[0, 7, 70000]), dice.pick(&[0, 1 << 20]));
        let device = (dice.pick(&[1, 300]), dice.pick(&[3, 1 << 18]));
        let new = New { mode, umask: 0, uid, gid, device, target: &target };
        let result = self.fs.create(self.inodes[directory], &name, &new);
        if self.files[directory].names.contains_key(&name) {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EEXIST));
            return;
        }
        let inode = result.unwrap();
        let is_directory = mode & 0xf000 == 0x4000;
        let links = if is_directory { 2 } else { 1 };
        // What stands in a directory with set-group-id has its group.
        let sticky = self.files[directory].mode & 0o2000;
        let gid = if sticky != 0 { self.files[directory].owner.1 } else { gid };
        let mode = if is_directory { mode | sticky } else { mode };
        let file = File { mode, target, owner: (uid, gid), links, ..File::default() };
        let number = self.files.len();
        self.files[directory].names.insert(name, number);
        self.files[directory].links += u32::from(is_directory);
        self.named.push(number);
        self.files.push(file);
        self.inodes.push(inode);
    }

    fn drop_name(&mut self, number: usize) {
        let file = &mut self.files[number];
        file.links = if file.is_directory() { 0 } else { file.links - 1 };
        if file.links == 0 {
            self.named.retain(|other| *other != number);
        }
    }

    fn remove(&mut self, dice: &mut Dice) {
        let (directory, name) = (self.directory(dice), name(dice));
        let child = self.files[directory].names.get(&name).copied();
        let parent = self.inodes[directory];
        let is_directory = child.is_some_and(|child| self.files[child].is_directory());
        let result = match is_directory {
            true => self.fs.remove_directory(parent, &name),
            false => self.fs.unlink(parent, &name),
        };
        let Some(child) = child else {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOENT));
            return;
        };
        if is_directory && !self.files[child].names.is_empty() {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOTEMPTY));
            return;
        }
        result.unwrap();
        self.files[directory].names.remove(&name);
        self.files[directory].links -= u32::from(is_directory);
        self.drop_name(child);
    }

    fn is_below(&self, directory: usize, above: usize) -> bool {
        directory == above
            || self.files[above]
                .names
                .values()
                .any(|child| self.files[*child].is_directory() && self.is_below(directory, *child))
    }

    fn rename(&mut self, dice: &mut Dice) {
        let (from, to) = (self.directory(dice), self.directory(dice));
        let (old, new) = (name(dice), name(dice));
        let onto = dice.pick(&[Onto::Replace, Onto::Replace, Onto::Free, Onto::Exchange]);
        let result = self.fs.rename(
            Place::new(self.inodes[from], &old),
            Place::new(self.inodes[to], &new),
            onto,
        );
        let moved = self.files[from].names.get(&old).copied();
        let other = self.files[to].names.get(&new).copied();
        let expected = self.judge(moved, other, (from, to), onto);
        match expected {
            Err(number) => {
                assert_eq!(result.unwrap_err().raw_os_error(), Some(number));
                return;
            }
            Ok(()) => result.unwrap(),
        }
        let Some(moved) = moved else { return };
        if other == Some(moved) {
            return;
        }
        let directories = |pair: &Self, n: Option<usize>| {
            u32::from(n.is_some_and(|n| pair.files[n].is_directory()))
        };
        let (mine, theirs) = (directories(self, Some(moved)), directories(self, other));
        self.files[from].names.remove(&old);
        self.files[from].links -= mine;
        self.files[to].names.insert(new, moved);
        self.files[to].links += mine;
        self.files[to].links -= theirs;
        if let Some(other) = other {
            if onto == Onto::Exchange {
                self.files[from].names.insert(old, other);
                self.files[from].links += theirs;
            } else {
                self.drop_name(other);
            }
        }
    }

    fn judge(
        &self,
        moved: Option<usize>,
        other: Option<usize>,
        (from, to): (usize, usize),
        onto: Onto,
    ) -> Result<(), i32> {
        let moved = moved.ok_or(libc::ENOENT)?;
        match (onto, other) {
            (Onto::Free, Some(_)) => return Err(libc::EEXIST),
            (Onto::Exchange, None) => return Err(libc::ENOENT),
            (_, Some(other)) if other == moved => return Ok(()),
            _ => {}
        }
        let directory = |n: usize| self.files[n].is_directory();
        if directory(moved) && self.is_below(to, moved) {
            return Err(libc::EINVAL);
        }
        let Some(other) = other else { return Ok(()) };
        if onto == Onto::Exchange {
            let circle = directory(other) && self.is_below(from, other);
            return if circle { Err(libc::EINVAL) } else { Ok(()) };
        }
        match (directory(moved), directory(other)) {
            (false, true) => Err(libc::EISDIR),
            (true, false) => Err(libc::ENOTDIR),
            (true, true) if !self.files[other].names.is_empty() => Err(libc::ENOTEMPTY),
            _ => Ok(()),
        }
    }

    fn link(&mut self, dice: &mut Dice) {
        let (directory, name) = (self.directory(dice), name(dice));
        let file = dice.pick(&self.named);
        let result = self.fs.link(self.inodes[file], self.inodes[directory], &name);
        let expected = match () {
            () if self.files[file].is_directory() => Some(libc::EPERM),
            () if self.files[directory].names.contains_key(&name) => Some(libc::EEXIST),
            () => None,
        };
        match expected {
            Some(number) => assert_eq!(result.unwrap_err().raw_os_error(), Some(number)),
            None => {
                result.unwrap();
                self.files[directory].names.insert(name, file);
                self.files[file].links += 1;
            }
        }
    }

    fn write(&mut self, dice: &mut Dice) {
        let Some(file) = self.regular(dice) else { return };
        let offset = match dice.below(4) {
            0 => self.files[file].bytes.len() as u64,
            1 => dice.below(self.longest / 1024) * 1024,
            _ => dice.below(self.longest),
        };
        let len = dice.pick(&[1u64, 100, 1024, 4096, 10000, 70000]);
        let len = dice.below(len) + 1;
        let len = len.min(self.longest.saturating_sub(offset)) as usize;
        if len == 0 {
            return;
        }
        let data: Vec<u8> = (0..len).map(|_| dice.below(255) as u8 + 1).collect();
        assert_eq!(self.fs.write(self.inodes[file], offset, &data).unwrap(), len);
        let (start, end) = (offset as usize, offset as usize + len);
        let bytes = &mut self.files[file].bytes;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(&data);
    }

    /// Writes over what a file holds; returns whether there was something.
    pub fn overwrite(&mut self, dice: &mut Dice) -> bool {
        let Some(file) = self.regular(dice) else { return false };
        let long = self.files[file].bytes.len() as u64;
        if long == 0 {
            return false;
        }
        let offset = dice.below(long);
        let len = dice.below((long - offset).min(9000)) as usize + 1;
        let data = vec![dice.below(255) as u8 + 1; len];
        assert_eq!(self.fs.write(self.inodes[file], offset, &data).unwrap(), len);
        self.files[file].bytes[offset as usize..][..len].copy_from_slice(&data);
        true
    }

    fn truncate(&mut self, dice: &mut Dice) {
        let Some(file) = self.regular(dice) else { return };
        let size = match dice.below(4) {
            0 => 0,
            1 => dice.below(self.longest / 4096) * 4096,
            _ => dice.below(self.longest),
        };
        let change = Change { size: Some(size), ..Change::default() };
        let known = self.fs.set_attributes(self.inodes[file], &change).unwrap();
        assert_eq!(known.size, size);
        self.files[file].bytes.resize(size as usize, 0);
    }

    fn allocate(&mut self, dice: &mut Dice) {
        let Some(file) = self.regular(dice) else { return };
        let how = dice.pick(&[Allocation::Punch, Allocation::Reserve, Allocation::Zero]);
        let keep = how == Allocation::Punch || dice.once_in(2);
        let offset = dice.below(self.longest);
        let len = (dice.below(40000) + 1).min(self.longest - offset).max(1);
        let result = self.fs.allocate(self.inodes[file], offset, len, how, keep);
        if !self.extents && how != Allocation::Punch {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
            return;
        }
        result.unwrap();
        let (start, end) = (offset as usize, (offset + len) as usize);
        let bytes = &mut self.files[file].bytes;
        if !keep && bytes.len() < end {
            bytes.resize(end, 0);
        }
        if how != Allocation::Reserve {
            let end = end.min(bytes.len());
            bytes.get_mut(start..end).unwrap_or_default().fill(0);
        }
    }

    fn attribute(&mut self, dice: &mut Dice) {
        let file = dice.pick(&self.named);
        let name = format!("{}a{}", dice.pick(&["user.", "trusted."]), dice.below(6)).into_bytes();
        let len = dice.pick(&[0, 3, 40, 100, 500]);
        let value: Vec<u8> = (0..len).map(|_| dice.below(256) as u8).collect();
        let value = if dice.once_in(3) { None } else { Some(value) };
        let need = dice.pick(&[Need::Either, Need::Either, Need::New, Need::Old]);
        let need = if value.is_none() { Need::Either } else { need };
        let inode = self.inodes[file];
        let result = self.fs.set_attribute(inode, &name, value.as_deref(), need);
        let there = self.files[file].attributes.contains_key(&name);
        let expected = match (&value, need, there) {
            (None, _, false) | (_, Need::Old, false) => Some(libc::ENODATA),
            (_, Need::New, true) => Some(libc::EEXIST),
            _ => None,
        };
        match (expected, result) {
            (Some(number), result) => {
                assert_eq!(result.unwrap_err().raw_os_error(), Some(number));
            }
            // What does not fit into a block has no room.
            (None, Err(error)) => assert_eq!(error.raw_os_error(), Some(libc::ENOSPC)),
            (None, Ok(())) => {
                let attributes = &mut self.files[file].attributes;
                match value {
                    Some(value) => drop(attributes.insert(name, value)),
                    None => drop(attributes.remove(&name)),
                }
            }
        }
    }

    fn change(&mut self, dice: &mut Dice) {
        let file = dice.pick(&self.named);
        let mode = dice.below(0o10000) as u16;
        let (uid, gid) = (dice.below(1 << 32) as u32, dice.below(100) as u32);
        let time = (dice.below(1 << 33) as i64 - (1 << 31), dice.below(1_000_000_000) as u32);
        let change = Change {
            mode: Some(mode),
            uid: Some(uid),
            gid: Some(gid),
            modified: Some(time),
            ..Change::default()
        };
        let known = self.fs.set_attributes(self.inodes[file], &change).unwrap();
        assert_eq!(known.mode & 0o7777, mode);
        self.files[file].mode = self.files[file].mode & 0xf000 | mode;
        self.files[file].owner = (uid, gid);
    }

    fn look(&mut self, dice: &mut Dice) {
        let (directory, name) = (self.directory(dice), name(dice));
        let found = self.fs.lookup(self.inodes[directory], &name).unwrap();
        let expected = self.files[directory].names.get(&name).map(|n| self.inodes[*n]);
        assert_eq!(found, expected);
        let Some(file) = self.regular(dice) else { return };
        let (inode, bytes) = (self.inodes[file], &self.files[file].bytes);
        let mut read = vec![0; 5000];
        let offset = dice.below(self.longest);
        let len = self.fs.read(inode, offset, &mut read).unwrap();
        let there = bytes.get(offset as usize..).unwrap_or_default();
        assert_eq!(&read[..len], &there[..there.len().min(5000)]);
        if let Ok(hole) = self.fs.seek(inode, offset, Seek::Hole) {
            let data = self.fs.seek(inode, offset, Seek::Data).unwrap_or(bytes.len() as u64);
            let zero = bytes[offset as usize..data as usize].iter().all(|byte| *byte == 0);
            assert!(zero && hole >= offset && hole <= bytes.len() as u64);
        }
    }
}
