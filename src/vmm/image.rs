//! Writes everything into guest memory that the guest program finds there when it starts.
//!
//! Only what is needed is written: memory may be under userfaultfd, and each touched page takes a frame.

use crate::vmm::config::MachineConfig;
use crate::vmm::error::VmmError;
use crate::vmm::layout::{
    BLOCKS, DIRECTORY_SPAN, GDT, HEADER, Layout, PAGE, POINTERS_SPAN, PROGRAM, TABLES, TSS, ZIPF_TABLE,
    physical,
};
use crate::vmm::memory::GuestMemory;
use crate::vmm::program::{self, PORT_PROGRESS, PORTS_END, block, flag, mode};
use crate::vmm::workload::{FillScope, Pattern};
use crate::vmm::{content, zipf};

/// First bytes of a reference guest's memory header.
const HEADER_MAGIC: &[u8; 8] = b"VMEMDGST";
/// Version of the layout and of the program's ports.
const HEADER_VERSION: u64 = 1;

/// Pages between two reports of a vCPU that is not slowed down.
pub(super) const BATCH_MAX: u64 = 256;
/// With a rate, reports come at least about this often a second, so that the touches spread evenly.
const REPORTS_PER_S: u64 = 200;

/// Page-table bits: present, writable, user, accessed; dirty and large for an entry that maps 2 MiB.
const TABLE_ENTRY: u64 = 0b0010_0111;
const LARGE_ENTRY: u64 = 0b1110_0111;
const LARGE_SPAN: u64 = 2 << 20;

/// Selectors in the GDT (the lowest two bits are the ring).
pub(super) const SELECTOR_DATA: u16 = 0x18 | 3;
pub(super) const SELECTOR_CODE: u16 = 0x20 | 3;
pub(super) const SELECTOR_TSS: u16 = 0x28;
/// Null, ring-0 code and data, ring-3 data and code, the TSS (two entries).
const GDT_ENTRIES: u64 = 7;
pub(super) const GDT_LIMIT: u16 = (GDT_ENTRIES * 8 - 1) as u16;

/// A 64-bit TSS ends where its I/O permission bitmap starts; a byte of ones ends the bitmap.
const TSS_BYTES: u64 = 104;
const TSS_BITMAP_FIELD: u64 = 102;
const BITMAP_BYTES: u64 = (PORTS_END as u64).div_ceil(8) + 1;
pub(super) const TSS_LIMIT: u32 = (TSS_BYTES + BITMAP_BYTES - 1) as u32;
const _: () = assert!(TSS + TSS_LIMIT as u64 <= PROGRAM && GDT + GDT_ENTRIES * 8 <= TSS);

/// Writes the image of a guest that has not started yet.
pub(super) fn write(memory: &GuestMemory, layout: &Layout, config: &MachineConfig) -> Result<(), VmmError> {
    let blocks =
        (0..config.vcpus).map(|vcpu| vcpu_block(layout, config, vcpu)).collect::<Result<Vec<_>, _>>()?;
    write_header(memory, layout, config);
    write_descriptors(memory);
    write_page_tables(memory, layout);
    memory.write(PROGRAM, program::bytes());
    for (start, fields) in (BLOCKS..).step_by(PAGE as usize).zip(blocks) {
        for (offset, value) in fields {
            memory.write_u64(start + offset, value);
        }
    }
    if let Pattern::Zipf { theta } = config.workload.pattern {
        let (set, _) = layout.split(config)?;
        // Shares differ by the pages that the division leaves over: the ranks are those of the smallest share.
        let table = zipf::quantiles(set.part(0, config.vcpus).pages, theta);
        let bytes: Vec<u8> = table.iter().flat_map(|rank| rank.to_le_bytes()).collect();
        memory.write(ZIPF_TABLE, &bytes);
    }
    Ok(())
}

fn write_header(memory: &GuestMemory, layout: &Layout, config: &MachineConfig) {
    memory.write(HEADER, HEADER_MAGIC);
    let fields = [HEADER_VERSION, layout.memory_bytes, u64::from(config.vcpus), layout.ledger, layout.data];
    for (offset, value) in (HEADER + 8..).step_by(8).zip(fields) {
        memory.write_u64(offset, value);
    }
}

fn write_descriptors(memory: &GuestMemory) {
    let tss_low = u64::from(TSS_LIMIT) | (TSS & 0xff_ffff) << 16 | 0x8b << 40 | (TSS >> 24 & 0xff) << 56;
    let entries = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        tss_low,
        TSS >> 32,
    ];
    for (offset, entry) in (GDT..).step_by(8).zip(entries) {
        memory.write_u64(offset, entry);
    }
    memory.write(TSS + TSS_BITMAP_FIELD, &(TSS_BYTES as u16).to_le_bytes());
    let mut bitmap = [0xff; BITMAP_BYTES as usize];
    for port in PORT_PROGRESS..PORTS_END {
        bitmap[usize::from(port / 8)] &= !(1 << (port % 8));
    }
    memory.write(TSS + TSS_BYTES, &bitmap);
}

/// Maps guest virtual addresses to RAM offsets one to one, in large pages that ring 3 may write.
fn write_page_tables(memory: &GuestMemory, layout: &Layout) {
    let mut directory = [0u8; PAGE as usize];
    let spans = (0..layout.memory_bytes).step_by(DIRECTORY_SPAN as usize).enumerate();
    for (index, start) in spans {
        let at = layout.directories + index as u64 * PAGE;
        directory.fill(0);
        let end = (start + DIRECTORY_SPAN).min(layout.memory_bytes);
        for (entry, offset) in directory.chunks_exact_mut(8).zip((start..end).step_by(LARGE_SPAN as usize)) {
            entry.copy_from_slice(&(physical(offset) | LARGE_ENTRY).to_le_bytes());
        }
        memory.write(at, &directory);
        memory.write_u64(layout.pointers + index as u64 * 8, physical(at) | TABLE_ENTRY);
    }
    for (index, _) in (0..layout.memory_bytes).step_by(POINTERS_SPAN as usize).enumerate() {
        let at = layout.pointers + index as u64 * PAGE;
        memory.write_u64(TABLES + index as u64 * 8, physical(at) | TABLE_ENTRY);
    }
}

/// Pages between two reports of a vCPU.
fn batch_pages(config: &MachineConfig) -> u64 {
    config.workload.rate.map_or(BATCH_MAX, |rate| {
        (rate.0 / PAGE / u64::from(config.vcpus) / REPORTS_PER_S).clamp(1, BATCH_MAX)
    })
}

fn vcpu_block(layout: &Layout, config: &MachineConfig, vcpu: u32) -> Result<Vec<(u64, u64)>, VmmError> {
    let (set, rest) = layout.split(config)?;
    let (share, rest) = (set.part(vcpu, config.vcpus), rest.part(vcpu, config.vcpus));
    let fill = config.workload.fill;
    let (mode, read_only) = match config.workload.pattern {
        Pattern::Fill | Pattern::Idle => (mode::IDLE, 0),
        Pattern::Rewrite => (mode::IN_ORDER, 0),
        Pattern::Read => (mode::IN_ORDER, flag::READ_ONLY),
        Pattern::Random => (mode::RANDOM, 0),
        Pattern::Zipf { .. } => (mode::ZIPF, 0),
    };
    let filled = if fill == FillScope::Nothing { 0 } else { flag::FILLED };
    let step = config.workload.scatter;
    let bits = u64::from(share.pages.next_power_of_two().trailing_zeros());
    Ok(vec![
        (block::LEDGER, layout.ledger),
        (block::MODE, mode),
        (block::FLAGS, read_only | filled),
        (block::BATCH, batch_pages(config)),
        (block::SHARE_FIRST, share.first),
        (block::SHARE_PAGES, share.pages),
        (block::SHARE_FILL, if fill == FillScope::Nothing { 0 } else { share.pages }),
        (block::REST_FIRST, rest.first),
        (block::REST_FILL, if fill == FillScope::All { rest.pages } else { 0 }),
        (block::RANDOM, content::word(vcpu, 1, 0)),
        (block::ZIPF_TABLE, ZIPF_TABLE),
        (block::SCATTER_MASK, (1 << bits) - 1),
        (block::SCATTER_SHIFT, (bits / 2).max(1)),
        (block::ROUND_PAGES, share.pages.div_ceil(step)),
        (block::STEP_PAGES, step),
    ])
}
