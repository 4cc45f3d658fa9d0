//! Trees and maps: what a terminal, a browser and graphviz are given, also where names are hostile.

use std::fs;

use crate::host::{Done, Work};
use crate::twin::{json, noise};

/// Snapshots on two branches, two clones, a raw base, and names that mean something in XML, in DOT
/// and on a terminal.
fn family(work: &Work) {
    work.vdisk("create base.qcow2 64M").succeeds();
    work.vdisk_fed("write base.qcow2 0", &noise(1, 3 << 20)).succeeds();
    work.vdisk_args(["clone", "base.qcow2", "web.q", "<a>&\"b\"\\'.q"]).succeeds();
    work.put("plain.raw", noise(2, 1 << 20));
    work.vdisk("clone plain.raw vm.q").succeeds();
    work.vdisk_fed("write web.q 1M", &noise(3, 1 << 20)).succeeds();
    work.vdisk_args(["snapshot", "create", "web.q", "</text><script>alert(1)</script>"]).succeeds();
    work.vdisk_fed("write web.q 8M", &noise(4, 2 << 20)).succeeds();
    work.vdisk("snapshot create web.q two").succeeds();
    work.vdisk_fed("write web.q 9M", &noise(5, 64 << 10)).succeeds();
    work.vdisk("snapshot create web.q branch").succeeds();
    work.vdisk("snapshot revert web.q two --keep tried").succeeds();
    work.vdisk_fed("write web.q 32M", &noise(6, 64 << 10)).succeeds();
}

/// Requires text that an XML parser takes: every tag is closed in its turn, nothing but the five
/// entities and no control characters stand in it.
#[track_caller]
fn well_formed(done: Done) -> String {
    let text = done.succeeds().out();
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'));
    let mut rest = text.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n").expect("XML");
    let mut open = Vec::new();
    while let Some(at) = rest.find('<') {
        let (words, tag) = (&rest[..at], &rest[at + 1..]);
        for part in words.split('&').skip(1) {
            let entities = ["amp;", "lt;", "gt;", "quot;", "#39;"];
            assert!(entities.iter().any(|entity| part.starts_with(entity)), "&{part}");
        }
        let end = tag.find('>').expect("the tag ends");
        let inside = &tag[..end];
        assert!(!inside.contains('<') && inside.matches('"').count() % 2 == 0, "{inside}");
        let name = inside.trim_matches('/').split(' ').next().unwrap();
        assert!(!name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric()), "<{inside}>");
        match (inside.starts_with('/'), inside.ends_with('/')) {
            (true, _) => assert_eq!(open.pop(), Some(name), "closed in its turn"),
            (_, true) => {}
            _ => open.push(name),
        }
        rest = &tag[end + 1..];
    }
    assert!(open.is_empty() && rest == "\n", "{open:?} stay open");
    text
}

#[test]
fn the_tree_shows_branches_sizes_and_where_the_user_is() {
    let work = Work::new();
    family(&work);
    let tree = work.vdisk("tree web.q").succeeds().out();
    let line =
        |name: &str| tree.lines().find(|l| l.contains(name)).unwrap_or_else(|| panic!("{tree}"));
    assert!(line("web.q  ").ends_with("<- here") && line("web.q  ").contains('●'), "{tree}");
    assert!(line("base.qcow2").starts_with("○ base.qcow2"), "{tree}");
    assert!(line("branch (web)").contains("├─○ branch"), "{tree}");
    assert!(!tree.contains("plain.raw"), "of another family: {tree}");
    let all = json(work.vdisk("tree . --json"));
    let find = |name: &str| find(&all, name).unwrap_or_else(|| panic!("{name}: {all}"));
    // A megabyte of the base is hidden by the first snapshot's layer, but not from the other clone.
    assert_eq!(find("base.qcow2")["exclusive"], 0);
    assert_eq!(find("web.q")["exclusive"], 64 << 10);
    assert_eq!(find("vm.q")["exclusive"], 0);
    assert_eq!(find("plain.raw")["exclusive"], 0);
    fs::remove_file(work.path("<a>&\"b\"\\'.q")).unwrap();
    let all = json(work.vdisk("tree . --json"));
    assert_eq!(self::find(&all, "base.qcow2").unwrap()["exclusive"], 1 << 20);
}

/// The node of a file in the JSON of `vdisk tree`.
fn find<'v>(value: &'v serde_json::Value, name: &str) -> Option<&'v serde_json::Value> {
    if value["file"].as_str().is_some_and(|file| file.ends_with(name)) {
        return Some(value);
    }
    let nodes = value.as_array().or_else(|| value["children"].as_array())?;
    nodes.iter().find_map(|node| find(node, name))
}

#[test]
fn pictures_are_well_formed_whatever_the_names_are() {
    let work = Work::new();
    family(&work);
    work.vdisk_args(["clone", "base.qcow2", "esc\u{1b}[31mape.q", "line\nbreak.q"]).succeeds();
    let tree = well_formed(work.vdisk("tree . --svg"));
    for part in [
        "base.qcow2",
        "&lt;script&gt;",
        "&lt;a&gt;&amp;&quot;b&quot;",
        "esc\u{fffd}[31m",
        "tried (web)",
    ] {
        assert!(tree.contains(part), "{part}: {tree}");
    }
    let map = well_formed(work.vdisk("map web.q --svg"));
    for part in ["web.q, 64 MiB", "base.qcow2", "&lt;script&gt;", "two (web@", "nothing stored"] {
        assert!(map.contains(part), "{part}: {map}");
    }
    assert!(!map.contains("tried"), "it is on another branch: {map}");
    let text = work.vdisk("tree .").succeeds().out();
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
    let dot = work.vdisk("tree . --dot").succeeds();
    assert_eq!(dot.out().matches(" -> ").count(), dot.out().matches("label=").count() - 2);
    for line in dot.out().lines().filter(|l| l.contains("label=")) {
        assert!(line.starts_with("  n") && line.ends_with("];"), "{line}");
    }
    if work.run("sh", ["-c", "command -v dot"]).code == Some(0) {
        work.put("tree.dot", &dot.stdout);
        let drawn = work.run("dot", ["-Tsvg", "tree.dot"]).succeeds();
        assert!(drawn.err().is_empty() && drawn.out().contains("script"), "{}", drawn.err());
    }
    work.vdisk("tree . --svg --json").ends(64);
}

#[test]
fn the_picture_of_a_large_and_scattered_disk_is_small() {
    let work = Work::new();
    work.vdisk("create large.q 1T").succeeds();
    for at in 0..20u64 {
        work.vdisk_fed(&format!("write large.q {}", at * 50_000_000_000), b"x").succeeds();
        work.vdisk(&format!("snapshot create large.q s{at}")).succeeds();
    }
    let picture = well_formed(work.vdisk("map large.q --svg"));
    assert!(picture.len() < 64 << 10 && picture.contains("one square is 256 MiB"));
    let scattered: Vec<u8> =
        (0..4096u32).flat_map(|n| [[n as u8 | 1; 4096], [0; 4096]].concat()).collect();
    work.put("holes.raw", scattered);
    well_formed(work.vdisk("map holes.raw --svg"));
    work.vdisk("create none.q 0").succeeds();
    well_formed(work.vdisk("map none.q --svg"));
}
