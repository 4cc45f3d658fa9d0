//! Images that were made to do harm: an error, in bounded time, and nothing outside is touched.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;

use crate::host::{VDISK, Work};
use crate::images::{LONG, layers};

/// A tar of what `script` makes, packed with `options`.
fn tar(work: &Work, name: &str, script: &str, options: &str) {
    fs::create_dir(work.path("tree")).unwrap();
    work.run("sh", ["-ec", &format!("cd tree; {script}")]).succeeds();
    let pack = format!("tar -C tree {options} -cf {name} .");
    work.run("sh", ["-ec", &pack]).succeeds();
    fs::remove_dir_all(work.path("tree")).unwrap();
}

const IMPORT: &str = "--store s --size 64M";

#[test]
fn a_layer_that_leads_out_of_itself_is_refused_or_stays_inside() {
    let work = Work::new();
    // Names with `..`, as tar writes them when it is told to.
    tar(&work, "up.tar", "echo x >f", "-P --transform s,^./f,../../f,");
    let said = work.vdisk(&format!("import up.tar x {IMPORT}")).fails(&[]);
    assert!(said.text().contains("leads out"), "{}", said.text());
    tar(
        &work,
        "link.tar",
        "echo x >f; ln f g",
        "-P --transform 'flags=h;s,^./f,../../../etc/passwd,'",
    );
    work.vdisk(&format!("import link.tar x {IMPORT}")).fails(&[]);
    // A link to the host's directory is followed from the disk's own root.
    fs::create_dir(work.path("outside")).unwrap();
    fs::create_dir(work.path("one")).unwrap();
    symlink(work.path("outside"), work.path("one/door")).unwrap();
    let script = "tar -C one -cf a.tar door; mkdir -p two/door; echo x >two/door/in; \
        tar -C two -rf a.tar door/in";
    work.run("sh", ["-ec", script]).succeeds();
    work.vdisk(&format!("import a.tar x {IMPORT}")).succeeds();
    assert_eq!(fs::read_dir(work.path("outside")).unwrap().count(), 0);
    work.vdisk("clone --store s x d.qcow2").succeeds();
    assert_eq!(work.vdisk("cat d.qcow2:/door/in").succeeds().stdout, b"x\n");
}

#[test]
fn what_does_not_fit_is_an_error_and_leaves_no_image() {
    let work = Work::new();
    // Zeroes without end, packed well.
    let bomb = "head -c 300M /dev/zero >f";
    tar(&work, "bomb.tar.gz", bomb, "-z");
    assert!(fs::metadata(work.path("bomb.tar.gz")).unwrap().len() < 1 << 20);
    let said = work.vdisk(&format!("import bomb.tar.gz x {IMPORT}")).fails(&[]);
    assert!(said.text().contains("no space"), "{}", said.text());
    assert_eq!(work.vdisk("image list --store s").succeeds().stdout, b"");
    assert_eq!(fs::read_dir(work.path("s/layers")).unwrap().count(), 0);
    // More names than there are inodes.
    tar(&work, "many.tar", "mkdir d; cd d; seq 1 40000 | xargs touch", "");
    for size in ["64M", "4M"] {
        let words = ["import", "many.tar", "x", "--store", "s", "--size", size];
        work.command(VDISK, words).finish(None, LONG).fails(&[]);
    }
}

#[test]
fn whiteouts_take_away_what_is_below_and_nothing_of_their_own_layer() {
    let work = Work::new();
    tar(
        &work,
        "a.tar",
        "mkdir -p d/e; echo 1 >d/e/f; echo 2 >g; echo 3 >.wh.g; touch .wh.nothing",
        "",
    );
    work.vdisk(&format!("import a.tar x {IMPORT}")).succeeds();
    work.vdisk("clone --store s x d.qcow2").succeeds();
    assert_eq!(work.vdisk("cat d.qcow2:/g").succeeds().stdout, b"2\n");
    work.vdisk("cat d.qcow2:/.wh.g").fails(&[]);
    // In a directory that is a file by now.
    let script = "mkdir -p one two/d; echo file >one/d; touch two/d/.wh.f two/d/.wh..wh..opq; \
        tar -C one -cf now.tar d; tar -C two -rf now.tar d/.wh.f d/.wh..wh..opq";
    work.run("sh", ["-ec", script]).succeeds();
    work.vdisk(&format!("import now.tar z {IMPORT}")).succeeds();
    work.vdisk("clone --store s z now.qcow2").succeeds();
    assert_eq!(work.vdisk("cat now.qcow2:/d").succeeds().stdout, b"file\n");
    // A hundred thousand of them.
    fs::create_dir(work.path("w")).unwrap();
    let script = "cd w; seq -f .wh.%g 1 100000 | xargs touch; tar -cf ../w.tar .";
    work.run("sh", ["-ec", script]).succeeds();
    let words = ["import", "w.tar", "y"].into_iter().chain(IMPORT.split(' '));
    work.command(VDISK, words).finish(None, LONG).succeeds();
}

#[test]
fn what_is_no_archive_or_was_cut_short_is_refused() {
    let work = Work::new();
    tar(&work, "whole.tar", "head -c 100000 /dev/urandom >f; echo x >g", "");
    let whole = work.bytes("whole.tar");
    work.put("cut.tar", &whole[..60_000]);
    work.put("noise.tar", vec![0x5a; 10_000]);
    let mut flipped = whole.clone();
    flipped[0] ^= 1;
    work.put("flipped.tar", flipped);
    let mut gzip = flate2(&whole);
    gzip.truncate(gzip.len() / 2);
    work.put("cut.tar.gz", gzip);
    for name in ["cut.tar", "noise.tar", "flipped.tar", "cut.tar.gz"] {
        let said = work.vdisk(&format!("import {name} x {IMPORT}")).fails(&[]);
        assert!(said.text().contains(name), "{}", said.text());
    }
    assert_eq!(work.vdisk("image list --store s").succeeds().stdout, b"");
}

#[test]
fn a_compressed_archive_is_taken_as_it_is_and_may_not_ask_for_any_amount_of_memory() {
    let work = Work::new();
    tar(&work, "a.tar", "head -c 100000 /dev/urandom >f; echo x >g", "");
    // In two streams, one after the other, where the form allows it.
    let script = "for with in gzip:gz xz:xz zstd:zst; do
        { head -c 51200 a.tar | ${with%:*} -c; tail -c +51201 a.tar | ${with%:*} -c; } >a.tar.${with#*:}; done
        truncate -s 300M zeroes; zstd -q --long=30 zeroes -o long.tar.zst";
    work.run("sh", ["-ec", script]).succeeds();
    work.vdisk("import a.tar plain --store a --size 64M").succeeds();
    for end in ["gz", "zst", "xz"] {
        work.vdisk(&format!("import a.tar.{end} x --store {end} --size 64M")).succeeds();
        assert_eq!(layers(&work, "a"), layers(&work, end), "{end}");
    }
    // The dictionary, in the header of the first block: of 4 GiB, and of 1 GiB.
    for size in [40, 36] {
        let mut bytes = work.bytes("a.tar.xz");
        let end = 12 + usize::from(bytes[12]) * 4;
        let header = &mut bytes[12..end];
        let at = header.iter().position(|byte| *byte == 0x21).unwrap() + 2;
        header[at] = size;
        let sum = crc32fast::hash(header);
        bytes[end..end + 4].copy_from_slice(&sum.to_le_bytes());
        work.put("large.tar.xz", bytes);
        let said = work.vdisk(&format!("import large.tar.xz y {IMPORT}")).fails(&["memory"]);
        assert!(said.text().contains("large.tar.xz"), "{}", said.text());
    }
    work.vdisk(&format!("import long.tar.zst y {IMPORT}")).fails(&["long.tar.zst"]);
    assert_eq!(work.vdisk("image list --store s").out(), "");
}

fn flate2(bytes: &[u8]) -> Vec<u8> {
    let mut child = std::process::Command::new("gzip")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let feeding = std::thread::spawn(move || input.write_all(&bytes));
    let out = child.wait_with_output().unwrap();
    feeding.join().unwrap().unwrap();
    out.stdout
}

/// A layout whose parts `lie` changes before they are written.
struct Lying {
    layer: Vec<u8>,
    layer_digest: Option<String>,
    layer_size: Option<u64>,
    diff_id: Option<String>,
}

impl Lying {
    fn write(&self, work: &Work) {
        let blobs = work.path("lie/blobs/sha256");
        let _ = fs::remove_dir_all(work.path("lie"));
        fs::create_dir_all(&blobs).unwrap();
        let put = |bytes: &[u8]| -> String {
            fs::write(work.path("blob"), bytes).unwrap();
            let sum = work.run("sha256sum", ["blob"]).succeeds();
            let hex = sum.text()[..64].to_owned();
            fs::write(blobs.join(&hex), bytes).unwrap();
            hex
        };
        let layer = put(&self.layer);
        if let Some(other) = &self.layer_digest {
            fs::rename(blobs.join(&layer), blobs.join(other)).unwrap();
        }
        let named = self.layer_digest.as_ref().unwrap_or(&layer);
        let diff = self.diff_id.as_ref().unwrap_or(&layer);
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["sha256:{diff}"]}}}}"#
        );
        let config_digest = put(config.as_bytes());
        let size = self.layer_size.unwrap_or(self.layer.len() as u64);
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{config_digest}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:{named}","size":{size}}}]}}"#,
            config.len()
        );
        let digest = put(manifest.as_bytes());
        index(work, &digest, manifest.len(), "manifest");
    }
}

fn index(work: &Work, digest: &str, size: usize, kind: &str) {
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.{kind}.v1+json","digest":"sha256:{digest}","size":{size}}}]}}"#
    );
    fs::write(work.path("lie/index.json"), index).unwrap();
    fs::write(work.path("lie/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

#[test]
fn an_image_that_lies_about_its_digests_is_refused() {
    let work = Work::new();
    tar(&work, "layer.tar", "echo x >f", "");
    let honest = Lying {
        layer: work.bytes("layer.tar"),
        layer_digest: None,
        layer_size: None,
        diff_id: None,
    };
    honest.write(&work);
    work.vdisk(&format!("import oci:lie x {IMPORT}")).succeeds();
    let zeroes = "0".repeat(64);
    let lies = [
        Lying {
            layer_digest: Some(zeroes.clone()),
            layer: honest.layer.clone(),
            layer_size: None,
            diff_id: None,
        },
        Lying {
            layer_size: Some(10),
            layer: honest.layer.clone(),
            layer_digest: None,
            diff_id: None,
        },
        Lying {
            diff_id: Some(zeroes),
            layer: honest.layer.clone(),
            layer_digest: None,
            layer_size: None,
        },
    ];
    for (number, lie) in lies.iter().enumerate() {
        lie.write(&work);
        let store = format!("--store l{number} --size 64M");
        let said = work.vdisk(&format!("import oci:lie x {store}")).fails(&[]);
        assert!(said.text().contains("digest says"), "{number}: {}", said.text());
        assert_eq!(work.vdisk(&format!("image list --store l{number}")).succeeds().stdout, b"");
    }
    // Blobs that are links to elsewhere are not followed.
    honest.write(&work);
    let blobs = work.path("lie/blobs/sha256");
    let blob = fs::read_dir(&blobs).unwrap().next().unwrap().unwrap().path();
    fs::rename(&blob, work.path("moved")).unwrap();
    symlink(work.path("moved"), &blob).unwrap();
    work.vdisk("import oci:lie x --store l9 --size 64M").fails(&[]);
}

#[test]
fn an_index_that_names_itself_comes_to_an_end() {
    let work = Work::new();
    fs::create_dir_all(work.path("lie/blobs/sha256")).unwrap();
    // It cannot name its own digest; one that is wrong is refused at once.
    fs::write(work.path("lie/blobs/sha256").join("1".repeat(64)), "{}").unwrap();
    index(&work, &"1".repeat(64), 2, "index");
    work.vdisk(&format!("import oci:lie x {IMPORT}")).fails(&[]);
    // Deep ones.
    let mut digest = String::new();
    for depth in 0..20 {
        let manifests = match depth {
            0 => String::new(),
            _ => format!(
                r#"{{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:{digest}","size":1}}"#
            ),
        };
        work.put("blob", format!(r#"{{"schemaVersion":2,"manifests":[{manifests}]}}"#));
        digest = work.run("sha256sum", ["blob"]).succeeds().text()[..64].to_owned();
        fs::copy(work.path("blob"), work.path("lie/blobs/sha256").join(&digest)).unwrap();
    }
    index(&work, &digest, 1, "index");
    let said = work.vdisk(&format!("import oci:lie x {IMPORT}")).fails(&[]);
    assert!(said.text().contains("too deep"), "{}", said.text());
}
