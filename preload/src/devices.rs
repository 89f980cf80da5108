//! How much memory devices have of their own: frame buffers, mostly. It goes with the device state, in the pause.
//!
//! QEMU sends a page of zeros as a few bytes and any other one whole. Which it is, is looked at here while the guest
//! runs: an empty frame buffer of 256 MiB costs nothing, a full one takes all of the pause.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

const PAGE: u64 = 4096;
/// A page of zeros in QEMU's stream, and what comes with a whole one.
const ZERO_PAGE_BYTES: u64 = 9;
/// Everything that is not memory: registers, queues, tables.
const REST_BYTES: u64 = 300 << 10;
/// Of a pagemap's entry: in memory, or in swap.
const PRESENT: u64 = 0b11 << 62;
const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
/// Looked at in one piece.
const CHUNK_PAGES: u64 = 256;

/// Memory of QEMU's that the guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Block {
    /// Bytes in use, and mapped.
    used: u64,
    mapped: u64,
    /// Where, if this QEMU tells.
    address: Option<u64>,
}

/// From QEMU's `info ramblock`, without the blocks of those ids, which are guest memory.
fn blocks(told: &str, memory: &[String]) -> Vec<Block> {
    let block = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let unit = words.iter().position(|word| matches!(*word, "KiB" | "MiB" | "GiB"))?;
        let name = words.get(..unit.checked_sub(1)?)?.join(" ");
        let number = |at: usize| u64::from_str_radix(words.get(unit + at)?.strip_prefix("0x")?, 16).ok();
        let ours = memory.iter().any(|id| name == *id || name.strip_prefix("/objects/") == Some(id));
        let (used, mapped, address) = (number(2)?, number(3)?, number(4));
        (!ours).then_some(Block { used, mapped, address })
    };
    told.lines().filter_map(block).collect()
}

/// About how many bytes the device state has, never much less than it will. `told` is QEMU's `info ramblock`, `memory`
/// the ids of guest memory, `process` the directory of QEMU in /proc.
pub(crate) fn state_bytes(told: &str, memory: &[String], process: &Path) -> u64 {
    let blocks = blocks(told, memory);
    let known = known_addresses(&blocks, process);
    let bytes = |(block, address): (&Block, Option<u64>)| {
        let all = block.used.div_ceil(PAGE);
        // What cannot be looked at may be full.
        let full = address.and_then(|address| full_pages(process, address, all).ok()).unwrap_or(all);
        full * (PAGE + ZERO_PAGE_BYTES) + (all - full.min(all)) * ZERO_PAGE_BYTES
    };
    REST_BYTES + blocks.iter().zip(known).map(bytes).sum::<u64>()
}

/// The disks that the guest can write to, from QEMU's `query-block`: each by its name and its file. None: it is no
/// answer.
pub(crate) fn written_disks(told: &Value) -> Option<Vec<String>> {
    let disk = |disk: &Value| {
        let inserted = disk["inserted"].as_object()?;
        if inserted.get("ro").and_then(Value::as_bool) == Some(true) {
            return None;
        }
        let named = |value: &Value| value.as_str().filter(|name| !name.is_empty()).map(str::to_owned);
        let name =
            named(&disk["device"]).or_else(|| named(&disk["qdev"])).unwrap_or_else(|| "one".to_owned());
        let file = inserted.get("file").and_then(Value::as_str).unwrap_or_default();
        Some(if file.is_empty() { name } else { format!("{name}: {file}") })
    };
    Some(told.as_array()?.iter().filter_map(disk).collect())
}

/// Where each block is. A QEMU that does not tell has mapped it as memory of exactly that size.
fn known_addresses(blocks: &[Block], process: &Path) -> Vec<Option<u64>> {
    if blocks.iter().all(|block| block.address.is_some()) {
        return blocks.iter().map(|block| block.address).collect();
    }
    let mut mappings = mappings(process);
    let mut take = |bytes: u64| {
        let mut alike = mappings.iter().enumerate().filter(|(_, (_, long))| *long == bytes);
        let (at, twins) = (alike.next()?.0, alike.count());
        // Which of several it is, nobody says.
        (twins == 0).then(|| mappings.swap_remove(at).0)
    };
    blocks.iter().map(|block| block.address.or_else(|| take(block.mapped))).collect()
}

/// Memory that belongs to no file, by address and length.
fn mappings(process: &Path) -> Vec<(u64, u64)> {
    let Ok(maps) = File::open(process.join("maps")) else { return Vec::new() };
    let mapping = |line: String| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let anonymous = words.next()?.starts_with("rw") && words.nth(2)? == "0" && words.next().is_none();
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?);
        anonymous.then(|| (start, end - start))
    };
    BufReader::new(maps).lines().map_while(Result::ok).filter_map(mapping).collect()
}

/// Pages of a range that are not zeros. By files of /proc: what is unmapped meanwhile is an error there, not a crash.
fn full_pages(process: &Path, address: u64, pages: u64) -> std::io::Result<u64> {
    let (pagemap, memory) = (File::open(process.join("pagemap"))?, File::open(process.join("mem"))?);
    let mut entries = vec![0; (CHUNK_PAGES * 8) as usize];
    let mut content = vec![0; (CHUNK_PAGES * PAGE) as usize];
    let mut full = 0;
    for first in (0..pages).step_by(CHUNK_PAGES as usize) {
        let entries = &mut entries[..(CHUNK_PAGES.min(pages - first) * 8) as usize];
        pagemap.read_exact_at(entries, (address / PAGE + first) * 8)?;
        let entries: &[[u8; 8]] = entries.as_chunks().0;
        let is_there = |entry: &[u8; 8]| u64::from_le_bytes(*entry) & PRESENT != 0;
        let mut at = first;
        for alike in entries.chunk_by(|one, next| is_there(one) == is_there(next)) {
            if is_there(&alike[0]) {
                let content = &mut content[..alike.len() * PAGE as usize];
                memory.read_exact_at(content, address + at * PAGE)?;
                full += content.chunks(PAGE as usize).filter(|page| **page != ZEROS).count() as u64;
            }
            at += alike.len() as u64;
        }
    }
    Ok(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_the_guest_can_write_to() {
        let told = serde_json::json!([
            { "device": "ide0-hd0", "inserted": { "ro": false, "file": "/srv/a.qcow2" } },
            { "device": "", "qdev": "/machine/peripheral/vd/virtio-backend", "inserted": { "ro": false, "file": "" } },
            { "device": "ide1-cd0" },
            { "device": "ide1-cd1", "inserted": { "ro": true, "file": "/srv/a.iso" } }
        ]);
        let disks = written_disks(&told).unwrap();
        assert_eq!(disks, ["ide0-hd0: /srv/a.qcow2", "/machine/peripheral/vd/virtio-backend"]);
        assert_eq!(written_disks(&Value::Null), None);
    }

    const OLD: &str = "              Block Name    PSize              Offset               Used              Total\r\n\
        \x20                     ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n\
        \x20  0000:00:01.0/vga.vram    4 KiB  0x0000000004080000 0x0000000001000000 0x0000000002000000\r\n";
    const NEW: &str = " Block Name    PSize  Offset  Used  Total  HVA  RO\n\
        /objects/ram    2 MiB  0x0 0x4000000 0x4000000 0x00007fb207e00000  rw\n\
        vga.vram    4 KiB  0x4080000 0x1000000 0x2000000 0x1000  rw\n";

    #[test]
    fn blocks_are_read_as_qemus_tell_them() {
        let memory = ["ram".to_owned()];
        let vram = |address| vec![Block { used: 16 << 20, mapped: 32 << 20, address }];
        assert_eq!(blocks(OLD, &memory), vram(None));
        assert_eq!(blocks(NEW, &memory), vram(Some(4096)));
        assert_eq!(blocks("rubbish\n0x1 KiB KiB\nKiB\n4 KiB 0x1\n", &[]), []);
        // Nothing of it can be looked at: it may be full.
        let process = Path::new("/nonexistent");
        assert!((16 << 20..17 << 20).contains(&state_bytes(OLD, &memory, process)));
        assert!((16 << 20..17 << 20).contains(&state_bytes(NEW, &memory, process)));
    }

    #[test]
    fn only_what_is_written_counts() {
        let myself = Path::new("/proc/self");
        let mut memory = vec![0_u8; 65 * PAGE as usize];
        let start = memory.as_ptr().align_offset(PAGE as usize);
        let address = memory[start..].as_ptr() as u64;
        assert_eq!(full_pages(myself, address, 64).unwrap(), 0);
        memory[start + 5 * PAGE as usize] = 1;
        memory[start + 9 * PAGE as usize + 4095] = 1;
        assert_eq!(full_pages(myself, address, 64).unwrap(), 2);
    }
}
