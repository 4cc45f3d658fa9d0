//! Files in a file system by their paths. Nothing leads out of it: what a link says is looked for
//! from its own root.

use crate::error::{Error, ErrorKind, Result};
use crate::filesystem::ext4::mounted::{Attributes, Mounted, ROOT};

/// Links that one path may go through.
const MAX_LINKS: usize = 40;
const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
const LINK: u16 = 0o120_000;

/// Where a path leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The directory that has the name.
    pub directory: u32,
    /// The name; empty for the root.
    pub name: Vec<u8>,
    /// What has the name, if anything has.
    pub file: Option<Attributes>,
}

fn not_found(path: &[u8]) -> Error {
    let text = format!("there is no {} in the disk", String::from_utf8_lossy(path));
    Error::new(ErrorKind::NotFound, text)
}

/// Follows a path from the root, its last name too where `follow` and it is a link. The last name
/// may be one that is not there yet.
pub fn find(fs: &Mounted, path: &[u8], follow: bool) -> Result<Place> {
    let mut left: Vec<Vec<u8>> = parts(path);
    let mut place = root(fs)?;
    let mut links = 0;
    while let Some(name) = left.pop() {
        let directory = place.file.filter(|file| file.mode & TYPE == DIRECTORY);
        let directory = directory.ok_or_else(|| not_found(path))?;
        let file = fs.lookup_attributes(directory.inode, &name)?;
        if name == b".." {
            // Its name is not known, and not asked for: it is a directory.
            place = Place { directory: directory.inode, name: Vec::new(), file };
            continue;
        }
        let link = file.as_ref().filter(|file| file.mode & TYPE == LINK);
        if let Some(link) = link.filter(|_| follow || !left.is_empty()) {
            links += 1;
            if links > MAX_LINKS {
                return Err(Error::invalid("too many symbolic links"));
            }
            let target = fs.read_link(link.inode)?;
            left.extend(parts(&target));
            place = match target.first() {
                Some(b'/') => root(fs)?,
                _ => Place { directory: directory.inode, name: Vec::new(), file: Some(directory) },
            };
            continue;
        }
        place = Place { directory: directory.inode, name, file };
    }
    Ok(place)
}

/// The file at a path that has to be there.
pub fn file(fs: &Mounted, path: &[u8], follow: bool) -> Result<Attributes> {
    find(fs, path, follow)?.file.ok_or_else(|| not_found(path))
}

fn root(fs: &Mounted) -> Result<Place> {
    Ok(Place { directory: ROOT, name: Vec::new(), file: Some(fs.attributes(ROOT)?) })
}

/// The names of a path, the first one last.
fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    let names = path.split(|byte| *byte == b'/').rev();
    names.filter(|name| !matches!(*name, b"" | b".")).map(<[u8]>::to_vec).collect()
}
