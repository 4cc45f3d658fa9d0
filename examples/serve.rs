//! Serves a disk over NBD until a line is read: `serve DISK SOCKET`. Needs the feature `serve`.

use std::sync::Arc;

use vdisk::{Disk, NbdServer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(socket)) = (args.next(), args.next()) else {
        return Err("usage: serve DISK SOCKET".into());
    };
    let disk = Arc::new(Disk::open(path)?);
    let server = NbdServer::start(disk.clone(), "", &socket)?;
    println!("nbd+unix:///?socket={socket}");
    std::io::stdin().read_line(&mut String::new())?;
    server.stop()?;
    let disk = Arc::into_inner(disk).ok_or("somebody still reads")?;
    disk.close()?;
    Ok(())
}
