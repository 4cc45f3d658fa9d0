//! Loads a kernel and says where everything is: by the Linux boot protocol
//! (Documentation/arch/x86/boot.rst) for bzImage and ELF, both entered in 64-bit mode, or for an ELF
//! file with a note for it, by PVH (Xen's docs/misc/pvh.pandoc), entered in protected mode.
//!
//! It knows guest memory and files, not KVM and not devices.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::acpi::ROOT;
use super::memory::{FIRMWARE_START, HIGH_START, low_end, usable};
use crate::error::{Error, Result};
use crate::kernel::form;
use crate::virtio::Memory;

/// Where the boot parameters ("zero page") lie.
pub const BOOT_PARAMS: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Where PVH's start information lies, its list of modules and its memory map after it.
const START_INFO: u64 = 0x6000;
const MODULES: u64 = START_INFO + 0x100;
const MEMORY_MAP: u64 = START_INFO + 0x200;
const START_MAGIC: u32 = 0x336e_c578;
/// The longest command line of an x86 kernel, its final zero left out.
const COMMAND_LINE_MAX: usize = 2047;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// xloadflags: the kernel has a 64-bit entry point, 0x200 after its start.
const HAS_ENTRY_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// The highest address for an initrd where the kernel does not say.
const INITRD_MAX: u64 = 0x37ff_ffff;
const PAGE: u64 = 4096;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// A file that is loaded into a guest, and what errors call it.
#[derive(Debug)]
pub struct Source {
    /// Its name.
    pub name: PathBuf,
    /// A regular file, or one in memory; it is read from its start.
    pub file: File,
}

impl Source {
    /// The host's file at `path`; `what` it is stands in errors.
    pub fn open(path: &Path, what: &str) -> Result<Source> {
        let failed = |e| Error::io(format!("cannot open the {what}"), e).at_path(path);
        let file = File::open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            let text = format!("the {what} is not a regular file");
            return Err(Error::invalid(text).at_path(path));
        }
        Ok(Source { name: path.to_owned(), file })
    }
}

/// What to boot.
#[derive(Debug)]
pub struct Payload {
    /// An ELF or bzImage file.
    pub kernel: Source,
    /// An initial RAM disk.
    pub initrd: Option<Source>,
    /// The kernel's command line.
    pub command_line: String,
}

/// How the first processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode, with the address of the boot parameters in rsi.
    Linux(u64),
    /// In protected mode without paging, with the address of the start information in ebx.
    Pvh(u64),
}

impl Entry {
    /// What the processor's register holds at the start.
    pub fn information(self) -> u64 {
        match self {
            Entry::Linux(_) => BOOT_PARAMS,
            Entry::Pvh(_) => START_INFO,
        }
    }
}

/// A kernel in memory.
struct Loaded {
    entry: Entry,
    header: setup_header,
    /// The first address that the kernel does not need for itself.
    end: u64,
    initrd_max: u64,
    command_line_max: usize,
}

/// Loads everything and returns the address to start at.
pub fn load(memory: &Memory, mut payload: Payload) -> Result<Entry> {
    let Source { name, file } = &mut payload.kernel;
    let kernel = load_kernel(memory, file).map_err(|e| e.at_path(name))?;
    let mut params = boot_params { hdr: kernel.header, ..Default::default() };
    params.acpi_rsdp_addr = ROOT;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    load_command_line(memory, &payload.command_line, &kernel)?;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    if let Some(Source { name, file }) = &mut payload.initrd {
        let (address, len) = load_initrd(memory, file, &kernel).map_err(|e| e.at_path(name))?;
        params.hdr.ramdisk_image = address;
        params.hdr.ramdisk_size = len;
    }
    memory_map(memory, &mut params);
    let written = match kernel.entry {
        Entry::Linux(_) => memory.write_obj(params, GuestAddress(BOOT_PARAMS)),
        Entry::Pvh(_) => start_information(memory, &params),
    };
    written.map_err(|e| Error::invalid(format!("no memory for the boot parameters: {e}")))?;
    Ok(kernel.entry)
}

/// The same for PVH.
fn start_information(
    memory: &Memory,
    params: &boot_params,
) -> std::result::Result<(), GuestMemoryError> {
    let entries = params.e820_table.iter().take(params.e820_entries.into());
    for (number, entry) in entries.enumerate() {
        let (addr, size, type_) = (entry.addr, entry.size, entry.r#type);
        let entry = hvm_memmap_table_entry { addr, size, type_, ..Default::default() };
        let at = MEMORY_MAP + (number * size_of::<hvm_memmap_table_entry>()) as u64;
        memory.write_obj(entry, GuestAddress(at))?;
    }
    let (paddr, size) = (params.hdr.ramdisk_image.into(), u64::from(params.hdr.ramdisk_size));
    let module = hvm_modlist_entry { paddr, size, ..Default::default() };
    memory.write_obj(module, GuestAddress(MODULES))?;
    let start = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        nr_modules: (size > 0).into(),
        modlist_paddr: MODULES,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ROOT,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: params.e820_entries.into(),
        ..Default::default()
    };
    memory.write_obj(start, GuestAddress(START_INFO))
}

fn load_kernel(memory: &Memory, file: &mut File) -> Result<Loaded> {
    let unread = |e| Error::io("cannot read the kernel", e);
    file.rewind().map_err(unread)?;
    let mut start = Vec::new();
    file.by_ref().take(form::START as u64).read_to_end(&mut start).map_err(unread)?;
    let loaded = if start.starts_with(b"\x7fELF") {
        elf(memory, file, &start)?
    } else if form::boots(&start) {
        bzimage(memory, file)?
    } else {
        let text = format!("not a kernel that boots here: {}", form::refusal(&start));
        return Err(Error::unsupported(text));
    };
    if loaded.end > low_end(memory) {
        return Err(Error::invalid(format!(
            "the kernel needs {} MiB of memory to start; give the guest more with --memory",
            loaded.end.div_ceil(1 << 20)
        )));
    }
    Ok(loaded)
}

fn elf(memory: &Memory, file: &mut File, start: &[u8]) -> Result<Loaded> {
    // e_ident[EI_CLASS] is ELFCLASS64 and e_machine is EM_X86_64.
    if start.get(4) != Some(&2) || start.get(18..20) != Some(&[62, 0]) {
        return Err(Error::unsupported("the kernel is not an x86-64 ELF file"));
    }
    let loaded = read(Elf::load(memory, None, file, Some(GuestAddress(HIGH_START))))?;
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(at) => Entry::Pvh(at.0),
        _ => Entry::Linux(loaded.kernel_load.0),
    };
    Ok(Loaded {
        entry,
        header: setup_header { kernel_alignment: 0x100_0000, ..Default::default() },
        end: loaded.kernel_end,
        initrd_max: INITRD_MAX,
        command_line_max: COMMAND_LINE_MAX,
    })
}

fn bzimage(memory: &Memory, file: &mut File) -> Result<Loaded> {
    let loaded = read(BzImage::load(memory, None, file, Some(GuestAddress(HIGH_START))))?;
    let header = loaded.setup_header.unwrap_or_default();
    let (version, flags) = (header.version, header.xloadflags);
    if version < 0x20c || flags & HAS_ENTRY_64 == 0 {
        return Err(Error::unsupported(
            "the kernel has no 64-bit entry point (boot protocol 2.12 of Linux 3.8): \
             32-bit kernels do not boot here",
        ));
    }
    let start = loaded.kernel_load.0;
    // It unpacks itself at its preferred address and needs init_size bytes from there on.
    let (preferred, init_size) = (header.pref_address, u64::from(header.init_size));
    let unpacked = start.max(preferred).saturating_add(init_size);
    Ok(Loaded {
        entry: Entry::Linux(start + ENTRY_64),
        header,
        end: unpacked.max(loaded.kernel_end),
        initrd_max: u64::from(header.initrd_addr_max),
        command_line_max: (header.cmdline_size as usize).min(COMMAND_LINE_MAX),
    })
}

fn read(loaded: linux_loader::loader::Result<KernelLoaderResult>) -> Result<KernelLoaderResult> {
    loaded.map_err(|error| {
        Error::invalid(format!(
            "cannot load the kernel (damaged, or the guest's memory is too small): {error}"
        ))
    })
}

fn load_command_line(memory: &Memory, line: &str, kernel: &Loaded) -> Result<()> {
    if line.len() > kernel.command_line_max {
        return Err(Error::invalid(format!(
            "the kernel's command line has {} bytes and the kernel takes {}",
            line.len(),
            kernel.command_line_max
        )));
    }
    if line.contains('\0') {
        return Err(Error::invalid("the kernel's command line has a zero byte in it"));
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(COMMAND_LINE))
        .map_err(|e| Error::invalid(format!("no memory for the command line: {e}")))
}

/// As high as the kernel can reach it; returns its address and length.
fn load_initrd(memory: &Memory, file: &mut File, kernel: &Loaded) -> Result<(u32, u32)> {
    let len = file.seek(std::io::SeekFrom::End(0)).map_err(|e| Error::io("cannot read", e))?;
    file.rewind().map_err(|e| Error::io("cannot read", e))?;
    let top = low_end(memory).min(kernel.initrd_max.saturating_add(1));
    let address = top.checked_sub(len).map(|a| a / PAGE * PAGE).filter(|a| *a >= kernel.end);
    let place = address.and_then(|a| Some((u32::try_from(a).ok()?, u32::try_from(len).ok()?)));
    let Some((address, size)) = place else {
        return Err(Error::invalid(format!(
            "the initrd ({} MiB) does not fit beside the kernel; give the guest more with --memory",
            len.div_ceil(1 << 20)
        )));
    };
    memory
        .read_exact_volatile_from(GuestAddress(address.into()), file, size as usize)
        .map_err(|e| Error::invalid(format!("cannot read the initrd: {e}")))?;
    Ok((address, size))
}

fn memory_map(memory: &Memory, params: &mut boot_params) {
    let entry = |addr, size, kind| boot_e820_entry { addr, size, r#type: kind };
    let mut map: Vec<_> =
        usable(memory).into_iter().map(|(addr, len)| entry(addr, len, E820_RAM)).collect();
    map.push(entry(FIRMWARE_START, HIGH_START - FIRMWARE_START, E820_RESERVED));
    map.sort_by_key(|entry| entry.addr);
    params.e820_entries = map.len() as u8;
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = entry;
    }
}
