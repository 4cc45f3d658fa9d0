//! Makes a disk and writes to it: `create FILE SIZE-IN-MIB`.

use vdisk::{BlockDevice, CreateOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(mib)) = (args.next(), args.next()) else {
        return Err("usage: create FILE SIZE-IN-MIB".into());
    };
    let size = mib.parse::<u64>()?.checked_mul(1 << 20).ok_or("too large")?;
    let disk = CreateOptions::new(size).cluster_size(128 << 10).subclusters(true).create(&path)?;
    disk.write(0, b"hello")?;
    // The rest of a disk's doings are those of the trait.
    disk.write_zeroes(0, 4096.min(size), true)?;
    disk.write(size / 2, b"in the middle")?;
    let data = disk.extents(0, size, 16)?;
    println!("{path}: {size} bytes, {} stretches", data.len());
    // What dropping it does, and how that went.
    disk.close()?;
    Ok(())
}
