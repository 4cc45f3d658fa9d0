//! Images: their layers are deltas, the same everywhere, and other programs agree on what is in them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use crate::host::{Done, VDISK, Work};
use crate::require::{Need, have};
use crate::someone::{Ids, Who, give, run};

/// How long it may take to pack, unpack or read a whole image on a slow and busy machine.
pub const LONG: Duration = Duration::from_secs(1200);

/// A directory with an image of two layers in it, `lay:a` and `lay:b`, made by umoci.
pub fn layout(work: &Work) {
    umoci(work, "init --layout lay");
    umoci(work, "new --image lay:a");
    change(work, "a", "a", |root| {
        for dir in ["etc", "usr/bin", "usr/lib", "var/lib/gone", "dev", "name with spaces"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        symlink("usr/bin", root.join("bin")).unwrap();
        for number in 0..40u8 {
            let bytes = vec![number; usize::from(number) * 701];
            fs::write(root.join(format!("usr/lib/f{number}")), bytes).unwrap();
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
        fs::hard_link(root.join("etc/passwd"), root.join("etc/hard")).unwrap();
        fs::write(root.join("usr/bin/tool"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(root.join("usr/bin/tool"), PermissionsExt::from_mode(0o4755)).unwrap();
        let script =
            "cd $1; mknod dev/null c 1 3; mkfifo var/pipe; touch \"$(printf 'etc/n\\377')\";
            truncate -s 5M var/sparse; printf x >>var/sparse; chown 1000:2000 var/lib/gone;
            touch -d '1965-01-01 01:02:03' etc/hard; ln -s usr/lib lib";
        shell(work, script, root);
    });
    change(work, "a", "b", |root| {
        fs::remove_file(root.join("usr/lib/f1")).unwrap();
        fs::remove_file(root.join("etc/hard")).unwrap();
        fs::remove_dir_all(root.join("var/lib/gone")).unwrap();
        fs::write(root.join("var/lib/gone"), "a file now").unwrap();
        fs::remove_file(root.join("bin")).unwrap();
        fs::create_dir(root.join("bin")).unwrap();
        fs::write(root.join("bin/t"), "t").unwrap();
        fs::write(root.join("usr/lib/f3"), "other").unwrap();
    });
}

pub fn umoci(work: &Work, words: &str) {
    work.command("umoci", words.split_whitespace()).finish(None, LONG).succeeds();
}

pub fn shell(work: &Work, script: &str, at: &Path) {
    read(work, script, at);
}

fn read(work: &Work, script: &str, at: &Path) -> Done {
    let words = ["-ec", script, "sh", at.to_str().unwrap()];
    work.command("sh", words).finish(None, LONG).succeeds()
}

/// Changes the files of the image `from` and makes that the image `to`.
fn change(work: &Work, from: &str, to: &str, with: impl FnOnce(&Path)) {
    umoci(work, &format!("unpack --image lay:{from} bundle"));
    with(&work.path("bundle/rootfs"));
    umoci(work, &format!("repack --image lay:{to} bundle"));
    fs::remove_dir_all(work.path("bundle")).unwrap();
}

/// What is in a tree, a line for each file.
fn tree(work: &Work, at: &str) -> Vec<String> {
    let script = "cd $1; find . -path ./lost+found -prune -o ! -type d \
        -printf '%P %y %m %U %G %s %n %T@ %l\\n' -o -printf '%P %y %m %U %G %T@\\n'; \
        find . -path ./lost+found -prune -o -type f -print0 | xargs -0 sha256sum; \
        find . -path ./lost+found -prune -o -print0 | xargs -0 getfattr -h -d -e hex -m '^(user|security.capability)' | \
        awk 'BEGIN { RS = \"\"; FS = \"\\n\" } { gsub(FS, \" \"); print }'";
    let done = read(work, script, &work.path(at));
    let mut lines: Vec<String> = done
        .stdout
        .split(|b| *b == b'\n')
        .map(|l| String::from_utf8_lossy(l).into_owned())
        .collect();
    lines.sort();
    lines
}

/// Requires that a disk shows the files that umoci unpacks from an image.
#[track_caller]
pub fn same_files(work: &Work, disk: &str, image: &str) {
    umoci(work, &format!("unpack --image {image} theirs"));
    fs::create_dir_all(work.path("ours")).unwrap();
    work.vdisk(&format!("mount --read-only {disk} ours")).succeeds();
    let (ours, theirs) = (tree(work, "ours"), tree(work, "theirs/rootfs"));
    work.command(VDISK, ["umount", "ours"]).finish(None, LONG).succeeds();
    fs::remove_dir_all(work.path("theirs")).unwrap();
    let odd: Vec<&String> = ours
        .iter()
        .filter(|l| !theirs.contains(l))
        .chain(theirs.iter().filter(|l| !ours.contains(l)))
        .collect();
    assert!(odd.is_empty(), "{disk} and {image} differ: {odd:#?}");
    assert!(ours.len() > 40);
}

/// The layers in a store, by name, and what is in them.
pub fn layers(work: &Work, store: &str) -> Vec<(String, String)> {
    let mut names: Vec<String> = fs::read_dir(work.path(store).join("layers"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let sum = |name: &String| {
        let path = work.path(store).join("layers").join(name);
        let sum = work.command("sha256sum", [path.to_str().unwrap()]);
        let done = sum.finish(None, LONG).succeeds();
        done.text().split(' ').next().unwrap_or_default().to_owned()
    };
    names.iter().map(|name| (name.clone(), sum(name))).collect()
}

/// The layers that an image in a layout names.
pub fn digests(work: &Work, layout: &str, tag: &str) -> Vec<String> {
    let done = work.run("skopeo", ["inspect", &format!("oci:{layout}:{tag}")]).succeeds();
    let text = String::from_utf8(done.stdout).unwrap();
    let from = text.find("\"Layers\"").unwrap();
    let layers = text[from..].split_once('[').unwrap().1.split_once(']').unwrap().0;
    layers.split(',').map(|l| l.trim().trim_matches('"').to_owned()).collect()
}

#[test]
fn an_imported_image_holds_what_others_unpack_and_is_the_same_everywhere() {
    if !have(Need::Oci) {
        return;
    }
    let work = Work::new();
    layout(&work);
    work.vdisk("import oci:lay:a debian --store s1").succeeds();
    work.vdisk("import oci:lay:b app:2 --store s1").succeeds();
    // The first layer is there once.
    assert_eq!(layers(&work, "s1").len(), 2);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    work.vdisk("import oci:lay:b other --store elsewhere").succeeds();
    assert_eq!(layers(&work, "s1"), layers(&work, "elsewhere"));
    // By other users, who have no root.
    work.run("chmod", ["-R", "a+rX", "lay"]).succeeds();
    give(&work);
    for ids in [Ids::Lent, Ids::One] {
        let words = format!("import oci:lay:b mine --store {ids:?}");
        run(&work, Who::Someone(ids), words.split_whitespace()).succeeds();
        assert_eq!(layers(&work, "elsewhere"), layers(&work, &format!("{ids:?}")));
    }
    for (name, _) in layers(&work, "s1") {
        work.qemu_img(&format!("check s1/layers/{name}")).succeeds();
    }
    for (image, tag) in [("debian", "a"), ("app:2", "b")] {
        let disk = format!("{tag}.qcow2");
        work.vdisk(&format!("clone --store s1 {image} {disk}")).succeeds();
        same_files(&work, &disk, &format!("lay:{tag}"));
        work.vdisk(&format!("convert --format raw {disk} {tag}.raw")).succeeds();
        work.run("e2fsck", ["-fn", &format!("{tag}.raw")]).succeeds();
    }
    // From an archive, as skopeo makes them, and of the form of `docker save`.
    work.run("skopeo", ["copy", "oci:lay:b", "oci-archive:o.tar:b"]).succeeds();
    work.run("skopeo", ["copy", "oci:lay:b", "docker-archive:d.tar:app:b"]).succeeds();
    for source in ["oci-archive:o.tar", "docker-archive:d.tar:app:b"] {
        work.vdisk(&format!("import {source} again --store s3")).succeeds();
        assert_eq!(layers(&work, "elsewhere"), layers(&work, "s3"), "{source}");
    }
}

#[test]
fn a_disk_is_exported_and_others_read_it() {
    if !have(Need::Oci) {
        return;
    }
    let work = Work::new();
    layout(&work);
    work.vdisk("import oci:lay:b app --store s").succeeds();
    work.vdisk("clone --store s app d.qcow2").succeeds();
    // Nothing was changed: the layers are those that came.
    work.vdisk("export d.qcow2 oci:out:same --store s").succeeds();
    assert_eq!(digests(&work, "lay", "b"), digests(&work, "out", "same"));
    fs::create_dir(work.path("m")).unwrap();
    work.vdisk("mount d.qcow2 m").succeeds();
    let script = "cd $1; rm usr/lib/f7; echo new >etc/new; mkdir d; echo x >d/x; ln d/x d/y; \
        mv 'name with spaces' renamed; echo in >renamed/file; chmod 700 var; truncate -s 3M sparse; \
        echo end >>sparse; mknod blk b 7 1; ln -s nowhere lnk; rm -r usr/bin; echo f >usr/bin; \
        mv usr/lib moved; mkdir usr/lib; echo alone >usr/lib/f3";
    shell(&work, script, &work.path("m"));
    work.vdisk("umount m").succeeds();
    work.vdisk("snapshot create d.qcow2 first").succeeds();
    work.vdisk("mount d.qcow2 m").succeeds();
    shell(&work, "cd $1; rm etc/new; mkdir etc/new; echo more >d/x", &work.path("m"));
    work.vdisk("umount m").succeeds();
    work.vdisk("export d.qcow2 oci:out:changed --store s --env A=b --label l=1").succeeds();
    let (before, after) = (digests(&work, "lay", "b"), digests(&work, "out", "changed"));
    assert_eq!(after.len(), before.len() + 2);
    assert!(after.starts_with(&before));
    same_files(&work, "d.qcow2", "out:changed");
    let said = work.run("skopeo", ["inspect", "oci:out:changed"]).succeeds();
    assert!(said.text().contains("\"A=b\"") && said.text().contains("\"l\": \"1\""));
    // And back: what was made of it is the same disk.
    work.vdisk("export d.qcow2 oci-archive:a.tar:v1 --store s").succeeds();
    work.vdisk("import oci-archive:a.tar:v1 back --store s").succeeds();
    work.vdisk("clone --store s back e.qcow2").succeeds();
    same_files(&work, "e.qcow2", "out:changed");
    // All files in one.
    work.vdisk("export d.qcow2 all.tar --store s").succeeds();
    work.vdisk("import all.tar flat --store s").succeeds();
    work.vdisk("clone --store s flat f.qcow2").succeeds();
    same_files(&work, "f.qcow2", "out:changed");
}

#[test]
fn layers_that_something_stands_on_are_not_pruned() {
    if !have(Need::Oci) {
        return;
    }
    let work = Work::new();
    layout(&work);
    let listed = |work: &Work| layers(work, "s").len();
    work.vdisk("import oci:lay:a one --store s").succeeds();
    work.vdisk("import oci:lay:b two --store s").succeeds();
    work.vdisk("image prune --store s --yes").succeeds();
    assert_eq!(listed(&work), 2);
    work.vdisk("clone --store s two d.qcow2").succeeds();
    work.vdisk("image rm --store s one").succeeds();
    work.vdisk("image rm --store s two").succeeds();
    work.vdisk("image prune --store s --yes").succeeds();
    assert_eq!(listed(&work), 2, "the clone stands on them");
    work.vdisk("check d.qcow2").succeeds();
    work.vdisk("rm d.qcow2 --yes").succeeds();
    let said = work.vdisk("image prune --store s").fails(&[]);
    assert!(said.text().contains("--yes"), "{}", said.text());
    assert_eq!(listed(&work), 2);
    work.vdisk("image prune --store s --yes").succeeds();
    assert_eq!(listed(&work), 0);
    let blobs = fs::read_dir(work.path("s/blobs/sha256")).unwrap().count();
    assert_eq!(blobs, 0);
}

#[test]
fn an_import_that_is_killed_leaves_whole_layers_and_is_done_again() {
    if !have(Need::Oci) {
        return;
    }
    let work = Work::new();
    layout(&work);
    work.vdisk("import oci:lay:b whole --store right").succeeds();
    for syncs in 1..40 {
        let store = format!("s{syncs}");
        let inject = format!("inject=fsync,fdatasync,linkat,renameat2:signal=SIGKILL:when={syncs}");
        let vdisk = crate::host::VDISK;
        let words =
            ["-f", "-o", "/dev/null", "-e", &inject, vdisk, "import", "oci:lay:b", "x", "--store"];
        let done = work.run("strace", words.into_iter().chain([store.as_str()]));
        let whole = done.code == Some(0);
        if work.path(&store).join("layers").is_dir() {
            for (name, sum) in layers(&work, &store) {
                work.qemu_img(&format!("check {store}/layers/{name}")).succeeds();
                // The lower one may not know yet that something stands on it.
                assert_eq!(sum.len(), 64);
            }
        }
        work.vdisk(&format!("import oci:lay:b x --store {store}")).succeeds();
        assert_eq!(layers(&work, &store), layers(&work, "right"), "killed at {syncs}");
        fs::remove_dir_all(work.path(&store)).unwrap();
        if whole {
            assert!(syncs > 4);
            return;
        }
    }
    panic!("it never came to its end");
}

#[test]
fn a_disk_made_from_an_image_grows_without_its_layers() {
    if !have(Need::Oci) {
        return;
    }
    let work = Work::new();
    layout(&work);
    work.vdisk("import oci:lay:b app --store s").succeeds();
    let clean = |disk: &str| {
        work.vdisk(&format!("convert --format raw {disk} x.raw")).succeeds();
        work.run("e2fsck", ["-fn", "x.raw"]).succeeds();
        let said = work.run("dumpe2fs", ["-h", "x.raw"]).succeeds().out();
        fs::remove_file(work.path("x.raw")).unwrap();
        let line = said.lines().find(|l| l.starts_with("Block count:")).unwrap();
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap() * 4096
    };
    work.vdisk("clone app a.qcow2 --store s").succeeds();
    assert_eq!(clean("a.qcow2"), 10 << 30);
    let before = layers(&work, "s");
    work.vdisk("clone app d.qcow2 e.qcow2 --size 37G --store s").succeeds();
    assert_eq!((clean("d.qcow2"), clean("e.qcow2")), (37 << 30, 37 << 30));
    same_files(&work, "d.qcow2", "lay:b");
    // What it takes is little, and the shared layers stay what they were.
    assert!(fs::metadata(work.path("d.qcow2")).unwrap().len() < 32 << 20);
    assert_eq!(layers(&work, "s").len(), before.len());
    let parents: Vec<_> = before.iter().map(|(name, _)| name).collect();
    assert!(layers(&work, "s").iter().all(|(name, _)| parents.contains(&name)));
    // By little, to a group's very end, past groups of descriptors; and twice to the same size.
    for size in ["37G", "39729496064", "39732641792", "39862665216", "60G", "101G", "101G"] {
        work.vdisk(&format!("resize d.qcow2 {size} --files")).succeeds();
        assert!(clean("d.qcow2") > 36 << 30, "{size}");
    }
    assert_eq!(clean("d.qcow2"), 101 << 30);
    // The new room is used, by the kernel too, and survives.
    fs::create_dir(work.path("m")).unwrap();
    work.vdisk("mount d.qcow2 m").succeeds();
    shell(
        &work,
        "cd $1; fallocate -l 12G big; seq 500000 >much; mkdir new; touch new/f; sync",
        &work.path("m"),
    );
    work.vdisk("umount m").succeeds();
    clean("d.qcow2");
    work.vdisk("mount d.qcow2 m").succeeds();
    work.vdisk("resize d.qcow2 120G --files").fails(&["in use"]);
    work.vdisk("umount m").succeeds();
    work.vdisk("clone app f.qcow2 --size 1G --store s").fails(&["at least"]);
    // A foreign file system is left alone, and its disk with it.
    work.run("truncate", ["-s", "64M", "t.raw"]).succeeds();
    work.run("mke2fs", ["-q", "-t", "ext4", "t.raw"]).succeeds();
    work.vdisk("convert --format qcow2 t.raw t.qcow2").succeeds();
    work.vdisk("resize t.qcow2 128M --files").fails(&["resize2fs"]);
    assert!(work.vdisk("info t.qcow2 --json").succeeds().out().contains("67108864"));
}

#[test]
fn what_is_run_in_an_image_goes_with_its_clones_and_snapshots() {
    if !have(Need::Oci) {
        return;
    }
    let work = Work::new();
    layout(&work);
    let more = "--config.env A=1 --config.cmd /bin/t --config.workingdir /w --config.volume /v";
    umoci(&work, &format!("config --image lay:b {more} --config.exposedports 80/tcp"));
    work.vdisk("import oci:lay:b app --store s").succeeds();
    work.vdisk("clone app d.qcow2 --store s").succeeds();
    let config = |disk: &str| work.vdisk(&format!("image config {disk} --json")).succeeds().out();
    let came = config("d.qcow2");
    for part in ["\"A=1\"", "/bin/t", "\"/w\"", "\"/v\"", "80/tcp"] {
        assert!(came.contains(part), "{part}: {came}");
    }
    work.vdisk("image config d.qcow2 --user 7:8 --env B=2 --env A=3 --label k=v").succeeds();
    work.vdisk("snapshot create d.qcow2 one").succeeds();
    let one = config("d.qcow2");
    assert!(one.contains("\"7:8\"") && one.contains("\"A=3\"") && !one.contains("A=1"), "{one}");
    work.vdisk("image config d.qcow2 --cmd other --workdir /x").succeeds();
    let two = config("d.qcow2");
    assert!(two.contains("other") && two.contains("\"B=2\""), "{two}");
    // Merging loses none of it, reverting brings the old one back, QEMU keeps it.
    work.vdisk("clone d.qcow2 e.qcow2 --snapshot one").succeeds();
    assert_eq!(config("e.qcow2"), one);
    work.vdisk("snapshot create d.qcow2 two").succeeds();
    work.vdisk("snapshot merge d.qcow2 two").succeeds();
    assert_eq!(config("d.qcow2"), two);
    work.qemu_io("d.qcow2", &["write 0 512"]).succeeds();
    assert_eq!(config("d.qcow2"), two);
    work.vdisk("snapshot revert d.qcow2 one --yes").succeeds();
    assert_eq!(config("d.qcow2"), one);
    work.vdisk("check d.qcow2").succeeds();
    work.vdisk("export d.qcow2 oci:out:v --env C=4 --store s").succeeds();
    let said = work.run("skopeo", ["inspect", "--config", "oci:out:v"]).succeeds().out();
    for part in ["7:8", "A=3", "B=2", "C=4", "/bin/t"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // An image's own, under the same layers.
    work.vdisk("image config app --store s --entrypoint /e").succeeds();
    work.vdisk("clone app f.qcow2 --store s").succeeds();
    assert!(config("f.qcow2").contains("/e") && !config("d.qcow2").contains("/e"));
    assert_eq!(layers(&work, "s").len(), 2);
    let long = "x".repeat(9000);
    work.vdisk(&format!("image config d.qcow2 --env L={long}")).fails(&["8192"]);
    assert_eq!(config("d.qcow2"), one);
    work.vdisk("image config app --store s --env bad").fails(&["NAME=VALUE"]);
}

#[test]
fn a_directory_becomes_an_image_the_same_for_the_same_tree() {
    if !have(Need::Oci) {
        return;
    }
    let work = Work::new();
    let script = "mkdir -p $1/etc $1/b/c; cd $1; echo x >etc/x; ln etc/x etc/y; ln -s x etc/l; mkfifo p;
        mknod n c 1 3; chown 7:8 etc/x; chmod 4755 etc/x; touch \"$(printf 'b/n\\377')\"; setfattr -n user.k -v v b;
        truncate -s 3M sparse; printf end >>sparse; head -c 300000 /dev/zero >zeroes; head -c 200000 /dev/urandom >r;
        find . -print0 | xargs -0 touch -h -d '2001-02-03 04:05:06.789'";
    shell(&work, script, &work.path("t"));
    // Another tree with the same files, made in another order, holes filled.
    shell(&work, "mkdir $1; cd $1/../t; tar c --sort=none --xattrs --no-recursion . | tar x -C $1;
        find . -mindepth 1 -print0 | sort -rz | tar c --xattrs --no-recursion --null -T - | tar x --xattrs -p -C $1;
        cd $1; cp --sparse=never -p sparse s2; mv s2 sparse; touch -d '2001-02-03 04:05:06.789' . b etc",
        &work.path("u"));
    work.vdisk("import t one --store a").succeeds();
    work.vdisk("import u/ two --store b").succeeds();
    assert_eq!(layers(&work, "a"), layers(&work, "b"));
    work.vdisk("clone one d.qcow2 --store a").succeeds();
    fs::create_dir(work.path("m")).unwrap();
    work.vdisk("mount --read-only d.qcow2 m").succeeds();
    let (ours, theirs) = (tree(&work, "m"), tree(&work, "t"));
    work.vdisk("umount m").succeeds();
    assert_eq!(ours, theirs);
    // As root's, all of it; and nothing of another file system.
    work.vdisk("import t mine --owners root --store a").succeeds();
    work.vdisk("clone mine e.qcow2 --store a").succeeds();
    assert!(work.vdisk("ls -l e.qcow2:/etc").succeeds().out().lines().all(|l| !l.contains(" 7 ")));
    work.vdisk("import nowhere x --store a").fails(&["nowhere"]);
}

#[test]
fn what_an_overlay_changed_is_exported_as_a_layer() {
    if !have(Need::Oci) {
        return;
    }
    let work = Work::new();
    layout(&work);
    work.vdisk("import oci:lay:b app --store s").succeeds();
    work.vdisk("clone app d.qcow2 --store s").succeeds();
    for dir in ["up", "m"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    work.vdisk("mount --overlay up d.qcow2 m").succeeds();
    let script =
        "cd $1; rm usr/lib/f7; echo new >etc/new; rm -r usr/bin; mkdir usr/bin; echo x >usr/bin/x;
        ln etc/new etc/newer; chmod 700 var";
    shell(&work, script, &work.path("m"));
    let shown = tree(&work, "m");
    work.vdisk("umount m").succeeds();
    work.vdisk("export --layer up up.tar").succeeds();
    let listed = work.run("tar", ["tf", "up.tar"]).succeeds().out();
    for name in ["usr/lib/.wh.f7", "usr/bin/.wh..wh..opq", "usr/bin/x", "etc/new", "etc/newer"] {
        assert!(listed.lines().any(|l| l == name), "{name}: {listed}");
    }
    // On the image it is what the overlay showed: umoci puts it there.
    umoci(&work, "raw add-layer --image lay:b --tag c up.tar");
    umoci(&work, "unpack --image lay:c theirs");
    let theirs = tree(&work, "theirs/rootfs");
    let odd: Vec<_> = shown.iter().filter(|l| !theirs.contains(l)).collect();
    let missing: Vec<_> = theirs.iter().filter(|l| !shown.contains(l)).collect();
    assert!(odd.is_empty() && missing.is_empty(), "{odd:#?} {missing:#?}");
    work.vdisk("export --layer up oci:x:y").fails(&["FILE.tar"]);
}
