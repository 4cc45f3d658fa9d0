//! Headers and ciphers against QEMU's own, and under damage.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{Cipher, Hash, Header, MAX_ITERATIONS, Options, Spec};
use crate::ErrorKind;
use crate::require::{Need, have};

const QUICK: Duration = Duration::from_millis(1);

fn quick(mode: &str, key_len: u32, hash: Hash) -> Options {
    Options { spec: Spec::parse("aes", mode, key_len).unwrap(), hash, iter_time: QUICK }
}

fn qemu(tool: &str, args: &[&str]) {
    let mut command = Command::new("timeout");
    command.args(["60", tool, "--object", "secret,id=sec0,data=open sesame"]).args(args);
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {stderr}");
}

/// `tool VERB --object ... REST`.
fn qemu_img(verb: &str, args: &[&str]) {
    let mut command = Command::new("timeout");
    command.args(["60", "qemu-img", verb, "--object", "secret,id=sec0,data=open sesame"]);
    let output = command.args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {verb} {args:?}: {stderr}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_volume_that_qemu_made_opens_and_reads() {
    if !have(Need::Qemu) {
        return;
    }
    let kinds = [
        ("aes-256", "xts", "plain64", "sha256"),
        ("aes-128", "xts", "plain", "sha1"),
        ("aes-256", "xts", "plain64", "ripemd160"),
        ("aes-256", "cbc", "essiv,ivgen-hash-alg=sha256", "sha512"),
    ];
    for (cipher, mode, vector, hash) in kinds {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.luks");
        let options = format!(
            "key-secret=sec0,iter-time=10,cipher-alg={cipher},cipher-mode={mode},\
             ivgen-alg={vector},hash-alg={hash}"
        );
        qemu_img("create", &["-q", "-f", "luks", "-o", &options, text(&path), "1M"]);
        let image = format!("driver=luks,key-secret=sec0,file.filename={}", text(&path));
        let write = ["-c", "write -P 0x5a 4096 8192", "-c", "write -P 0xa5 1048064 512"];
        qemu("qemu-io", &[&write[..], &["--image-opts", &image]].concat());
        let bytes = std::fs::read(&path).unwrap();
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.hash().name(), hash);
        assert!(header.unlock(&bytes, b"open barley").is_err());
        let cipher = header.unlock(&bytes, b"open sesame").unwrap();
        let payload = header.payload_offset() as usize;
        let mut data = bytes[payload..].to_vec();
        cipher.decrypt(0, &mut data).unwrap();
        assert!(data[4096..12288].iter().all(|&b| b == 0x5a), "{options}");
        assert!(data[1_048_064..1_048_576].iter().all(|&b| b == 0xa5), "{options}");
    }
}

#[test]
fn qemu_opens_and_reads_a_volume_made_here() {
    if !have(Need::Qemu) {
        return;
    }
    let kinds = [
        quick("xts-plain64", 64, Hash::Sha256),
        quick("xts-plain64", 32, Hash::Sha1),
        quick("cbc-essiv:sha256", 32, Hash::Sha512),
        quick("cbc-plain64", 16, Hash::Sha224),
    ];
    for options in kinds {
        let dir = tempfile::tempdir().unwrap();
        let (path, raw) = (dir.path().join("disk.luks"), dir.path().join("out.raw"));
        let made = Header::create(b"open sesame", &options).unwrap();
        let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(i) >> 7) as u8).collect();
        let mut sealed = data.clone();
        made.cipher.encrypt(0, &mut sealed).unwrap();
        assert_eq!(made.header.payload_offset(), made.area.len() as u64);
        std::fs::write(&path, [made.area, sealed].concat()).unwrap();
        let image = format!("driver=luks,key-secret=sec0,file.filename={}", text(&path));
        qemu_img("convert", &["--image-opts", &image, "-O", "raw", text(&raw)]);
        assert!(std::fs::read(&raw).unwrap() == data, "{options:?}");
    }
}

fn be64(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// A qcow2 file's LUKS area (header extension 0x0537be77) and the host offset of a guest's cluster.
fn qcow2(bytes: &[u8], guest: usize) -> (usize, usize, usize) {
    let mut at = u32::from_be_bytes(bytes[100..104].try_into().unwrap()) as usize;
    while bytes[at..at + 4] != [0x05, 0x37, 0xbe, 0x77] {
        let len = u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        at += 8 + len.next_multiple_of(8);
    }
    let (header, len) = (be64(bytes, at + 8), be64(bytes, at + 16));
    let mask = (1 << 56) - 512;
    let l2 = be64(bytes, be64(bytes, 40)) & mask;
    (header, len, be64(bytes, l2 + (guest >> 16) * 8) & mask)
}

#[test]
fn a_qcow2_files_clusters_are_encrypted_by_their_host_offset() {
    if !have(Need::Qemu) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10";
    qemu_img("create", &["-q", "-f", "qcow2", "-o", options, text(&path), "64M"]);
    let image = format!("driver=qcow2,encrypt.key-secret=sec0,file.filename={}", text(&path));
    qemu("qemu-io", &["-c", "write -P 0x77 5M 64k", "--image-opts", &image]);
    let bytes = std::fs::read(&path).unwrap();
    let (at, len, host) = qcow2(&bytes, 5 << 20);
    let area = &bytes[at..at + len];
    assert_eq!(Header::area_len(Spec::default()), len as u64);
    let cipher = Header::parse(area).unwrap().unlock(area, b"open sesame").unwrap();
    let mut cluster = bytes[host..host + 65536].to_vec();
    cipher.decrypt(host as u64, &mut cluster).unwrap();
    assert_eq!(cluster, [0x77; 65536]);
    assert_ne!(host, 5 << 20);
}

#[test]
fn the_legacy_encryption_goes_by_the_guests_offset() {
    if !have(Need::Qemu) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let options = "encrypt.format=aes,encrypt.key-secret=sec0";
    qemu_img("create", &["-q", "-f", "qcow2", "-o", options, text(&path), "64M"]);
    let image = format!("driver=qcow2,encrypt.key-secret=sec0,file.filename={}", text(&path));
    qemu("qemu-io", &["-c", "write -P 0x66 5M 64k", "--image-opts", &image]);
    let bytes = std::fs::read(&path).unwrap();
    let l2 = be64(&bytes, be64(&bytes, 40)) & ((1 << 56) - 512);
    let host = be64(&bytes, l2 + 80 * 8) & ((1 << 56) - 512);
    let mut cluster = bytes[host..host + 65536].to_vec();
    Cipher::legacy(b"open sesame").unwrap().decrypt(5 << 20, &mut cluster).unwrap();
    assert_eq!(cluster, [0x66; 65536]);
}

#[test]
fn passphrases_come_and_go_and_the_key_stays() {
    let mut made = Header::create(b"one", &quick("xts-plain64", 64, Hash::Sha256)).unwrap();
    let mut probe = [7; 512];
    made.cipher.encrypt(512, &mut probe).unwrap();
    let (header, area) = (&mut made.header, &mut made.area);
    header.add_key(area, 3, &made.cipher, b"two", QUICK).unwrap();
    assert_eq!(*header, Header::parse(area).unwrap());
    assert_eq!(header.active_slots().collect::<Vec<_>>(), [0, 3]);
    let (slot, cipher) = header.find(area, b"two").unwrap().unwrap();
    cipher.decrypt(512, &mut probe).unwrap();
    assert_eq!((slot, probe), (3, [7; 512]));

    header.erase_key(area, 0, false).unwrap();
    let header = &mut Header::parse(area).unwrap();
    let error = header.unlock(area, b"one").err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(header.unlock(area, b"two").is_ok());
    assert!(header.erase_key(area, 3, false).is_err());
    header.erase_key(area, 3, true).unwrap();
    assert!(header.find(area, b"two").unwrap().is_none());
    assert!(header.add_key(area, 8, &made.cipher, b"x", QUICK).is_err());
}

#[test]
fn a_header_that_asks_for_endless_hashing_is_refused_at_once() {
    let made = Header::create(b"one", &quick("xts-plain64", 64, Hash::Sha256)).unwrap();
    for at in [164, 208 + 4] {
        let mut area = made.area.clone();
        area[at..at + 4].copy_from_slice(&(MAX_ITERATIONS + 1).to_be_bytes());
        let begin = Instant::now();
        let error = Header::parse(&area).unwrap().unlock(&area, b"one").err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(begin.elapsed() < Duration::from_secs(1));
    }
}

#[test]
fn a_damaged_header_gives_an_error_or_another_key_never_a_panic() {
    let made = Header::create(b"one", &quick("xts-plain64", 64, Hash::Sha1)).unwrap();
    let mut state = 20_261_121u64;
    println!("seed {state}");
    let mut random = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    let mut parsed = 0;
    for round in 0..2000 {
        let mut area = made.area.clone();
        for _ in 0..1 + random() % 3 {
            let at = random() % 592;
            area[at] = [random() as u8, 0, 0xff, area[at] ^ 1][random() % 4];
        }
        if random() % 8 == 0 {
            area.truncate(random() % 600);
        }
        let Ok(header) = Header::parse(&area) else { continue };
        parsed += 1;
        // Rounds by the million are refused or slow, and not what this is about.
        let rounds = header.slots.iter().map(|slot| slot.iterations).max().unwrap_or(0);
        if round % 20 == 0 && rounds.max(header.digest_iterations) < 1 << 17 {
            let _ = header.find(&area, b"one");
        }
    }
    assert!((100..1900).contains(&parsed), "{parsed}");
}

#[test]
fn every_field_is_checked_with_its_offset() {
    let made = Header::create(b"one", &quick("xts-plain64", 64, Hash::Sha256)).unwrap();
    let bad = |at: usize, bytes: &[u8]| {
        let mut area = made.area.clone();
        area[at..at + bytes.len()].copy_from_slice(bytes);
        Header::parse(&area).unwrap_err()
    };
    assert_eq!(bad(0, b"X").offset(), Some(0));
    assert_eq!(bad(7, &[2]).kind(), ErrorKind::Unsupported);
    assert_eq!(bad(8, b"twofish").kind(), ErrorKind::Unsupported);
    assert_eq!(bad(40, b"lrw").offset(), Some(8));
    assert_eq!(bad(72, b"whirlpool").offset(), Some(72));
    assert_eq!(bad(108, &[0xff; 4]).kind(), ErrorKind::Unsupported);
    assert_eq!(bad(208, &[1]).offset(), Some(208));
    assert_eq!(bad(208 + 40, &[0xff; 4]).offset(), Some(208));
    assert_eq!(bad(208 + 48 + 40, &[0, 0, 0, 8]).kind(), ErrorKind::Corrupt);
    assert_eq!(bad(208 + 44, &[0; 4]).offset(), Some(208));
    assert!(Header::parse(&made.area[..100]).is_err());
    assert!(made.header.uuid().len() == 36 && made.header.uuid().as_bytes()[14] == b'4');
}
