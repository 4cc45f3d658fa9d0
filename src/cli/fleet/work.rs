//! What is done to one instance: stopped, its disk changed, started, asked how it is.
//!
//! Each step leaves what says itself how far it is: the record that it is to be started again, the disk on
//! what it stands. So the same work done again does what is left of it. This process reads no disk: [`disk`] has one
//! in a jail do that.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vdisk::change::plan::Keeping;
use vdisk::instance::{Before, Order, Phase, Record, ask, place};
use vdisk::{Error, ErrorKind, Result};

use super::again::Words;
use super::disk::{self, Disk, Planned, Wanted};
use super::health::Health;
use super::target::Target;
use crate::cli::image::Which;
use crate::cli::instance::start;
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
        config: Option<String>,
    },
    /// On what they stood on before.
    Back,
}

impl Goal {
    /// On what the user calls so.
    pub fn to(word: &Path, which: &Which) -> Result<Goal> {
        let base = which.base(word)?;
        let image = base != word;
        let name = word.to_str().filter(|_| image);
        let config = name.map(|name| disk::config(name, which)).transpose()?.flatten();
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
    pub plan: Option<Planned>,
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
        let plan = self.disk(target).and_then(|disk| disk.plan(&self.wanted())).map_err(named)?;
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
        let disk = self.disk(target)?;
        let changes = disk.changes()?;
        let mut record = match record {
            // Who stopped it before may be gone, and it is still on its way.
            Some(record) if record.lives() && (changes || record.again) => {
                Some(self.stop(&record)?)
            }
            record => record,
        };
        if changes {
            if let Some(record) = record.as_mut().filter(|_| target.clone) {
                *record = self.note_before(record, &disk)?;
            }
            disk.change(&self.wanted())?;
        }
        if matches!(self.goal, Goal::To { .. }) {
            disk.grow(&target.name)?;
        }
        let Some(record) = record else { return Ok(()) };
        let record = if record.lives() { record } else { settle(&record, target, &disk)? };
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

    /// Its disk, in the hands of a process in a jail.
    fn disk(&self, target: &Target) -> Result<Disk> {
        match &self.goal {
            Goal::To { base, .. } => Disk::of(target, Some(base)),
            Goal::Back => Disk::of(target, None),
        }
    }

    /// What is to become of what disks hold.
    fn wanted(&self) -> Wanted {
        let config = match &self.goal {
            Goal::To { config, .. } => config.clone(),
            Goal::Back => None,
        };
        Wanted { keep: self.keep.clone(), keeping: self.keeping.0, config }
    }

    /// Writes down which image it runs from now on, and what it stands on still.
    fn note_before(&self, record: &Record, disk: &Disk) -> Result<Record> {
        let Goal::To { word, .. } = &self.goal else { return Ok(record.clone()) };
        let base = disk.stands_on()?.unwrap_or_default();
        place::note(record, |record| {
            let image = record.image.clone().unwrap_or_default();
            // One that was interrupted has written it down.
            if record.before.as_ref().is_none_or(|before| before.base != base) {
                record.before = Some(Before { image, base });
            }
            set_image(record, word);
        })
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
fn settle(record: &Record, target: &Target, disk: &Disk) -> Result<Record> {
    let Some(before) = record.before.clone().filter(|_| target.clone) else {
        return Ok(record.clone());
    };
    if disk.stands_on()?.as_ref() != Some(&before.base) {
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
