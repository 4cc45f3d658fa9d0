//! Serves an overlay until it is unmounted: `overlay LOWER[:LOWER...] UPPER WORK DIR`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vdisk_fuse::Server;
use vdisk_fuse::files::Keeping;
use vdisk_fuse::host::HostLayer;
use vdisk_fuse::layer::Layer;
use vdisk_fuse::mount::MountOptions;
use vdisk_fuse::overlay::{Layers, Overlay, UpperDirs};
use vdisk_fuse::server::Serving;

fn main() -> std::io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [lower, upper, work, dir] = words.as_slice() else {
        eprintln!("usage: overlay LOWER[:LOWER...] UPPER WORK DIR");
        std::process::exit(64);
    };
    let mut lowers: Vec<Arc<dyn Layer>> = Vec::new();
    for path in lower.split(':') {
        lowers.push(Arc::new(HostLayer::open(Path::new(path))?));
    }
    let upper = Some(UpperDirs::open(Path::new(upper), Path::new(work))?);
    let overlay = Overlay::new(Layers { lowers, upper, user_xattrs: None }, 1024)?;
    let serving = Serving {
        mount: MountOptions {
            source: "overlay".into(),
            subtype: "vdisk-overlay".into(),
            others: rustix::process::geteuid().is_root(),
            suid: true,
            dev: true,
            ..MountOptions::default()
        },
        keeping: Keeping { ttl: Duration::from_secs(86400), writeback: false },
        threads: 4,
    };
    Server::files(Arc::new(overlay), Path::new(dir), &serving)?.join()
}
