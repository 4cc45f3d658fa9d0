//! A KVM guest: processors, memory, a kernel, a serial console and disks.
//!
//! It carries disks by virtio and knows nothing of what they are made of. It prints only what the
//! guest prints, to where its caller says.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

use kvm_ioctls::Kvm;

use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::virtio::{Block, Id, Net, Rng, VirtioDevice};

mod acpi;
mod boot;
mod bus;
mod code;
mod console;
mod control;
mod cpu;
mod handle;
#[cfg(any(test, feature = "internals"))]
mod hostile;
mod i8042;
mod machine;
mod memory;
mod mmio;
mod network;
mod power;
mod terminal;

pub use boot::Source;
pub use console::Streams;
use control::Control;
pub use control::Ended;
pub use handle::Handle;
#[cfg(any(test, feature = "internals"))]
pub use hostile::drive;
pub use network::{Network, tap, user};

use boot::Payload;
use console::Console;
use machine::{Machine, Parts};
use mmio::Transport;
use power::Power;

/// Interrupt lines for devices: those that nothing on a PC without devices uses, the eight of which only
/// an I/O APIC knows last. Where there are more devices than lines, some share one.
const DEVICE_IRQS: [u32; 17] = [5, 6, 7, 10, 11, 12, 14, 15, 3, 16, 17, 18, 19, 20, 21, 22, 23];

/// The most disks that a guest can have: /dev/vda to /dev/vdz.
pub const MAX_DISKS: usize = 26;

/// The most queues that a disk can have.
pub const MAX_QUEUES: u16 = 32;

/// The most processors that a guest can have.
pub const MAX_CPUS: u8 = 32;

/// A disk for a guest.
pub struct Disk {
    /// What it holds.
    pub device: Arc<dyn BlockDevice>,
    /// Its serial number in the guest; the first 20 bytes count.
    pub id: String,
}

/// What a guest is made of.
pub struct Config {
    /// An ELF or bzImage kernel file.
    pub kernel: Source,
    /// An initial RAM disk.
    pub initrd: Option<Source>,
    /// What the kernel's command line holds beside the disks, which are put before it.
    pub command_line: String,
    /// Number of processors, from 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// RAM in bytes: whole pages, 16 MiB at least.
    pub memory: u64,
    /// The disks in order: /dev/vda, /dev/vdb, … in a Linux guest.
    pub disks: Vec<Disk>,
    /// Queues of each disk, from 1 to [`MAX_QUEUES`]; each is served by a thread.
    pub queues: u16,
    /// A network card.
    pub network: Option<Network>,
    /// The serial console. An input that is a terminal is put into raw mode while the guest runs.
    pub console: Streams,
}

/// A guest that is ready to run.
pub struct Guest {
    machine: Machine,
    disks: Vec<Arc<dyn BlockDevice>>,
    devices: Vec<Arc<Transport>>,
    console: Arc<Console>,
    power: Arc<Power>,
    input: OwnedFd,
    control: Arc<Control>,
}

impl Guest {
    /// Makes a guest and loads its kernel.
    pub fn new(config: Config) -> Result<Guest> {
        if config.disks.len() > MAX_DISKS {
            return Err(Error::unsupported(format!(
                "a guest can have {MAX_DISKS} disks and was given {}",
                config.disks.len()
            )));
        }
        if config.queues == 0 || config.queues > MAX_QUEUES {
            return Err(Error::invalid(format!("a disk can have 1 to {MAX_QUEUES} queues")));
        }
        let kvm = open_kvm()?;
        let most = kvm.get_max_vcpus().min(MAX_CPUS.into());
        if config.cpus == 0 || usize::from(config.cpus) > most {
            return Err(Error::invalid(format!(
                "a guest on this host can have 1 to {most} processors, not {}",
                config.cpus
            )));
        }
        let control = Arc::new(Control::new()?);
        let memory = Arc::new(memory::allocate(config.memory)?);
        let console = Arc::new(Console::new(config.console.output, Arc::clone(&control))?);
        let mut parts = Parts::new(Arc::clone(&memory), Arc::clone(&console), &control)?;
        let disks: Vec<_> = config.disks.iter().map(|disk| Arc::clone(&disk.device)).collect();
        let made = devices(config.disks, config.queues, config.network);
        let mut line = String::new();
        for (device, irq) in made.into_iter().zip(DEVICE_IRQS.into_iter().cycle()) {
            let transport = Transport::new(device, Arc::clone(&memory))?;
            line.push_str(&parts.add_device(transport, irq)?);
            line.push(' ');
        }
        line.push_str(&config.command_line);
        let payload = Payload { kernel: config.kernel, initrd: config.initrd, command_line: line };
        acpi::write(&memory, config.cpus, &parts.places())?;
        let entry = boot::load(&memory, payload)?;
        let (devices, power) = (parts.transports(), parts.power());
        let machine = Machine::new(&kvm, parts, config.cpus, entry)?;
        Ok(Guest { machine, disks, devices, console, power, input: config.console.input, control })
    }

    /// What steers the guest from outside, from any thread.
    pub fn handle(&self) -> Handle {
        let (control, power) = (Arc::clone(&self.control), Arc::clone(&self.power));
        Handle::new(control, power, Arc::clone(&self.console))
    }

    /// What tells the guest that its disk number `disk`, from 0, has another size; from any thread,
    /// and without effect once the guest has ended.
    pub fn announce_size(&self, disk: usize) -> impl Fn() + Send + Sync + 'static {
        let device = self.devices.get(disk).map(Arc::downgrade);
        move || {
            if let Some(device) = device.as_ref().and_then(Weak::upgrade) {
                device.reconfigure();
            }
        }
    }

    /// Runs the guest to its end. When this returns, all it wrote is durable and the terminal is as
    /// it was.
    pub fn run(self) -> Result<Ended> {
        let raw = terminal::Raw::take(self.input.as_fd())?;
        let keys = raw.is_some().then(|| Arc::clone(&self.power));
        let feeder = self.console.feed(self.input, keys, Arc::clone(&self.control));
        let ended = match &feeder {
            Ok(_) => self.machine.run(&self.control),
            Err(_) => Ok(Ended::Stopped),
        };
        self.control.end(Ok(Ended::Stopped));
        // A panic there has been reported, and the guest did without the input.
        let fed = feeder.map(|thread| drop(thread.join()));
        drop(raw);
        let flushed: Vec<_> = self.disks.iter().map(|disk| flush(&**disk)).collect();
        fed?;
        let ended = ended?;
        flushed.into_iter().collect::<Result<()>>()?;
        Ok(ended)
    }
}

/// The disks first, in their order: their places stay whatever else there is.
fn devices(disks: Vec<Disk>, queues: u16, network: Option<Network>) -> Vec<Box<dyn VirtioDevice>> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for disk in disks {
        devices.push(Box::new(Block::new(disk.device, Id::new(&disk.id), queues)));
    }
    devices.push(Box::new(Rng::default()));
    if let Some(Network { mac, link, frames }) = network {
        devices.push(Box::new(Net::new(mac, link, frames)));
    }
    devices
}

fn flush(disk: &dyn BlockDevice) -> Result<()> {
    if disk.read_only() { Ok(()) } else { disk.flush() }
}

/// Opens the host's KVM, and says what to do where it cannot be.
fn open_kvm() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|error| {
        let error = std::io::Error::from(error);
        let what = match error.kind() {
            std::io::ErrorKind::NotFound => {
                "this host has no /dev/kvm: load the module kvm_intel or kvm_amd, enable \
                 virtualisation in the firmware, or allow nested virtualisation where this host is \
                 itself a guest"
            }
            std::io::ErrorKind::PermissionDenied => {
                "/dev/kvm may not be opened by this user: add it to the group kvm, or run as root"
            }
            _ => "cannot open /dev/kvm",
        };
        Error::io(what, error)
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        other => Err(Error::new(
            ErrorKind::Unsupported,
            format!("this host's KVM has API version {other}; 12 is needed"),
        )),
    }
}

/// A call to KVM failed.
fn kvm_error(what: &str, error: kvm_ioctls::Error) -> Error {
    Error::io(format!("KVM cannot {what}"), std::io::Error::from(error))
}
