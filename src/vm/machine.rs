//! The machine itself: KVM's virtual machine with memory, interrupt controllers and buses, and the
//! threads that run its processors.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuExit, VcpuFd, VmFd};
use nix::libc::{EAGAIN, EINTR, c_int, c_void, siginfo_t};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::acpi::{POWER_IRQ, Place};
use super::boot::Entry;
use super::bus::Bus;
use super::console::{self, Console};
use super::control::{Control, Ended};
use super::mmio::{self, Transport};
use super::{code, cpu, i8042, kvm_error, memory, power};
use crate::error::{Error, ErrorKind, Result};
use crate::jail;
use crate::virtio::Memory;

/// Three pages below the firmware that Intel processors need for themselves.
const TASK_STATE: usize = 0xfffb_d000;
/// How often the processor's thread is asked to leave the guest.
const ASK_AGAIN: Duration = Duration::from_millis(2);

/// What a machine is put together from.
pub struct Parts {
    memory: Arc<Memory>,
    ports: Bus,
    registers: Bus,
    console: Arc<Console>,
    power: Arc<power::Power>,
    transports: Vec<Slot>,
}

struct Slot {
    transport: Arc<Transport>,
    base: u64,
    irq: u32,
}

impl Parts {
    /// Memory, a console, a keyboard controller and power management.
    pub fn new(
        memory: Arc<Memory>,
        console: Arc<Console>,
        control: &Arc<Control>,
    ) -> Result<Parts> {
        let mut ports = Bus::default();
        ports.insert(console::BASE, console::LEN, Arc::clone(&console) as _)?;
        let controller = i8042::Controller::new(Arc::clone(control));
        ports.insert(i8042::BASE, i8042::LEN, Arc::new(controller))?;
        let power = Arc::new(power::Power::new(Arc::clone(control)));
        ports.insert(power::BASE, power::LEN, Arc::clone(&power) as _)?;
        let registers = Bus::default();
        Ok(Parts { memory, ports, registers, console, power, transports: Vec::new() })
    }

    /// The power button.
    pub fn power(&self) -> Arc<power::Power> {
        Arc::clone(&self.power)
    }

    /// The devices with their registers, in the order in which they were added.
    pub fn transports(&self) -> Vec<Arc<Transport>> {
        self.transports.iter().map(|slot| Arc::clone(&slot.transport)).collect()
    }

    /// Where the devices are.
    pub fn places(&self) -> Vec<Place> {
        let users = |irq| self.transports.iter().filter(|slot| slot.irq == irq).count();
        let place = |slot: &Slot| Place {
            base: slot.base,
            len: mmio::LEN,
            irq: slot.irq,
            shared: users(slot.irq) > 1,
        };
        self.transports.iter().map(place).collect()
    }

    /// Adds a device; returns how the kernel's command line names it (the Linux parameter
    /// `virtio_mmio.device`).
    pub fn add_device(&mut self, transport: Transport, irq: u32) -> Result<String> {
        let base = memory::HOLE_START + self.transports.len() as u64 * mmio::LEN;
        let transport = Arc::new(transport);
        self.registers.insert(base, mmio::LEN, Arc::clone(&transport) as _)?;
        self.transports.push(Slot { transport, base, irq });
        Ok(format!("virtio_mmio.device={}K@{base:#x}:{irq}", mmio::LEN >> 10))
    }
}

/// A virtual machine that is ready to run.
pub struct Machine {
    // Fields are dropped in order: KVM lets go of the guest's memory before it is unmapped.
    vcpus: Vec<VcpuFd>,
    vm: Arc<VmFd>,
    parts: Parts,
}

impl Machine {
    /// Puts the parts together with `count` processors; the first starts at `entry`.
    pub fn new(kvm: &Kvm, parts: Parts, count: u8, entry: Entry) -> Result<Machine> {
        let vm = kvm.create_vm().map_err(|e| kvm_error("make a virtual machine", e))?;
        let vm = Arc::new(vm);
        map_memory(&vm, &parts.memory)?;
        vm.set_tss_address(TASK_STATE).map_err(|e| kvm_error("place the task state", e))?;
        vm.create_irq_chip().map_err(|e| kvm_error("make interrupt controllers", e))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(|e| kvm_error("make a timer", e))?;
        connect(&vm, &parts)?;
        // The buttons' registers are among the parts, which outlive the machine.
        let line = Arc::downgrade(&vm);
        parts.power.connect(Box::new(move |up| {
            if let Some(vm) = line.upgrade() {
                // A guest that is gone hears nothing.
                let _ = vm.set_irq_line(POWER_IRQ.into(), up);
            }
        }));
        let mut vcpus = Vec::new();
        for index in 0..count {
            let made = vm.create_vcpu(index.into());
            let vcpu = made.map_err(|e| kvm_error("make a processor", e))?;
            cpu::prepare(kvm, &vcpu, cpu::Place { index, count })?;
            if index == 0 {
                cpu::start(&vcpu, &parts.memory, entry)?;
            }
            vcpus.push(vcpu);
        }
        Ok(Machine { vcpus, vm, parts })
    }

    /// Runs to the end that `control` tells of. When it returns, no device is at work.
    pub fn run(self, control: &Arc<Control>) -> Result<Ended> {
        let Machine { vcpus, vm, parts } = self;
        let failed = |error| Error::io("cannot start a processor's thread", error);
        let parts = Arc::new(parts);
        register_signal_handler(SIGRTMIN(), leave_guest)
            .map_err(|e| failed(std::io::Error::from(e)))?;
        control.runs(vcpus.len());
        let mut threads = Vec::new();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let runner = Runner { vcpu, parts: Arc::clone(&parts), control: Arc::clone(control) };
            let builder = std::thread::Builder::new().name(format!("vcpu-{index}"));
            match builder.spawn(move || runner.run()) {
                Ok(thread) => threads.push(thread),
                Err(error) => control.end(Err(failed(error))),
            }
        }
        let nudge = || {
            for thread in &threads {
                // One that has ended needs no signal.
                let _ = thread.kill(SIGRTMIN());
            }
        };
        code::let_go();
        let ended = control.wait(nudge);
        threads.into_iter().for_each(join);
        parts.transports.iter().for_each(|slot| slot.transport.stop());
        drop(vm);
        ended
    }
}

/// Interrupts the processor's thread in KVM_RUN, and does nothing else.
extern "C" fn leave_guest(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Gets the processor's thread out of the guest and waits for its end.
fn join(thread: JoinHandle<()>) {
    // A signal that comes just before KVM_RUN is lost: hence the loop.
    while !thread.is_finished() {
        if thread.kill(SIGRTMIN()).is_err() {
            break;
        }
        std::thread::sleep(ASK_AGAIN);
    }
    // A panic there has ended the guest with an error already.
    let _ = thread.join();
}

fn map_memory(vm: &VmFd, memory: &Memory) -> Result<()> {
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for as long as `Parts` lives, and `Machine` keeps that until
        // the processor has stopped and the virtual machine is gone. Regions do not overlap.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|e| kvm_error("map the guest's memory", e))?;
    }
    Ok(())
}

/// Lets KVM signal devices and interrupts without a turn through this program.
fn connect(vm: &VmFd, parts: &Parts) -> Result<()> {
    let irq = |event, line| {
        vm.register_irqfd(event, line).map_err(|e| kvm_error("connect an interrupt", e))
    };
    irq(parts.console.irq(), console::IRQ)?;
    for slot in &parts.transports {
        irq(slot.transport.irq(), slot.irq)?;
        let notify = IoEventAddress::Mmio(slot.base + mmio::QUEUE_NOTIFY);
        for (queue, kick) in slot.transport.kicks().iter().enumerate() {
            vm.register_ioevent(kick, &notify, queue as u32)
                .map_err(|e| kvm_error("connect a queue", e))?;
        }
    }
    Ok(())
}

/// The processor's thread.
struct Runner {
    vcpu: VcpuFd,
    parts: Arc<Parts>,
    control: Arc<Control>,
}

impl Runner {
    fn run(mut self) {
        jail::narrow(jail::Thread::Processor);
        let _alarm = Alarm(Arc::clone(&self.control));
        loop {
            self.control.gate();
            if self.control.over() {
                return;
            }
            match self.step() {
                Ok(None) => {}
                Ok(Some(ended)) => self.control.end(Ok(ended)),
                Err(error) => self.control.end(Err(error)),
            }
        }
    }

    /// Runs the guest until it needs this program.
    fn step(&mut self) -> Result<Option<Ended>> {
        let reason = match self.vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                self.parts.ports.read(port.into(), data);
                return Ok(None);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                self.parts.ports.write(port.into(), data);
                return Ok(None);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.parts.registers.read(address, data);
                return Ok(None);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.parts.registers.write(address, data);
                return Ok(None);
            }
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Ok(None),
            Ok(VcpuExit::Shutdown) => return Ok(Some(Ended::TripleFault)),
            Ok(VcpuExit::InternalError) => None,
            Ok(other) => Some(format!("{other:?}")),
            Err(error) if [EINTR, EAGAIN].contains(&error.errno()) => {
                return Ok(None);
            }
            Err(error) => return Err(kvm_error("run the guest", error)),
        };
        let reason = reason.unwrap_or_else(|| self.internal_error());
        let at = self.vcpu.get_regs().map_or(0, |regs| regs.rip);
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("the guest did what this host's KVM cannot do: {reason} at {at:#x}"),
        ))
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: KVM_RUN has just returned with KVM_EXIT_INTERNAL_ERROR, for which this field of the
        // union is the one that KVM fills in; it is plain numbers.
        let suberror = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
        match suberror {
            1 => "an instruction that cannot be emulated".into(),
            other => format!("internal error {other}"),
        }
    }
}

/// Ends the guest when the processor's thread dies of a panic.
struct Alarm(Arc<Control>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Err(Error::new(ErrorKind::Io, "the processor's thread died")));
        }
    }
}
