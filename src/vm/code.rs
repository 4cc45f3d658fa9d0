//! The program's own code in memory: most of it is needed only to start a guest.

use std::fs;

use nix::libc;

/// Lets go of the pages of code that were read so far. Those that are needed again are found in the kernel's
/// page cache; the others are the guest's neighbours' to use. Nothing is lost where this cannot be done.
pub fn let_go() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (start, end) in maps.lines().filter_map(code) {
        // SAFETY: what can be executed and not written, of a file, holds the file's bytes and nothing else: who
        // touches such a page again, in whatever thread, finds the same bytes there.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

/// The first address of a mapping and that behind it, where it holds a file's code; proc_pid_maps(5).
fn code(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let is_code = words.next()? == "r-xp" && words.nth(3)?.starts_with('/');
    let address = |text| usize::from_str_radix(text, 16).ok();
    is_code.then_some((address(start)?, address(end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_code_of_files_is_let_go_of() {
        let of = |protection: &str, name: &str| {
            code(&format!(
                "55d0c2a31000-55d0c2a33000 {protection} 00001000 fe:00 123456      {name}"
            ))
        };
        assert_eq!(of("r-xp", "/usr/bin/vdisk"), Some((0x55d0_c2a3_1000, 0x55d0_c2a3_3000)));
        assert_eq!(of("r--p", "/usr/bin/vdisk"), None);
        assert_eq!(of("rwxp", "/usr/bin/vdisk"), None);
        assert_eq!(of("r-xp", "[vdso]"), None);
        assert_eq!(code("7f0000000000-7f0000001000 r-xp 00000000 00:00 0"), None);
        assert_eq!(code("nothing of the kind"), None);
        let_go();
    }
}
