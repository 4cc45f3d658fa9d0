//! Which kernel `vdisk boot` finds in a disk: crafted disks of every layout, and nothing is run.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::boot;
use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::json;

const MIB: u64 = 1 << 20;

/// What begins as a bzImage does, told apart by its last byte.
pub fn kernel(tag: u8) -> Vec<u8> {
    let mut bytes = vec![0; 0x1000];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes.push(tag);
    bytes
}

/// A tree of files; what a path ends with says what is in it.
fn tree(work: &Work, name: &str, files: &[(&str, &[u8])]) {
    for (path, bytes) in files {
        let path = work.path(name).join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// An ext4 file system with a tree of files.
fn file_system(work: &Work, name: &str, uuid: &str, mib: u64) -> Vec<u8> {
    let image = format!("{name}.ext4");
    fs::File::create(work.path(&image)).unwrap().set_len(mib * MIB).unwrap();
    fs::create_dir_all(work.path(name)).unwrap();
    let words = format!("-q -F -t ext4 -U {uuid} -d {name} {image}");
    work.run("mke2fs", words.split_whitespace()).succeeds();
    work.bytes(&image)
}

/// A disk with these file systems as its partitions.
fn partitioned(work: &Work, label: &str, parts: &[Vec<u8>]) {
    let mut script = format!("label: {label}\n");
    let mut disk = vec![0; MIB as usize];
    for part in parts {
        let (start, sectors) = (disk.len() / 512, part.len() / 512);
        script.push_str(&format!("start={start}, size={sectors}\n"));
        disk.extend(part);
    }
    disk.resize(disk.len() + MIB as usize, 0);
    work.put("disk.raw", &disk);
    work.put("table", script);
    let words = ["-c", "sfdisk -q --no-reread disk.raw < table"];
    work.run("sh", words).succeeds();
}

const A: &str = "aaaaaaaa-0000-4000-8000-000000000001";
const B: &str = "bbbbbbbb-0000-4000-8000-000000000002";

/// What a root has beside its kernel.
const ROOT: [(&str, &[u8]); 2] = [("etc/os-release", b"ID=x\n"), ("usr/bin/true", b"")];

fn shown(work: &Work, more: &str) -> Value {
    let before = work.bytes("disk.raw");
    let shown = json(work.vdisk(&format!("boot disk.raw --show --json {more}")));
    assert!(before == work.bytes("disk.raw"), "a look at a disk changed it");
    shown
}

fn line(shown: &Value) -> &str {
    shown["command_line"].as_str().unwrap()
}

fn whole(work: &Work, files: &[(&str, &[u8])]) {
    tree(work, "root", &ROOT);
    tree(work, "root", files);
    work.put("disk.raw", file_system(work, "root", A, 16));
}

#[test]
fn the_newest_kernel_of_a_whole_disk_is_found_with_its_initrd() {
    let work = Work::new();
    let (old, new) = (kernel(1), kernel(2));
    whole(
        &work,
        &[
            ("boot/vmlinuz-6.1.0-9-amd64", &old),
            ("boot/vmlinuz-6.1.0-37-amd64", &new),
            ("boot/initrd.img-6.1.0-9-amd64", b"nine"),
            ("boot/initrd.img-6.1.0-37-amd64", b"thirty-seven"),
            ("boot/config-6.1.0-37-amd64", b""),
        ],
    );
    let found = shown(&work, "");
    assert_eq!(found["kernel"], "/boot/vmlinuz-6.1.0-37-amd64");
    assert_eq!(found["initrds"][0], "/boot/initrd.img-6.1.0-37-amd64");
    assert_eq!(line(&found), "reboot=k panic=-1 root=/dev/vda rw console=ttyS0");
    assert_eq!(found["partition"], Value::Null);
    let found = shown(&work, "--read-only --append quiet");
    assert_eq!(line(&found), "reboot=k panic=-1 root=/dev/vda ro console=ttyS0 quiet");
    let text = work.vdisk("boot disk.raw --show").succeeds().out();
    assert!(text.starts_with("kernel: /boot/vmlinuz-6.1.0-37-amd64\ninitrd: "), "{text}");
}

#[test]
fn a_clone_and_its_snapshots_are_looked_into_as_they_are() {
    let work = Work::new();
    whole(&work, &[("boot/vmlinuz-virt", &kernel(1)), ("boot/initramfs-virt", b"alpine")]);
    work.vdisk("clone disk.raw clone.qcow2").succeeds();
    work.vdisk("snapshot create clone.qcow2 before").succeeds();
    work.put("new", kernel(2));
    work.vdisk("cp new clone.qcow2:/boot/vmlinuz-6.2").succeeds();
    let kernel = |more: &str| {
        json(work.vdisk(&format!("boot clone.qcow2 --show --json {more}")))["kernel"].clone()
    };
    // A number is newer than a name.
    assert_eq!(kernel(""), "/boot/vmlinuz-6.2");
    assert_eq!(kernel("--snapshot before"), "/boot/vmlinuz-virt");
}

#[test]
fn grubs_default_entry_is_found_on_the_partition_that_it_names() {
    let work = Work::new();
    let config = format!(
        "set default=\"${{saved_entry}}\"\nmenuentry 'Old' --id old {{\n\tlinux /vmlinuz-1 root=UUID={B} ro\n}}\n\
         menuentry 'New' --id new {{\n\tsearch --no-floppy --fs-uuid --set=root {A}\n\
         \tlinux\t/vmlinuz-2 root=UUID={B} ro quiet console=tty0\n\tinitrd /ucode.img /initrd.img-2\n}}\n"
    );
    for label in ["gpt", "dos"] {
        let kernel = kernel(2);
        let boot: [(&str, &[u8]); 6] = [
            ("grub/grub.cfg", config.as_bytes()),
            ("grub/grubenv", b"# GRUB Environment Block\nsaved_entry=new\n####"),
            ("vmlinuz-1", &kernel),
            ("vmlinuz-2", &kernel),
            ("initrd.img-2", b"two"),
            ("ucode.img", b"microcode"),
        ];
        tree(&work, "boot", &boot);
        tree(&work, "root", &ROOT);
        fs::create_dir_all(work.path("root/boot")).unwrap();
        let parts = [file_system(&work, "boot", A, 8), file_system(&work, "root", B, 8)];
        partitioned(&work, label, &parts);
        let found = shown(&work, "");
        assert_eq!(found["kernel"], "/vmlinuz-2", "{found}");
        assert_eq!(
            (&found["partition"], &found["initrds"][1]),
            (&1.into(), &"/initrd.img-2".into())
        );
        let expected =
            format!("reboot=k panic=-1 root=UUID={B} ro quiet console=tty0 console=ttyS0");
        assert_eq!(line(&found), expected);
    }
}

#[test]
fn a_root_that_is_named_by_its_id_is_a_device_where_there_is_no_initrd() {
    let work = Work::new();
    let kernel = kernel(1);
    let config = format!("menuentry 'x' {{\nlinux /vmlinuz root=UUID={B} ro\n}}\n");
    tree(&work, "boot", &[("grub2/grub.cfg", config.as_bytes()), ("vmlinuz", &kernel)]);
    tree(&work, "root", &ROOT);
    let parts = [file_system(&work, "boot", A, 8), file_system(&work, "root", B, 8)];
    partitioned(&work, "gpt", &parts);
    assert_eq!(line(&shown(&work, "")), "reboot=k panic=-1 root=/dev/vda2 ro console=ttyS0");
    let said = shown(&work, "--append root=/dev/vda9");
    assert!(line(&said).ends_with(" console=ttyS0 root=/dev/vda9"), "{said}");
}

#[test]
fn entries_of_the_boot_loader_specification_come_before_all_else() {
    let work = Work::new();
    let kernel = kernel(1);
    let entry = |version: &str| {
        format!(
            "title Fedora\nversion {version}\nlinux /vmlinuz-{version}\ninitrd /initramfs-{version}.img\n\
             initrd $tuned_initrd\noptions root=UUID={B} ro $kernelopts\n"
        )
    };
    let (old, new) = (entry("6.5.6"), entry("6.5.12"));
    let boot: [(&str, &[u8]); 8] = [
        ("loader/entries/0123-6.5.6.conf", old.as_bytes()),
        ("loader/entries/0123-6.5.12.conf", new.as_bytes()),
        ("loader/entries/0123-0-rescue.conf", old.as_bytes()),
        ("grub2/grub.cfg", b"menuentry 'x' {\nlinux /vmlinuz-6.5.6\n}\n"),
        ("grub2/grubenv", b"# GRUB Environment Block\nkernelopts=rhgb quiet\n###"),
        ("vmlinuz-6.5.6", &kernel),
        ("vmlinuz-6.5.12", &kernel),
        ("initramfs-6.5.12.img", b"x"),
    ];
    tree(&work, "boot", &boot);
    tree(&work, "root", &ROOT);
    let parts = [file_system(&work, "boot", A, 8), file_system(&work, "root", B, 8)];
    partitioned(&work, "gpt", &parts);
    let found = shown(&work, "");
    assert_eq!(found["kernel"], "/vmlinuz-6.5.12");
    assert_eq!(found["initrds"], Value::from(vec!["/initramfs-6.5.12.img"]));
    assert!(line(&found).contains(&format!("root=UUID={B} ro rhgb quiet")), "{found}");
    // What the user or the loader chose.
    tree(&work, "boot", &[("loader/loader.conf", b"default 0123-6.5.6*\n")]);
    partitioned(&work, "gpt", &[file_system(&work, "boot", A, 8), parts[1].clone()]);
    assert_eq!(shown(&work, "")["kernel"], "/vmlinuz-6.5.6");
}

#[test]
fn entries_lie_below_boot_and_by_machine_too() {
    let work = Work::new();
    let entry =
        b"sort-key arch\nlinux /0123abcd/6.9/linux\ninitrd /0123abcd/6.9/initrd\noptions ro\n";
    let files: [(&str, &[u8]); 3] = [
        ("boot/loader/entries/0123abcd-6.9+3.conf", entry),
        ("boot/0123abcd/6.9/linux", &kernel(1)),
        ("boot/0123abcd/6.9/initrd", b"x"),
    ];
    whole(&work, &files);
    let found = shown(&work, "");
    assert_eq!(found["kernel"], "/boot/0123abcd/6.9/linux");
    assert_eq!(line(&found), "reboot=k panic=-1 root=/dev/vda ro console=ttyS0");
}

/// An EFI system partition with a tree of files: FAT with entries of so many bits.
fn efi(work: &Work, name: &str, bits: u32, mib: u64) -> Vec<u8> {
    let image = format!("{name}.fat");
    fs::File::create(work.path(&image)).unwrap().set_len(mib * MIB).unwrap();
    let words = format!("-F {bits} -s 1 -i 1234abcd {image}");
    work.run("mkfs.vfat", words.split_whitespace()).succeeds();
    let copy = format!("mcopy -s -i {image} {name}/* ::");
    work.run("sh", ["-c", copy.as_str()]).succeeds();
    work.bytes(&image)
}

#[test]
fn a_boot_on_an_efi_system_partition_is_read() {
    if !have(Need::Fat) {
        return;
    }
    for (bits, mib) in [(12, 1), (16, 8), (32, 40)] {
        let work = Work::new();
        let entry = "sort-key debian\nversion 6.9\nlinux /0123abcd/6.9-cloud-amd64/linux\n\
                     initrd /0123abcd/6.9-cloud-amd64/initrd.img-6.9\noptions root=PARTUUID=1 ro quiet\n";
        let large = vec![7; 100_000];
        let boot: [(&str, &[u8]); 6] = [
            ("loader/loader.conf", b"timeout 3\n"),
            ("loader/entries/0123abcd-6.9-cloud-amd64.conf", entry.as_bytes()),
            ("0123abcd/6.9-cloud-amd64/linux", &kernel(1)),
            ("0123abcd/6.9-cloud-amd64/initrd.img-6.9", &large),
            ("EFI/BOOT/BOOTX64.EFI", b"MZ"),
            ("vmlinuz-7.0", &kernel(2)),
        ];
        tree(&work, "esp", &boot);
        tree(&work, "root", &ROOT);
        let parts = [efi(&work, "esp", bits, mib), file_system(&work, "root", A, 8)];
        partitioned(&work, "gpt", &parts);
        let found = shown(&work, "");
        assert_eq!(found["kernel"], "/0123abcd/6.9-cloud-amd64/linux", "FAT{bits}");
        assert_eq!(found["partition"], 1);
        let initrd = "/0123abcd/6.9-cloud-amd64/initrd.img-6.9";
        assert_eq!(found["initrds"], Value::from(vec![initrd]));
        assert!(line(&found).contains("root=PARTUUID=1 ro quiet"), "{found}");
        // Without entries the newest one at its top, and the root is beside it: not on FAT.
        fs::remove_dir_all(work.path("esp/loader")).unwrap();
        tree(&work, "esp", &ROOT);
        partitioned(&work, "dos", &[efi(&work, "esp", bits, mib), parts[1].clone()]);
        let found = shown(&work, "");
        assert_eq!(found["kernel"], "/vmlinuz-7.0", "FAT{bits}");
        assert!(line(&found).contains("root=/dev/vda2"), "{found}");
    }
}

#[test]
fn a_guest_gets_the_kernel_and_initrd_of_its_efi_system_partition_byte_for_byte() {
    if !have(Need::Fat) || !boot::can_boot() {
        return;
    }
    let work = Work::new();
    let kernel = fs::read(boot::guest()).unwrap();
    let mut initrd = b"what the initrd holds\0".to_vec();
    initrd.resize(300_000, 0x5a);
    let entry = b"linux /guest\ninitrd /initrd\noptions root=/dev/vda2 test=cache\n";
    let boot: [(&str, &[u8]); 3] =
        [("loader/entries/x.conf", entry), ("guest", &kernel), ("initrd", &initrd)];
    tree(&work, "esp", &boot);
    tree(&work, "root", &ROOT);
    let esp = efi(&work, "esp", 16, 8);
    partitioned(&work, "gpt", &[esp, file_system(&work, "root", A, 8)]);
    let out = work.vdisk("boot disk.raw --memory 64M --ephemeral").succeeds().out();
    assert!(out.contains("initrd: what the initrd holds\n") && out.ends_with("done\n"), "{out}");
}

#[test]
fn what_only_the_kernel_reads_is_named_with_what_can_be_done() {
    let work = Work::new();
    let mut xfs = vec![0; MIB as usize];
    xfs[..4].copy_from_slice(b"XFSB");
    let mut btrfs = vec![0; MIB as usize];
    btrfs[0x10040..0x10048].copy_from_slice(b"_BHRfS_M");
    partitioned(&work, "gpt", &[xfs, btrfs]);
    let what = ["no kernel", "partition 1 (xfs", "partition 2 (btrfs", "--kernel", "vdisk mount"];
    work.vdisk("boot disk.raw --show").fails(&what);
}

#[test]
fn alpines_configuration_is_read() {
    let work = Work::new();
    let config = b"DEFAULT virt\nLABEL virt\n  LINUX vmlinuz-virt\n  INITRD initramfs-virt\n  \
                   APPEND root=UUID=1 modules=ext4\n";
    let files: [(&str, &[u8]); 4] = [
        ("boot/extlinux.conf", config),
        ("boot/vmlinuz-virt", &kernel(1)),
        ("boot/vmlinuz-9", &kernel(1)),
        ("boot/initramfs-virt", b"x"),
    ];
    whole(&work, &files);
    let found = shown(&work, "");
    assert_eq!(found["kernel"], "/boot/vmlinuz-virt");
    assert!(line(&found).contains("root=UUID=1 modules=ext4 rw"), "{found}");
}

#[test]
fn kernels_that_do_not_boot_are_refused_by_the_name_of_their_form() {
    let work = Work::new();
    whole(&work, &[("boot/vmlinuz-6.1", b"\x1f\x8b\x08 and more")]);
    work.vdisk("boot disk.raw --show").fails(&["vmlinuz-6.1", "gzip", "--kernel"]);
    work.vdisk("boot disk.raw").fails(&["vmlinuz-6.1", "gzip"]);
    work.put("zboot", b"MZ\0\0zimg\0\0");
    work.vdisk("boot disk.raw --kernel zboot").fails(&["zboot", "EFI"]);
    let entry = b"linux /gone\noptions ro\n";
    tree(&work, "root", &[("boot/loader/entries/x.conf", entry)]);
    work.put("disk.raw", file_system(&work, "root", A, 16));
    work.vdisk("boot disk.raw --show").fails(&["vmlinuz-6.1", "gzip"]);
}

#[test]
fn a_disk_without_a_kernel_says_what_was_looked_at_and_takes_one_that_is_kept() {
    let work = Work::new();
    whole(&work, &[]);
    let vdisk = |words: &str| work.vdisk(&format!("{words} --store store"));
    vdisk("boot disk.raw --show").fails(&["no kernel", "the disk", "--kernel", "kernel add"]);
    work.put("k", kernel(7));
    work.put("i", "an initrd");
    work.put("bad", "no kernel");
    vdisk("kernel add bad bad").fails(&["neither ELF nor bzImage"]);
    vdisk("kernel add ../x k").fails(&["name"]);
    vdisk("kernel add small k --initrd i").succeeds();
    vdisk("kernel add small k").fails(&["already"]);
    let listed = json(vdisk("kernel list --json"));
    assert_eq!(listed["kernels"][0]["name"], "small");
    let found = json(vdisk("boot disk.raw --show --json"));
    assert!(found["kernel"].as_str().unwrap().ends_with("/small/kernel"), "{found}");
    assert!(found["initrds"][0].as_str().unwrap().ends_with("/small/initrd"), "{found}");
    vdisk("kernel add other k").succeeds();
    vdisk("boot disk.raw --show").fails(&["several", "other, small"]);
    let found = json(vdisk("boot disk.raw --show --json --kernel other"));
    assert!(found["kernel"].as_str().unwrap().ends_with("/other/kernel"), "{found}");
    vdisk("kernel rm other").succeeds();
    vdisk("kernel rm other").fails(&["no kernel other"]);
    assert_eq!(fs::read_dir(work.path("store/kernels")).unwrap().count(), 1);
}

#[test]
fn an_initrd_is_made_of_a_kernels_modules() {
    let work = Work::new();
    work.put("k", kernel(7));
    let files: [(&str, &[u8]); 5] = [
        ("modules.dep", b"fs/ext4.ko: lib/crc16.ko\nlib/crc16.ko:\nvirtio_mmio.ko:\n"),
        ("modules.builtin", b"kernel/drivers/block/virtio_blk.ko\n"),
        ("fs/ext4.ko", b"of ext4"),
        ("lib/crc16.ko", b"of crc16"),
        ("virtio_mmio.ko", b"of mmio"),
    ];
    tree(&work, "modules", &files);
    let busybox = Path::new("/bin/busybox").exists();
    let done = work.vdisk("kernel add k k --modules modules --store store");
    if !busybox {
        done.fails(&["busybox-static"]);
        return;
    }
    done.succeeds();
    let unpack = "mkdir x && cd x && /bin/busybox cpio -id < ../store/kernels/k/initrd-made 2>/dev/null && ls modules && \
                  cat modules/*ext4.ko && test -x init && test -x bin/busybox";
    let out = work.run("sh", ["-c", unpack]).succeeds().out();
    assert_eq!(out, "000-virtio_mmio.ko\n001-crc16.ko\n002-ext4.ko\nof ext4");
    work.run("sh", ["-n", "x/init"]).succeeds();
    // Such a one runs a command; words keep what is in them.
    whole(&work, &[]);
    let words = ["boot", "disk.raw", "--store", "store", "--show", "--", "sh", "-c", "echo 'a  b'"];
    let shown = work.vdisk_args(words).succeeds().out();
    let expected = "vdisk.host=disk vdisk.word=sh vdisk.word=-c \
                    vdisk.word=echo\\0040\\0047a\\0040\\0040b\\0047\n";
    assert!(shown.contains(expected), "{shown}");
    work.vdisk("kernel add plain k --store store").succeeds();
    let plain = "boot disk.raw --store store --kernel plain --show -- true";
    work.vdisk(plain).fails(&["kernel add", "--modules"]);
}

#[test]
fn a_disk_of_rubbish_has_no_kernel_and_says_so() {
    let work = Work::new();
    work.put("disk.raw", vec![0x5a; MIB as usize]);
    work.vdisk("boot disk.raw --show").fails(&["no kernel", "no file system"]);
    tree(&work, "root", &ROOT);
    let boot = work.path("root/boot");
    fs::create_dir_all(&boot).unwrap();
    std::os::unix::fs::symlink("vmlinuz-b", boot.join("vmlinuz-a")).unwrap();
    std::os::unix::fs::symlink("vmlinuz-a", boot.join("vmlinuz-b")).unwrap();
    work.put("disk.raw", file_system(&work, "root", A, 16));
    work.vdisk("boot disk.raw --show").fails(&["no kernel"]);
}
