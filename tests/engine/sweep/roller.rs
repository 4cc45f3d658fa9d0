//! A process that puts a disk on another base: this test program itself, started again, as no command does
//! that to a disk alone.

use std::path::Path;

use vdisk::internals::change::roll::{Wishes, plan_roll};

/// How it is told what to do: `disk.qcow2 base.qcow2 kept`.
const ROLL: &str = "VDISK_SWEEP_ROLL";
/// The first of the words that stand for its command line.
const VERB: &str = "roll";

/// The command line that does what these words say, if they are meant for it.
pub fn command(words: &[String]) -> Option<Vec<String>> {
    let (verb, what) = words.split_first()?;
    if verb != VERB {
        return None;
    }
    let own = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    let name = "sweep::roller::a_roller_that_the_sweep_starts";
    let what = format!("{ROLL}={}", what.join(" "));
    let words = [&what, &own, "--exact", name, "--ignored", "--nocapture"];
    Some(words.map(str::to_owned).into())
}

#[test]
#[ignore = "the sweep starts it"]
fn a_roller_that_the_sweep_starts() {
    let Ok(what) = std::env::var(ROLL) else { return };
    let mut words = what.split(' ');
    let (disk, base, keep) = (words.next().unwrap(), words.next().unwrap(), words.next());
    let wishes = Wishes { keep, ..Wishes::default() };
    let plan = plan_roll(Path::new(disk), Path::new(base), &wishes);
    let done = plan.and_then(|plan| plan.map_or(Ok(()), |roll| roll.execute()));
    let good = done.inspect_err(|e| eprintln!("{e}")).is_ok();
    std::process::exit(if good { 0 } else { 1 });
}
