//! pasta(1): connections of a network namespace, carried by sockets of the host's.

use std::path::Path;
use std::process::{Command, Stdio};

use super::user::Publish;
use crate::error::{Error, ErrorKind, Result};

/// Where it answers questions for names.
pub(super) const NAME_SERVER: &str = "169.254.1.1";

/// Connects the network namespace at `network`; returns when it can be used. pasta is in the
/// background then.
pub(super) fn connect(program: &Path, network: &Path, publish: &[Publish]) -> Result<()> {
    let mut command = Command::new(program);
    // It goes into the background when all is ready.
    command.args(["--config-net", "--quiet", "--no-map-gw", "--dns-forward", NAME_SERVER]);
    command.args(["--tcp-ns", "none", "--udp-ns", "none"]);
    for (option, udp) in [("--tcp-ports", false), ("--udp-ports", true)] {
        let ports: Vec<_> = publish.iter().filter(|one| one.udp == udp).collect();
        if ports.is_empty() {
            command.args([option, "none"]);
        }
        for one in ports {
            let address = one.address.map(|address| format!("{address}/")).unwrap_or_default();
            command.args([option, &format!("{address}{}:{}", one.host, one.container)]);
        }
    }
    if vdisk_fuse::mount::is_host_root() {
        command.args(["--runas", "0:0"]);
    }
    command.args(["--netns-only", "--netns"]).arg(network);
    let done = command.stdin(Stdio::null()).stdout(Stdio::null()).output();
    let done = done.map_err(|e| Error::io("cannot run pasta", e).at_path(program))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let said: Vec<&str> = said.lines().filter(|line| !line.contains("syslog")).collect();
    let said = said.join("; ");
    Err(Error::new(ErrorKind::Io, format!("pasta could not connect the container: {said}")))
}
