//! Merging a snapshot of a disk in use, behind its user's reads and writes.
//!
//! *Up*, into the layer above: what only the snapshot's layer holds is copied. Where the layer above
//! is the head, each cluster is copied under its in-flight entry, so that no write of the guest is
//! lost; where it is frozen, the copy goes into its file by a second way in, and the chain reads on
//! through the first, which stays right: nothing that it maps moves.
//!
//! *Down*, from the frozen layer above into the snapshot's: only whole clusters are written that the
//! layer above hides. What the chain reads of the layer itself stands where it stood.
//!
//! Then the layers are exchanged in memory in one moment, and after that the files say so. What a
//! crash leaves at any point, the next open finishes, as for an idle disk.

use std::fs::FileTimes;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::{Live, Turn};
use crate::block::BlockDevice;
use crate::chain::cost::{cost, data_bytes, look};
use crate::chain::fold::{self, Meter, Source};
use crate::chain::merge::{Progress, fold_up};
use crate::chain::open::{OpenOptions, open_file, open_image, peek};
use crate::chain::snapshot::unprotected;
use crate::chain::tree::{Family, Member, refuse_clones, same_file};
use crate::chain::{Chain, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, Role};
use crate::storage::draft::{remove, rename, sync_directory};
use crate::storage::{Access, FileOptions, FileStorage};

/// Bytes that are copied at a time: the guest waits for no more than that.
const CHUNK: u64 = 256 << 10;
/// How often somebody who slows a merge down looks whether it is to stop.
const NAP: Duration = Duration::from_millis(20);
/// What a merge upwards leaves that did not end.
const UNCHANGED: &str = "the disk and its snapshots are as they were";
/// What a merge downwards leaves that did not end.
const UNFINISHED: &str =
    "the disk is as it was; the merge is finished by running it again, or by the next writer";

/// Says how far a merge is, slows it down and stops it.
struct Pace<'a, 'p> {
    turn: &'a Turn<'a>,
    progress: &'a mut Progress<'p>,
    rate: Option<u64>,
    since: Instant,
    /// Bytes that were copied into other layers before.
    before: u64,
    total: u64,
}

impl Pace<'_, '_> {
    /// Notes that `done` bytes of this part were copied, and waits as long as the rate asks; `false`
    /// where it is to stop.
    fn goes_on(&mut self, done: u64) -> bool {
        let done = self.before + done;
        loop {
            self.turn.at(done, self.total);
            if !(self.progress)(done, self.total) {
                return false;
            }
            let Some(rate) = self.rate.filter(|r| *r > 0) else { return true };
            let due = Duration::from_secs_f64(done as f64 / rate as f64);
            let early = due.saturating_sub(self.since.elapsed());
            if early.is_zero() {
                return true;
            }
            std::thread::sleep(early.min(NAP));
        }
    }

    /// Makes the head of `chain` hold what only `below`, the layer below it, holds.
    fn copy_up(&mut self, chain: &Chain, below: &Layer) -> Result<()> {
        let total = self.total;
        let mut progress = |done, _| self.goes_on(done);
        let mut meter = Meter::new(&mut progress, total, UNCHANGED).in_chunks(CHUNK);
        fold::up_metered(chain, &Source::below(below, false), &mut meter)
    }

    /// Writes what `upper` holds into `lower`, durably.
    fn copy_down(&mut self, upper: &Layer, lower: &Chain) -> Result<()> {
        let total = self.total;
        let mut progress = |done, _| self.goes_on(done);
        let mut meter = Meter::new(&mut progress, total, UNFINISHED).in_chunks(CHUNK);
        fold::down(upper, lower, false, &mut meter)
    }
}

/// A file of the chain that nobody else may have open meanwhile.
struct Alone(Arc<FileStorage>);

impl Alone {
    fn with(layer: &Layer) -> Result<Alone> {
        layer.file.relock(Access::Write)?;
        Ok(Alone(layer.file.clone()))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        // What fails here is a lock that lasts too long: it keeps readers out.
        let _ = self.0.relock(Access::Read);
    }
}

/// A frozen layer of the chain that is written by a second way in. Nobody else has it meanwhile.
struct Writer {
    chain: Chain,
    _time: Option<KeptTime>,
    _alone: Alone,
}

/// Gives a file that shows what it showed the time of its last write back: clones that stand on it
/// go on taking it for what it is.
struct KeptTime(Arc<FileStorage>, SystemTime);

impl KeptTime {
    fn of(layer: &Layer) -> Option<KeptTime> {
        let modified = layer.file.file().metadata().and_then(|meta| meta.modified()).ok()?;
        Some(KeptTime(layer.file.clone(), modified))
    }
}

impl Drop for KeptTime {
    fn drop(&mut self) {
        // Where that fails, the clones ask the user what to make of it.
        let _ = self.0.file().set_times(FileTimes::new().set_modified(self.1));
    }
}

impl Writer {
    /// Opens `layers[number]`, on those below it, for writing.
    fn open(layers: &[Layer], number: usize, same_contents: bool) -> Result<Writer> {
        let layer = &layers[number];
        if layer.image.details().is_some_and(|d| d.data_file.is_some()) {
            let message = "keeps its data in another file: stop the disk to merge it";
            return Err(Error::unsupported(message).at_path(&layer.path));
        }
        let alone = Alone::with(layer)?;
        let time = if same_contents { KeptTime::of(layer) } else { None };
        let options = FileOptions { access: None, write: true };
        let file = Arc::new(FileStorage::open(&layer.path, options)?);
        if file.identity()? != layer.file.identity()? {
            let message = "is not the file that is in use: it was replaced";
            return Err(Error::invalid(message).at_path(&layer.path));
        }
        let options = OpenOptions { same_contents, format: Some(layer.format), ..unprotected() };
        let head = open_file(&layer.path, file, &options)?;
        let memory = OpenOptions::default().cache / 2;
        let chain = Chain::new(head, layers[number + 1..].to_vec(), memory);
        Ok(Writer { chain, _time: time, _alone: alone })
    }

    fn image(&self) -> Arc<dyn Image> {
        self.chain.head().image
    }
}

/// Opens a layer that is open already once more, by the same file and under its lock.
fn reopen(layer: &Layer) -> Result<Layer> {
    let format = Some(layer.format);
    let options = OpenOptions { unprotected: true, format, ..OpenOptions::default() };
    open_file(&layer.path, layer.file.clone(), &options)
}

impl Live {
    /// Merges the snapshot `name` into a neighbour: the name goes, no change is lost. At most `rate`
    /// bytes are copied in a second, if that is given.
    ///
    /// # Errors
    /// As for an idle disk; [`ErrorKind::Interrupted`] where `progress` asked to stop.
    pub fn merge(&self, name: &str, rate: Option<u64>, progress: &mut Progress<'_>) -> Result<()> {
        let turn = self.begin(format!("merge of snapshot '{name}'"))?;
        let family = Family::of(&self.path)?;
        let merging = |m: &&Member| m.label.role == Role::Merging && m.label.name == name;
        let unfinished = family.layers.iter().find(merging);
        let layer = unfinished.map_or_else(|| family.snapshot(name), Ok)?;
        refuse_clones(layer)?;
        let children = family.children(layer.label.layer);
        if children.is_empty() {
            let message = format!(
                "nothing stands on snapshot '{name}', so there is nothing to merge it with: delete it"
            );
            return Err(Error::invalid(message).at_path(&self.path));
        }
        let since = Instant::now();
        let mut pace = Pace { turn: &turn, progress, rate, since, before: 0, total: 0 };
        let layers = self.chain.all_layers();
        let number = layers.iter().position(|l| same_file(&l.path, &layer.path));
        if let Some(number) = number.filter(|n| *n > 1) {
            let only =
                children.len() == 1 && same_file(&children[0].path, &layers[number - 1].path);
            if only && (unfinished.is_some() || goes_down(&layers, number)?) {
                return self.merge_down(&layers, number, (layer, children[0]), &mut pace);
            }
        }
        if unfinished.is_some() {
            let message = "has a merge that was interrupted: stop the disk to finish it";
            return Err(Error::new(ErrorKind::InUse, message).at_path(&self.path));
        }
        self.merge_up(&layers, number, layer, &children, &mut pace)
    }

    fn merge_up(
        &self,
        layers: &[Layer],
        number: Option<usize>,
        layer: &Member,
        children: &[&Member],
        pace: &mut Pace<'_, '_>,
    ) -> Result<()> {
        let in_chain = |m: &&&Member| layers.iter().any(|l| same_file(&l.path, &m.path));
        let held = data_bytes(&*look(layer)?.image)?;
        pace.total = held.saturating_mul(children.len() as u64);
        for child in children.iter().filter(|m| !in_chain(m)) {
            fold_up(child, layer, false, &mut |done, _| pace.goes_on(done))?;
            pace.before += held;
        }
        let Some(number) = number.filter(|n| *n > 0) else {
            // Beside the disk's own line; or the head holds all of it since an earlier attempt.
            return self.leave_locked(layer, None, None);
        };
        if !children.iter().any(|m| same_file(&m.path, &layers[number - 1].path)) {
            let message = "is not made of the layers that its files name; reopen it";
            return Err(Error::corrupt(message).at_path(&self.path));
        }
        let alone = Alone::with(&layers[number])?;
        let without: Vec<Layer> = [&layers[1..number], &layers[number + 1..]].concat();
        if number == 1 {
            pace.copy_up(&self.chain, &layers[1])?;
            self.chain.flush()?;
            return self.exchange_and_leave(layers, without, (layer, alone), None);
        }
        let writer = Writer::open(layers, number - 1, true)?;
        pace.copy_up(&writer.chain, &layers[number])?;
        writer.chain.flush()?;
        writer.chain.flush()?;
        let mut without = without;
        without[number - 2] = reopen(&layers[number - 1])?;
        self.exchange_and_leave(layers, without, (layer, alone), Some((number - 2, writer)))
    }

    /// Lets the chain go on without the layer, whose child holds all of it, and takes it away.
    fn exchange_and_leave(
        &self,
        layers: &[Layer],
        without: Vec<Layer>,
        (layer, alone): (&Member, Alone),
        child: Option<(usize, Writer)>,
    ) -> Result<()> {
        self.chain.replace_lower(without);
        let writer = child.as_ref().map(|(_, writer)| writer);
        if let Err(error) = self.leave_locked(layer, Some(&alone), writer) {
            // As the files say; what is shown is the same.
            self.chain.replace_lower(layers[1..].to_vec());
            return Err(error);
        }
        if let Some((at, writer)) = child {
            drop(writer);
            // What its header says now.
            let lower = self.chain.all_layers();
            if let Some(Ok(fresh)) = lower.get(at + 1).map(reopen) {
                self.chain.replace_layer(at, fresh);
            }
        }
        Ok(())
    }

    /// Takes a layer away that its children hold all of. It is locked already where it is `alone`.
    fn leave_locked(
        &self,
        layer: &Member,
        alone: Option<&Alone>,
        child: Option<&Writer>,
    ) -> Result<()> {
        let open = match alone {
            None => open_image(&layer.path, &unprotected())?,
            Some(_) => {
                let options = FileOptions { access: None, write: true };
                let file = Arc::new(FileStorage::open(&layer.path, options)?);
                open_file(&layer.path, file, &unprotected())?
            }
        };
        let mut identity = open.image.identity()?;
        if let Some(label) = &mut identity.label {
            label.role = Role::Leaving;
        }
        open.image.set_identity(&identity).map_err(|e| e.at_path(&layer.path))?;
        drop(open);
        let family = Family::of(&self.path)?;
        self.move_children(&family, layer, child)?;
        remove(&layer.path)?;
        sync_directory(&self.path)
    }

    /// Goes on with a merge that has marked its layer, and was interrupted then.
    pub(super) fn leave(&self, family: &Family, layer: &Member) -> Result<()> {
        let layers = self.chain.all_layers();
        if let Some(number) = layers.iter().position(|l| same_file(&l.path, &layer.path)) {
            let without: Vec<Layer> = [&layers[1..number], &layers[number + 1..]].concat();
            self.chain.replace_lower(without);
        }
        drop(layers);
        self.move_children(family, layer, None)?;
        remove(&layer.path)?;
        sync_directory(&self.path)
    }

    /// Lets the layers that stand on `layer` stand on what it stands on.
    fn move_children(
        &self,
        family: &Family,
        layer: &Member,
        writer: Option<&Writer>,
    ) -> Result<()> {
        let layers = self.chain.all_layers();
        for child in family.children(layer.label.layer) {
            let number = layers.iter().position(|l| same_file(&l.path, &child.path));
            let in_writer =
                writer.filter(|w| same_file(&w.chain.head().path, &child.path)).map(Writer::image);
            let (image, _writer) = match (number, in_writer) {
                (_, Some(image)) => (image, None),
                (Some(0), _) => (layers[0].image.clone(), None),
                (Some(number), _) => {
                    let writer = Writer::open(&layers, number, true)?;
                    (writer.image(), Some(writer))
                }
                (None, _) => (open_image(&child.path, &unprotected())?.image, None),
            };
            let mut identity = image.identity()?;
            identity.backing = layer.peek.identity.backing.clone();
            if let Some(label) = &mut identity.label {
                label.parent = layer.label.parent;
            }
            image.set_identity(&identity).map_err(|e| e.at_path(&child.path))?;
        }
        Ok(())
    }

    /// Folds the frozen layer above `layers[number]`, its only child, into it.
    fn merge_down(
        &self,
        layers: &[Layer],
        number: usize,
        (layer, child): (&Member, &Member),
        pace: &mut Pace<'_, '_>,
    ) -> Result<()> {
        let upper = &layers[number - 1];
        pace.total = data_bytes(&*upper.image)?;
        // Nobody may change it, or begin to read it by its old name, meanwhile.
        let _upper = Alone::with(upper)?;
        let lower = Writer::open(layers, number, false)?;
        let done = self.copy_and_rename(upper, &lower, (layer, child), pace);
        drop(lower);
        let renamed = done.is_ok();
        let at = if renamed { &child.path } else { &layer.path };
        // The file's tables are others than when it was opened.
        let fresh = Layer { path: at.clone(), ..layers[number].clone() };
        let fresh = reopen(&fresh)?;
        let mut now = layers[1..].to_vec();
        now[number - 1] = fresh;
        if renamed {
            now.remove(number - 2);
        }
        self.chain.replace_lower(now);
        done
    }

    fn copy_and_rename(
        &self,
        upper: &Layer,
        lower: &Writer,
        (layer, child): (&Member, &Member),
        pace: &mut Pace<'_, '_>,
    ) -> Result<()> {
        let image = lower.image();
        let mut identity = image.identity()?;
        if let Some(label) = &mut identity.label {
            label.role = Role::Merging;
        }
        image.set_identity(&identity).map_err(|e| e.at_path(&layer.path))?;
        pace.copy_down(upper, &lower.chain)?;
        lower.chain.flush()?;
        let missing = || Error::corrupt("has lost its label").at_path(&child.path);
        let mut identity = peek(&child.path)?.ok_or_else(missing)?.identity;
        identity.backing = image.backing();
        if let Some(label) = &mut identity.label {
            label.parent = layer.label.parent;
        }
        image.set_identity(&identity).map_err(|e| e.at_path(&layer.path))?;
        rename(&layer.path, &child.path)?;
        sync_directory(&self.path)
    }
}

/// Whether `layers[number]` takes in the layer above it for less than the other way round, and
/// nothing of it that shows has to move for that.
fn goes_down(layers: &[Layer], number: usize) -> Result<bool> {
    let (upper, lower) = (&*layers[number - 1].image, &*layers[number].image);
    let whole = upper.granularity().bits() >= lower.cluster().bits();
    if !whole || upper.size() < lower.size() {
        return Ok(false);
    }
    let cost = cost(upper, lower)?;
    Ok(cost.upper < cost.only_lower)
}
