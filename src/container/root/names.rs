//! Who is who for a container: /etc/hosts and /etc/resolv.conf.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};

/// Gives a disk that knows no host names those of the container, or else `localhost` would be
/// unknown. A disk with names of its own keeps them.
pub(in super::super) fn hosts(hostname: &OsStr) -> io::Result<()> {
    const HOSTS: &str = "/etc/hosts";
    match fs::symlink_metadata(HOSTS) {
        Ok(found) if found.is_file() && found.len() == 0 => {}
        Ok(_) => return Ok(()),
        // Something to mount on, as podman leaves it, too.
        Err(_) if File::create_new(HOSTS).is_ok() => {}
        // There is no /etc, or it cannot be written to.
        Err(_) => return Ok(()),
    }
    let hostname = hostname.to_string_lossy();
    let text = format!("127.0.0.1 localhost {hostname}\n::1 localhost ip6-localhost\n");
    show(HOSTS, &text)
}

/// Shows name servers in the place of those that the disk knows: they are those of another network.
pub(in super::super) fn resolver(text: &str) -> io::Result<()> {
    const RESOLVER: &str = "/etc/resolv.conf";
    if !fs::exists(RESOLVER)? {
        // Maybe a link to what a service would write in /run.
        if let Ok(target) = fs::read_link(RESOLVER) {
            let target = Path::new("/etc").join(target);
            target.parent().map_or(Ok(()), fs::create_dir_all)?;
        }
        match File::options().write(true).create(true).truncate(false).open(RESOLVER) {
            Ok(_) => {}
            // There is no /etc, or it cannot be written to: who has neither asks nobody.
            Err(_) => return Ok(()),
        }
    }
    show(RESOLVER, text)
}

fn show(at: &str, text: &str) -> io::Result<()> {
    const FILE: &str = "/dev/shown";
    fs::write(FILE, text)?;
    mount(Some(FILE), at, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    fs::remove_file(FILE)
}
