//! Random damage, and its repair: QEMU calls the image clean, and every guest cluster that could be
//! read before, by us or by QEMU, reads the same.

use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vdisk::internals::addr::{GuestOffset, Unit};
use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::Chain;
use vdisk::internals::formats::raw;
use vdisk::internals::image::{Backing, Compress as _, Image as _};
use vdisk::internals::open::Format;
use vdisk::internals::qcow2::{self, CreateOptions, Image, NewSnapshot, OpenOptions, Repair};
use vdisk::internals::storage::{MemoryStorage, Storage};

use crate::crash::layer;
use crate::dice::{Dice, rounds};
use crate::internal::{WRITABLE, qemu_img};
use crate::model::{pattern, random_range};
use crate::processes::{have_qemu, run};

/// The bits of a table entry that hold an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What one guest cluster reads as; `None` where it cannot be read.
type Clusters = Vec<Option<Vec<u8>>>;

/// An image to be damaged.
struct Victim {
    file: Vec<u8>,
    base: Option<Vec<u8>>,
    unit: u64,
}

fn options(dice: &mut Dice) -> CreateOptions {
    let bits = dice.pick(&[9, 9, 12, 12, 14, 16]);
    let extended_l2 = bits >= 14 && dice.once_in(2);
    let version = if extended_l2 { 3 } else { dice.pick(&[2, 3, 3, 3]) };
    let wide = dice.pick(&[1, 2, 8, 16, 16, 64]);
    let backing = Backing { name: "base".to_owned(), format: Some("raw".to_owned()) };
    CreateOptions {
        cluster: Unit::from_bits(bits),
        version,
        extended_l2,
        refcount_bits: if version == 2 { 16 } else { wide },
        backing: dice.once_in(3).then_some(backing),
        ..CreateOptions::new((20 + dice.below(60)) << bits.min(13))
    }
}

/// An image with a bit of everything.
fn victim(dice: &mut Dice) -> Victim {
    let options = options(dice);
    let storage = Arc::new(MemoryStorage::default());
    drop(qcow2::create(storage.clone(), &options).unwrap());
    let base = options.backing.is_some().then(|| pattern(0, options.size * 3 / 4, 99));
    let unit = options.cluster.bytes();
    for round in 0..1 + dice.below(3) {
        scribble(&storage, &base, unit, dice);
        if dice.once_in(2) {
            let mut image = Image::open(storage.clone(), WRITABLE).unwrap();
            let new = NewSnapshot { name: format!("snapshot {round}"), ..NewSnapshot::default() };
            // Narrow refcounts have no room for one.
            let _ = image.create_snapshot(&new);
        }
        if options.version == 3 && dice.once_in(3) {
            let mut image = Image::open(storage.clone(), WRITABLE).unwrap();
            image.add_bitmap(&format!("bitmap {round}"), Some(512), true).unwrap();
        }
    }
    Victim { file: storage.to_vec(), base, unit }
}

fn scribble(storage: &Arc<MemoryStorage>, base: &Option<Vec<u8>>, unit: u64, dice: &mut Dice) {
    let image = Arc::new(Image::open(storage.clone(), WRITABLE).unwrap());
    let size = image.size();
    for _ in 0..dice.below(8) {
        let at = dice.below(size / unit) * unit;
        let len = unit.min(size - at);
        let _ = image.write_compressed(GuestOffset(at), &pattern(at / 97, len, at)[..]);
        let flat = vec![at as u8; len as usize];
        let _ = image.write_compressed(GuestOffset(at), &flat);
    }
    let chain = Chain::new(layer(image, Format::Qcow2), below(base), 1 << 20);
    for _ in 0..4 + dice.below(8) {
        let (at, len) = random_range(dice, size, unit);
        match dice.below(8) {
            0 => chain.write_zeroes(at, len, true).unwrap(),
            1 => chain.discard(at, len).unwrap(),
            _ => chain.write_at(at, &[IoSlice::new(&pattern(at, len, dice.next()))]).unwrap(),
        }
    }
    chain.flush().unwrap();
}

fn below(base: &Option<Vec<u8>>) -> Vec<vdisk::internals::chain::Layer> {
    let open = |bytes: &Vec<u8>| {
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        layer(Arc::new(raw::Image::open(storage, true).unwrap()), Format::Raw)
    };
    base.iter().map(open).collect()
}

fn get(file: &[u8], at: u64) -> u64 {
    let bytes = usize::try_from(at).ok().and_then(|at| file.get(at..at.checked_add(8)?));
    bytes.map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()))
}

fn put(file: &mut [u8], at: u64, value: u64, bytes: usize) {
    let Ok(at) = usize::try_from(at) else { return };
    if let Some(place) = at.checked_add(bytes).and_then(|end| file.get_mut(at..end)) {
        place.copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    }
}

/// Where the header's bitmap extension says the directory is.
fn bitmap_directory(file: &[u8]) -> u64 {
    let header = if get(file, 4) >> 32 == 2 { 72 } else { get(file, 100) >> 32 };
    let mut at = header;
    for _ in 0..20 {
        let (magic, len) = (get(file, at) >> 32, get(file, at) & 0xffff_ffff);
        match magic {
            0 => break,
            0x2385_2875 => return get(file, at + 24),
            _ => at += 8 + len.next_multiple_of(8),
        }
    }
    0
}

/// One piece of damage, of the kinds that a repair is there for.
fn damage(file: &mut Vec<u8>, dice: &mut Dice) -> String {
    let unit = 1 << (get(file, 16) & 31);
    let l1 = get(file, 40);
    let l1_size = get(file, 32) & 0xffff_ffff;
    let l1_entry = l1 + dice.below(l1_size.max(1)) * 8;
    let l2 = get(file, l1_entry) & OFFSET;
    let l2_entry = l2 + dice.below((unit / 8).min(100)) * 8;
    let table = get(file, 48);
    let block = get(file, table) & OFFSET;
    let clusters = file.len() as u64 / unit + 1;
    let cluster = dice.below(clusters) * unit;
    let target = match dice.below(7) {
        0 => (clusters + dice.below(100)) * unit,
        1 => cluster + dice.below(unit) / 512 * 512,
        2 => 1 << (40 + dice.below(15)),
        _ => cluster,
    };
    let copied = dice.below(2) << 63;
    let (what, at, value, bytes) = match dice.below(16) {
        0..=2 => ("a refcount", block + dice.below(unit), dice.next() & 0xff, 1),
        3 => (
            "refcounts",
            block + dice.below(unit / 8) * 8,
            [0, dice.next(), u64::MAX][dice.below(3) as usize],
            8,
        ),
        4 => ("a block", table + dice.below(2) * 8, dice.pick(&[0, target, cluster, l2]), 8),
        5 | 6 => ("an L1 entry", l1_entry, target | copied, 8),
        7 => ("an L1 flag", l1_entry, get(file, l1_entry) ^ 1 << 63, 8),
        8 | 9 => ("an L2 entry", l2_entry, target | copied, 8),
        10 => ("an L2 flag", l2_entry, get(file, l2_entry) ^ 1 << dice.below(64), 8),
        11 => ("any entry", l2_entry, dice.next(), 8),
        12 if get(file, 4) >> 32 > 2 => ("features", 72, get(file, 72) ^ 1 << dice.below(2), 8),
        13 => {
            let snapshots = get(file, 64);
            let field = dice.pick(&[0, 8]);
            let value = if field == 0 { cluster } else { dice.below(40) };
            ("a snapshot", snapshots + field, value, 8 - field as usize / 2)
        }
        14 => {
            let at = dice.pick(&[40, 48, 64]);
            ("a table's place", at, cluster.max(unit), 8)
        }
        _ => {
            let directory = bitmap_directory(file);
            let at = if dice.once_in(2) { directory } else { get(file, directory) };
            if directory == 0 {
                ("nothing", 4, get(file, 4), 8)
            } else {
                ("a bitmap", at, target, 8)
            }
        }
    };
    put(file, at, value, bytes);
    if dice.once_in(40) {
        let len = file.len() as u64;
        file.truncate((len - dice.below(len / 3)) as usize);
    }
    format!("{what} at {at:#x}: {value:#x}")
}

/// What we read of each cluster, of the disk or of a snapshot by its id.
fn our_clusters(victim: &Victim, file: &[u8], snapshot: Option<&str>) -> vdisk::Result<Clusters> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(file.to_vec()));
    let image = match snapshot {
        None => Image::open(storage, OpenOptions::default())?,
        Some(id) => Image::open_snapshot(storage, OpenOptions::default(), id)?,
    };
    let chain = Chain::new(layer(Arc::new(image), Format::Qcow2), below(&victim.base), 1 << 20);
    let read = |at: u64| {
        let mut bytes = vec![0; victim.unit.min(chain.size() - at) as usize];
        let done = chain.read_at(at, &mut [IoSliceMut::new(&mut bytes)]);
        done.ok().map(|()| bytes)
    };
    Ok((0..chain.size()).step_by(victim.unit as usize).map(read).collect())
}

/// What QEMU reads of each cluster.
fn qemu_clusters(path: &Path, size: u64, unit: u64) -> Clusters {
    let mut command = Command::new("timeout");
    command.args(["20", "qemu-io", "-r", "-f", "qcow2"]);
    for at in (0..size).step_by(unit as usize) {
        command.args(["-c", &format!("read -v {at} {}", unit.min(size - at))]);
    }
    let out = run(command.arg(path));
    let text = String::from_utf8_lossy(&out.stdout);
    let mut found: Clusters = vec![None; size.div_ceil(unit) as usize];
    let mut bytes = Vec::new();
    for line in text.lines() {
        if let Some((_, rest)) = line.split_once(":  ").filter(|(at, _)| at.len() >= 8) {
            let digits = rest.get(..48).unwrap_or(rest).split_whitespace().take(16);
            bytes.extend(digits.map_while(|b| u8::from_str_radix(b, 16).ok()));
        } else if let Some((_, at)) = line.split_once("bytes at offset ") {
            let at: u64 = at.trim().parse().unwrap();
            found[(at / unit) as usize] = Some(std::mem::take(&mut bytes));
        } else {
            bytes.clear();
        }
    }
    found
}

/// The snapshots of a file by id, as far as they can be read.
fn snapshots(victim: &Victim, file: &[u8]) -> Vec<(String, Clusters)> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(file.to_vec()));
    let Ok(list) = Image::open(storage, OpenOptions::default()).and_then(|i| i.snapshots()) else {
        return Vec::new();
    };
    let read = |s: &qcow2::Snapshot| {
        Some((s.id().into_owned(), our_clusters(victim, file, Some(&s.id())).ok()?))
    };
    list.iter().filter_map(read).collect()
}

fn hold_against(what: &str, before: &Clusters, after: &Clusters) {
    for (number, (old, new)) in before.iter().zip(after).enumerate() {
        if let Some(old) = old {
            assert!(new.is_some(), "cluster {number} {what} cannot be read any more");
            let differs = old.iter().zip(new.as_ref().unwrap()).position(|(a, b)| a != b);
            assert_eq!(differs, None, "cluster {number} {what} reads something else");
        }
    }
    assert!(after.len() >= before.len(), "the disk {what} has shrunk");
}

/// Damages and repairs; whether it was repaired, and not refused.
fn round(dice: &mut Dice, dir: &Path, with_qemu: bool) -> bool {
    let victim = victim(dice);
    let mut file = victim.file.clone();
    let kinds: Vec<String> = (0..1 + dice.below(3)).map(|_| damage(&mut file, dice)).collect();
    let Ok(before) = our_clusters(&victim, &file, None) else { return false };
    let path: PathBuf = dir.join("disk");
    std::fs::write(&path, &file).unwrap();
    if let Some(base) = &victim.base {
        std::fs::write(dir.join("base"), base).unwrap();
    }
    let size = get(&file, 24);
    let qemu = if with_qemu { qemu_clusters(&path, size, victim.unit) } else { Vec::new() };
    let old_snapshots = snapshots(&victim, &file);
    let storage = Arc::new(MemoryStorage::new(file.clone()));
    let opening = OpenOptions { repair: true, ..WRITABLE };
    eprintln!("{kinds:?}");
    let image = match Image::open(storage.clone(), opening) {
        Ok(image) => image,
        Err(error) => {
            eprintln!("open: {error}");
            return false;
        }
    };
    let check = match vdisk::internals::image::Checked::check(&image, Repair::All) {
        Ok(check) => check,
        Err(error) => {
            drop(image);
            let same = storage.to_vec() == file;
            eprintln!("refused: {error}");
            assert!(same, "it was refused, and changed all the same");
            return false;
        }
    };
    drop(image);
    let file = storage.to_vec();
    std::fs::write(&path, &file).unwrap();
    if !check.is_clean() {
        panic!("{:#?}", check);
    }
    let image = Image::open(storage.clone(), WRITABLE).unwrap();
    let again = vdisk::internals::image::Checked::check(&image, Repair::None).unwrap();
    assert!(again.is_clean(), "{again:#?}");
    drop(image);
    assert!(storage.to_vec() == file, "opening it changes nothing");
    let after = our_clusters(&victim, &file, None).unwrap();
    hold_against("of ours", &before, &after);
    let new_snapshots = snapshots(&victim, &file);
    for (id, old) in &old_snapshots {
        let Some((_, new)) = new_snapshots.iter().find(|s| s.0 == *id) else {
            assert!(old.iter().all(Option::is_none), "snapshot {id} is gone");
            continue;
        };
        hold_against(&format!("of snapshot {id}"), old, new);
    }
    if with_qemu {
        hold_against("of QEMU", &qemu, &after);
        let (code, text) = qemu_img(&["check"], &path);
        assert_eq!(code, Some(0), "{text}");
        assert!(qemu_clusters(&path, size, victim.unit) == after, "QEMU reads something else");
    }
    true
}

#[test]
fn a_repair_keeps_all_that_could_be_read_and_qemu_finds_nothing_wrong() {
    let with_qemu = have_qemu();
    let (mut done, mut repaired) = (0, 0);
    let dir = tempfile::tempdir().unwrap();
    rounds(12, |dice| {
        repaired += u64::from(round(dice, dir.path(), with_qemu));
        done += 1;
    });
    eprintln!("{repaired} of {done} images repaired");
    // Damage that is always refused tests nothing.
    assert!(done < 10 || repaired * 2 > done, "{repaired} of {done} images repaired");
}
