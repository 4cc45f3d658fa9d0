//! Copies a disk of any format into one new file: `convert SOURCE TARGET`. A target whose name ends in
//! `.raw` is raw, others are compressed qcow2.

use vdisk::{Convert, CreateOptions, Format, OpenOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(source), Some(target)) = (args.next(), args.next()) else {
        return Err("usage: convert SOURCE TARGET".into());
    };
    let disk = OpenOptions::new().read_only(true).open(source)?;
    let raw = target.ends_with(".raw");
    let made = CreateOptions::new(disk.size());
    let made = if raw { made.format(Format::Raw) } else { made.zstd(true) };
    Convert::to(made).compress(!raw).run(&disk, &target)?;
    println!("{target}: {} bytes", disk.size());
    Ok(())
}
