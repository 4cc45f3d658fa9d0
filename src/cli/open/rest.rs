//! The jail around a command that changes disks at rest. What it may open is told by the headers of the
//! layers, before any of them is opened for good.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use vdisk::Result;
use vdisk::family::tree::Family;
use vdisk::image::{Backing, Label};
use vdisk::jail::{Jail, Mode, Reach, Work};
use vdisk::open::{self, Format, MAX_DEPTH, resolve};
use vdisk::qcow2::Header;
use vdisk::storage::name::directory;
use vdisk::storage::{FileOptions, FileStorage, device, follow, note_holders};

use super::jail;

/// What is let through of the disks of a command.
pub struct Rest {
    jail: Jail,
    /// Files whose headers were looked at, and whether they are changed.
    seen: HashSet<(PathBuf, bool)>,
}

/// What a header says that leads to other files.
struct Leads {
    label: Option<Label>,
    backing: Option<Backing>,
    data_file: Option<String>,
}

impl Rest {
    /// Who holds a file can be asked, and what time it is here.
    pub fn new() -> Rest {
        Rest::of(Work::Command)
    }

    /// The same for other work.
    pub fn of(work: Work) -> Rest {
        let mut jail = Jail::new(work);
        for path in ["/proc", "/etc/localtime", "/usr/share/zoneinfo"] {
            jail.reach(Path::new(path), Reach::Read);
        }
        Rest { jail, seen: HashSet::new() }
    }

    /// A disk that is changed: its directory, in which all its own layers are, and what those stand on.
    pub fn disk(mut self, path: &Path) -> Rest {
        self.admit(path, Reach::Change);
        // What cannot be read is said by who opens it.
        let family = Family::read(path).ok().flatten();
        let members = family.iter().flat_map(Family::members).map(|member| member.path.clone());
        members.chain([path.to_owned()]).for_each(|path| self.look(&path, Reach::Change));
        self
    }

    /// A disk that is written into the one that it stands on.
    pub fn disk_and_base(self, path: &Path) -> Rest {
        let backing = Leads::of(path, false).and_then(|leads| leads.backing);
        let base = backing.and_then(|backing| below(path, &backing));
        let rest = self.disk(path);
        match base {
            Some(base) => rest.disk(&base),
            None => rest,
        }
    }

    /// A disk with all that it stands on: any of it is written.
    pub fn chain(self, path: &Path) -> Rest {
        let (mut rest, mut at) = (self, path.to_owned());
        for _ in 0..=MAX_DEPTH {
            rest = rest.disk(&at);
            let backing = Leads::of(&at, false).and_then(|leads| leads.backing);
            let Some(next) = backing.and_then(|backing| below(&at, &backing)) else { break };
            at = next;
        }
        rest
    }

    /// A file that is made.
    pub fn made(mut self, path: &Path) -> Rest {
        let there = fs::canonicalize(path).ok();
        for path in there.as_deref().into_iter().chain([path]) {
            self.jail.reach(directory(path), Reach::Change);
        }
        self
    }

    /// A file or a directory that is read, with all below it.
    pub fn read(mut self, path: &Path) -> Rest {
        self.jail.reach(path, Reach::Read);
        self
    }

    /// A directory that files of all kinds are made in.
    pub fn tree(mut self, path: &Path) -> Rest {
        self.jail.reach(path, Reach::Tree);
        self
    }

    /// A disk that is stood on: it is told so.
    pub fn base(mut self, path: &Path) -> Rest {
        self.look(path, Reach::Write);
        self
    }

    /// A disk that is looked at.
    pub fn looked_at(mut self, path: &Path) -> Rest {
        self.look(path, Reach::Read);
        self
    }

    /// Closes the jail.
    pub fn close(self) -> Result<()> {
        jail::close(self.jail)
    }

    /// The same; what of it is missing is for the caller to say.
    pub fn close_untold(self) -> Result<Option<String>> {
        jail::close_untold(self.jail)
    }

    /// The same for other work.
    pub fn with_work(self, work: Work) -> Rest {
        Rest { jail: self.jail.with_work(work), ..self }
    }

    /// Closes it and says nothing.
    pub fn close_as(self, mode: Mode) -> Result<()> {
        self.jail.close(mode).map(drop)
    }

    /// Lets a file be opened by its name and its other one, and what stands beside it.
    fn admit(&mut self, path: &Path, reach: Reach) {
        let real = follow(path).unwrap_or_else(|_| path.to_owned());
        for path in [path, &real] {
            if device::is_device(path) {
                self.jail.reach(directory(path), Reach::List);
                self.jail.reach(path, Reach::Write);
                // What it is used for.
                for place in ["/sys/dev/block", "/sys/devices"] {
                    self.jail.reach(Path::new(place), Reach::Read);
                }
            } else {
                self.jail.reach(directory(path), reach);
            }
        }
    }

    /// Goes by what a layer's header names, down to the base. What is done to the layer is `reach`: what other
    /// disks are below one that changes is told who stands on it, and is read else.
    fn look(&mut self, path: &Path, reach: Reach) {
        let (mut at, mut reach, mut is_raw) = (path.to_owned(), reach, false);
        for _ in 0..=MAX_DEPTH {
            if !self.seen.insert((at.clone(), reach == Reach::Change)) {
                return;
            }
            let Some(leads) = Leads::of(&at, is_raw) else {
                // It may name others, and nobody knows which.
                return self.jail.reach(Path::new("/"), Reach::Read);
            };
            let beside = if reach == Reach::Change { reach } else { Reach::Read };
            self.admit(&at, beside);
            if reach == Reach::Write && leads.label.is_some() {
                self.jail.reach(&at, reach);
            }
            if let Some(data) = leads.data_file.and_then(|name| resolve(&at, &name).ok()) {
                self.admit(&data, beside);
            }
            jail::clones_in(leads.label.as_ref(), &at)
                .iter()
                .for_each(|dir| self.jail.reach(dir, Reach::Read));
            let Some(backing) = leads.backing else { return };
            // It is looked for where it may have gone.
            let Some(below) = below(&at, &backing) else {
                return self.jail.reach(Path::new("/"), Reach::Read);
            };
            // What its guest wrote is no header, whatever it looks like.
            is_raw = backing.format.as_deref() == Some("raw");
            at = below;
            if reach == Reach::Change {
                reach = Reach::Write;
            }
        }
    }
}

/// The file that the one at `path`, or what that is a link to, names as `backing`; `None` where there is
/// nothing.
fn below(path: &Path, backing: &Backing) -> Option<PathBuf> {
    let real = follow(path).ok();
    let names = real.as_deref().into_iter().chain([path]);
    names.filter_map(|at| resolve(at, &backing.name).ok()).find(|below| below.exists())
}

impl Leads {
    /// What the file at `path` leads to, which may be said to be raw; `None` where that is not known.
    fn of(path: &Path, is_raw: bool) -> Option<Leads> {
        let file = FileStorage::open(path, FileOptions { access: None, write: false }).ok()?;
        // From within the jail nobody sees who has it.
        note_holders(file.file());
        match if is_raw { Format::Raw } else { open::probe(&file).ok()? } {
            Format::Raw => Some(Leads { label: None, backing: None, data_file: None }),
            Format::Qcow2 => {
                let header = Header::read(&file).ok()?;
                let identity = header.identity().ok()?;
                let data_file = header.data_file().ok()?.map(str::to_owned);
                Some(Leads { label: identity.label, backing: identity.backing, data_file })
            }
            _ => None,
        }
    }
}
