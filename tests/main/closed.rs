//! Readers that go away: `… | head`, and an output that takes nothing.

use std::fs::OpenOptions;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use crate::host::Work;

/// Commands that report, as words of `vdisk`, and the status that they end with.
const REPORTS: &[(&str, i32)] = &[
    ("--help", 0),
    ("convert --help", 0),
    ("--version", 0),
    ("info d.qcow2", 0),
    ("info d.qcow2 --json", 0),
    ("info d.qcow2 --chain", 0),
    ("tree d.qcow2", 0),
    ("check d.qcow2", 0),
    ("check d.qcow2 --json", 0),
    ("map d.qcow2", 0),
    ("map d.qcow2 --json", 0),
    ("compare d.qcow2 other.qcow2", 1),
    ("snapshot list d.qcow2", 0),
    ("snapshot list d.qcow2 --json", 0),
    ("snapshot diff d.qcow2 first", 0),
    ("snapshot delete d.qcow2 first --dry-run", 0),
    ("compact d.qcow2 --json", 0),
    ("resize d.qcow2 +1M", 0),
    ("read d.qcow2 0 1M", 0),
    ("info missing", 1),
    ("no-such-verb", 64),
    ("qemu-img --help", 0),
    ("qemu-img --version", 0),
    ("qemu-img check d.qcow2", 0),
    ("qemu-img check --output=json d.qcow2", 0),
    ("qemu-img map d.qcow2", 0),
    ("qemu-img map --output=json d.qcow2", 0),
    ("qemu-img measure -O qcow2 d.qcow2", 0),
    ("qemu-img compare d.qcow2 other.qcow2", 1),
    ("qemu-img info d.qcow2", 0),
    ("qemu-img info --output=json --backing-chain d.qcow2", 0),
    ("qemu-img snapshot -l d.qcow2", 0),
    ("qemu-img create -f qcow2 -o help", 0),
    ("qemu-img create -f qcow2 new.qcow2 1M", 0),
    ("qemu-img amend -f qcow2 -o help", 0),
    ("qemu-img convert -p -O qcow2 d.qcow2 copy.qcow2", 0),
    ("qemu-img resize d.qcow2 +1M", 0),
    ("qemu-img bench -c 10 d.qcow2", 0),
    ("qemu-img info missing", 1),
    ("qemu-img no-such-command", 1),
];

fn disks(work: &Work) {
    work.vdisk("create d.qcow2 8M").succeeds();
    work.vdisk("create other.qcow2 8M").succeeds();
    work.vdisk_fed("write d.qcow2 0", &vec![7; 2 << 20]).succeeds();
    work.vdisk("snapshot create d.qcow2 first").succeeds();
    work.vdisk_fed("write d.qcow2 3M", &vec![8; 1 << 20]).succeeds();
}

/// An end of a pipe that nobody reads.
fn unread() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// The standard library's `println!` panics there: `… | head` ended with a backtrace and 101.
#[test]
fn a_reader_who_has_seen_enough_changes_nothing() {
    let work = Work::new();
    disks(&work);
    for (words, status) in REPORTS {
        for close_messages in [false, true] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_vdisk"));
            command.args(words.split(' ')).current_dir(work.dir()).stdin(Stdio::null());
            command.stdout(unread());
            command.stderr(if close_messages { unread() } else { Stdio::piped() });
            let done = command.output().unwrap();
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(!said.contains("panicked") && !said.contains("roken pipe"), "{words}: {said}");
            let ended = (done.status.code(), done.status.signal());
            assert_eq!(ended, (Some(*status), None), "{words}: {said}");
        }
    }
    work.vdisk("check d.qcow2").succeeds();
}

#[test]
fn an_output_that_cannot_be_written_is_a_failure() {
    let work = Work::new();
    disks(&work);
    for words in ["info d.qcow2", "map d.qcow2 --json", "qemu-img info d.qcow2", "read d.qcow2 0 9"]
    {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vdisk"));
        command.args(words.split(' ')).current_dir(work.dir()).stdout(full);
        let done = command.output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(said.contains("standard output could not be written"), "{words}: {said}");
        assert_eq!(done.status.code(), Some(1), "{words}");
    }
}
