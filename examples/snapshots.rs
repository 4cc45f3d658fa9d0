//! Takes a snapshot and shows the tree, or goes back to one: `snapshots DISK [take NAME | revert NAME]`.

use vdisk::{Result, Snapshot, Snapshots};

fn show(all: &[Snapshot], parent: Option<&str>, depth: usize) {
    for one in all.iter().filter(|s| s.parent.as_deref() == parent) {
        let mark = if one.is_current { '*' } else { ' ' };
        println!("{mark} {:depth$}{} ({} bytes)", "", one.name, one.allocated);
        show(all, Some(&one.name), depth + 2);
    }
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        [disk, "take", name] => Snapshots::of(disk).create(name, "by the example")?,
        [disk, "revert", name] => {
            let plan = Snapshots::of(disk).revert(name, None)?;
            println!("{} bytes go, and can be brought back", plan.dropped());
            plan.execute()?;
        }
        [_] => {}
        _ => return Err(vdisk::Error::invalid("usage: snapshots DISK [take NAME | revert NAME]")),
    }
    show(&Snapshots::of(words[0]).list()?, None, 0);
    Ok(())
}
