//! The calls of several users on the kernel's ext4 and on a disk's files in user space: every answer, and the
//! trees that are left, agree.
//!
//! `VDISK_TWIN_ROUNDS` sets how many rounds are run, `VDISK_SEED` with which seed the first begins.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::filesystem_twin::{Twins, first_seed};
use crate::host::with_own_mounts;
use crate::require::{Need, have};
use crate::same_calls::Call;
use crate::same_overlay::{Calls, calls, now};
use crate::same_tree;

/// What a tree shows but for holes: what is preallocated and then written, the kernel fills up with zeroes
/// as it likes.
fn shown(root: &Path, started: i64) -> Vec<String> {
    let is_range = |word: &str| {
        let number = |text: &str| text.parse::<u64>().is_ok();
        word.split_once('-').is_some_and(|(from, to)| number(from) && number(to))
    };
    let cut = |line: String| match line.split(' ').rev().take_while(|word| is_range(word)).count() {
        0 => line,
        ranges => line.rsplitn(ranges + 1, ' ').last().unwrap_or_default().to_owned(),
    };
    same_tree::tree(root, started).into_iter().map(cut).collect()
}

/// The calls that overlays are compared by: other users', with masks, locks, lists and files without a name.
#[test]
fn calls_of_several_users_are_answered_as_by_the_kernel_and_leave_the_same() {
    if !(have(Need::Fuse) && have(Need::Root)) {
        return;
    }
    let rounds = std::env::var("VDISK_TWIN_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    for seed in (first_seed()..).take(rounds) {
        eprintln!("VDISK_SEED={seed:#x}");
        with_own_mounts(|| agree_for_users(seed));
    }
}

fn agree_for_users(seed: u64) {
    let twins = Twins::new("-t ext4 -b 4096");
    let (kernel, ours) = (&twins.work.path("kernel"), &twins.work.path("ours"));
    let started = now() - 1;
    for thread in 0..2 {
        for side in [kernel, ours] {
            let dir = side.join(format!("t{thread}"));
            fs::create_dir(&dir).unwrap();
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        }
    }
    for round in 0..2 {
        std::thread::scope(|scope| {
            for thread in 0..2 {
                // Where the holes are in what is preallocated and then written, the kernel says as it likes.
                let made: fn(&Call) -> bool = match seed % 2 {
                    0 => |call| !matches!(call, Call::Seek(..)),
                    _ => |call| !matches!(call, Call::Allocate(..)),
                };
                let seed = seed ^ round << 50;
                let what = Calls { seed, thread, many: 400, started, made };
                scope.spawn(move || calls(&what, ours, kernel));
            }
        });
        for side in [kernel, ours] {
            rustix::fs::syncfs(File::open(side).unwrap()).unwrap();
        }
        for what in ["in use", "mounted anew"] {
            let (ours, kernel) = (shown(ours, started), shown(kernel, started));
            for (a, b) in ours.iter().zip(&kernel) {
                assert_eq!(a, b, "VDISK_SEED={seed:#x}: {what}: first ours, then the kernel's");
            }
            assert_eq!(ours.len(), kernel.len(), "VDISK_SEED={seed:#x}: {what}");
            if what == "in use" {
                twins.umount();
                twins.is_clean();
                twins.mount();
            }
        }
    }
    twins.umount();
}
