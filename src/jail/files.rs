//! Which files can be named: rules for Landlock.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

/// The newest of Landlock that there are rules for; what a kernel does not know of it is left out.
const NEWEST: ABI = ABI::V9;

/// What can be done to a file, or to a directory and all below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Directories are listed, and no file is opened.
    List,
    /// Files are read, and directories listed.
    Read,
    /// The same, and others run programs there: a file that the kernel reads in this process's place it opens
    /// for them with this process's rights.
    Lend,
    /// A file that is there is written too.
    Write,
    /// Files are written too, made and removed, and directories stay as they are.
    Files,
    /// Files are written too, made and removed, and directories with them.
    Change,
    /// The same, and links, devices, fifos and sockets with them: a tree of files as somebody has it.
    Tree,
    /// Sockets are named there, and anything is removed.
    Sockets,
    /// Anything is removed there, and nothing made.
    Remove,
}

impl Reach {
    fn access(self) -> BitFlags<AccessFs> {
        let list = BitFlags::from(AccessFs::ReadDir);
        let read = list | AccessFs::ReadFile;
        match self {
            Reach::List => list,
            Reach::Read => read,
            Reach::Lend => read | AccessFs::Execute,
            Reach::Write => read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev,
            Reach::Files => {
                read | make_bitflags!(AccessFs::{WriteFile | Truncate | MakeReg | RemoveFile | Refer})
            }
            Reach::Change => Reach::Files.access() | AccessFs::MakeDir | AccessFs::RemoveDir,
            Reach::Tree => {
                let more = AccessFs::MakeSym | AccessFs::MakeFifo | AccessFs::MakeSock;
                Reach::Change.access() | more | AccessFs::MakeChar | AccessFs::MakeBlock
            }
            Reach::Sockets => list | AccessFs::MakeSock | AccessFs::RemoveFile,
            Reach::Remove => list | AccessFs::RemoveFile,
        }
    }
}

/// What is let through: what stood there when it was added, whatever is mounted over it since.
#[derive(Default)]
pub(super) struct Files {
    named: Vec<Place>,
    open: Vec<(OwnedFd, BitFlags<AccessFs>)>,
}

struct Place {
    path: PathBuf,
    at: PathFd,
    access: BitFlags<AccessFs>,
}

impl Files {
    /// Adds a place. What is not there, or cannot be looked at, is not let through.
    pub(super) fn add(&mut self, path: &Path, reach: Reach) {
        let file = if path.is_dir() { BitFlags::all() } else { AccessFs::from_file(NEWEST) };
        let access = reach.access() & file;
        match self.named.iter_mut().find(|place| place.path == path) {
            Some(place) => place.access |= access,
            None => {
                let Ok(at) = PathFd::new(path) else { return };
                self.named.push(Place { path: path.to_path_buf(), at, access });
            }
        }
    }

    /// Adds a directory that is open.
    pub(super) fn add_open(&mut self, dir: OwnedFd, reach: Reach) {
        self.open.push((dir, reach.access()));
    }

    /// Bounds this thread, and those that it starts, to them; and keeps it from ports, but for connections
    /// where it `connects`.
    pub(super) fn restrict(self, connects: bool) -> Result<(), String> {
        let done = self.enforce(connects).map_err(|e| format!("files cannot be bounded ({e})"))?;
        match done {
            RulesetStatus::NotEnforced => {
                Err("this kernel has no Landlock, and files are not bounded".to_owned())
            }
            RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
        }
    }

    fn enforce(self, connects: bool) -> Result<RulesetStatus, RulesetError> {
        let all = AccessNet::from_all(NEWEST);
        let ports = if connects { all & !AccessNet::ConnectTcp } else { all };
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(ports)?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        for Place { at, access, .. } in self.named {
            rules = rules.add_rule(PathBeneath::new(at, access))?;
        }
        for (at, access) in self.open {
            rules = rules.add_rule(PathBeneath::new(at, access))?;
        }
        Ok(rules.restrict_self()?.ruleset)
    }
}
