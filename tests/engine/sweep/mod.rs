//! The kill-point sweep: every command that changes a tree of disks is stopped at every change that
//! it makes, by a kill, a power cut, or a call that fails; the disks must then be as before it or as
//! after it, and the next open for writing puts right the rest.
//!
//! `VDISK_SWEEP_SECONDS` sets how long it goes on; what it tries is drawn from the seed.

mod holder;
mod operations;
mod power;
mod roller;
mod scene;
mod tracer;

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use tempfile::TempDir;

use vdisk::internals::change;
use vdisk::internals::open::OpenOptions;

use self::operations::Operation;
use self::power::{Directory, Rest};
use self::scene::State;
use self::tracer::{Event, Fate, Files, Run};
use crate::dice::{Confess, Dice, seed};
use crate::processes::undisturbed;

/// A directory that nobody's syncs make slow, where the host has one.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// It starts programs with a variable.
const ENV: &str = "/usr/bin/env";

fn vdisk() -> PathBuf {
    env!("CARGO_BIN_EXE_vdisk").into()
}

impl Operation {
    /// Runs it, or one that is done with before it.
    fn run(&self, words: &[String], files: Files, fate: Fate) -> Run {
        match roller::command(words) {
            Some(words) => tracer::run(Path::new(ENV), &words, files, fate),
            None if self.held => tracer::run(Path::new(ENV), words, files, fate),
            None => tracer::run(&vdisk(), words, files, fate),
        }
    }

    /// All that a directory shows, but for the disk that is held.
    fn observe(&self, dir: &Path) -> vdisk::Result<State> {
        let mut state = undisturbed(|| scene::observe(dir))?;
        if self.held {
            // Its bitmaps are in use with it.
            state.retain(|name, _| name.split('#').next() != Some(holder::DISK));
        }
        self.over.and_then(|name| state.remove(name));
        Ok(state)
    }

    /// What the disk shows that the command writes over.
    fn overwritten(&self, dir: &Path) -> vdisk::Result<Vec<u8>> {
        let Some(name) = self.over else { return Ok(Vec::new()) };
        undisturbed(|| Ok(scene::bytes(&change::open(&dir.join(name), &OpenOptions::default())?)))
    }
}

/// One command on one scene.
struct Sweep {
    operation: Operation,
    start: Directory,
    /// What the directory shows before the command, and after it.
    old: State,
    new: State,
    /// How many files it has then, once disks have been opened for writing.
    files: [usize; 2],
    /// What the disk that is written over shows before and after.
    over: [Vec<u8>; 2],
    log: Vec<Event>,
    calls: usize,
    /// What the disk held before, where the command holds it.
    head: Option<Vec<u8>>,
}

impl Sweep {
    /// Runs the command once, undisturbed.
    fn new(mut operation: Operation, dice: &mut Dice) -> Sweep {
        let dir = scratch();
        undisturbed(|| (operation.build)(dir.path(), dice));
        for words in &operation.first {
            let one = Operation { held: false, ..Operation::new(operation.build, &[], "") };
            let run = one.run(words, Files::of(dir.path()).0, Fate::Undisturbed);
            assert_eq!(run.status, Some(0), "{words:?}: {}", run.stderr);
        }
        operation.args.iter_mut().for_each(|word| *word = scene::expand(dir.path(), word));
        let (files, named) = Files::of(dir.path());
        let start = Directory::read(dir.path(), &named);
        let files_before = {
            let dir = scratch();
            start.write(dir.path());
            undisturbed(|| scene::heal(dir.path())).unwrap();
            scene::files(dir.path())
        };
        let head = operation.held.then(|| undisturbed(|| holder::read(dir.path())).unwrap());
        let old = operation.observe(dir.path()).unwrap();
        let before = operation.overwritten(dir.path()).unwrap();
        let run = operation.run(&operation.args, files, Fate::Undisturbed);
        assert_eq!(run.status, Some(0), "{:?}: {}", operation.args, run.stderr);
        // A merge that folded the head into the layer below let go of it before that had its name:
        // what QEMU wrote to it in between was gone.
        let unguarded = run.unguarded.iter().filter(|name| scene::is_disk(Path::new(name)));
        assert_eq!(unguarded.count(), 0, "{:?} lets go of {:?}", operation.args, run.unguarded);
        let over = [before, operation.overwritten(dir.path()).unwrap()];
        let new = operation.observe(dir.path()).unwrap();
        let end = start.after(&run.log, Rest::Kept, dice);
        let again = scratch();
        end.write(again.path());
        let seen = operation.observe(again.path()).unwrap();
        assert_eq!(seen, new, "{:?}: the log says what was done", operation.args);
        let files = [files_before, scene::files(again.path())];
        let (log, calls) = (run.log, run.tried);
        let sweep = Sweep { operation, start, old, new, files, over, log, calls, head };
        sweep.head_shows(again.path(), holder::durable(&sweep.log)).unwrap();
        sweep
    }

    /// Runs the command on a fresh copy of the scene.
    fn run(&self, dir: &Path, fate: Fate) -> Run {
        self.start.write(dir);
        self.operation.run(&self.operation.args, Files::of(dir).0, fate)
    }

    fn cut(&self, at: usize, rest: Rest, dice: &mut Dice) -> Result<(), String> {
        let dir = scratch();
        self.start.after(&self.log[..at], rest, dice).write(dir.path());
        let seen = self.judge(dir.path(), &self.log[..at], dice.once_in(8))?;
        if at == self.log.len() { self.is_done(dir.path(), &seen) } else { Ok(()) }
    }

    fn kill(&self, at: usize, dice: &mut Dice) -> Result<(), String> {
        let dir = scratch();
        let run = self.run(dir.path(), Fate::Kill(at));
        self.judge(dir.path(), &run.log, dice.once_in(4)).map(drop)
    }

    fn fail(&self, fate: Fate, dice: &mut Dice) -> Result<(), String> {
        let dir = scratch();
        let run = self.run(dir.path(), fate);
        if run.status.is_none_or(|status| status > 1) {
            return Err(format!("it ended with {:?}: {}", run.status, run.stderr));
        }
        let seen = self.judge(dir.path(), &run.log, dice.once_in(4))?;
        if run.status != Some(0) {
            let said = self.operation.held || !run.stderr.is_empty();
            return if said { Ok(()) } else { Err("it failed without a word".to_owned()) };
        }
        self.is_done(dir.path(), &seen).map_err(|why| format!("{why}\n{}", run.stderr))?;
        // Whatever failed, what it said that it did outlives a power cut.
        let later = scratch();
        self.start.after(&run.log, Rest::Lost, dice).write(later.path());
        let seen = self.judge(later.path(), &run.log, false)?;
        let done = self.is_done(later.path(), &seen);
        done.map_err(|why| format!("after a power cut: {why}\n{}", run.stderr))
    }

    /// Whether a command that ended with 0 has done all that it does.
    fn is_done(&self, dir: &Path, seen: &State) -> Result<(), String> {
        let mut shown = seen.clone();
        if self.operation.again {
            // Of a base that could not be written it warns.
            shown.retain(|name, _| !name.ends_with('!') || self.new.contains_key(name));
        }
        if shown != self.new {
            return Err(format!("it reported success, but shows {seen:?}"));
        }
        if self.operation.overwritten(dir).ok() != self.done() {
            return Err("it reported success, and is not done".to_owned());
        }
        Ok(())
    }

    fn done(&self) -> Option<Vec<u8>> {
        Some(self.over[1].clone())
    }

    /// Whether each sector of the disk that is written over is as before or as after.
    fn over_shows(&self, dir: &Path) -> Result<(), String> {
        const SECTOR: usize = 512;
        let seen = self.operation.overwritten(dir).map_err(|e| e.to_string())?;
        let [old, new] = &self.over;
        let sectors =
            |bytes: &Vec<u8>| bytes.chunks(SECTOR).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let (old, new) = (sectors(old), sectors(new));
        match sectors(&seen)
            .iter()
            .zip(old.iter().zip(&new))
            .position(|(s, (a, b))| s != a && s != b)
        {
            None => Ok(()),
            Some(at) => Err(format!("sector {at} is neither as before nor as after")),
        }
    }

    /// Whether the directory is as it may be; what it shows at the end.
    fn judge(&self, dir: &Path, log: &[Event], again: bool) -> Result<State, String> {
        scene::private(dir)?;
        undisturbed(|| self.readers(dir))?;
        self.head_shows(dir, holder::durable(log)).map_err(|e| format!("to a reader: {e}"))?;
        undisturbed(|| scene::heal(dir)).map_err(|e| format!("healing: {e}"))?;
        let seen = self.operation.observe(dir).map_err(|e| format!("after healing: {e}"))?;
        self.head_shows(dir, holder::durable(log)).map_err(|e| format!("after healing: {e}"))?;
        self.over_shows(dir)?;
        if !self.allows(&seen) {
            let Sweep { old, new, .. } = self;
            return Err(format!("shows  {seen:x?}\nbefore {old:x?}\nafter  {new:x?}"));
        }
        undisturbed(|| scene::check(dir))?;
        self.nothing_is_left(dir, &seen)?;
        scene::private(dir).map_err(|e| format!("after healing: {e}"))?;
        if again && seen == self.old && !self.operation.held {
            let args = &self.operation.args;
            let run = self.operation.run(args, Files::of(dir).0, Fate::Undisturbed);
            let seen = self.operation.observe(dir).map_err(|e| e.to_string())?;
            self.over_shows(dir)?;
            if self.operation.overwritten(dir).ok() != self.done() {
                return Err("run again, and not done".to_owned());
            }
            if run.status != Some(0) || seen != self.new {
                return Err(format!("run again: {:?} {}", run.status, run.stderr));
            }
        }
        Ok(seen)
    }

    /// Whether there are no more files than before or after.
    fn nothing_is_left(&self, dir: &Path, seen: &State) -> Result<(), String> {
        if self.operation.again && *seen == self.new && scene::files(dir) != self.files[1] {
            // It ends with 0 where something was left.
            let args = &self.operation.args;
            let run = self.operation.run(args, Files::of(dir).0, Fate::Undisturbed);
            if run.status != Some(0) {
                return Err(format!("does not finish what it began: {}", run.stderr));
            }
        }
        let [old, new] = self.files;
        // A layer without a name, on which others stand, may stay: it is folded some other time. And what
        // is kept aside goes where a write wants its room.
        let most = if self.operation.again && *seen == self.new { new } else { old.max(new) };
        let files = scene::files(dir);
        if (self.operation.atomic || self.operation.again) && files > most {
            return Err(format!("{files} files, not {most}"));
        }
        Ok(())
    }

    /// Before anybody writes, a reader sees each disk as it was or as it becomes.
    fn readers(&self, dir: &Path) -> Result<(), String> {
        for path in scene::disks(dir) {
            let name = path.file_name().unwrap().to_str().unwrap();
            if self.operation.held && name == holder::DISK || self.operation.over == Some(name) {
                continue;
            }
            let seen = scene::look(&path).map_err(|e| format!("to a reader: {e}"))?;
            if ![self.old.get(name), self.new.get(name)].contains(&Some(&seen)) {
                return Err(format!("{name} shows something else to a reader"));
            }
        }
        Ok(())
    }

    /// Whether the disk that the command holds shows what it may.
    fn head_shows(&self, dir: &Path, durable: usize) -> Result<(), String> {
        let Some(before) = &self.head else { return Ok(()) };
        let seen = undisturbed(|| holder::read(dir)).map_err(|e| e.to_string())?;
        holder::may_show(before, durable, &seen)
    }

    fn allows(&self, seen: &State) -> bool {
        if self.operation.atomic {
            return *seen == self.old || *seen == self.new;
        }
        let names = self.old.keys().chain(self.new.keys()).chain(seen.keys());
        names
            .into_iter()
            .all(|name| [self.old.get(name), self.new.get(name)].contains(&seen.get(name)))
    }
}

/// What is tried of one command.
#[derive(Debug, Clone, Copy)]
enum Trial {
    Cut(usize, Rest),
    Run(Fate),
}

impl Sweep {
    fn trials(&self) -> Vec<Trial> {
        let cuts = (0..=self.log.len()).flat_map(|at| {
            [Rest::Kept, Rest::Lost, Rest::Mixed, Rest::Mixed].map(|rest| Trial::Cut(at, rest))
        });
        let calls = (0..self.calls).flat_map(|at| {
            [Fate::Kill(at), Fate::Fail(at, Errno::EIO), Fate::Full(at)].map(Trial::Run)
        });
        cuts.chain(calls).collect()
    }

    fn try_one(&self, trial: Trial, dice: &mut Dice) -> Result<(), String> {
        match trial {
            Trial::Cut(at, rest) => self.cut(at, rest, dice),
            Trial::Run(Fate::Kill(at)) => self.kill(at, dice),
            Trial::Run(fate) => self.fail(fate, dice),
        }
    }
}

/// Seconds that the sweep goes on, if it is limited.
fn limit(seconds: u64) -> Option<u64> {
    match std::env::var("VDISK_SWEEP_SECONDS").as_deref() {
        Ok("all") => None,
        Ok(text) => Some(text.parse().expect("VDISK_SWEEP_SECONDS is a number, or `all`")),
        Err(_) => Some(seconds),
    }
}

#[test]
fn a_command_stopped_anywhere_leaves_the_old_tree_or_the_new_one() {
    sweep(operations::operations(), 25);
}

/// A size was published before the zeroes that were to hide a longer base: a command that was stopped
/// in between showed the base's old bytes for ever.
#[test]
fn a_change_of_size_stopped_anywhere_leaves_the_old_disk_or_the_new_one() {
    sweep(operations::size_operations(), 15);
}

/// `rm` finishes what it had begun when it is run again; what is kept aside too long goes, whoever was
/// stopped while he let go of it.
#[test]
fn a_removal_an_expiry_and_what_a_disk_stands_on_are_as_before_or_as_after() {
    sweep(operations::other_operations(), 25);
}

/// A label of several sectors was written in one piece, and torn by a power cut.
#[test]
fn a_long_label_stopped_anywhere_is_the_old_one_or_the_new_one() {
    sweep(operations::label_operations(), 10);
}

/// The old disk and the new one both stand, one of them by the disk's name: and it goes back.
#[test]
fn a_roll_stopped_anywhere_leaves_the_disk_on_its_old_base_or_on_the_new_one() {
    sweep(operations::roll_operations(), 15);
}

#[test]
fn a_holder_stopped_anywhere_leaves_a_tree_and_all_that_was_flushed() {
    sweep(operations::live_operations(), 12);
}

/// Tries what time allows of all that can happen to the operations.
fn sweep(operations: Vec<Operation>, seconds: u64) {
    let seed = seed();
    let _confess = Confess(seed);
    let mut dice = Dice::new(seed);
    let until =
        limit(seconds).map(|s| std::time::Instant::now() + std::time::Duration::from_secs(s));
    let sweeps: Vec<Sweep> = operations.into_iter().map(|op| Sweep::new(op, &mut dice)).collect();
    let mut trials: Vec<(usize, Trial)> = Vec::new();
    for (number, sweep) in sweeps.iter().enumerate() {
        trials.extend(sweep.trials().into_iter().map(|trial| (number, trial)));
    }
    let all = trials.len();
    let (mut done, mut wrong) = (0, Vec::new());
    while !trials.is_empty() && until.is_none_or(|until| std::time::Instant::now() < until) {
        let (number, trial) = trials.swap_remove(dice.below(trials.len() as u64) as usize);
        let sweep = &sweeps[number];
        if let Err(why) = sweep.try_one(trial, &mut dice) {
            let words = sweep.operation.first.iter().chain([&sweep.operation.args]);
            let words: Vec<String> = words.map(|words| words.join(" ")).collect();
            wrong.push(format!("{} {trial:?}:\n{why}", words.join("; ")));
        }
        done += 1;
    }
    eprintln!(
        "{done} of {all} kill points tried, {} mismatches, VDISK_SEED={seed:#x}",
        wrong.len()
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}
