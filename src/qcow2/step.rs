//! The steps that the engine announces to its storage: what makes faults happen at a known point of an
//! operation.
//!
//! An announcement changes nothing. Steps that are taken in one write are each announced before it.

use crate::storage::Step;

/// Entries of an L1 table are written.
pub const L1_UPDATE: Step = Step::WriteRoot;
/// A longer L1 table: room for it, its bytes, the header that points to it.
pub const L1_GROW: [Step; 3] = [Step::GrowRoot, Step::WriteGrownRoot, Step::SwitchRoot];
/// A shorter L1 table: its entries, what they led to.
pub const L1_SHRINK: [Step; 2] = [Step::ShrinkRoot, Step::FreeCutMap];
/// A part of an L2 table is read.
pub const L2_LOAD: Step = Step::LoadMap;
/// L2 entries are written.
pub const L2_UPDATE: Step = Step::WriteMap;
/// A new L2 table is copied from a shared one, and written.
pub const L2_ALLOC: [Step; 2] = [Step::CopyMap, Step::NewMap];
/// The guest's bytes are read.
pub const READ: Step = Step::ReadData;
/// Compressed bytes are read.
pub const READ_COMPRESSED: Step = Step::ReadCompressed;
/// The guest's bytes are written.
pub const WRITE: Step = Step::WriteData;
/// Compressed bytes are written.
pub const WRITE_COMPRESSED: Step = Step::WriteCompressed;
/// The refcount table is read.
pub const REFTABLE_LOAD: Step = Step::LoadCountTable;
/// The refcount table moves to a place with more room.
pub const REFTABLE_GROW: Step = Step::GrowCountTable;
/// The refcount table is replaced.
pub const REFTABLE_UPDATE: Step = Step::ReplaceCountTable;
/// A part of a refcount block is read.
pub const REFBLOCK_LOAD: Step = Step::LoadCounts;
/// Parts of refcount blocks are written.
pub const REFBLOCK_UPDATE: Step = Step::WriteCounts;
/// A refcount block is made.
pub const REFBLOCK_ALLOC: Step = Step::NewCounts;
/// Entries of new refcount blocks are written to the table.
pub const REFBLOCK_HOOKUP: Step = Step::LinkCounts;
/// A refcount table that moved is written, and the header that points to it.
pub const REFBLOCK_TABLE: [Step; 2] = [Step::WriteGrownCountTable, Step::SwitchCountTable];
/// Clusters are allocated for metadata.
pub const CLUSTER_ALLOC: Step = Step::Allocate;
/// Room for compressed bytes is allocated.
pub const CLUSTER_ALLOC_BYTES: Step = Step::AllocateCompressed;
/// Clusters lose a reference.
pub const CLUSTER_FREE: Step = Step::Free;
/// All that was changed is brought to the file, and made durable.
pub const FLUSH: Step = Step::Flush;
/// The places of the first tables of an emptied image are cleared.
pub const EMPTY_IMAGE_PREPARE: Step = Step::ClearFirstTables;
