//! The commands that the sweep stops: on what scene, and after which others.

use std::path::Path;

use super::holder;
use super::scene::{build, build_expired, build_marked, build_shorter};
use crate::dice::Dice;

/// A command that changes the directory.
pub struct Operation {
    /// Fills the directory.
    pub build: fn(&Path, &mut Dice),
    /// Commands that are done with before it.
    pub first: Vec<Vec<String>>,
    /// Its words. A `*` stands for what a file's name in the directory has there.
    pub args: Vec<String>,
    /// Whether it is one step, so that nothing between the old state and the new one is allowed.
    /// Otherwise each disk and each snapshot is as before or as after.
    pub atomic: bool,
    /// Whether it holds a disk and writes to it, as [`holder`] does.
    pub held: bool,
    /// A disk that it writes over where it stands: each sector of it is as before or as after.
    pub over: Option<&'static str>,
    /// Whether what an interruption leaves of files is removed by the same command, run again: else by
    /// the next who opens the disk for writing.
    pub again: bool,
}

impl Operation {
    /// One command, a step, on the scene that `build` makes.
    pub fn new(build: fn(&Path, &mut Dice), first: &[&str], line: &str) -> Operation {
        let first = first.iter().map(|line| words(line)).collect();
        let args = words(line);
        Operation { build, first, args, atomic: true, held: false, over: None, again: false }
    }
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

/// Commands that change sizes, above a base that is longer.
pub fn size_operations() -> Vec<Operation> {
    let after = |first: &[&str], line: &str| Operation::new(build_shorter, first, line);
    let one = |line: &str| after(&[], line);
    let grown = ["snapshot create short.qcow2 m", "resize short.qcow2 160K"];
    let plain = [
        "qemu-img create -q -f qcow2 -b long.qcow2 -F qcow2 below-plain.qcow2 50K",
        "qemu-img create -q -f qcow2 -b below-plain.qcow2 -F qcow2 plain.qcow2 160K",
    ];
    vec![
        one("resize short.qcow2 +64K"),
        one("resize short.qcow2 160K"),
        one("resize over.qcow2 --shrink 45K"),
        one("resize short.qcow2 --shrink 20K"),
        one("qemu-img resize short.qcow2 120K"),
        one("qemu-img resize --shrink over.qcow2 30K"),
        one("qemu-img amend -o size=120K short.qcow2"),
        one("commit over.qcow2"),
        after(&plain, "qemu-img commit plain.qcow2"),
        after(&grown, "snapshot merge short.qcow2 m"),
        after(&grown, "snapshot merge short.qcow2 m --in-batches"),
        after(&grown, "snapshot revert short.qcow2 m --yes"),
        after(&["qemu-img bitmap --add short.qcow2 b"], "resize short.qcow2 160K"),
        after(&["qemu-img bitmap --add short.qcow2 b"], "resize short.qcow2 --shrink 20K"),
    ]
}

/// Commands that write labels, or names of bases, which do not fit into a sector.
pub fn label_operations() -> Vec<Operation> {
    let after = |first: &[String], line: &str| {
        let first: Vec<&str> = first.iter().map(String::as_str).collect();
        Operation::new(build, &first, line)
    };
    let text = "word".repeat(230);
    let create = |name: &str| format!("snapshot create disk.qcow2 {name} --description {text}");
    let base = format!("{}.qcow2", "b".repeat(239));
    let long = [format!("clone --full base.qcow2 {base}"), format!("clone {base} n.qcow2")];
    let plain = ["qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 plain.qcow2".to_owned()];
    let add = "qemu-img bitmap --add plain.qcow2 c".to_owned();
    let bitmap = [plain[0].clone(), add];
    vec![
        after(&[], &create("e")),
        after(&[create("e")], "snapshot rename disk.qcow2 e f"),
        after(&[create("e"), create("f")], "snapshot merge disk.qcow2 e"),
        after(&[create("e")], "snapshot revert disk.qcow2 a --yes"),
        after(&[create("e")], "snapshot delete disk.qcow2 e --yes"),
        after(&[create("e")], "resize disk.qcow2 +64K"),
        after(&long[..1], &format!("rebase other.qcow2 --backing {base}")),
        after(&long, "snapshot create n.qcow2 e"),
        after(&long, &format!("snapshot create n.qcow2 e --description {text}")),
        after(&long, "rebase n.qcow2 --backing base.qcow2"),
        after(&plain, "qemu-img bitmap --add plain.qcow2 c"),
        after(&plain, "qemu-img rebase -u -b ./base.qcow2 -F qcow2 plain.qcow2"),
        after(&bitmap, "qemu-img bitmap --remove plain.qcow2 c"),
        after(&bitmap, "qemu-img resize plain.qcow2 200K"),
    ]
}

/// The commands of a sweep.
pub fn operations() -> Vec<Operation> {
    let one = |line: &str| Operation::new(build, &[], line);
    let over = |line: &str| Operation { over: Some("alone.qcow2"), ..one(line) };
    let many = |line: &str| Operation { atomic: false, ..one(line) };
    let after = |first: &str, line: &str| Operation::new(build, &[first], line);
    vec![
        one("snapshot create disk.qcow2 e --description words"),
        one("snapshot revert disk.qcow2 b --yes"),
        one("snapshot revert disk.qcow2 d --keep e --yes"),
        one("snapshot delete disk.qcow2 c --yes"),
        one("snapshot delete disk.qcow2 d --yes"),
        one("snapshot delete disk.qcow2 b --tree --yes"),
        one("snapshot delete disk.qcow2 c --forget --yes"),
        one("snapshot merge disk.qcow2 a --in-batches"),
        one("snapshot merge disk.qcow2 b --in-batches"),
        one("snapshot merge disk.qcow2 c --in-batches"),
        after("snapshot delete disk.qcow2 c --yes", "snapshot undo disk.qcow2 --yes"),
        after("snapshot delete disk.qcow2 c --yes", "snapshot undo disk.qcow2 --keep e --yes"),
        after("snapshot delete disk.qcow2 c --yes", "snapshot delete disk.qcow2 b --yes"),
        after("snapshot delete disk.qcow2 c --yes", "snapshot forget disk.qcow2"),
        after("snapshot delete disk.qcow2 b --tree --yes", "snapshot undo disk.qcow2 --yes"),
        after("snapshot delete disk.qcow2 b --tree --yes", "snapshot forget disk.qcow2"),
        after("snapshot revert disk.qcow2 a --yes", "snapshot undo disk.qcow2 --yes"),
        after("snapshot revert disk.qcow2 b --yes", "snapshot merge disk.qcow2 b"),
        one("snapshot merge disk.qcow2 a"),
        one("snapshot merge disk.qcow2 b"),
        one("snapshot merge disk.qcow2 c"),
        one("snapshot rename disk.qcow2 b e"),
        many("clone other.qcow2 new1.qcow2 new2.qcow2"),
        one("clone --full disk.qcow2 copy.qcow2"),
        one("rebase other.qcow2 --flatten"),
        one("commit alone.qcow2"),
        one("resize disk.qcow2 +64K"),
        one("convert disk.qcow2 new.qcow2 --compress"),
        one("create new.qcow2 1M"),
        over("qemu-img convert -n -O qcow2 disk.qcow2 alone.qcow2"),
        over("qemu-img convert -n -c -O qcow2 disk.qcow2 alone.qcow2"),
        over("qemu-img convert -n -S 0 -O qcow2 other.qcow2 alone.qcow2"),
        over("qemu-img dd -n -O qcow2 if=disk.qcow2 of=alone.qcow2 bs=4k"),
    ]
}

/// Commands that let go of something: a disk, a seal, what was kept aside; and those that change what a
/// disk stands on, or is made of.
pub fn other_operations() -> Vec<Operation> {
    let after = |first: &[&str], line: &str| Operation::new(build, first, line);
    let one = |line: &str| after(&[], line);
    let many = |line: &str| Operation { atomic: false, ..one(line) };
    let remove = |first: &[&str], line: &str| Operation { again: true, ..after(first, line) };
    let marked = |line: &str| Operation::new(build_marked, &[], line);
    let expired = |line: &str| Operation::new(build_expired, &[], line);
    let plain = ["qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 plain.qcow2"];
    let copy = "qemu-img convert -O qcow2 disk.qcow2 copy.qcow2";
    let bitmaps = [
        "clone --full other.qcow2 full.qcow2",
        "qemu-img bitmap --add full.qcow2 b",
        "qemu-img bitmap --add full.qcow2 c",
    ];
    vec![
        remove(&[], "rm disk.qcow2 --yes"),
        remove(&[], "rm other.qcow2 --yes"),
        remove(&["snapshot delete disk.qcow2 c --yes"], "rm disk.qcow2 --yes"),
        // The mark on what it stood on goes after it.
        Operation {
            atomic: false,
            ..remove(&["clone disk.qcow2 --snapshot b new.qcow2"], "rm new.qcow2 --yes")
        },
        remove(&plain, "rm plain.qcow2 --yes"),
        marked("unseal three.qcow2"),
        marked("unseal one@*.qcow2"),
        expired("snapshot create disk.qcow2 e"),
        expired("snapshot rename disk.qcow2 b e"),
        Operation { over: Some("disk.qcow2"), ..expired("write disk.qcow2 5000") },
        Operation { over: Some("alone.qcow2"), ..one("write alone.qcow2 5000") },
        many("clone other.qcow2 --count 3 --name n{}.qcow2"),
        many("clone disk.qcow2 --snapshot b new.qcow2"),
        one("clone --full --bitmaps disk.qcow2 copy.qcow2"),
        one("compact disk.qcow2"),
        one("rebase other.qcow2 --backing below.qcow2"),
        one("rebase other.qcow2 --backing below.qcow2 --unsafe"),
        after(&plain, "qemu-img rebase -b below.qcow2 -F qcow2 plain.qcow2"),
        after(&[copy], "qemu-img amend -o compat=0.10 copy.qcow2"),
        after(&[copy], "qemu-img amend -o refcount_bits=64 copy.qcow2"),
        after(&bitmaps, "qemu-img bitmap --clear --disable full.qcow2 b"),
        after(&bitmaps, "qemu-img bitmap --merge b full.qcow2 c"),
    ]
}

/// Changes of what a disk stands on that leave what it was beside it: [`super::roller`] does them.
pub fn roll_operations() -> Vec<Operation> {
    let after = |first: &[&str], line: &str| Operation::new(build, first, line);
    // The snapshot that keeps what was written comes first.
    let many = |line: &str| Operation { atomic: false, ..after(&[], line) };
    let rolled = "roll disk.qcow2 below.qcow2";
    vec![
        after(&[], rolled),
        after(&[], "roll other.qcow2 below.qcow2"),
        many("roll disk.qcow2 below.qcow2 kept"),
        many("roll other.qcow2 below.qcow2 kept"),
        after(&["snapshot delete disk.qcow2 c --yes"], rolled),
        after(&["snapshot create disk.qcow2 e"], "roll disk.qcow2 below.qcow2 e"),
        after(&[rolled], "snapshot undo disk.qcow2 --yes"),
        after(&[rolled], "snapshot undo disk.qcow2 --keep new --yes"),
        after(&[rolled], "snapshot revert disk.qcow2 c --yes"),
        Operation { atomic: false, ..after(&[rolled], "roll disk.qcow2 other.qcow2") },
    ]
}

/// Changes of the tree of a disk in use, as [`holder`] does them.
pub fn live_operations() -> Vec<Operation> {
    let after = |first: &[&str], change: &str| {
        let args = holder::command(change);
        Operation { args, held: true, ..Operation::new(build, first, "") }
    };
    let one = |change: &str| after(&[], change);
    let deleted = ["snapshot delete disk.qcow2 d --yes"];
    vec![
        one("create e"),
        one("merge a"),
        one("merge b"),
        one("merge c"),
        one("merge a batches"),
        one("merge b batches"),
        one("merge c batches"),
        one("delete d"),
        one("delete d kept"),
        one("rename b e"),
        after(&deleted, "undo"),
        after(&deleted, "forget"),
        after(&["snapshot delete disk.qcow2 c --yes"], "forget"),
        after(&["resize disk.qcow2 --shrink 101K"], "resize 163840"),
    ]
}
