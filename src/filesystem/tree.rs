//! Whole directories of a file system: listed, gone through, removed.

use crate::error::{Error, Result};
use crate::filesystem::ext4::mounted::Mounted;

/// Directories that may stand in each other.
const DEEPEST: usize = 4096;
/// Names that are asked for at once.
const PIECE: usize = 4096;
const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;

/// The names in a directory and their inodes, but for itself and the one above.
pub fn names(fs: &Mounted, directory: u32) -> Result<Vec<(Vec<u8>, u32)>> {
    let (mut found, mut after) = (Vec::new(), 0);
    loop {
        let piece = fs.list(directory, after, PIECE)?;
        let Some(last) = piece.last() else { return Ok(found) };
        after = last.next;
        for name in piece {
            match name.name.as_slice() {
                b"." | b".." => {}
                bad if bad.is_empty() || bad.contains(&b'/') || bad.contains(&0) => {
                    return Err(Error::corrupt("a directory has a name that no file can have"));
                }
                _ => found.push((name.name, name.inode)),
            }
        }
    }
}

/// Tells `visit` the inode of everything below a directory; it stops that with `false`.
pub fn walk(fs: &Mounted, directory: u32, visit: &mut dyn FnMut(u32) -> bool) -> Result<()> {
    let mut left = vec![(directory, 0)];
    while let Some((directory, depth)) = left.pop() {
        for (_, inode) in names(fs, directory)? {
            if !visit(inode) {
                return Ok(());
            }
            if fs.attributes(inode)?.mode & TYPE == DIRECTORY {
                left.push((inode, deeper(depth)?));
            }
        }
    }
    Ok(())
}

fn deeper(depth: usize) -> Result<usize> {
    match depth < DEEPEST {
        true => Ok(depth + 1),
        false => Err(Error::corrupt("directories stand too deep in each other")),
    }
}

/// Removes what is in a directory.
pub fn remove(fs: &Mounted, directory: u32) -> Result<()> {
    // Directories on the way down, each with what is left in it to do.
    let mut path = vec![(directory, names(fs, directory)?)];
    loop {
        let depth = path.len();
        let Some((at, left)) = path.last_mut() else { return Ok(()) };
        let Some((name, inode)) = left.last() else {
            path.pop();
            if let Some((above, left)) = path.last_mut()
                && let Some((name, _)) = left.pop()
            {
                fs.remove_directory(*above, &name)?;
            }
            continue;
        };
        if fs.attributes(*inode)?.mode & TYPE == DIRECTORY {
            deeper(depth)?;
            let below = (*inode, names(fs, *inode)?);
            path.push(below);
        } else {
            fs.unlink(*at, name)?;
            left.pop();
        }
    }
}
