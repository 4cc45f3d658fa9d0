//! A change of a tree as a value: what its steps are.
//!
//! A step names layers by their ids and holds no open file, so a plan can be kept, shown and compared.
//! Of most steps the last thing that they do is durable and says itself, in a label, what is to come: that
//! is what an interrupted change is finished or taken back by (see [`crate::change::heal`]). The doc of each
//! says what stands after it, and which way a change that ends there goes.
//!
//! Some steps stand for others, which are worked out from the family when their turn comes
//! ([`Step::Fold`], [`Step::Resume`], [`Step::DropRest`], [`Step::LetGo`], [`Step::Collect`]).

use std::path::PathBuf;

use crate::image::{Id, Kept, Role};

/// One step of a change of a tree.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Opens the layer for writing and closes it: whoever else has it is named before anything changes;
    /// with `unless_cloned`, also who has made a clone of it.
    Claim { layer: Id, unless_cloned: bool },
    /// Opens the layer for reading and keeps it open for the [`Step::NewHead`] that will stand on it.
    Hold(Id),
    /// Opens the head for writing and keeps it open, where a step before has put it there: nobody else has
    /// the disk.
    HoldHead,
    /// Reads the head's bitmaps for the [`Step::NewHead`] to come. Nothing changes.
    ReadBitmaps,
    /// The head's file says that it is a frozen layer, and has that layer's name too. Taken back, until
    /// another file has the head's name: heal does what [`Step::Promote`] does.
    Demote(Demote),
    /// Makes a head that was marked frozen the head again. The second name goes first, then the mark.
    Promote,
    /// A new, empty delta on the layer `on` has the head's name, durably: from here on the change is done
    /// and only gone on with.
    NewHead { on: Id, bitmaps: bool },
    /// The same with the head that was made ready, on the layer of another disk.
    PutHead,
    /// The layer's label says its role, and how it comes back.
    Label(Relabel),
    /// The frozen layer has that name for people.
    Rename { layer: Id, name: String },
    /// The layer says that no clone stands on it: the user said so. Not taken back.
    ForgetClones(Id),
    /// The head says that it is another layer than the one that it is an old copy of.
    NewId,
    /// The file of a layer that was dropped is the head by its label, and is known by nothing else.
    BecomeHead,
    /// The bitmaps of the layers `into` say what those of `from` do, which stands below them. Harmless
    /// alone.
    TakeBitmaps { from: Id, into: Vec<Id> },
    /// The layer's file is as accessible as the one whose place it will take.
    BecomeAccessibleAs { layer: Id, like: Id },
    /// The layers `into`, which stand on `from`, hold all that it holds. Harmless alone, but in batches:
    /// there `from`, which is [`Role::Rising`], has given up what they have, and it is gone on with.
    FoldUp { from: Id, into: Vec<Id>, method: Method },
    /// The layer `into`, which is [`Role::Merging`], holds all that `from` does, which stands on it alone.
    /// Both stay open until the name is taken. It is gone on with.
    FoldDown { from: Id, into: Id, in_batches: bool },
    /// The layer `into` says of itself what `from` says, which it took in. It is gone on with: a file that
    /// carries the label of the one that stands on it takes that one's name.
    TakeLabel { from: Id, into: Id },
    /// The file has the name of another, whose place it takes, durably.
    TakeName { file: PathBuf, over: PathBuf },
    /// The layer stands on what `off` stands on, which it stood on and which is [`Role::Leaving`]. It is
    /// gone on with.
    MoveOff { layer: Id, off: Id },
    /// The layer holds all that the merged layer `onto` does, and stands on it again. It is gone on with:
    /// `onto` is [`Role::Returning`].
    MoveBack { layer: Id, onto: Id },
    /// The layer's file is gone.
    Remove(Id),
    /// The same, if it is still dropped or without a name, and nobody has made a clone of it.
    Discard(Id),
    /// The names in the disk's directory are durable.
    SyncNames,
    /// The label of the layer says again what its files look like.
    Stamp(Id),
    /// A disk in use stands on the layers that the files name by now.
    Reload,
    /// Folds a layer into its neighbour, as the family is by then.
    Fold(Fold),
    /// Goes on with the merge of a layer that was begun before.
    Resume(Id),
    /// Marks the layers that go with that one, which is [`Role::Dropping`]. A layer of which somebody has
    /// made a clone meanwhile stays what it is.
    DropRest(Id),
    /// Says which of these snapshots have stayed because of that. Nothing changes.
    RefuseLeft(Vec<Id>),
    /// Lets go of what some events dropped: what nothing stands on is removed, the rest has no name any
    /// more. Gone on with: an event of which a layer is missing does not come back.
    LetGo(Which),
    /// Removes layers without a name on which nothing stands; with `fold`, folds those on which one layer
    /// stands into it. The disk is right with each of them.
    Collect { fold: bool },
    /// What was asked for is done, and this goes with it: where there is no room for it, or somebody looks
    /// at a layer, it is left for later.
    IfPossible(Vec<Step>),
}

/// What the head's file says when it is frozen.
#[derive(Debug, Clone)]
pub(crate) struct Demote {
    pub role: Role,
    /// The snapshot's name, and what the user says of it; empty for what is none.
    pub name: String,
    pub description: String,
    pub kept: Option<Kept>,
    /// Whether its second name is durable before the next step, which puts another file at the first.
    pub durably: bool,
}

/// What the label of a layer is to say.
#[derive(Debug, Clone)]
pub(crate) struct Relabel {
    pub layer: Id,
    pub role: Role,
    pub kept: Option<Kept>,
    /// Refused where somebody has made a clone of it meanwhile.
    pub unless_cloned: bool,
}

/// The neighbour into which a merge folds a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// What the layer holds goes into the layers on it.
    Up,
    /// What the layer on it holds goes into the layer.
    Down,
}

/// How bytes get from one layer into another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// All are copied, and then what was copied goes.
    Copy,
    /// The host lets both layers refer to the same bytes; only what it cannot share is copied.
    Share,
    /// Some are copied and given back where they came from, then the next: little space is taken.
    Batches,
}

/// Where a merge goes, and how, and what it costs.
#[derive(Debug, Clone)]
pub(crate) struct Strategy {
    pub direction: Direction,
    pub method: Method,
    /// Bytes that are copied, shared, taken of the host meanwhile, and free afterwards.
    pub moved: u64,
    pub linked: u64,
    pub space: u64,
    pub freed: u64,
    /// Why this way and not another, for people.
    pub why: &'static str,
}

/// A layer to be folded into its neighbour.
#[derive(Debug, Clone)]
pub(crate) struct Fold {
    pub layer: Id,
    pub strategy: Strategy,
    /// How the layer is kept afterwards; the layers that were moved off it are noted in it.
    pub kept: Option<Kept>,
}

/// Which events are let go of.
#[derive(Debug, Clone)]
pub(crate) enum Which {
    All,
    /// These.
    Events(Vec<u64>),
    /// All but this one.
    AllBut(u64),
    /// Those that have no right to stay any more.
    Overdue,
}

impl Step {
    /// The label that says `role` alone, of a layer of which somebody may have made a clone.
    pub fn mark(layer: Id, role: Role, kept: Option<Kept>) -> Step {
        Step::Label(Relabel { layer, role, kept, unless_cloned: true })
    }

    /// The label of a snapshot that is one again.
    pub fn restore(layer: Id) -> Step {
        Step::Label(Relabel { layer, role: Role::Snapshot, kept: None, unless_cloned: false })
    }
}
