//! Puts clones on a base disk: `clones BASE CLONE...`. Each costs what is written to it.

use vdisk::Disk;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let base = args.next().ok_or("usage: clones BASE CLONE...")?;
    for name in args {
        let clone: Disk = vdisk::create_clone(&base, &name)?;
        clone.write(0, name.as_bytes())?;
        for layer in clone.info()?.layers {
            println!("{}: {} bytes of the host", layer.path.display(), layer.allocated);
        }
        clone.close()?;
    }
    Ok(())
}
