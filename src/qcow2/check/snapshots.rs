//! Checking the snapshot table itself, before and after the references that it leads to.

use nix::libc::EIO;

use super::{Check, Repair};
use crate::error::{Error, Result};
use crate::qcow2::header::MAX_SNAPSHOTS;
use crate::qcow2::image::Image;
use crate::qcow2::snapshot::{OldTable, Table};

impl Image {
    /// Reads the snapshot table; notes what is wrong with it. With [`Repair::All`], what is over the
    /// limits is left out, and the table is to be written anew where anything was noted.
    ///
    /// # Errors
    /// With QEMU's error number where the table cannot be read: no reference in it would be counted.
    pub(super) fn check_snapshot_table(&self, check: &mut Check, repair: Repair) -> Result<Table> {
        let header = self.header();
        let mend = repair == Repair::All;
        let table = if mend {
            Table::read_mending(&*self.storage, &header)
        } else {
            Table::read(&*self.storage, &header)
        };
        let table = table.map_err(|error| {
            let over = header.snapshots.saturating_sub(MAX_SNAPSHOTS);
            let message = match error.message() {
                _ if over > 0 => format!(
                    "snapshot table too large\nYou can force-remove all {over} overhanging \
                     snapshots with qemu-img check -r all"
                ),
                why => format!("failed to read the snapshot table: {why}"),
            };
            Error::corrupt(message).with_os_error(error.raw_os_error().unwrap_or(EIO))
        })?;
        table.discarded.iter().for_each(|said| check.say(said.clone()));
        check.corruptions += table.shortened;
        if table.overhanging > 0 {
            // Now: what follows goes by the header. The rest of the table is a leak, which is found.
            let count = table.snapshots.len() as u32;
            self.update_header(|h| h.snapshots = count)?;
            check.corruptions_fixed += table.overhanging;
        }
        if header.version >= 3 {
            for (index, _) in table.snapshots.iter().enumerate().filter(|(_, s)| s.is_incomplete())
            {
                let verb = if mend { "Repairing" } else { "ERROR" };
                check.corruptions += 1;
                check.say(format!("{verb} snapshot table entry {index} is incomplete"));
            }
        }
        Ok(table)
    }

    /// Writes a table whose entries were found wanting; the refcounts are right by now.
    pub(super) fn mend_snapshot_table(&self, check: &mut Check, table: &Table) -> Result<()> {
        let header = self.header();
        let incomplete =
            table.snapshots.iter().filter(|s| header.version >= 3 && s.is_incomplete());
        let wanting = table.shortened + incomplete.count() as u64;
        if wanting == 0 {
            return Ok(());
        }
        self.write_back()?;
        let old = OldTable { offset: header.snapshots_offset, len: table.len };
        self.replace_snapshots(&table.snapshots, old)?;
        check.corruptions = check.corruptions.saturating_sub(wanting);
        check.corruptions_fixed += wanting;
        Ok(())
    }
}
