//! Starting a virtual machine, against QEMU's microvm machine with the same kernel: from the start of the
//! program to the guest's first words, and what the program takes in memory beside the guest's own.
//!
//! The guest is the tests' own, which speaks at once and then stands still.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::peers::{Side, place, row};
use super::seconds;

/// The guest's memory.
const MEMORY: u64 = 512 << 20;

/// A machine that has spoken; killed with this guard.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine {
    /// Starts one on the clone of this side, and waits for the guest's first line.
    fn start(side: Side, dir: &Path) -> Machine {
        let disk = format!("{}.qcow2", side.name());
        let mut command = match side {
            Side::Ours => Command::new(env!("CARGO_BIN_EXE_vdisk")),
            Side::Peer => Command::new("qemu-system-x86_64"),
        };
        let words = match side {
            Side::Ours => format!("boot {disk} --kernel guest --memory 512M --append test=wait"),
            Side::Peer => format!(
                "-M microvm,accel=kvm,pic=off,pit=off,rtc=off -cpu host -m 512M -nodefaults \
                 -no-user-config -display none -serial stdio -kernel guest -append test=wait \
                 -drive file={disk},if=none,id=d,discard=unmap -device virtio-blk-device,drive=d"
            ),
        };
        command.args(words.split_whitespace()).current_dir(dir);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines =
            BufReader::new(child.stdout.take().unwrap()).split(b'\n').map_while(Result::ok);
        let spoke = lines.any(|line| line.windows(4).any(|part| part == b"ram:"));
        let machine = Machine(child);
        assert!(spoke, "the guest of {} says nothing", side.name());
        machine
    }

    /// Resident memory in bytes, without what is the guest's.
    fn resident(&self) -> u64 {
        let maps = fs::read_to_string(format!("/proc/{}/smaps", self.0.id())).unwrap();
        let number = |line: &str, name: &str| {
            let kib = line.strip_prefix(name)?.trim().strip_suffix(" kB")?;
            kib.parse::<u64>().ok().map(|kib| kib << 10)
        };
        let (mut size, mut all) = (0, 0);
        for line in maps.lines() {
            size = number(line, "Size:").unwrap_or(size);
            let resident = number(line, "Rss:").unwrap_or(0);
            all += if size >= MEMORY / 2 { 0 } else { resident };
        }
        all
    }
}

/// Prints the rows; where there is no KVM or no QEMU there are none.
pub fn table() {
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
    if kvm.is_err() || Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("SKIPPED: the table of virtual machines needs /dev/kvm and qemu-system-x86_64");
        return;
    }
    let (dir, _) = place();
    let dir = dir.path();
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/build");
    let built = Command::new(build).arg(dir.join("guest")).arg("pvh").status().unwrap();
    assert!(built.success(), "the guest is built with cc");
    Side::Ours.run(dir, &["create", "-q", "-f", "qcow2", "base", "20G"]);
    for side in [Side::Ours, Side::Peer] {
        let clone = format!("{}.qcow2", side.name());
        side.run(dir, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", &clone]);
    }
    row("VM of 512 MiB on a 20 GiB clone: first words", "QEMU microvm", |side| {
        let mut machine = None;
        let taken = seconds(|| machine = Some(Machine::start(side, dir)));
        drop(machine);
        taken
    });
    for side in [Side::Ours, Side::Peer] {
        let resident = Machine::start(side, dir).resident();
        println!(
            "resident beside the guest's memory, {}: {:.1} MiB",
            side.name(),
            resident as f64 / 1048576.0
        );
    }
}
