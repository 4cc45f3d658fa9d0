//! A processor's first state: long mode, as the Linux 64-bit boot protocol asks for it
//! (Documentation/arch/x86/boot.rst, "64-bit boot protocol").

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::boot::Entry;
use super::kvm_error;
use crate::error::{Error, Result};
use crate::virtio::Memory;

const GDT: u64 = 0x500;
const STACK: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
/// Four page directories follow one another: the first 4 GiB, where devices are too.
const PAGE_DIRECTORIES: u64 = 0xb000;
const DIRECTORIES: u64 = 4;

const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x80;

/// Selectors that the boot protocol names: __BOOT_CS, __BOOT_DS, and a task after them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_NUMERIC_ERROR: u64 = 1 << 5;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const EDX_MANY: u32 = 1 << 28;
const LEVEL_THREADS: u32 = 1;
const LEVEL_CORES: u32 = 2;
const ECX_HYPERVISOR: u32 = 1 << 31;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets of the local interrupt pins in the local APIC, and their delivery modes.
const APIC_LINT0: usize = 0x350;
const APIC_LINT1: usize = 0x360;
const APIC_EXTERNAL: i8 = 7;
const APIC_NMI: i8 = 4;

/// One of a guest's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its number, from 0: also its APIC id.
    pub index: u8,
    /// How many there are.
    pub count: u8,
}

/// Prepares any processor. All but the first then wait until the guest starts them.
pub fn prepare(kvm: &Kvm, vcpu: &VcpuFd, place: Place) -> Result<()> {
    let cpuid = cpuid(kvm, place)?;
    vcpu.set_cpuid2(&cpuid).map_err(|e| kvm_error("set the guest's CPUID", e))?;
    msrs(vcpu)?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(|e| kvm_error("set the guest's FPU", e))?;
    local_interrupts(vcpu, place)
}

/// Lets the first processor start at `entry`.
pub fn start(vcpu: &VcpuFd, memory: &Memory, entry: Entry) -> Result<()> {
    tables(memory).map_err(|e| Error::invalid(format!("no memory for page tables: {e}")))?;
    let mut sregs = vcpu.get_sregs().map_err(|e| kvm_error("read system registers", e))?;
    let information = entry.information();
    let start = kvm_regs { rflags: 2, rsp: STACK, rbp: STACK, ..Default::default() };
    let regs = match entry {
        Entry::Linux(rip) => {
            long_mode(&mut sregs);
            kvm_regs { rip, rsi: information, ..start }
        }
        Entry::Pvh(rip) => {
            protected_mode(&mut sregs);
            kvm_regs { rip, rbx: information, rsp: 0, rbp: 0, ..start }
        }
    };
    vcpu.set_sregs(&sregs).map_err(|e| kvm_error("set system registers", e))?;
    vcpu.set_regs(&regs).map_err(|e| kvm_error("set registers", e))
}

/// All that KVM can give a guest on this host, for one of its processors: each is a core of one
/// package.
///
/// What KVM does by itself it does not count among the processor's features: it is added here.
fn cpuid(kvm: &Kvm, place: Place) -> Result<CpuId> {
    let (index, count) = (u32::from(place.index), u32::from(place.count));
    let id_bits = u32::from(place.count).next_power_of_two().ilog2();
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| kvm_error("ask for supported CPUID", e))?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            // APIC id, number of logical processors; a hypervisor is there.
            1 => {
                entry.ebx = entry.ebx & 0xffff | count << 16 | index << 24;
                entry.edx &= !EDX_MANY;
                entry.edx |= if count > 1 { EDX_MANY } else { 0 };
                entry.ecx |= ECX_HYPERVISOR;
                if kvm.check_extension(Cap::TscDeadlineTimer) {
                    entry.ecx |= ECX_TSC_DEADLINE;
                }
            }
            // Caches: their sharing, and cores in the package (Intel).
            4 if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | (count - 1).min(63) << 26;
            }
            // Topology: threads of a core, cores of the package; the x2APIC id.
            0xb | 0x1f => {
                let level = entry.index;
                (entry.eax, entry.ebx, entry.ecx) = match level {
                    0 => (0, 1, LEVEL_THREADS << 8),
                    1 => (id_bits, count, LEVEL_CORES << 8 | 1),
                    _ => (0, 0, level),
                };
                entry.edx = index;
            }
            // Cores in the package, and this one's ids (AMD).
            0x8000_0008 => entry.ecx = id_bits << 12 | (count - 1),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
            _ => {}
        }
    }
    Ok(cpuid)
}

fn msrs(vcpu: &VcpuFd) -> Result<()> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_FAST_STRINGS),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ON_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries)
        .map_err(|e| Error::unsupported(format!("cannot list MSRs: {e:?}")))?;
    // A processor without one of them does without: KVM then sets fewer.
    vcpu.set_msrs(&msrs).map_err(|e| kvm_error("set MSRs", e))?;
    Ok(())
}

/// Pin 0 of the first processor takes the interrupts of the PIC, pin 1 of each NMIs: as firmware
/// leaves them.
fn local_interrupts(vcpu: &VcpuFd, place: Place) -> Result<()> {
    let mut lapic = vcpu.get_lapic().map_err(|e| kvm_error("read the local APIC", e))?;
    let pins = [(APIC_LINT1, APIC_NMI), (APIC_LINT0, APIC_EXTERNAL)];
    for (pin, mode) in pins.into_iter().take(if place.index == 0 { 2 } else { 1 }) {
        // Bits 8 to 10 of a pin's entry: delivery mode.
        if let Some(byte) = lapic.regs.get_mut(pin + 1) {
            *byte = *byte & !7 | mode;
        }
        // Bit 16: masked.
        if let Some(byte) = lapic.regs.get_mut(pin + 2) {
            *byte &= !1;
        }
    }
    vcpu.set_lapic(&lapic).map_err(|e| kvm_error("set the local APIC", e))
}

/// Segment descriptors and an identity map of the first 4 GiB in pages of 2 MiB.
fn tables(memory: &Memory) -> std::result::Result<(), GuestMemoryError> {
    for (selector, segment) in [(CODE, code()), (DATA, data()), (TASK, task())] {
        memory.write_obj(descriptor(&segment), GuestAddress(GDT + u64::from(selector)))?;
    }
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    for directory in 0..DIRECTORIES {
        let table = PAGE_DIRECTORIES + directory * 0x1000;
        memory.write_obj(table | PRESENT_WRITABLE, GuestAddress(PDPT + directory * 8))?;
        for entry in 0..512 {
            let page = (directory * 512 + entry) << 21;
            let value = page | PRESENT_WRITABLE | LARGE_PAGE;
            memory.write_obj(value, GuestAddress(table + entry * 8))?;
        }
    }
    Ok(())
}

fn long_mode(sregs: &mut kvm_sregs) {
    sregs.gdt.base = GDT;
    sregs.gdt.limit = TASK + 15;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code();
    sregs.tr = task();
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data();
    }
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_NUMERIC_ERROR | CR0_PAGING;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LONG_MODE;
}

/// Protected mode with flat segments, paging off: as PVH asks for it.
fn protected_mode(sregs: &mut kvm_sregs) {
    long_mode(sregs);
    sregs.cs = kvm_segment { l: 0, db: 1, ..code() };
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// A flat segment over 4 GiB.
fn flat(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        selector,
        type_: kind,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn code() -> kvm_segment {
    kvm_segment { l: 1, ..flat(CODE, 0xb) }
}

fn data() -> kvm_segment {
    kvm_segment { db: 1, ..flat(DATA, 0x3) }
}

fn task() -> kvm_segment {
    kvm_segment { s: 0, g: 0, limit: 0x67, ..flat(TASK, 0xb) }
}

/// A segment as its eight bytes in the descriptor table.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        assert_eq!(descriptor(&code()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task()), 0x0000_8b00_0000_0067);
    }
}
