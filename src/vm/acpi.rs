//! ACPI tables (ACPI 6.5): what a guest's kernel that does not look at its command line needs to find
//! its processors, its interrupt controller, its console and its disks, and to power off.
//!
//! It knows addresses, not devices.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use super::{console, i8042, power};
use crate::error::{Error, Result};
use crate::virtio::Memory;

/// Where kernels look for the root pointer, and all tables after it.
pub const ROOT: u64 = 0xe_0000;
/// The end of the firmware's memory.
const END: u64 = 0x10_0000;
/// What the strictest of the tables is aligned to (ACPI 5.2.10).
const ALIGN: u64 = 64;

const OEM: [u8; 6] = *b"VDISK ";
const OEM_TABLE: [u8; 8] = *b"VDISK   ";
const REVISION: u32 = 1;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// The interrupt for power events, such as a press of the button.
pub const POWER_IRQ: u16 = 9;

/// There are ISA devices and a keyboard controller, no VGA and no real-time clock (ACPI 5.2.9.3).
const BOOT_ARCHITECTURE: u16 = 1 | 1 << 1 | 1 << 2 | 1 << 5;
/// The interrupt for power events is a level, and high: ISA interrupts are edges else (ACPI 5.2.12.5:
/// type 2, length, bus ISA, source, number, flags).
const POWER_IRQ_LEVEL: [u8; 10] =
    [2, 10, 0, POWER_IRQ as u8, POWER_IRQ as u8, 0, 0, 0, 1 | 3 << 2, 0];
/// There are two 8259 interrupt controllers too (ACPI 5.2.12).
const HAS_PIC: u32 = 1;

/// A virtio-mmio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its registers.
    pub base: u64,
    /// Length of its registers in bytes.
    pub len: u64,
    /// Its interrupt line.
    pub irq: u32,
    /// Whether other devices have the same line.
    pub shared: bool,
}

/// Writes tables for this many processors and these devices.
pub fn write(memory: &Memory, cpus: u8, devices: &[Place]) -> Result<()> {
    let mut tables = Tables { memory, next: ROOT + ALIGN };
    let dsdt = tables.put(dsdt(devices)?.as_slice())?;
    let facs = tables.put(&bytes(&FACS::new()))?;
    let fadt = tables.put(&bytes(&fadt(dsdt, facs)))?;
    let madt = tables.put(madt(cpus).as_slice())?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.put(&bytes(&xsdt))?;
    tables.next = ROOT;
    tables.put(&bytes(&Rsdp::new(OEM, xsdt)))?;
    Ok(())
}

struct Tables<'m> {
    memory: &'m Memory,
    next: u64,
}

impl Tables<'_> {
    /// Puts a table after the others; returns its address.
    fn put(&mut self, table: &[u8]) -> Result<u64> {
        let at = self.next;
        self.next = (at + table.len() as u64).next_multiple_of(ALIGN);
        if self.next > END {
            return Err(Error::invalid("the guest's ACPI tables do not fit"));
        }
        self.memory
            .write_slice(table, GuestAddress(at))
            .map_err(|e| Error::invalid(format!("no memory for ACPI tables: {e}")))?;
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn madt(cpus: u8) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM, OEM_TABLE, REVISION);
    madt.write_u32(36, LOCAL_APIC);
    madt.write_u32(40, HAS_PIC);
    for cpu in 0..cpus {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled)));
    }
    madt.append_slice(&bytes(&IoApic::new(0, IO_APIC, 0)));
    madt.append_slice(&POWER_IRQ_LEVEL);
    madt
}

/// The fixed hardware: power off, and reset by the keyboard controller.
fn fadt(dsdt: u64, facs: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_64(facs)
        .flag(Flags::Wbinvd)
        // A set flag says that there is no such button here: the power button is one.
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = POWER_IRQ.into();
    fadt.pm1a_evt_blk = (power::BASE as u32).into();
    fadt.pm1_evt_len = power::CONTROL as u8;
    fadt.pm1a_cnt_blk = ((power::BASE + power::CONTROL) as u32).into();
    fadt.pm1_cnt_len = (power::LEN - power::CONTROL) as u8;
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    let command = i8042::BASE + i8042::COMMAND;
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, command);
    fadt.reset_value = i8042::RESET;
    fadt.finalize()
}

fn dsdt(devices: &[Place]) -> Result<Sdt> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&serial_port());
    for (number, place) in devices.iter().enumerate() {
        dsdt.append_slice(&virtio(number, place)?);
    }
    let off = power::OFF;
    let sleep = Package::new(vec![&off, &off, &0u8, &0u8]);
    dsdt.append_slice(&bytes(&Name::new("_S5_".into(), &sleep)));
    Ok(dsdt)
}

fn serial_port() -> Vec<u8> {
    let base = console::BASE as u16;
    let ports = IO::new(base, base, 1, console::LEN as u8);
    let interrupt = Interrupt::new(true, true, false, false, console::IRQ);
    let id = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let unique = Name::new("_UID".into(), &0u8);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt]));
    let device = Device::new("COM1".into(), vec![&id, &unique, &resources]);
    bytes(&Scope::new(Path::new("_SB_"), vec![&device]))
}

/// A device by the id that Linux knows virtio-mmio by.
fn virtio(number: usize, place: &Place) -> Result<Vec<u8>> {
    // Names have four characters.
    if number > 0xfff {
        return Err(Error::invalid("more devices than can be named"));
    }
    let outside = |_| Error::invalid("a device lies above 4 GiB");
    let base = u32::try_from(place.base).map_err(outside)?;
    let len = u32::try_from(place.len).map_err(outside)?;
    let registers = Memory32Fixed::new(true, base, len);
    let interrupt = Interrupt::new(true, true, false, place.shared, place.irq);
    let id = Name::new("_HID".into(), &"LNRO0005");
    let unique = Name::new("_UID".into(), &(number as u32));
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &interrupt]));
    let name = format!("V{number:03X}");
    let device = Device::new(name.as_str().into(), vec![&id, &unique, &resources]);
    Ok(bytes(&Scope::new(Path::new("_SB_"), vec![&device])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn read(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    #[test]
    fn each_table_has_its_checksum_and_the_root_leads_to_all() {
        let memory = super::super::memory::allocate(16 << 20).unwrap();
        let place = Place { base: 0xd000_0000, len: 0x1000, irq: 5, shared: false };
        write(&memory, 1, &[place, Place { base: 0xd000_1000, irq: 6, ..place }]).unwrap();
        let root = read(&memory, ROOT, 36);
        assert_eq!((&root[..8], sum(&root[..20]), sum(&root)), (&b"RSD PTR "[..], 0, 0));
        let table = |at: u64| {
            let len = memory.read_obj::<u32>(GuestAddress(at + 4)).unwrap() as usize;
            let table = read(&memory, at, len);
            assert_eq!(sum(&table), 0, "{:?}", String::from_utf8_lossy(&table[..4]));
            table
        };
        let pointer =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let xsdt = table(pointer(&root, 24));
        let fadt = table(pointer(&xsdt, 36));
        let madt = table(pointer(&xsdt, 44));
        let dsdt = table(pointer(&fadt, 140));
        assert_eq!(
            (&fadt[..4], &madt[..4], &dsdt[..4]),
            (&b"FACP"[..], &b"APIC"[..], &b"DSDT"[..])
        );
        assert_eq!(read(&memory, pointer(&fadt, 132), 4), b"FACS");
        assert_eq!(dsdt.windows(8).filter(|w| *w == b"LNRO0005").count(), 2);
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let memory = super::super::memory::allocate(16 << 20).unwrap();
        let place = Place { base: 0xd000_0000, len: 0x1000, irq: 5, shared: false };
        assert!(write(&memory, 1, &vec![place; 3000]).is_err());
        assert!(write(&memory, 1, &vec![place; 5000]).is_err());
        assert!(write(&memory, 1, &[Place { base: 1 << 32, ..place }]).is_err());
    }
}
