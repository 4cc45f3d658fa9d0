//! QEMU's names for the steps of a format: what the rules of `blkdebug` wait for.

use vdisk::storage::Step;

/// The events that happen at a step, in their order: QEMU does some things in two that are one here.
pub fn of(step: Step) -> &'static [&'static str] {
    match step {
        Step::ReadData => &["read_aio"],
        Step::WriteData => &["write_aio"],
        Step::ReadCompressed => &["read_compressed"],
        Step::WriteCompressed => &["write_compressed"],
        Step::LoadMap => &["l2_load"],
        Step::WriteMap => &["l2_update"],
        Step::CopyMap => &["l2_alloc.cow_read"],
        Step::NewMap => &["l2_alloc.write"],
        Step::WriteRoot => &["l1_update"],
        Step::GrowRoot => &["l1_grow.alloc_table"],
        Step::WriteGrownRoot => &["l1_grow.write_table"],
        Step::SwitchRoot => &["l1_grow.activate_table"],
        Step::ShrinkRoot => &["l1_shrink.write_table"],
        Step::FreeCutMap => &["l1_shrink.free_l2_clusters"],
        Step::LoadCountTable => &["reftable_load"],
        Step::GrowCountTable => &["reftable_grow"],
        Step::WriteGrownCountTable => &["refblock_alloc.write_table"],
        Step::SwitchCountTable => &["refblock_alloc.switch_table"],
        Step::ReplaceCountTable => &["reftable_update"],
        Step::LoadCounts => &["refblock_load"],
        Step::WriteCounts => &["refblock_update_part"],
        Step::NewCounts => &["refblock_alloc"],
        Step::LinkCounts => &["refblock_alloc.hookup"],
        Step::Allocate => &["cluster_alloc"],
        Step::AllocateCompressed => &["cluster_alloc_bytes"],
        Step::Free => &["cluster_free"],
        Step::ClearFirstTables => &["empty_image_prepare"],
        Step::Flush => &["flush_to_os", "flush_to_disk"],
    }
}
