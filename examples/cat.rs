//! Reads a file of an ext4 file system as it was at a snapshot, with nothing mounted:
//! `cat DISK SNAPSHOT PATH`. A directory is listed.

use std::io::Write;
use std::sync::Arc;

use vdisk::{Files, OpenOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [disk, snapshot, path] = &words[..] else {
        return Err("usage: cat DISK SNAPSHOT PATH".into());
    };
    let disk = OpenOptions::new().snapshot(snapshot).open(disk)?;
    let files = Files::open(Arc::new(disk), None)?;
    match files.read(path) {
        Ok(bytes) => std::io::stdout().write_all(&bytes)?,
        Err(error) => {
            let entries = files.list(path).map_err(|_| error)?;
            entries.iter().for_each(|e| println!("{:>12} {}", e.len, e.name.display()));
        }
    }
    Ok(())
}
