//! What a format is about to do with its storage: points of an operation at which a storage that fails on
//! purpose may wait.

/// A step that a format announces by [`Storage::about_to`](super::Storage::about_to), before it takes it.
///
/// A *map* is what leads from a guest's clusters to those of the host, in a *root* and in tables below
/// it; *counts* are the reference counts of the host's clusters, in blocks that a table leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// The guest's bytes are read.
    ReadData,
    /// The guest's bytes are written.
    WriteData,
    /// Compressed bytes are read.
    ReadCompressed,
    /// Compressed bytes are written.
    WriteCompressed,
    /// A part of a table of the map is read.
    LoadMap,
    /// Entries of a table of the map are written.
    WriteMap,
    /// What a new table of the map takes over from a shared one is read.
    CopyMap,
    /// A new table of the map is written.
    NewMap,
    /// Entries of the map's root are written.
    WriteRoot,
    /// Room is taken for a longer root.
    GrowRoot,
    /// A longer root is written.
    WriteGrownRoot,
    /// The header is pointed to a longer root.
    SwitchRoot,
    /// A root is cut.
    ShrinkRoot,
    /// What a root's cut entries led to is given back.
    FreeCutMap,
    /// The table of the counts is read.
    LoadCountTable,
    /// The table of the counts moves to a place with more room.
    GrowCountTable,
    /// A table of the counts that moved is written.
    WriteGrownCountTable,
    /// The header is pointed to a table of the counts that moved.
    SwitchCountTable,
    /// The table of the counts is replaced.
    ReplaceCountTable,
    /// A part of a block of counts is read.
    LoadCounts,
    /// Parts of blocks of counts are written.
    WriteCounts,
    /// A block of counts is made.
    NewCounts,
    /// Entries of new blocks of counts are written to their table.
    LinkCounts,
    /// Clusters are allocated for tables.
    Allocate,
    /// Room for compressed bytes is allocated.
    AllocateCompressed,
    /// Clusters lose a reference.
    Free,
    /// The places of the first tables of an emptied image are cleared.
    ClearFirstTables,
    /// All that was changed is brought to the file, and made durable.
    Flush,
}
