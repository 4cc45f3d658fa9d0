//! Where instances are kept, how one is claimed, and how one is found.
//!
//! Each has a directory `instances/ID` where control sockets are: `record.json`, `lock`, which its
//! keeper holds for as long as it lives, `log` and `log.1`, and sockets. A directory gets its name when
//! its lock is held and its record written, so that nobody ever sees half of one.

use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc::EWOULDBLOCK;
use rustix::fs::{FlockOperation, flock};

use super::name;
use super::record::{Phase, Record};
use crate::control::place;
use crate::error::{Error, ErrorKind, Result};

/// How long a process that has ended an instance may take to be gone itself.
const TO_LET_GO: Duration = Duration::from_secs(10);
/// Between two looks at a lock.
const LOOK: Duration = Duration::from_millis(5);

/// An instance of this process's.
pub struct Claim {
    /// Its directory.
    dir: PathBuf,
    record: Record,
    /// What says that it lives.
    _lock: File,
}

impl Claim {
    /// Makes an instance of what `record` says of it, whose id and, where it is empty, whose name are
    /// made up here. One of that name that has ended goes.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] where one of that name lives.
    pub fn new(mut record: Record) -> Result<Claim> {
        let all = directory()?;
        let _alone = lock(&all.join(".lock"), FlockOperation::LockExclusive)?;
        sweep(&all);
        record.id = uuid::Uuid::new_v4().simple().to_string().chars().take(12).collect();
        if record.name.is_empty() {
            let from = record.image.as_deref().unwrap_or(&record.disk);
            let from = Path::new(from).file_stem().unwrap_or_default().to_string_lossy();
            record.name = name::made(&from, &record.id);
        }
        // What has no name of its own need not read what all others are called.
        let others = if record.plain { Vec::new() } else { list()? };
        for other in others.into_iter().filter(|other| other.name == record.name) {
            if other.lives() {
                let text =
                    format!("an instance named {:?} runs already ({})", other.name, other.id);
                return Err(Error::new(ErrorKind::Exists, text));
            }
            forget(&other)?;
        }
        let draft = all.join(format!(".{}", record.id));
        let failed = |e| Error::io("cannot make an instance", e).at_path(&draft);
        DirBuilder::new().mode(0o700).create(&draft).map_err(failed)?;
        let held = lock(&draft.join("lock"), FlockOperation::LockExclusive)?;
        let dir = all.join(&record.id);
        let claim = Claim { dir: draft.clone(), record, _lock: held };
        claim.write()?;
        fs::rename(&draft, &dir).map_err(failed)?;
        Ok(Claim { dir, ..claim })
    }

    /// The instance of that record, which has ended and is to run again: as the record by now says, and as
    /// `change` makes it.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] where it lives; [`ErrorKind::NotFound`] where it is gone.
    pub fn again(record: &Record, change: impl FnOnce(&mut Record)) -> Result<Claim> {
        let dir = of(record)?;
        let gone = || Error::new(ErrorKind::NotFound, format!("{} is gone", record.name));
        if !dir.is_dir() {
            return Err(gone());
        }
        let lives =
            || Error::new(ErrorKind::Exists, format!("{} runs ({})", record.name, record.id));
        let held = lock_ended(&dir)?.ok_or_else(lives)?;
        let record = read(&dir).ok_or_else(gone)?;
        let mut claim = Claim { dir, record, _lock: held };
        claim.note(change)?;
        Ok(claim)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is known of it.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Changes what is known of it.
    pub fn note(&mut self, change: impl FnOnce(&mut Record)) -> Result<()> {
        change(&mut self.record);
        self.write()
    }

    /// Leaves nothing of it.
    pub fn forget(self) -> Result<()> {
        remove(&self.dir)
    }

    fn write(&self) -> Result<()> {
        let (draft, path) = (self.dir.join("record.new"), self.dir.join("record.json"));
        let failed = |e| Error::io("cannot be written", e).at_path(&path);
        let mut text = serde_json::to_vec_pretty(&self.record).map_err(|e| failed(e.into()))?;
        text.push(b'\n');
        let mut file = File::create(&draft).map_err(failed)?;
        file.write_all(&text).and_then(|()| fs::rename(&draft, &path)).map_err(failed)
    }
}

/// The directory of all instances of this user.
fn directory() -> Result<PathBuf> {
    let dir = place::directory()?.join("instances");
    match DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::io("cannot be made", e).at_path(dir))
        }
        _ => Ok(dir),
    }
}

/// The directory of an instance.
pub fn of(record: &Record) -> Result<PathBuf> {
    Ok(directory()?.join(&record.id))
}

/// The name of an instance's control socket.
pub(super) fn socket(record: &Record) -> String {
    format!("instance-{}-{}-0.sock", record.id, record.pid)
}

fn lock(path: &Path, how: FlockOperation) -> Result<File> {
    let failed = |e| Error::io("cannot be locked", e).at_path(path);
    let open = File::options().create(true).truncate(false).write(true).mode(0o600).open(path);
    let file = open.map_err(failed)?;
    flock(&file, how).map_err(|e| failed(e.into()))?;
    Ok(file)
}

/// The lock of the instance in this directory, if that has ended: who has it a moment longer is waited for.
fn lock_ended(dir: &Path) -> Result<Option<File>> {
    let until = Instant::now() + TO_LET_GO;
    loop {
        match lock(&dir.join("lock"), FlockOperation::NonBlockingLockExclusive) {
            Err(e) if e.raw_os_error() == Some(EWOULDBLOCK) => {
                if Instant::now() >= until || read(dir).is_some_and(|record| record.lives()) {
                    return Ok(None);
                }
                std::thread::sleep(LOOK);
            }
            done => return done.map(Some),
        }
    }
}

/// Whether somebody holds the lock of the instance in this directory.
fn is_held(dir: &Path) -> bool {
    let Ok(file) = File::open(dir.join("lock")) else { return false };
    flock(&file, FlockOperation::NonBlockingLockShared).is_err()
}

/// Removes what was never finished.
fn sweep(all: &Path) {
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        if hidden && entry.path().is_dir() && !is_held(&entry.path()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn remove(dir: &Path) -> Result<()> {
    // Nobody may find a half of it.
    let gone =
        dir.with_file_name(format!(".{}", dir.file_name().unwrap_or_default().to_string_lossy()));
    match fs::rename(dir, &gone).and_then(|()| fs::remove_dir_all(&gone)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("cannot be removed", e).at_path(dir))
        }
        _ => Ok(()),
    }
}

/// Leaves nothing of an instance that has ended, whose process may be there a moment longer.
///
/// # Errors
/// [`ErrorKind::InUse`] where it lives.
pub fn forget(record: &Record) -> Result<()> {
    let dir = of(record)?;
    // Whoever starts it again takes this lock, too.
    let held = match lock_ended(&dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        held => held?,
    };
    if held.is_none() {
        let text = format!("{} runs: `vdisk stop {}` ends it", record.name, record.name);
        return Err(Error::new(ErrorKind::InUse, text));
    }
    remove(&dir)
}

/// All instances of this user, the oldest first.
pub fn list() -> Result<Vec<Record>> {
    let dir = directory()?;
    let entries = fs::read_dir(&dir).map_err(|e| Error::io("cannot be read", e).at_path(&dir))?;
    let mut all: Vec<Record> = entries.flatten().filter_map(|entry| read(&entry.path())).collect();
    // What was killed before it could be forgotten by who ran it.
    all.retain(|record| !(record.plain && record.phase == Phase::Lost && forget(record).is_ok()));
    all.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
    Ok(all)
}

/// Changes what is known of an instance that has ended; returns that.
///
/// # Errors
/// As [`Claim::again`].
pub fn note(record: &Record, change: impl FnOnce(&mut Record)) -> Result<Record> {
    drop(Claim::again(record, change)?);
    let gone = || Error::new(ErrorKind::NotFound, format!("{} is gone", record.name));
    read(&of(record)?).ok_or_else(gone)
}

/// What is known of the instance in a directory; nothing where there is none, or none any more.
pub fn read(dir: &Path) -> Option<Record> {
    if dir.file_name()?.to_string_lossy().starts_with('.') {
        return None;
    }
    // Before the record: one that ends now has written its end by then.
    let held = is_held(dir);
    let mut record: Record =
        serde_json::from_slice(&fs::read(dir.join("record.json")).ok()?).ok()?;
    if !held && record.phase != Phase::Exited {
        record.phase = Phase::Lost;
        record.turn = None;
    }
    Some(record)
}

/// The instance that a word names: its name, its id or the first digits of that, or its disk's path.
/// One that lives goes before those that have ended.
///
/// # Errors
/// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] where several are meant.
pub fn find(word: &str) -> Result<Record> {
    let all = list()?;
    let found = |fits: &dyn Fn(&Record) -> bool| {
        let fitting: Vec<&Record> = all.iter().filter(|record| fits(record)).collect();
        let living: Vec<&Record> = fitting.iter().copied().filter(|r| r.lives()).collect();
        if living.is_empty() { fitting } else { living }
    };
    let file = |path: &str| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let disk = file(word);
    let by_name = found(&|record| record.name == word || record.id == word);
    let by_digits = found(&|record| !word.is_empty() && record.id.starts_with(word));
    let by_disk = found(&|record| disk.is_some() && file(&record.disk) == disk);
    let several = [by_name, by_digits, by_disk].into_iter().find(|found| !found.is_empty());
    let several = several.unwrap_or_default();
    match several.as_slice() {
        [one] => Ok((*one).clone()),
        [] => {
            let text = format!("there is no instance {word:?}: `vdisk ps --all` lists them");
            Err(Error::new(ErrorKind::NotFound, text))
        }
        more => {
            let names: Vec<_> = more.iter().map(|r| format!("{} ({})", r.name, r.id)).collect();
            Err(Error::invalid(format!("{word:?} may be {}", names.join(", "))))
        }
    }
}
