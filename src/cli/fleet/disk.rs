//! The disk of an instance that is rolled: looked at and changed by a process of its own, inside a jail. Who stops
//! and starts instances asks it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args as ClapArgs;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vdisk::block::BlockDevice;
use vdisk::change::plan::{Keeping, Plan, Undoable};
use vdisk::change::roll::{self, Wishes};
use vdisk::filesystem::ext4::mounted::growable;
use vdisk::open::peek;
use vdisk::{Error, Result};

use super::target::Target;
use crate::cli::disk::resize;
use crate::cli::image::Which;
use crate::cli::inside::{self, Inside, answer};
use crate::cli::open::disk::{self, Use};
use crate::cli::open::rest::Rest;
use crate::cli::open::turn;
use crate::cli::terminal::output;

/// The verb of that process.
pub const VERB: &str = "roll-disk";

/// What that process is told.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk; without one an image is looked at.
    disk: Option<PathBuf>,
    /// The base that it is put on; without, it is brought back.
    #[arg(long)]
    base: Option<PathBuf>,
    #[command(flatten)]
    store: Which,
}

#[derive(Debug, Serialize, Deserialize)]
enum Question {
    /// What is run in this image.
    Config(String),
    /// What is about to be done to the disk.
    Plan(Wanted),
    /// Whether anything is.
    Changes,
    /// What it stands on.
    StandsOn,
    /// Do it.
    Change(Wanted),
    /// Make it as large again as it was; it is the disk of this instance.
    Grow(String),
}

/// What is to become of what the disk holds, and of what is run in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Wanted {
    /// The name of the snapshot that what was written stays as.
    pub keep: Option<String>,
    /// How long what is dropped is kept aside.
    pub keeping: Duration,
    /// What is run in it from now on, where an image says it.
    pub config: Option<String>,
}

/// What is about to be done to a disk.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Planned {
    /// Bytes that it does not show afterwards, nor any snapshot.
    pub dropped: u64,
    /// Bytes that are kept aside.
    pub kept: u64,
    /// Until then, in milliseconds since 1970, what is dropped can be brought back.
    pub until: Option<u64>,
}

impl From<&Plan> for Planned {
    fn from(plan: &Plan) -> Planned {
        let until = match plan.undo {
            Undoable::Until(end) => Some(end),
            _ => None,
        };
        Planned { dropped: plan.dropped, kept: plan.kept, until }
    }
}

/// What clones of an image are told of what is run in them.
pub fn config(image: &str, store: &Which) -> Result<Option<String>> {
    Inside::start(VERB, store.words())?.ask(&Question::Config(image.to_owned()))
}

/// The disk of an instance, as the process has it that works on it.
pub struct Disk(Inside);

impl Disk {
    /// The disk of `target`, that is put on `base`; without, it is brought back.
    pub fn of(target: &Target, base: Option<&Path>) -> Result<Disk> {
        let base = base.map(|base| ["--base".into(), base.into()]);
        let words = base.into_iter().flatten().chain(["--".into(), target.disk.clone().into()]);
        Inside::start(VERB, words.collect()).map(Disk)
    }

    /// What is to be done to it; nothing where that is done.
    pub fn plan(&self, wanted: &Wanted) -> Result<Option<Planned>> {
        self.0.ask(&Question::Plan(wanted.clone()))
    }

    /// Whether something is to be done to it. What, is planned when nobody uses it any more.
    pub fn changes(&self) -> Result<bool> {
        self.0.ask(&Question::Changes)
    }

    /// What it stands on, as text.
    pub fn stands_on(&self) -> Result<Option<String>> {
        self.0.ask(&Question::StandsOn)
    }

    /// Does what is to be done to it, if anything is.
    pub fn change(&self, wanted: &Wanted) -> Result<()> {
        self.0.ask(&Question::Change(wanted.clone()))
    }

    /// Makes it as large again as it was before it was put on another base.
    pub fn grow(&self, name: &str) -> Result<()> {
        self.0.ask(&Question::Grow(name.to_owned()))
    }
}

/// Is the process.
pub fn run(args: &Args) -> Result<u8> {
    let prepare = || {
        // Of an image its configuration is read.
        let store = if args.disk.is_none() { args.store.existing()? } else { None };
        let rest = store.iter().fold(Rest::new(), |rest, store| rest.read(store.dir()));
        Ok((args.disk.iter().chain(&args.base).fold(rest, |rest, at| rest.disk(at)), ()))
    };
    inside::serve(prepare, |(), question| args.answer(question))
}

impl Args {
    fn answer(&self, question: Question) -> Result<Value> {
        match question {
            Question::Config(image) => {
                let raw = self.store.config(Path::new(&image))?;
                let text = |raw| String::from_utf8(raw).map_err(|_| no_text(&image));
                answer(raw.map(text).transpose()?)
            }
            Question::Plan(wanted) => {
                let planned = turn::again(|| self.planned(&wanted))?;
                answer(planned.map(|change| Planned::from(change.plan())))
            }
            Question::Changes => answer(turn::again(|| self.changes())?),
            Question::StandsOn => answer(roll::stands_on(self.disk())?.map(output::path)),
            Question::Change(wanted) => {
                let change = || match self.planned(&wanted)? {
                    Some(change) => change.execute(),
                    None => Ok(()),
                };
                answer(turn::again(change)?)
            }
            Question::Grow(name) => answer(self.grow(&name)?),
        }
    }

    fn disk(&self) -> &Path {
        self.disk.as_deref().unwrap_or(Path::new(""))
    }

    fn changes(&self) -> Result<bool> {
        match &self.base {
            Some(base) => roll::has_base(self.disk(), base).map(|there| !there),
            None => roll::has_rolled(self.disk()),
        }
    }

    fn planned(&self, wanted: &Wanted) -> Result<Option<Change>> {
        let keep = wanted.keep.as_deref();
        match &self.base {
            Some(base) => {
                let config = wanted.config.clone().map(String::into_bytes);
                let wishes = Wishes { keep, keeping: Keeping(wanted.keeping), config };
                Ok(roll::plan_roll(self.disk(), base, &wishes)?.map(Change::Roll))
            }
            None => Ok(roll::plan_back(self.disk(), keep)?.map(Change::Back)),
        }
    }

    /// A disk that was made larger than its image is so again.
    fn grow(&self, name: &str) -> Result<()> {
        let path = self.disk();
        let Some(before) = roll::size_before(path)? else { return Ok(()) };
        // One that runs has it by now, and is not to be opened.
        if peek(path)?.is_none_or(|seen| seen.size >= before) {
            return Ok(());
        }
        let disk = disk::open(path, &Use::reading())?;
        let device: Arc<dyn BlockDevice> = disk.clone();
        if let Err(why) = growable(&device) {
            let now = disk.size();
            let why = inside::plain(&why.to_string());
            eprintln!(
                "vdisk: warning: {name}: its disk had {before} bytes and has {now} now: {why}"
            );
            return Ok(());
        }
        drop((device, disk));
        let disk = disk::open(path, &Use::writing())?;
        resize::files(disk, before).map_err(|e| e.at_path(path))
    }
}

fn no_text(image: &str) -> Error {
    Error::corrupt(format!("the configuration of image {image} is no text"))
}

/// A change of a disk.
enum Change {
    Roll(roll::Roll),
    Back(Plan),
}

impl Change {
    fn plan(&self) -> &Plan {
        match self {
            Change::Roll(roll) => &roll.plan,
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
