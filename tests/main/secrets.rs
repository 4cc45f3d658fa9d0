//! The drop-in and secrets: encrypted images of both formats go to and fro between it and QEMU, and
//! passphrases come and go.

use crate::host::{Done, Work};
use crate::require::{Need, have};
use crate::twin::{noise, same_bytes};

const SIZE: usize = 1 << 20;
/// The secrets of these tests, in the ways in which they can be given.
const SECRETS: &str = "--object secret,id=s,file=words --object secret,id=n,data=new \
                       --object secret,id=b,format=base64,data=d3Jvbmc=";

/// An image, how a new one is described, and how its options begin when it is opened.
const KINDS: [(&str, &str, &str); 3] = [
    ("disk.luks", "-O luks -o key-secret=s,iter-time=10", "key-secret="),
    (
        "disk.qcow2",
        "-O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        "encrypt.key-secret=",
    ),
    ("disk.aes", "-O qcow2 -o encrypt.format=aes,encrypt.key-secret=s", "encrypt.key-secret="),
];

fn with_words() -> Work {
    let work = Work::new();
    work.put("words", "open sesame");
    work.put("flat", [noise(3, SIZE / 2), vec![0; SIZE / 4], noise(4, SIZE / 4)].concat());
    work
}

fn ours(work: &Work, words: &str) -> Done {
    work.vdisk(&format!("qemu-img {words}"))
}

fn format(image: &str) -> &str {
    if image == "disk.luks" { "luks" } else { "qcow2" }
}

#[test]
fn encrypted_images_go_to_and_fro_between_the_drop_in_and_qemu() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_words();
    for (image, options, key) in KINDS {
        let driver = format(image);
        let opened = format!("{SECRETS} --image-opts driver={driver},file.filename={image},{key}s");
        ours(&work, &format!("convert {SECRETS} -f raw {options} flat {image}")).succeeds();
        work.qemu_img(&format!("convert {opened} -O raw back")).succeeds();
        same_bytes(image, &work.bytes("back"), &work.bytes("flat"));
        work.qemu_img(&format!("convert {SECRETS} -f raw {options} flat {image}")).succeeds();
        ours(&work, &format!("convert {opened} -O raw back")).succeeds();
        same_bytes(image, &work.bytes("back"), &work.bytes("flat"));
        let plain = "driver=raw,file.filename=flat";
        ours(&work, &format!("compare {opened} {plain}")).succeeds();
        for words in ["info", "info --output=json", "map --output=json"] {
            let say = |done: Done| done.succeeds().out();
            let want = say(work.qemu_img(&format!("{words} {opened}")));
            assert_eq!(say(ours(&work, &format!("{words} {opened}"))), want, "{words}");
        }
    }
}

#[test]
fn what_is_wrong_with_a_secret_is_said_as_qemu_says_it() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_words();
    for (image, options, key) in KINDS {
        ours(&work, &format!("convert {SECRETS} -f raw {options} flat {image}")).succeeds();
        let driver = format(image);
        let place = format!("driver={driver},file.filename={image}");
        let mut tries = vec![
            format!("map {image}"),
            format!("map --image-opts {place}"),
            format!("map --image-opts {place},{key}s"),
            format!("map {SECRETS} --object secret,id=s,data=x {image}"),
            format!("map --object secret,id=1,data=x {image}"),
            format!(
                "create -f {driver} {} other 1M",
                options.split_once(' ').unwrap().1.split_once(' ').unwrap().1
            ),
        ];
        if image != "disk.aes" {
            // The old way has no means to tell a wrong key.
            tries.push(format!("map {SECRETS} --image-opts {place},{key}b"));
        }
        for words in tries {
            let want = work.qemu_img(&words).fails(&["qemu-img: "]).err();
            assert_eq!(ours(&work, &words).fails(&[]).err(), want, "{words}");
        }
    }
}

#[test]
fn passphrases_come_and_go_and_the_disk_stays() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_words();
    for (image, options, key) in &KINDS[..2] {
        let prefix = key.strip_suffix("key-secret=").unwrap();
        let opened = |by: &str| {
            let driver = format(image);
            format!("{SECRETS} --image-opts driver={driver},file.filename={image},{key}{by}")
        };
        ours(&work, &format!("convert {SECRETS} -f raw {options} flat {image}")).succeeds();
        let amend = |by: &str, what: &str| {
            let what: Vec<String> = what.split(',').map(|w| format!("{prefix}{w}")).collect();
            ours(&work, &format!("amend {} -o {}", opened(by), what.join(",")))
        };
        amend("s", "state=inactive,keyslot=0").fails(&["only active keyslot 0"]);
        amend("s", "state=active,new-secret=n,iter-time=10,keyslot=5").succeeds();
        amend("s", "state=active,new-secret=b,iter-time=10,keyslot=5").fails(&["erase it first"]);
        amend("n", "state=inactive,old-secret=s").succeeds();
        work.qemu_img(&format!("map {}", opened("s"))).fails(&["Invalid password"]);
        ours(&work, &format!("map {}", opened("s"))).fails(&["Invalid password"]);
        work.qemu_img(&format!("convert {} -O raw back", opened("n"))).succeeds();
        same_bytes(image, &work.bytes("back"), &work.bytes("flat"));
    }
}

#[test]
fn a_delta_on_an_encrypted_base_is_read_committed_and_rebased() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_words();
    for (image, options, key) in KINDS {
        let driver = format(image);
        ours(&work, &format!("convert {SECRETS} -f raw {options} flat {image}")).succeeds();
        ours(&work, &format!("create -q -f qcow2 -b {image} -F {driver} delta.qcow2")).succeeds();
        let opened =
            format!("{SECRETS} --image-opts driver=qcow2,file.filename=delta.qcow2,backing.{key}s");
        ours(&work, "map delta.qcow2").fails(&["Could not open backing file: Parameter"]);
        work.run(
            "qemu-io",
            format!("-t writeback -c write_-P_7_600k_100k {opened}")
                .split(' ')
                .map(|w| w.replace('_', " ")),
        )
        .succeeds();
        let mut want = work.bytes("flat");
        want[600 << 10..700 << 10].fill(7);
        ours(&work, &format!("convert {opened} -O raw back")).succeeds();
        same_bytes(image, &work.bytes("back"), &want);
        ours(&work, &format!("commit -q {opened}")).succeeds();
        let base = format!("{SECRETS} --image-opts driver={driver},file.filename={image},{key}s");
        work.qemu_img(&format!("convert {base} -O raw back")).succeeds();
        same_bytes(image, &work.bytes("back"), &want);
        let args = ["qemu-img", "rebase", "-b", ""];
        let args = args.into_iter().chain(opened.split_whitespace());
        work.vdisk_args(args).succeeds();
        work.qemu_img("convert -O raw delta.qcow2 back").succeeds();
        same_bytes("alone", &work.bytes("back"), &want);
    }
}

/// The header of an empty disk said AES, and native verbs read zeroes and converted it.
#[test]
fn an_encrypted_disk_without_its_passphrase_is_refused_also_where_it_is_empty() {
    let work = Work::new();
    work.vdisk("create d.qcow2 1M").succeeds();
    let mut image = work.bytes("d.qcow2");
    image[32..36].copy_from_slice(&1u32.to_be_bytes());
    work.put("d.qcow2", image);
    for words in ["read d.qcow2 0 512", "convert d.qcow2 out.qcow2", "compare d.qcow2 d.qcow2"] {
        work.vdisk(words)
            .ends(if words.starts_with("compare") { 2 } else { 1 })
            .says(&["encrypted"]);
    }
    assert!(!work.path("out.qcow2").exists());
    work.vdisk("info d.qcow2").succeeds();
}
