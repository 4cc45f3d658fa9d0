//! Forms of VMDK that qemu-img does not make: VMware's footer, grains without markers, descriptors
//! with several kinds of extents.

use std::io::Write;
use std::sync::Arc;

use super::{difference, extents, flat, open, storage};
use crate::ErrorKind;
use crate::formats::vmdk::Plan;
use crate::image::{Image, Mapping};
use crate::storage::Storage;

const GRAIN: usize = 65536;

struct Form {
    flags: u32,
    /// Guest sectors.
    capacity: u64,
    /// Sectors per grain.
    grain: u64,
    at_end: bool,
}

impl Form {
    const STREAM: Form = Form { flags: 0x30001, capacity: 300, grain: 128, at_end: true };

    fn header(&self, directory: u64) -> Vec<u8> {
        let mut head = vec![0; 512];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"KDMV");
        put(4, &3u32.to_le_bytes());
        put(8, &self.flags.to_le_bytes());
        put(12, &self.capacity.to_le_bytes());
        put(20, &self.grain.to_le_bytes());
        put(44, &512u32.to_le_bytes());
        put(56, &directory.to_le_bytes());
        put(64, &1u64.to_le_bytes());
        put(77, &[u8::from(self.flags & 0x10000 != 0), 0]);
        head
    }

    /// A compressed extent with `grains` at their numbers.
    fn build(&self, grains: &[(usize, Vec<u8>)]) -> Vec<u8> {
        let mut file = self.header(if self.at_end { u64::MAX } else { 0 });
        let mut table = vec![0u32; 512];
        for (number, bytes) in grains {
            table[*number] = (file.len() / 512) as u32;
            let mut packer = flate2::write::ZlibEncoder::new(Vec::new(), Default::default());
            packer.write_all(bytes).unwrap();
            let packed = packer.finish().unwrap();
            if self.flags & 0x20000 != 0 {
                file.extend((*number as u64 * self.grain).to_le_bytes());
                file.extend((packed.len() as u32).to_le_bytes());
            }
            file.extend(packed);
            pad(&mut file);
        }
        let at = (file.len() / 512) as u32;
        table.iter().for_each(|entry| file.extend(entry.to_le_bytes()));
        let directory = (file.len() / 512) as u64;
        file.extend(at.to_le_bytes());
        pad(&mut file);
        if self.at_end {
            let mut marker = [0; 512];
            marker[0] = 1;
            marker[12] = 3;
            file.extend(marker);
            file.extend(self.header(directory));
            file.extend([0; 512]);
        } else {
            file[..512].copy_from_slice(&self.header(directory));
        }
        file
    }
}

fn pad(file: &mut Vec<u8>) {
    file.resize(file.len().next_multiple_of(512), 0);
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(seed | 1) >> 5) as u8).collect()
}

fn disk() -> (Vec<(usize, Vec<u8>)>, Vec<u8>) {
    let grains = vec![(0, noise(77, GRAIN)), (2, noise(99, GRAIN))];
    let mut flat = grains[0].1.clone();
    flat.resize(2 * GRAIN, 0);
    flat.extend(&grains[1].1);
    flat.truncate(300 * 512);
    (grains, flat)
}

#[test]
fn a_directory_at_the_end_is_found_by_the_footer() {
    let (grains, expected) = disk();
    let file = Form::STREAM.build(&grains);
    let image = open("vmdk", file.clone(), &[]).unwrap();
    assert_eq!(difference(&flat(&*image, &[]), &expected), None);
    let kinds: Vec<_> = extents(&*image).unwrap().iter().map(|e| e.mapping).collect();
    assert!(matches!(
        kinds[..],
        [Mapping::Compressed { .. }, Mapping::Unallocated, Mapping::Compressed { .. }]
    ));

    let cut = file[..file.len() - 512].to_vec();
    let error = open("vmdk", cut, &[]).err().unwrap();
    assert!(error.message().contains("cut off"), "{error}");
}

#[test]
fn compressed_grains_need_no_markers() {
    let (grains, expected) = disk();
    let form = Form { flags: 0x10001, at_end: false, ..Form::STREAM };
    let image = open("vmdk", form.build(&grains), &[]).unwrap();
    assert_eq!(difference(&flat(&*image, &[]), &expected), None);
}

#[test]
fn a_short_last_grain_is_enough_for_a_short_disk() {
    let (mut grains, expected) = disk();
    grains[1].1.truncate((300 - 256) * 512);
    let image = open("vmdk", Form::STREAM.build(&grains), &[]).unwrap();
    assert_eq!(difference(&flat(&*image, &[]), &expected), None);

    grains[1].1.truncate(512);
    let image = open("vmdk", Form::STREAM.build(&grains), &[]).unwrap();
    let last = *extents(&*image).unwrap().last().unwrap();
    let mut buf = vec![0; last.len as usize];
    let error = image.read(&last, last.start, &mut [std::io::IoSliceMut::new(&mut buf)]);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn a_grain_that_unpacks_to_more_than_a_grain_is_refused() {
    let bomb = vec![(0, vec![0; 64 << 20])];
    let image = open("vmdk", Form::STREAM.build(&bomb), &[]).unwrap();
    let first = extents(&*image).unwrap()[0];
    let mut buf = [0; 512];
    let error = image.read(&first, first.start, &mut [std::io::IoSliceMut::new(&mut buf)]);
    let error = error.unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(512)));
}

fn plan(text: &str) -> Plan {
    Plan::read(storage(text.as_bytes().to_vec())).unwrap()
}

#[test]
fn a_descriptor_joins_flat_sparse_and_zero_extents() {
    let (grains, sparse) = disk();
    let plan = plan(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n\
         RW 3 FLAT \"flat.bin\" 2\nRW 5 ZERO\nRDONLY 299 SPARSE \"s.vmdk\"\nRW 1 FLAT \"flat.bin\" 0\n",
    );
    let names: Vec<_> = plan.files().iter().map(|name| name.text.as_str()).collect();
    assert_eq!(names, ["flat.bin", "s.vmdk"]);
    let bytes = noise(5, 512 * 5);
    let files: [Arc<dyn Storage>; 2] =
        [storage(bytes.clone()), storage(Form::STREAM.build(&grains))];
    let image = plan.open(&files).unwrap();
    let expected = [&bytes[1024..], &[0; 2560], &sparse[..299 * 512], &bytes[..512]].concat();
    assert_eq!(difference(&flat(&image, &[]), &expected), None);
}

#[test]
fn extents_that_the_files_do_not_hold_are_refused() {
    let head = "# Disk DescriptorFile\nversion=1\ncreateType=\"custom\"\n";
    let (grains, _) = disk();
    for (line, file) in [
        ("RW 3 FLAT \"f\" 3", vec![0; 512 * 5]),
        ("RW 301 SPARSE \"f\"", Form::STREAM.build(&grains)),
        ("RW 1 SPARSE \"f\"", vec![0; 4096]),
    ] {
        let plan = plan(&format!("{head}{line}\n"));
        let error = plan.open(&[storage(file)]).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{line}: {error}");
    }
    let error = plan(&format!("{head}RW 1 FLAT \"f\" 0\n")).open(&[]).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn a_header_without_a_disk_of_its_own_is_read_for_its_descriptor() {
    let form = Form { capacity: 0, at_end: false, ..Form::STREAM };
    let mut file = form.header(0);
    file[28..36].copy_from_slice(&1u64.to_le_bytes());
    file[36..44].copy_from_slice(&1u64.to_le_bytes());
    file.extend(b"version=1\ncreateType=\"monolithicFlat\"\nRW 2 FLAT \"f\" 0\n");
    pad(&mut file);
    let plan = Plan::read(storage(file)).unwrap();
    let image = plan.open(&[storage(vec![7; 1024])]).unwrap();
    assert_eq!(flat(&image, &[]), [7; 1024]);
    assert_eq!(image.size(), 1024);
}

#[test]
fn neighbours_in_different_files_do_not_look_like_one_extent() {
    let plan = plan(
        "version=1\ncreateType=\"custom\"\nRW 4 FLAT \"a\" 0\nRW 4 FLAT \"b\" 4\nRW 4 FLAT \"b\" 8\n",
    );
    let files = [storage(vec![1; 2048]), storage(noise(3, 6144))];
    let image = plan.open(&files).unwrap();
    let hosts: Vec<_> = extents(&image)
        .unwrap()
        .iter()
        .map(|extent| match extent.mapping {
            Mapping::Data { host, .. } => (host.0, extent.len),
            other => unreachable!("{other:?}"),
        })
        .collect();
    assert!(hosts[0] == (0, 2048) && hosts[1].0 > 2048, "{hosts:?}");
    // In one file they may be joined: a longer extent reads on.
    assert_eq!(hosts[2].0, hosts[1].0 + 2048);
    let mut joined = extents(&image).unwrap()[1];
    joined.len = 4096;
    let mut buf = [0; 4096];
    image.read(&joined, joined.start, &mut [std::io::IoSliceMut::new(&mut buf)]).unwrap();
    assert_eq!(buf[..], noise(3, 6144)[2048..]);
}

/// COWD, the older snapshots of ESX: `grains` of a sector each.
pub(super) fn cowd(sectors: u32, grains: &[u32]) -> Vec<u8> {
    let tables = sectors.div_ceil(4096);
    let mut file = vec![0; 2048 + (tables as usize * 4).next_multiple_of(512)];
    file[..4].copy_from_slice(b"COWD");
    for (at, number) in [(4, 1), (8, 3), (12, sectors), (16, 1), (20, 4), (24, tables)] {
        file[at..at + 4].copy_from_slice(&number.to_le_bytes());
    }
    for &grain in grains {
        let entry = 2048 + grain as usize / 4096 * 4;
        let mut table = u32::from_le_bytes(file[entry..entry + 4].try_into().unwrap()) as usize;
        if table == 0 {
            table = file.len() / 512;
            file[entry..entry + 4].copy_from_slice(&(table as u32).to_le_bytes());
            file.resize(file.len() + 4096 * 4, 0);
        }
        let slot = table * 512 + grain as usize % 4096 * 4;
        let place = (file.len() / 512) as u32;
        file[slot..slot + 4].copy_from_slice(&place.to_le_bytes());
        file.extend([grain as u8 | 1; 512]);
    }
    file
}

/// seSparse, the newer ones: `grains` of 4 KiB each, and such that read as zeroes.
pub(super) fn space(sectors: u64, grains: &[u64], zeroes: &[u64]) -> Vec<u8> {
    let (directory, tables) = (8u64, sectors.div_ceil(8).div_ceil(4096));
    let (first, data) = (directory + 1, directory + 1 + tables * 64);
    let mut file = vec![0; data as usize * 512];
    let mut put =
        |at: u64, number: u64| file[at as usize..][..8].copy_from_slice(&number.to_le_bytes());
    let header = [0xcafe_babe, 0x2_0000_0001, sectors, 8, 64];
    (0..).step_by(8).zip(header).for_each(|(at, number)| put(at, number));
    let places = [(80, 1), (128, directory), (136, 1), (144, first), (192, data)];
    places.into_iter().for_each(|(at, number)| put(at, number));
    put(512, 0xcafe_cafe);
    for table in 0..tables {
        put(directory * 512 + table * 8, 1 << 60 | table);
    }
    for (number, grain) in grains.iter().enumerate() {
        let number = number as u64;
        put(first * 512 + grain * 8, 3 << 60 | (number & 0xfff) << 48 | number >> 12);
    }
    for (number, grain) in zeroes.iter().enumerate() {
        put(first * 512 + grain * 8, (1 + number as u64 % 2) << 60);
    }
    grains.iter().for_each(|grain| file.extend([*grain as u8 | 1; 4096]));
    file
}

fn over(line: &str, file: Vec<u8>) -> crate::Result<crate::formats::vmdk::Vmdk> {
    plan(&format!("version=1\ncreateType=\"custom\"\n{line}\n")).open(&[storage(file)])
}

#[test]
fn the_snapshots_of_esx_hold_what_their_tables_name() {
    let grains = [0, 1, 5, 4095, 4096, 9000];
    let image = over("RW 9001 VMFSSPARSE \"a-delta.vmdk\"", cowd(9001, &grains)).unwrap();
    let mut expected = vec![0xcc; 9001 * 512];
    for grain in grains {
        expected[grain as usize * 512..][..512].fill(grain as u8 | 1);
    }
    assert_eq!(difference(&flat(&image, &vec![0xcc; 9001 * 512]), &expected), None);

    let (grains, zeroes) = ([0, 3, 4097], [1, 2]);
    let bytes = space(40_000, &grains, &zeroes);
    let image = over("RW 40000 SESPARSE \"a-sesparse.vmdk\"", bytes.clone()).unwrap();
    let mut expected = vec![0xcc; 40_000 * 512];
    for grain in grains {
        expected[grain as usize * 4096..][..4096].fill(grain as u8 | 1);
    }
    expected[4096..3 * 4096].fill(0);
    assert_eq!(difference(&flat(&image, &vec![0xcc; 40_000 * 512]), &expected), None);

    // A journal that ESX would replay.
    let mut dirty = bytes;
    dirty[512 + 24] = 1;
    let error = over("RW 40000 SESPARSE \"a\"", dirty).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    // Alone such an extent says nothing of what is below it.
    let error = Plan::read(storage(cowd(100, &[1]))).err().unwrap();
    assert!(error.message().contains("open the descriptor"), "{error}");
}
