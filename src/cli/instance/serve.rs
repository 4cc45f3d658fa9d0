//! `vdisk serve`: a disk for other people's guests and tools, over a socket.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use nix::sys::signal::SigSet;
use vdisk::chain::Chain;
use vdisk::control::{self, Bound};
use vdisk::image::Mapping;
use vdisk::jail::Work;
use vdisk::jail::broker::Broker;
use vdisk::nbd::tls::ServerCredentials;
use vdisk::serve::nbd::{Bitmap, Contexts, Export, MAX_BITMAPS, Server, Tls};
use vdisk::serve::socket::{Listener, UnixSocket};
use vdisk::serve::vhost::{self, MAX_QUEUES};
use vdisk::virtio::Id;
use vdisk::{Error, ErrorKind, Result};

use crate::cli::instance::holding::{self, Whole};
use crate::cli::open::disk::{self, Use};
use crate::cli::open::jail::{self, Around};
use crate::cli::open::options::Opening;
use crate::cli::terminal::stop;

/// NBD's port.
const NBD_PORT: u16 = 10809;

/// Serve a disk to other programs.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    protocol: Protocol,
}

#[derive(Subcommand)]
enum Protocol {
    Nbd(NbdArgs),
    VhostUser(VhostArgs),
}

/// Serve a disk over NBD: for nbdcopy, qemu, the kernel.
///
/// Serves up to 32 clients at a time until it is ended by SIGTERM or SIGINT (Ctrl-C); then all that was
/// written is durable. When clients can connect it writes one line to standard output: "ready", and
/// the URI to connect to.
#[derive(ClapArgs)]
struct NbdArgs {
    #[command(flatten)]
    disk: DiskArgs,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    tls: TlsArgs,
    /// The export's name that clients have to ask for; none by default
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    export: String,
    /// Tell which layer each part of the disk comes from: the metadata context qemu:allocation-depth
    #[arg(long)]
    allocation_depth: bool,
    /// Tell what dirty bitmap NAME of the disk's top layer says: the metadata context
    /// qemu:dirty-bitmap:NAME. The disk is served for reading only
    #[arg(long, value_name = "NAME", requires = "read_only")]
    bitmap: Vec<String>,
}

impl NbdArgs {
    /// What is told of the disk beside its bytes.
    fn contexts(&self, chain: &Arc<Chain>) -> Result<Contexts> {
        let own = Arc::clone(chain);
        let depth = move |at, len| {
            let extent = own.map(at, len, false)?;
            let depth = match extent.mapping {
                Mapping::Unallocated => 0,
                _ => u32::try_from(extent.depth).unwrap_or(u32::MAX).saturating_add(1),
            };
            Ok((extent.len, depth))
        };
        let depth = self.allocation_depth.then(|| Arc::new(depth) as _);
        if self.bitmap.len() > MAX_BITMAPS {
            return Err(Error::invalid(format!("at most {MAX_BITMAPS} bitmaps are told of")));
        }
        let mut all = if self.bitmap.is_empty() { vec![] } else { chain.head().image.bitmaps()? };
        let bitmap = |name: &String| {
            let at = all.iter().position(|bitmap| bitmap.name == *name);
            let found = at.map(|at| all.swap_remove(at));
            let found = found.ok_or_else(|| {
                let text = format!("there is no bitmap {name} in the disk's top layer");
                Error::new(ErrorKind::NotFound, text).at_path(&self.disk.disk)
            })?;
            Ok(Bitmap { name: found.name, written: found.written })
        };
        let bitmaps = self.bitmap.iter().map(bitmap).collect::<Result<_>>()?;
        Ok(Contexts { depth, bitmaps })
    }
}

/// Whether what clients say is hidden from others, and who they are known.
#[derive(ClapArgs)]
struct TlsArgs {
    /// Serve with TLS, by ca-cert.pem, server-cert.pem and server-key.pem in DIR, as qemu-nbd's
    /// tls-creds-x509 and nbdkit's --tls-certificates take them; ca-crl.pem says what was revoked
    #[arg(long, value_name = "DIR")]
    tls_certs: Option<PathBuf>,
    /// Who is served: only clients with TLS (require), others too (on), only others (off); require by
    /// default where there is --tls-certs, else off
    #[arg(long, value_name = "WHO")]
    tls: Option<TlsMode>,
    /// Serve only clients with a certificate that an authority in ca-cert.pem has signed: this is who
    /// may read and write the disk. TLS alone hides what is said, and proves who the server is
    #[arg(long, requires = "tls_certs")]
    tls_verify_peer: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TlsMode {
    Off,
    On,
    Require,
}

impl TlsArgs {
    fn load(&self) -> Result<Tls> {
        let Some(dir) = &self.tls_certs else {
            return match self.tls {
                None | Some(TlsMode::Off) => Ok(Tls::Off),
                Some(_) => Err(Error::invalid("--tls-certs=DIR says where the certificates are")),
            };
        };
        let load = || ServerCredentials::load(dir, self.tls_verify_peer);
        match self.tls {
            // Who comes without TLS shows no certificate.
            Some(TlsMode::On | TlsMode::Off) if self.tls_verify_peer => {
                Err(Error::invalid("--tls-verify-peer keeps nobody out without --tls=require"))
            }
            Some(TlsMode::Off) => Ok(Tls::Off),
            Some(TlsMode::On) => load().map(Tls::Offered),
            Some(TlsMode::Require) | None => load().map(Tls::Required),
        }
    }
}

/// Serve a disk as a virtio-blk device: for QEMU, cloud-hypervisor.
///
/// Serves one virtual machine after the other until it is ended by SIGTERM or SIGINT (Ctrl-C); then
/// all that was written is durable. When one can connect it writes one line to standard output:
/// "ready", and the socket's path. The virtual machine has to share its memory (QEMU:
/// `-object memory-backend-memfd,share=on`).
#[derive(ClapArgs)]
struct VhostArgs {
    #[command(flatten)]
    disk: DiskArgs,
    /// Listen on a socket at this path, which only its owner can use
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Queues that the device offers, one for each processor of this host by default
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    queues: Option<u16>,
}

/// Which disk, and how.
#[derive(ClapArgs)]
struct DiskArgs {
    /// The disk
    disk: PathBuf,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Serve what snapshot NAME holds, for reading only unless --ephemeral
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// Put all writes into a throw-away delta
    #[arg(long, conflicts_with = "read_only")]
    ephemeral: bool,
    #[command(flatten)]
    opening: Opening,
}

#[derive(ClapArgs)]
#[group(required = true, multiple = false)]
struct Place {
    /// Listen on a socket at this path, which only its owner can use
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Listen on HOST:PORT, or PORT of this host alone; NBD's port is 10809, and 0 is any that is
    /// free. Whoever reaches the port reads and writes the disk, unless --tls-verify-peer says who may
    #[arg(long, value_name = "ADDR", value_parser = address)]
    listen: Option<(String, u16)>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<u8> {
    match &args.protocol {
        Protocol::Nbd(args) => nbd(args),
        Protocol::VhostUser(args) => vhost_user(args),
    }
}

fn vhost_user(args: &VhostArgs) -> Result<u8> {
    let signals = stop::hold_endings()?;
    let broker = jail::broker(true)?;
    let chain = args.disk.open()?;
    let socket = UnixSocket::bind(&args.socket)?;
    let place = socket.path().display().to_string();
    let id = Id::new(&args.disk.name());
    let processors = || std::thread::available_parallelism().map_or(1, usize::from);
    let queues = args.queues.unwrap_or_else(|| processors().min(MAX_QUEUES.into()) as u16);
    let control = args.disk.control(&chain, format!("served at {place}"), "the guest")?;
    let control = enclose(broker, &chain, control, Some(socket.path()))?;
    let server = vhost::Server::start(chain, id, queues, socket)?;
    ready(&place);
    wait(&signals)?;
    ended(server.stop(), control)
}

/// Closes the jail around a server of this disk, whose socket is at a path, and lets commands reach it.
fn enclose(
    broker: Option<Broker>,
    chain: &Chain,
    control: Option<Bound>,
    socket: Option<&Path>,
) -> Result<Option<control::Server>> {
    let mut jail = Around::new(Work::Server, broker);
    jail.disk(chain, control.is_some())?;
    if let Some(path) = socket {
        jail.socket(path)?;
    }
    jail.close()?;
    control.map(Bound::serve).transpose()
}

/// Tells who waits for the end of the server how it ended.
fn ended(result: Result<()>, control: Option<control::Server>) -> Result<u8> {
    if let Some(control) = control {
        control.end(&result);
    }
    result.map(|()| 0)
}

fn nbd(args: &NbdArgs) -> Result<u8> {
    if args.export.len() > 4096 {
        return Err(Error::invalid("an export's name has 4096 bytes at most"));
    }
    // Before any thread is started, so that the signals reach the one that waits for them.
    let signals = stop::hold_endings()?;
    let broker = jail::broker(!args.disk.read_only || args.place.socket.is_some())?;
    let tls = args.tls.load()?;
    let chain = args.disk.open()?;
    let listener = args.place.listen()?;
    let uri = uri(&listener, &args.export, !matches!(tls, Tls::Off))?;
    let export = Export {
        device: chain.clone(),
        name: args.export.clone(),
        description: args.disk.name(),
        contexts: args.contexts(&chain)?,
    };
    let control = args.disk.control(&chain, format!("served at {uri}"), "its client")?;
    let control = enclose(broker, &chain, control, listener.path())?;
    drop(chain);
    let server = Server::start(export, listener, tls)?;
    ready(&uri);
    wait(&signals)?;
    ended(server.stop(), control)
}

impl DiskArgs {
    /// The disk's name for those whom it is served to: its path is not theirs to know.
    fn name(&self) -> String {
        let name = self.disk.file_name().unwrap_or(self.disk.as_os_str());
        name.to_string_lossy().into_owned()
    }

    fn open(&self) -> Result<Arc<Chain>> {
        let using = Use {
            write: self.ephemeral || !(self.read_only || self.snapshot.is_some()),
            ephemeral: self.ephemeral,
            snapshot: self.snapshot.as_deref(),
            ..Use::default()
        };
        disk::open(&self.disk, &self.opening.holding(using))
    }

    /// The socket at which commands reach the disk.
    fn control(
        &self,
        chain: &Arc<Chain>,
        doing: String,
        user: &'static str,
    ) -> Result<Option<Bound>> {
        let path = std::path::absolute(&self.disk).unwrap_or_else(|_| self.disk.clone());
        // Nobody can be told of a new size: a client learns it when it connects again.
        holding::bind(chain, &path, Arc::new(Whole::new(doing, user, || {})))
    }
}

impl Place {
    fn listen(&self) -> Result<Listener> {
        match (&self.socket, &self.listen) {
            (Some(path), _) => Listener::unix(path),
            (None, Some((host, port))) => Listener::tcp(host, *port),
            (None, None) => Err(Error::invalid("--socket or --listen says where to listen")),
        }
    }
}

/// A host and a port: `HOST:PORT`, `[V6]:PORT`, `HOST`, `PORT` or `:PORT`.
fn address(text: &str) -> std::result::Result<(String, u16), String> {
    let (host, port) = match text.rsplit_once(':') {
        _ if text.ends_with(']') => (text, None),
        Some((host, _)) if host.contains(':') && !host.ends_with(']') => (text, None),
        Some((host, port)) => (host, Some(port)),
        None if text.bytes().all(|b| b.is_ascii_digit()) => ("", Some(text)),
        None => (text, None),
    };
    let port = match port.map(str::parse) {
        None => NBD_PORT,
        Some(Ok(port)) => port,
        Some(Err(_)) => return Err(format!("'{}' is no port", port.unwrap_or_default())),
    };
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    Ok((if host.is_empty() { "127.0.0.1" } else { host }.to_owned(), port))
}

/// What clients connect to.
fn uri(listener: &Listener, export: &str, secure: bool) -> Result<String> {
    let scheme = if secure { "nbds" } else { "nbd" };
    let export = encoded(export.as_bytes());
    Ok(match listener {
        Listener::Unix(socket) => {
            let path = encoded(socket.path().as_os_str().as_encoded_bytes());
            format!("{scheme}+unix:///{export}?socket={path}")
        }
        Listener::Tcp(listener) => {
            let address = listener.local_addr();
            let address = address.map_err(|e| Error::io("the port is not known", e))?;
            format!("{scheme}://{address}/{export}")
        }
    })
}

/// Bytes as they stand in an URI.
fn encoded(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                text.push(char::from(*byte));
            }
            other => text.push_str(&format!("%{other:02X}")),
        }
    }
    text
}

/// Says that clients can connect. Nobody may be there to read it.
fn ready(place: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "ready {place}").and_then(|()| out.flush());
}

/// Returns when one of these signals comes.
fn wait(signals: &SigSet) -> Result<()> {
    loop {
        match signals.wait() {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_one_of_this_host() {
        let of = |text| address(text).map(|(host, port)| format!("{host} {port}"));
        assert_eq!(of("10810").unwrap(), "127.0.0.1 10810");
        assert_eq!(of(":0").unwrap(), "127.0.0.1 0");
        assert_eq!(of("0.0.0.0:1234").unwrap(), "0.0.0.0 1234");
        assert_eq!(of("host").unwrap(), "host 10809");
        assert_eq!(of("10.0.0.1").unwrap(), "10.0.0.1 10809");
        assert_eq!(of("[::1]:99").unwrap(), "::1 99");
        assert_eq!(of("[::1]").unwrap(), "::1 10809");
        assert_eq!(of("::1").unwrap(), "::1 10809");
        assert!(of("99999").is_err() && of("host:").is_err() && of("host:x").is_err());
    }

    #[test]
    fn what_an_uri_cannot_hold_is_encoded() {
        assert_eq!(encoded(b"/tmp/a b?&\xff"), "/tmp/a%20b%3F%26%FF");
    }
}
