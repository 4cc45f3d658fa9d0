//! Every change of a disk's tree: planned, executed on idle disks and on those in use, and finished or
//! rolled back where it was interrupted.
//!
//! A change is a value, a list of [steps](run::step::Step). A verb (`merge`, `delete`, `undo`, `forget`,
//! `snapshot`, `roll`) makes it of the family's labels, with a [description](plan::Plan) for people; one
//! interpreter, [`run`], does it, whether the disk is idle or in use; [`heal`] makes of what an
//! interrupted change left the steps that finish it or take it back. No verb knows another, and none
//! the interpreter. Nothing here sees an L2 entry or names a concrete format.
//!
//! Steps name layers by the ids in their labels. What [`base`] does is therefore none: a clone, a rebase and a
//! commit concern one head and what it stands on, which may carry no label (an overlay of QEMU's, a raw base) and
//! is another disk's. Each is in order after every write of its own, and one that was interrupted is finished by
//! the same command. A roll is both: its new head is made there, and put in place by steps.
//!
//! # Locks
//!
//! Those of the whole program, in the order in which they are taken: who holds one takes none that stands
//! above it.
//!
//! | lock | keeps out | is held |
//! |---|---|---|
//! | the running change of a [`live::Live`] disk | other changes of that disk in this process, which are refused | for the change |
//! | the [turn](crate::storage::Turn), a byte of the directory | other processes' changes of the disk | for the change of an idle disk, and while it is healed; the thread may take it again |
//! | QEMU's bytes of a layer's file | other writers of the layer, or whoever reads it, too | while it is open: the head first, then from the top down |
//! | byte `PASSING` of the file | nobody: who finds a layer held waits for it, since its holder is a command and will be gone | while it is open |
//! | byte `TURN_BYTE` of the file | others who change the label of a layer that is being read | for one label |
//! | a chain's `publishing` | flushes | from a new head's being put on the old one to its being found on the host; shared for the look at the head |
//! | a chain's space | others who find the host full | while what is kept aside is let go of |
//! | a chain's `layers` | requests, which share it | for an exchange in memory |
//! | an image's `grace` | the giving away of clusters that requests read, which share it | for the moment in which freed clusters become free |
//! | an entry of a chain's `inflight` | other changes of the mapping of those clusters | for one allocating write; a thread has one |
//! | the image's own, in the order that [`crate::qcow2`] tells: `writeback`, `tables`, `refcounts`, … | other changes of its metadata | for the work in memory |
//! | a flattened map's pages | others who fill one | for a look |
//!
//! A write that finds the host full has let go of all of these before it asks for space.

pub mod apply;
mod base;
mod delete;
mod event;
mod execute;
mod forget;
pub(crate) mod heal;

pub mod live;
pub mod merge;
mod names;
mod open;
pub mod plan;
mod release;
mod remove;
mod run;
pub mod snapshot;
mod strategy;
mod undo;

pub use base::clone::{Base, remembered, unseal};
pub use base::marks::{Bases, mark_below};
pub(crate) use base::marks::{Clone, mark, unmark};
pub use base::{commit, preview, rebase, roll};
pub use delete::Wishes as DeleteWishes;
pub use open::{open, with_space};
pub use remove::{Removal, plan_remove};
