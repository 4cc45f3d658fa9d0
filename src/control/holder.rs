//! A disk that this process holds, and what commands may ask of it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use serde_json::{Value, json};

use super::place;
use super::server::{Bound, Names, Server, Service};
use super::wire::{Named, Request};
use crate::block::BlockDevice;
use crate::chain::Layer;
use crate::change::DeleteWishes;
use crate::change::live::{Live, Quiesce};
use crate::change::merge::{Progress, Wishes};
use crate::change::plan::Keeping;
use crate::error::{Error, Result};
use crate::image::Check;

/// What a disk is held for, and what has to follow when it changes.
pub trait Kind: Send + Sync {
    /// Such as `mounted at /mnt`.
    fn doing(&self) -> String;

    /// Who can bring the disk's file system to rest.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) says why nobody here can.
    fn quiesce(&self) -> Result<&dyn Quiesce>;

    /// Whether the user of the disk comes to rest for every snapshot, because it is this process
    /// itself and he hardly notices.
    fn rests(&self) -> bool {
        false
    }

    /// Tells the user of the disk its new size in bytes.
    fn resized(&self, size: u64) -> Result<()>;

    /// Notes that the disk may have other snapshots now.
    fn rearranged(&self) {}
}

/// A disk held for something.
pub struct Holder {
    live: Live,
    kind: Arc<dyn Kind>,
    names: OnceLock<Names>,
    /// What the names of its sockets begin with: a file without a label has another one from its
    /// first snapshot on.
    prefix: Mutex<String>,
}

impl Holder {
    /// Makes a socket for commands about the disk `live`.
    pub fn bind(live: Live, kind: Arc<dyn Kind>) -> Result<Bound> {
        let prefix = place::prefix(live.path())?;
        let name = socket(&prefix);
        let (names, prefix) = (OnceLock::new(), Mutex::new(prefix));
        live.held_for(kind.doing());
        let holder = Arc::new(Holder { live, kind, names, prefix });
        let bound = Server::bind(&name, holder.clone())?;
        let _ = holder.names.set(bound.names());
        Ok(bound)
    }

    /// Lets the disk be found by what it is called now.
    fn follow_name(&self) -> Result<()> {
        let now = place::prefix(self.live.path())?;
        let mut prefix = self.prefix.lock().unwrap_or_else(|e| e.into_inner());
        if *prefix != now {
            self.names.get().map_or(Ok(()), |names| names.also(&socket(&now)))?;
            *prefix = now;
        }
        Ok(())
    }

    fn info(&self) -> Value {
        let info = self.live.info();
        let running = info.running.map(|r| {
            json!({
                "what": r.what,
                "seconds": r.since.elapsed().as_secs_f64(),
                "done": r.done,
                "total": r.total,
            })
        });
        json!({
            "pid": std::process::id(),
            "doing": self.kind.doing(),
            "disk": self.live.path().to_string_lossy(),
            "virtual_size": info.size,
            "layers": info.layers.iter().map(|l| l.to_string_lossy()).collect::<Vec<_>>(),
            "running": running,
        })
    }

    fn snapshot(&self, name: &str, description: &str, freeze: bool) -> Result<Value> {
        let rests = freeze || self.kind.rests();
        let user = if rests { Some(self.kind.quiesce()?) } else { None };
        let pause = self.live.snapshot(name, description, user)?;
        self.follow_name()?;
        Ok(json!({ "pause_us": micros(pause) }))
    }

    fn diff(&self, from: &str, to: Option<&str>) -> Result<Value> {
        let changes = self.live.diff(from, to)?;
        let rows: Vec<Value> = changes.iter().map(|c| json!([c.start, c.len, c.zero])).collect();
        Ok(json!({ "changes": rows }))
    }

    fn check(&self, chain: bool) -> Result<Value> {
        let found = self.live.check(chain)?;
        let layer = |(layer, check): &(Layer, Check)| {
            json!({
                "filename": layer.path.to_string_lossy(),
                "format": layer.format.name(),
                "corruptions": check.corruptions,
                "leaks": check.leaks,
                "check_errors": check.errors,
                "corruptions_fixed": check.corruptions_fixed,
                "leaks_fixed": check.leaks_fixed,
                "total_clusters": check.total_clusters,
                "allocated_clusters": check.allocated_clusters,
                "fragmented_clusters": check.fragmented_clusters,
                "compressed_clusters": check.compressed_clusters,
                "image_end_offset": check.image_end_offset,
                "messages": check.messages,
            })
        };
        Ok(json!({ "layers": found.iter().map(layer).collect::<Vec<_>>() }))
    }

    fn compact(&self, told: &mut Progress<'_>) -> Result<Value> {
        let done = self.live.compact(told)?;
        Ok(json!({ "zeroes": done.zeroes, "before": done.before, "after": done.after }))
    }
}

fn keeping(milliseconds: Option<u64>) -> Keeping {
    milliseconds.map_or_else(Keeping::default, |ms| Keeping(Duration::from_millis(ms)))
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A name of a socket that no other has.
fn socket(prefix: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("{prefix}{}-{}.sock", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Service for Holder {
    fn holds(&self, disk: Named) -> bool {
        let head = self.live.chain().head().file.identity();
        head.is_ok_and(|head| head == (disk.device, disk.inode))
    }

    fn serve(&self, request: &Request, told: &mut Progress<'_>) -> Result<Value> {
        let done = self.answer(request, told);
        if changes_tree(request) {
            // Also where it failed: it may have come some way.
            self.kind.rearranged();
        }
        done
    }
}

/// Whether a request is for other snapshots.
fn changes_tree(request: &Request) -> bool {
    match request {
        Request::Snapshot { .. }
        | Request::Merge { .. }
        | Request::Delete { .. }
        | Request::Undo { .. }
        | Request::Forget { .. }
        | Request::Rename { .. } => true,
        Request::Info
        | Request::Revert { .. }
        | Request::Resize { .. }
        | Request::Check { .. }
        | Request::Compact
        | Request::Diff { .. }
        | Request::Instance { .. }
        | Request::Wait => false,
    }
}

impl Holder {
    fn answer(&self, request: &Request, told: &mut Progress<'_>) -> Result<Value> {
        match request {
            Request::Info => Ok(self.info()),
            Request::Snapshot { name, description, freeze } => {
                self.snapshot(name, description, *freeze)
            }
            Request::Merge { name, rate, keep, in_batches, even_if_cloned, seen } => {
                let (keeping, in_batches) = (keeping(*keep), *in_batches);
                let even_if_cloned = *even_if_cloned;
                let wishes = Wishes { keeping, in_batches, in_use: true, even_if_cloned };
                self.live.merge(name, wishes, *rate, *seen, told).map(|()| Value::Null)
            }
            Request::Delete { name, tree, even_if_cloned, keep, seen } => {
                let (tree, even_if_cloned) = (*tree, *even_if_cloned);
                let how = DeleteWishes { tree, keeping: keeping(*keep), even_if_cloned };
                self.live.delete(name, how, *seen, told).map(|()| Value::Null)
            }
            Request::Undo { keep_as, seen } => {
                self.live.undo(keep_as.as_deref(), *seen, told).map(|()| Value::Null)
            }
            Request::Forget { even_if_cloned, seen } => {
                self.live.forget(*even_if_cloned, *seen, told).map(|()| Value::Null)
            }
            Request::Rename { old, new } => self.live.rename(old, new).map(|()| Value::Null),
            Request::Revert { name } => Err(self.live.revert(name)),
            Request::Resize { size } => {
                let old = self.live.chain().size();
                self.live.resize(*size)?;
                self.kind.resized(*size)?;
                Ok(json!({ "old": old, "new": size }))
            }
            Request::Check { chain } => self.check(*chain),
            Request::Compact => self.compact(told),
            Request::Diff { from, to } => self.diff(from, to.as_deref()),
            Request::Wait => Err(Error::invalid("the end is waited for elsewhere")),
            Request::Instance { .. } => {
                Err(Error::unsupported("this holds a disk and is no instance"))
            }
        }
    }
}
