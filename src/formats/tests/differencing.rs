//! Differencing disks, which QEMU neither makes nor reads: VHD's and VHDX's, built here by the
//! letter of their specifications.

use super::{difference, extents, fixture, flat, open};
use crate::ErrorKind;
use crate::addr::GuestOffset;
use crate::image::Mapping;

const BLOCK: usize = 4096;

fn sum(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum: u32 = bytes.iter().map(|&b| u32::from(b)).sum();
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// A VHD of `blocks`: the sectors each holds, by their numbers in the block.
pub(super) fn vhd(
    blocks: &[Option<&[usize]>],
    locator: Option<(&[u8; 4], &str)>,
    kind: u8,
) -> Vec<u8> {
    let mut footer = vec![0; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[13] = 1;
    footer[16..24].copy_from_slice(&512u64.to_be_bytes());
    footer[28..32].copy_from_slice(b"win ");
    footer[48..56].copy_from_slice(&((blocks.len() * BLOCK) as u64).to_be_bytes());
    footer[63] = kind;
    footer[68..84].fill(0xaa);
    sum(&mut footer, 64);
    let mut header = vec![0; 1024];
    header[..8].copy_from_slice(b"cxsparse");
    header[16..24].copy_from_slice(&1536u64.to_be_bytes());
    header[28..32].copy_from_slice(&(blocks.len() as u32).to_be_bytes());
    header[32..36].copy_from_slice(&(BLOCK as u32).to_be_bytes());
    header[40..56].fill(0xbb);
    let short: Vec<u8> = "plain.vhd".encode_utf16().flat_map(u16::to_be_bytes).collect();
    header[64..64 + short.len()].copy_from_slice(&short);
    if let Some((code, name)) = locator {
        header[576..580].copy_from_slice(code);
        header[584..588].copy_from_slice(&(2 * name.len() as u32).to_be_bytes());
        header[592..600].copy_from_slice(&2048u64.to_be_bytes());
    }
    sum(&mut header, 36);
    let mut file = [footer.clone(), header].concat();
    let table = file.len();
    file.resize(2048, 0xff);
    let name = locator.map_or("", |(_, name)| name);
    file.extend(name.encode_utf16().flat_map(u16::to_le_bytes));
    file.resize(2560, 0);
    for (n, block) in blocks.iter().enumerate() {
        let Some(sectors) = block else { continue };
        let sector = (file.len() / 512) as u32;
        file[table + 4 * n..table + 4 * n + 4].copy_from_slice(&sector.to_be_bytes());
        let mut bitmap = vec![0u8; 512];
        sectors.iter().for_each(|s| bitmap[s / 8] |= 0x80 >> (s % 8));
        file.extend(bitmap);
        (0..BLOCK / 512).for_each(|s| file.extend([(1 + n * 8 + s) as u8; 512]));
    }
    file.extend(footer);
    file
}

#[test]
fn a_differencing_vhd_holds_the_sectors_that_its_bitmaps_name() {
    let blocks: [Option<&[usize]>; 4] =
        [Some(&[0, 1, 5]), None, Some(&[]), Some(&[0, 1, 2, 3, 4, 5, 6, 7])];
    let bytes = vhd(&blocks, Some((b"W2ru", ".\\dir\\base.vhd")), 4);
    let image = open("vpc", bytes.clone(), &[]).unwrap();
    let backing = image.backing().unwrap();
    assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("dir/base.vhd", Some("vpc")));
    let below = vec![0xcc; 4 * BLOCK];
    let mut expected = below.clone();
    for (n, block) in blocks.iter().enumerate() {
        for s in block.unwrap_or_default() {
            let at = n * BLOCK + s * 512;
            expected[at..at + 512].fill((1 + n * 8 + s) as u8);
        }
    }
    assert_eq!(difference(&flat(&*image, &below), &expected), None);
    let sectors: Vec<_> = extents(&*image).unwrap().iter().map(|e| e.len / 512).collect();
    assert_eq!(sectors, [2, 3, 1, 18, 8]);
    let odd = image.map(GuestOffset(700), 10_000).unwrap();
    assert_eq!((odd.start.0, odd.len), (700, 324));

    assert_eq!(image.fingerprint().unwrap(), "a".repeat(32));
    assert_eq!(image.parent_fingerprints(), ["b".repeat(32)]);
}

#[test]
fn a_dynamic_vhd_does_not_heed_its_bitmaps() {
    let image = open("vpc", vhd(&[Some(&[]), None], None, 3), &[]).unwrap();
    let bytes = flat(&*image, &[]);
    assert!(bytes[..512].iter().all(|&b| b == 1) && bytes[BLOCK..].iter().all(|&b| b == 0));
    assert!(image.backing().is_none());
}

#[test]
fn a_parent_without_a_locator_is_known_by_its_plain_name() {
    let image = open("vpc", vhd(&[None], None, 4), &[]).unwrap();
    assert_eq!(image.backing().unwrap().name, "plain.vhd");
    let far = vhd(&[None], Some((b"W2ku", "C:\\vms\\base.vhd")), 4);
    assert_eq!(open("vpc", far, &[]).unwrap().backing().unwrap().name, "C:/vms/base.vhd");
}

#[test]
fn a_guest_cannot_turn_its_fixed_vhd_into_a_child_of_any_file() {
    let mut disk = fixture("fixed.vhd");
    let evil = vhd(&[None], Some((b"W2ku", "/etc/shadow")), 4);
    disk[..evil.len()].copy_from_slice(&evil);
    let image = open("vpc", disk.clone(), &[]).unwrap();
    assert!(image.backing().is_none());
    assert_eq!(difference(&flat(&*image, &[])[..evil.len()], &evil), None);
}

/// A parent locator, [MS-VHDX] 2.6.2.6.
fn locator() -> Vec<u8> {
    let mut locator = vec![0; 20];
    locator[..16].copy_from_slice(&[
        0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a, 0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59,
        0x13,
    ]);
    let pairs = [
        ("parent_linkage", "{83ed0ec3-24c8-49a6-a959-5e4bd1288791}"),
        ("absolute_win32_path", "\\\\?\\C:\\base.vhdx"),
        ("relative_path", "..\\base.vhdx"),
    ];
    locator[18] = pairs.len() as u8;
    let mut text = Vec::new();
    for (key, value) in pairs {
        let wide = |s: &str| s.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let (key, value) = (wide(key), wide(value));
        let at = 20 + 12 * pairs.len() + text.len();
        locator.extend((at as u32).to_le_bytes());
        locator.extend(((at + key.len()) as u32).to_le_bytes());
        locator.extend((key.len() as u16).to_le_bytes());
        locator.extend((value.len() as u16).to_le_bytes());
        text.extend([key, value].concat());
    }
    locator.extend(text);
    locator
}

/// Turns QEMU's dynamic VHDX (blocks of 1 MiB, 512-byte sectors) into a differencing one: block 0
/// keeps sectors 0 to 2 and 9, block 1 is whole, the others as they were.
pub(super) fn vhdx() -> Vec<u8> {
    let mut file = fixture("dynamic.vhdx");
    let find = |file: &[u8], guid: [u8; 4], from: usize| {
        from + file[from..].windows(4).position(|w| w == guid).unwrap()
    };
    let le =
        |file: &[u8], at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
    let entry = find(&file, [0x66, 0x77, 0xc2, 0x2d], 192 << 10);
    let bat = le(&file, entry + 16);
    let metadata = le(&file, find(&file, [0x06, 0xa2, 0x7c, 0x8b], 192 << 10) + 16);
    // File parameters: has a parent.
    let item = find(&file, [0x37, 0x67, 0xa1, 0xca], metadata);
    let offset = metadata + (le(&file, item + 16) as u32) as usize;
    file[offset + 4] |= 2;
    // A parent locator, behind all other items.
    let count = u16::from_le_bytes([file[metadata + 10], file[metadata + 11]]) as usize;
    file[metadata + 10] += 1;
    let locator = locator();
    let mut item = vec![0; 32];
    item[..16].copy_from_slice(&[
        0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab,
        0x0c,
    ]);
    item[16..20].copy_from_slice(&(512u32 << 10).to_le_bytes());
    item[20..24].copy_from_slice(&(locator.len() as u32).to_le_bytes());
    item[24] = 4;
    let slot = metadata + 32 * (count + 1);
    file[slot..slot + 32].copy_from_slice(&item);
    file[metadata + (512 << 10)..][..locator.len()].copy_from_slice(&locator);
    // The bitmap of the first chunk: entry 4096 of the table, a new MiB at the end of the file.
    file.resize(file.len().next_multiple_of(1 << 20), 0);
    let bitmap = file.len();
    file.resize(bitmap + (1 << 20), 0);
    file[bitmap] = 0b111;
    file[bitmap + 1] = 0b10;
    let place = bat + 4096 * 8;
    file[place..place + 8].copy_from_slice(&(bitmap as u64 | 6).to_le_bytes());
    assert_eq!(file[bat] & 7, 6);
    file[bat] |= 7;
    for (n, state) in [(2, 0u64), (4, 3)] {
        file[bat + n * 8..][..8].copy_from_slice(&state.to_le_bytes());
    }
    file
}

#[test]
fn a_differencing_vhdx_holds_what_its_states_and_bitmaps_say() {
    let image = open("vhdx", vhdx(), &[]).unwrap();
    let backing = image.backing().unwrap();
    assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("../base.vhdx", Some("vhdx")));
    let mib = 1 << 20;
    let own = super::pattern();
    let mut expected = vec![0xcc; 5 * mib];
    for (from, to) in [(0, 3 * 512), (9 * 512, 10 * 512), (mib, 2 * mib), (3 * mib, 4 * mib)] {
        expected[from..to].copy_from_slice(&own[from..to]);
    }
    // Block 4 is unmapped: zeroes, not the parent's bytes.
    expected[4 * mib..].fill(0);
    assert_eq!(difference(&flat(&*image, &vec![0xcc; 5 * mib]), &expected), None);
    let kinds: Vec<_> =
        extents(&*image).unwrap().iter().map(|e| (e.len / 512, e.mapping)).collect();
    assert!(
        matches!(
            kinds[..],
            [
                (3, Mapping::Data { .. }),
                (6, Mapping::Unallocated),
                (1, Mapping::Data { .. }),
                (2038, Mapping::Unallocated),
                (2048, Mapping::Data { .. }),
                (2048, Mapping::Unallocated),
                (2048, Mapping::Data { .. }),
                (2048, Mapping::Zero { .. })
            ]
        ),
        "{kinds:?}"
    );
    assert_eq!(image.parent_fingerprints(), ["83ed0ec3-24c8-49a6-a959-5e4bd1288791"]);
}

#[test]
fn a_partial_block_without_its_bitmap_is_refused() {
    let mut file = vhdx();
    let entry = 192 << 10;
    let guid = file[entry..].windows(4).position(|w| w == [0x66, 0x77, 0xc2, 0x2d]).unwrap();
    let at = entry + guid + 16;
    let bat = u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
    file[bat + 4096 * 8..][..8].fill(0);
    let image = open("vhdx", file, &[]).unwrap();
    let error = image.map(GuestOffset(0), 512).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(bat as u64 + 4096 * 8)));
}
