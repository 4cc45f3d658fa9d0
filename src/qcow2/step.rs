//! The steps that the engine announces to its storage, by the names that QEMU's `blkdebug` has for
//! them: what makes faults happen at a known point of an operation.
//!
//! An announcement changes nothing. Where the engine does in one write what QEMU does in several,
//! it announces each of them before it.

/// Entries of an L1 table are written.
pub const L1_UPDATE: &str = "l1_update";
/// A longer L1 table: room for it, its bytes, the header that points to it.
pub const L1_GROW: [&str; 3] =
    ["l1_grow.alloc_table", "l1_grow.write_table", "l1_grow.activate_table"];
/// A shorter L1 table: its entries, what they led to.
pub const L1_SHRINK: [&str; 2] = ["l1_shrink.write_table", "l1_shrink.free_l2_clusters"];
/// A part of an L2 table is read.
pub const L2_LOAD: &str = "l2_load";
/// L2 entries are written.
pub const L2_UPDATE: &str = "l2_update";
/// A new L2 table is copied from a shared one, and written.
pub const L2_ALLOC: [&str; 2] = ["l2_alloc.cow_read", "l2_alloc.write"];
/// The guest's bytes are read.
pub const READ: &str = "read_aio";
/// Compressed bytes are read.
pub const READ_COMPRESSED: &str = "read_compressed";
/// The guest's bytes are written.
pub const WRITE: &str = "write_aio";
/// Compressed bytes are written.
pub const WRITE_COMPRESSED: &str = "write_compressed";
/// The refcount table is read.
pub const REFTABLE_LOAD: &str = "reftable_load";
/// The refcount table moves to a place with more room.
pub const REFTABLE_GROW: &str = "reftable_grow";
/// The refcount table is replaced.
pub const REFTABLE_UPDATE: &str = "reftable_update";
/// A part of a refcount block is read.
pub const REFBLOCK_LOAD: &str = "refblock_load";
/// Parts of refcount blocks are written.
pub const REFBLOCK_UPDATE: &str = "refblock_update_part";
/// A refcount block is made.
pub const REFBLOCK_ALLOC: &str = "refblock_alloc";
/// Entries of new refcount blocks are written to the table.
pub const REFBLOCK_HOOKUP: &str = "refblock_alloc.hookup";
/// A refcount table that moved is written, and the header that points to it.
pub const REFBLOCK_TABLE: [&str; 2] = ["refblock_alloc.write_table", "refblock_alloc.switch_table"];
/// Clusters are allocated for metadata.
pub const CLUSTER_ALLOC: &str = "cluster_alloc";
/// Room for compressed bytes is allocated.
pub const CLUSTER_ALLOC_BYTES: &str = "cluster_alloc_bytes";
/// Clusters lose a reference.
pub const CLUSTER_FREE: &str = "cluster_free";
/// All that was changed is brought to the file, and made durable.
pub const FLUSH: [&str; 2] = ["flush_to_os", "flush_to_disk"];
/// The places of the first tables of an emptied image are cleared.
pub const EMPTY_IMAGE_PREPARE: &str = "empty_image_prepare";
