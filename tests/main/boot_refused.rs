//! What `vdisk boot` refuses: kernels, disks and words that no machine can be made of.

use crate::boot::{boot, can_boot, cloned, guest};

#[test]
fn what_cannot_be_booted_is_refused_with_a_reason() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let before = work.bytes("clone.qcow2");
    work.vdisk("boot clone.qcow2").fails(&["--kernel"]);
    work.vdisk("boot clone.qcow2 --kernel nowhere").fails(&["nowhere", "kernel"]);
    work.vdisk("boot clone.qcow2 --kernel base.raw").fails(&["base.raw", "not a kernel"]);
    work.vdisk("boot clone.qcow2 --kernel .").fails(&["regular file"]);
    work.put("short.elf", b"\x7fELF\x02\x01\x01");
    work.vdisk("boot clone.qcow2 --kernel short.elf").fails(&["short.elf"]);
    let elf = std::fs::read(guest()).unwrap();
    work.put("cut.elf", &elf[..elf.len() / 2]);
    work.vdisk("boot clone.qcow2 --kernel cut.elf").fails(&["cut.elf", "load"]);
    boot(&work, "bare", "--cpus 0").fails(&["processors"]);
    boot(&work, "bare", "--cpus 255").fails(&["processors"]);
    boot(&work, "bare", "--initrd nowhere").fails(&["nowhere", "initrd"]);
    work.put("large", vec![0; 31 << 20]);
    boot(&work, "bare", "--initrd large").fails(&["large", "--memory"]);
    boot(&work, "bare", "--disk nowhere.qcow2").fails(&["nowhere.qcow2"]);
    boot(&work, "bare", &"--disk base.raw ".repeat(26)).fails(&["disks"]);
    boot(&work, "bare", "--queues 33").refuses(&["--queues"]);
    boot(&work, "bare", "--net tap:").refuses(&["tap:NAME"]);
    let kernel = guest().to_str().unwrap();
    work.vdisk(&format!("boot clone.qcow2 --kernel {kernel} --memory 1M")).fails(&["memory"]);
    work.vdisk(&format!("boot clone.qcow2 --kernel {kernel} --memory 1E")).fails(&["memory"]);
    let long = "a".repeat(3000);
    work.vdisk(&format!("boot clone.qcow2 --kernel {kernel} --append {long}"))
        .fails(&["command line"]);
    assert!(before == work.bytes("clone.qcow2"), "a refused boot changed the disk");
}
