//! What is done to one instance: stopped, its disk changed, started, asked how it is.
//!
//! Each step leaves what says itself how far it is: the record that it is to be started again, the disk on
//! what it stands. So the same work done again does what is left of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use vdisk::block::BlockDevice;
use vdisk::change::plan::{Keeping, Plan};
use vdisk::change::roll::{self, Wishes};
use vdisk::filesystem::ext4::mounted::growable;
use vdisk::instance::{Before, Order, Phase, Record, ask, place};
use vdisk::open::peek;
use vdisk::{Error, ErrorKind, Result};

use super::again::Words;
use super::health::Health;
use super::target::Target;
use crate::cli::disk::resize;
use crate::cli::image::Which;
use crate::cli::instance::start;
use crate::cli::open::disk::{self, Use};
use crate::cli::open::turn;
use crate::cli::terminal::output;

/// How often it is begun anew.
const ATTEMPTS: usize = 2;
/// How long one may take to run that another process starts.
const TO_START: Duration = Duration::from_secs(30);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(20);

/// Where instances are put.
pub enum Goal {
    /// On an image or a base.
    To {
        /// As the user calls it.
        word: String,
        /// Its topmost layer.
        base: PathBuf,
        /// Whether it is an image.
        image: bool,
        /// What is run in it.
        config: Option<Vec<u8>>,
    },
    /// On what they stood on before.
    Back,
}

impl Goal {
    /// On what the user calls so.
    pub fn to(word: &Path, which: &Which) -> Result<Goal> {
        let base = which.base(word)?;
        let (image, config) = (base != word, which.config(word)?);
        Ok(Goal::To { word: output::path(word), base, image, config })
    }

    /// What has been done.
    pub fn words(&self) -> String {
        match self {
            Goal::To { word, .. } => format!("on {word}"),
            Goal::Back => "back".to_owned(),
        }
    }
}

/// What is to be done to each.
pub struct Work {
    pub goal: Goal,
    pub keep: Option<String>,
    pub keeping: Keeping,
    pub patience: Duration,
    pub health: Option<Health>,
}

/// What is about to be done to one.
pub struct Intent {
    /// To its disk, where that is not there yet.
    pub plan: Option<Plan>,
    /// Whether it is started.
    pub starts: bool,
}

impl Work {
    /// What is to be done to one.
    pub fn plan(&self, target: &Target) -> Result<Intent> {
        let named = |e: Error| Error::new(e.kind(), format!("{}: {e}", target.name));
        if let (Goal::To { word, image: false, .. }, true) = (&self.goal, target.clone) {
            let text = format!(
                "{} runs in a clone that the store keeps of an image, and {word} is no image",
                target.name
            );
            return Err(Error::invalid(text));
        }
        let plan = turn::again(|| self.disk(target)).map_err(named)?.map(|change| change.plan());
        let starts = match &target.record {
            Some(record) => record.again || (record.lives() && plan.is_some()),
            None => false,
        };
        Ok(Intent { plan, starts })
    }

    /// Does it.
    pub fn carry_out(&self, target: &Target) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let lived = lives(target);
            match self.attempt(target) {
                // Who was interrupted had started it, and it has come up only now.
                Err(e)
                    if matches!(e.kind(), ErrorKind::InUse | ErrorKind::Exists)
                        && !lived
                        && lives(target) => {}
                done => return done,
            }
        }
        self.attempt(target)
    }

    fn attempt(&self, target: &Target) -> Result<()> {
        // It may be another by now than it was when this was planned.
        let record = target.record.as_ref().map(|record| place::find(&record.id)).transpose()?;
        let changes = turn::again(|| self.changes(target))?;
        let mut record = match record {
            // Who stopped it before may be gone, and it is still on its way.
            Some(record) if record.lives() && (changes || record.again) => {
                Some(self.stop(&record)?)
            }
            record => record,
        };
        if changes {
            if let Some(record) = record.as_mut().filter(|_| target.clone) {
                *record = self.note_before(record)?;
            }
            turn::again(|| self.disk(target)?.map_or(Ok(()), |change| change.execute()))?;
        }
        self.grow(target)?;
        let Some(record) = record else { return Ok(()) };
        let record = if record.lives() { record } else { settle(&record, target)? };
        let record = match record.again && !record.lives() {
            true => started(&record)?,
            false => record,
        };
        match &self.health {
            Some(health) if record.lives() => health.await_of(&record),
            _ => Ok(()),
        }
    }

    /// Stops it; from then on its record says that it is to be started again.
    fn stop(&self, record: &Record) -> Result<Record> {
        let patience = u64::try_from(self.patience.as_millis()).unwrap_or(u64::MAX);
        let order = Order::Stop { patience, again: true };
        let stopped = ask(record, order, &mut |_, _| true);
        let now = place::find(&record.id)?;
        match stopped {
            Err(error) if now.lives() => Err(error),
            // It may have ended by itself, just before.
            _ if !now.again => place::note(&now, |record| record.again = true),
            _ => Ok(now),
        }
    }

    /// Whether something is to be done to its disk. What, is planned when nobody uses it any more.
    fn changes(&self, target: &Target) -> Result<bool> {
        match &self.goal {
            Goal::To { base, .. } => roll::has_base(&target.disk, base).map(|there| !there),
            Goal::Back => roll::has_rolled(&target.disk),
        }
    }

    /// What is to be done to its disk; nothing where that is done.
    fn disk(&self, target: &Target) -> Result<Option<Change>> {
        let keep = self.keep.as_deref();
        match &self.goal {
            Goal::To { base, config, .. } => {
                let wishes = Wishes { keep, keeping: self.keeping, config: config.clone() };
                Ok(roll::plan_roll(&target.disk, base, &wishes)?.map(Change::Roll))
            }
            Goal::Back => Ok(roll::plan_back(&target.disk, keep)?.map(Change::Back)),
        }
    }

    /// Writes down which image it runs from now on, and what it stands on still.
    fn note_before(&self, record: &Record) -> Result<Record> {
        let Goal::To { word, .. } = &self.goal else { return Ok(record.clone()) };
        let base = roll::stands_on(Path::new(&record.disk))?.map(output::path).unwrap_or_default();
        place::note(record, |record| {
            let image = record.image.clone().unwrap_or_default();
            // One that was interrupted has written it down.
            if record.before.as_ref().is_none_or(|before| before.base != base) {
                record.before = Some(Before { image, base });
            }
            set_image(record, word);
        })
    }

    /// A disk that was made larger than its image is so again.
    fn grow(&self, target: &Target) -> Result<()> {
        if !matches!(self.goal, Goal::To { .. }) {
            return Ok(());
        }
        let Some(before) = roll::size_before(&target.disk)? else { return Ok(()) };
        // One that runs has it by now, and is not to be opened.
        if peek(&target.disk)?.is_none_or(|seen| seen.size >= before) {
            return Ok(());
        }
        let disk = disk::open(&target.disk, &Use::reading())?;
        let device: Arc<dyn BlockDevice> = disk.clone();
        if let Err(why) = growable(&device) {
            let (name, now) = (&target.name, disk.size());
            eprintln!(
                "vdisk: warning: {name}: its disk had {before} bytes and has {now} now: {why}"
            );
            return Ok(());
        }
        drop((device, disk));
        let disk = disk::open(&target.disk, &Use::writing())?;
        resize::files(disk, before).map_err(|e| e.at_path(&target.disk))
    }
}

/// A change of a disk.
enum Change {
    Roll(roll::Roll),
    Back(Plan),
}

impl Change {
    fn plan(self) -> Plan {
        match self {
            Change::Roll(roll) => roll.plan,
            Change::Back(plan) => plan,
        }
    }

    fn execute(&self) -> Result<()> {
        match self {
            Change::Roll(roll) => roll.execute(),
            Change::Back(plan) => plan.execute(&mut |_, _| true),
        }
    }
}

fn lives(target: &Target) -> bool {
    let now = target.record.as_ref().map(|record| place::find(&record.id));
    now.is_some_and(|now| now.is_ok_and(|now| now.lives()))
}

/// Starts it again; what is known of it then.
fn started(record: &Record) -> Result<Record> {
    let failed = match start::begin_again(record) {
        Ok(id) => return place::find(&id),
        Err(failed) => failed,
    };
    // Who was interrupted may have started it: it comes up a moment later.
    let until = Instant::now() + TO_START;
    loop {
        let now = place::find(&record.id)?;
        match now.phase {
            Phase::Running => return Ok(now),
            _ if !now.lives() || Instant::now() >= until => return Err(failed),
            _ => sleep(LOOK),
        }
    }
}

/// The record of an instance that has ended says what its disk stands on.
fn settle(record: &Record, target: &Target) -> Result<Record> {
    let Some(before) = record.before.clone().filter(|_| target.clone) else {
        return Ok(record.clone());
    };
    let base = roll::stands_on(&target.disk)?;
    if base.as_deref() != Some(Path::new(&before.base)) {
        return Ok(record.clone());
    }
    place::note(record, |record| {
        set_image(record, &before.image);
        record.before = None;
    })
}

fn set_image(record: &mut Record, image: &str) {
    let words = Words::of(&record.words).on(image.as_ref());
    record.words = words.all().iter().map(output::path).collect();
    (record.image, record.named) = (Some(image.to_owned()), image.to_owned());
}
