//! Images of every foreign format, made by QEMU and by hand, read back and damaged.

use std::io::{IoSlice, IoSliceMut, Read};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::parallels::Parallels;
use super::probe;
use super::qcow::Qcow;
use super::qed::Qed;
use super::vdi::Vdi;
use super::vhd::{SizeBy, Vhd};
use super::vhdx::Vhdx;
use super::vmdk::{Name, Plan};
use crate::addr::GuestOffset;
use crate::error::{Error, Result};
use crate::image::{Extent, Image, Mapping};
use crate::storage::Storage;

mod differencing;
mod hostile;
mod made_by_qemu;
mod vhdx_log;
mod vmdk_forms;

/// A file's bytes, which no test may change.
struct Bytes(Vec<u8>);

impl Storage for Bytes {
    fn len(&self) -> Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let mut at = usize::try_from(offset).unwrap();
        for buf in bufs {
            let end = at.checked_add(buf.len()).unwrap();
            buf.copy_from_slice(self.0.get(at..end).ok_or_else(|| Error::invalid("past the end"))?);
            at = end;
        }
        Ok(())
    }

    fn set_len(&self, _: u64) -> Result<()> {
        unreachable!("an image is only read")
    }

    fn is_fixed(&self) -> bool {
        true
    }

    fn write_at(&self, _: u64, _: &[IoSlice<'_>]) -> Result<()> {
        unreachable!("an image is only read")
    }

    fn punch_hole(&self, _: u64, _: u64) -> Result<()> {
        unreachable!("an image is only read")
    }

    fn write_zeroes(&self, _: u64, _: u64) -> Result<()> {
        unreachable!("an image is only read")
    }

    fn sync(&self) -> Result<()> {
        unreachable!("an image is only read")
    }
}

fn storage(bytes: Vec<u8>) -> Arc<dyn Storage> {
    Arc::new(Bytes(bytes))
}

/// Opens an image in memory; `files` are what a VMDK's descriptor names.
fn open(format: &str, bytes: Vec<u8>, files: &[Arc<dyn Storage>]) -> Result<Box<dyn Image>> {
    let storage = storage(bytes);
    Ok(match format {
        "parallels" => Box::new(Parallels::open(storage)?),
        "qcow" => Box::new(Qcow::open(storage)?),
        "qed" => Box::new(Qed::open(storage)?),
        "vdi" => Box::new(Vdi::open(storage)?),
        "vpc" => Box::new(Vhd::open(storage, SizeBy::Creator)?),
        "vhdx" => Box::new(Vhdx::open(storage)?),
        "vmdk" => Box::new(Plan::read(storage)?.open(files)?),
        other => unreachable!("{other}"),
    })
}

/// Opens an image file, and the files beside it that it names.
fn open_file(format: &str, path: &Path) -> Box<dyn Image> {
    let bytes = std::fs::read(path).unwrap();
    if format != "vmdk" {
        return open(format, bytes, &[]).unwrap();
    }
    let plan = Plan::read(storage(bytes)).unwrap();
    let beside = |name: &Name| storage(std::fs::read(path.with_file_name(&name.bytes)).unwrap());
    let files: Vec<_> = plan.files().iter().map(beside).collect();
    Box::new(plan.open(&files).unwrap())
}

/// A fixture of `testdata/formats`, unpacked.
fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/formats").join(name);
    let packed = std::fs::read(path.with_added_extension("gz")).unwrap();
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut bytes).unwrap();
    bytes
}

/// The extents of a whole image, which must follow each other without a gap.
fn extents(image: &dyn Image) -> Result<Vec<Extent>> {
    let (mut at, mut extents) = (0, Vec::new());
    while at < image.size() {
        let extent = image.map(GuestOffset(at), image.size() - at)?;
        assert_eq!(extent.start.0, at);
        assert!(extent.len > 0 && extent.len <= image.size() - at);
        at += extent.len;
        extents.push(extent);
    }
    Ok(extents)
}

/// The flat contents; `below` shows through where the image holds nothing.
fn flat(image: &dyn Image, below: &[u8]) -> Vec<u8> {
    let mut flat = below.to_vec();
    flat.resize(image.size() as usize, 0);
    for extent in extents(image).unwrap() {
        let start = extent.start.0 as usize;
        let bytes = &mut flat[start..start + extent.len as usize];
        if extent.mapping != Mapping::Unallocated {
            // In two buffers, and a second time from the middle.
            let cut = bytes.len() / 3;
            let (a, b) = bytes.split_at_mut(cut);
            let mut bufs = [IoSliceMut::new(a), IoSliceMut::new(b)];
            image.read(&extent, extent.start, &mut bufs).unwrap();
            let mut again = vec![0xee; bytes.len() - cut];
            let middle = GuestOffset(extent.start.0 + cut as u64);
            image.read(&extent, middle, &mut [IoSliceMut::new(&mut again)]).unwrap();
            assert!(again == bytes[cut..], "{extent:?}");
        }
    }
    flat
}

/// Where two disks differ first.
fn difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a.len() != b.len() {
        Some(a.len().min(b.len()))
    } else {
        a.iter().zip(b).position(|(x, y)| x != y)
    }
}

/// What the fixtures hold: offset, length, byte. 5 MiB in all.
const PATTERN: [(usize, usize, u8); 4] =
    [(0, 4096, 0x11), (1 << 20, 65536, 0x22), (3 << 20, 512, 0x33), (5_238_784, 4096, 0x44)];

fn pattern() -> Vec<u8> {
    let mut raw = vec![0; 5 << 20];
    for (at, len, byte) in PATTERN {
        raw[at..at + len].fill(byte);
    }
    raw
}

/// Runs a tool to its successful end and answers with its stdout.
fn run(tool: &str, args: &[&str]) -> String {
    let output = Command::new("timeout").args(["60", tool]).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {} {stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn fixtures_read_as_the_disk_they_were_made_from() {
    let fixtures = [
        ("vmdk", "sparse.vmdk"),
        ("vmdk", "stream.vmdk"),
        ("vpc", "dynamic.vhd"),
        ("vpc", "fixed.vhd"),
        ("vhdx", "dynamic.vhdx"),
        ("vdi", "dynamic.vdi"),
        ("qcow", "packed.qcow"),
        ("qed", "table.qed"),
        ("parallels", "table.parallels"),
    ];
    for (format, name) in fixtures {
        let bytes = fixture(name);
        if name != "fixed.vhd" {
            assert_eq!(probe::foreign(&bytes, bytes.len() as u64), Some(format), "{name}");
        }
        let image = open(format, bytes, &[]).unwrap();
        let mut expected = pattern();
        // A VHD has whole cylinders.
        assert!(image.size() == 5 << 20 || format == "vpc" && image.size() < 6 << 20, "{name}");
        expected.resize(image.size() as usize, 0);
        assert_eq!(difference(&flat(&*image, &[]), &expected), None, "{name}");
        assert!(image.read_only() && image.backing().is_none());
        assert!(image.resize(1 << 20).is_err() && image.zero(GuestOffset(0), 512, true).is_err());
        assert!(image.map(GuestOffset(image.size()), 1).is_err(), "{name}");
    }
}
