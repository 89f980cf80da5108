//! A disk whose content is a function of the offset: the host writes the image, the guest reads and verifies it past
//! its page cache.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use crate::arguments::Failure;
use crate::content::{self, DISK, PAGE};
use crate::differences::{Differences, Mismatched};
use crate::pages::PageBuffer;

/// Bytes of one read.
const PIECE: usize = 16 << 20;
/// Buffers that are read into in turn. A buffer's pages lie untouched for the time of the reads between, and may be
/// evicted.
const BUFFERS: usize = 4;
/// Pieces between two lines.
const SAY_EVERY: u64 = 5;

/// Reads `count` pieces, from the start again after the last.
pub(crate) fn check(device: &str, count: u64) -> Result<Mismatched, Failure> {
    let mut disk = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .map_err(|error| format!("{device}: {error}"))?;
    let pieces = disk.seek(SeekFrom::End(0))? / PIECE as u64;
    // A buffer whose old content is the right one would let a read pass that writes nothing.
    if pieces < 2 {
        return Err(format!("{device} has less than {} bytes: make the image larger", 2 * PIECE).into());
    }
    let mut buffers: Vec<(PageBuffer, Option<u64>)> =
        (0..BUFFERS).map(|_| (PageBuffer::new(PIECE), None)).collect();
    let mut differences = Differences::none("disk");
    let started = Instant::now();
    for read in 0..count {
        let piece = read % pieces;
        let turn = read as usize % BUFFERS;
        // Never into a buffer that has this very piece.
        let at = (turn..turn + BUFFERS).find(|&at| buffers[at % BUFFERS].1 != Some(piece));
        let (buffer, holds) = &mut buffers[at.expect("the last read was of another piece") % BUFFERS];
        disk.read_exact_at(buffer.as_mut_slice(), piece * PIECE as u64)
            .map_err(|error| format!("{device}: piece {piece}: {error}"))?;
        *holds = Some(piece);
        let first = piece * (PIECE / PAGE) as u64;
        for (page, bytes) in (first..).zip(buffer.as_slice().chunks_exact(PAGE)) {
            differences.check(bytes, DISK, page);
        }
        if (read + 1) % SAY_EVERY == 0 {
            println!("checker disk pieces={} mismatched={}", read + 1, differences.count);
        }
    }
    let (wrong, us) = (differences.count, started.elapsed().as_micros());
    println!("checker disk done pieces={count} mismatched={wrong} us={us}");
    Ok(wrong)
}

/// Writes an image of `size` bytes (whole pages of it) for `check`.
pub(crate) fn write_image(file: &str, size: usize) -> Result<Mismatched, Failure> {
    let image = File::create(file).map_err(|error| format!("{file}: {error}"))?;
    let mut image = BufWriter::with_capacity(1 << 20, image);
    let mut bytes = [0; PAGE];
    let pages = size / PAGE;
    for page in 0..pages {
        content::fill(&mut bytes, DISK, page as u64);
        image.write_all(&bytes).map_err(|error| format!("{file}: {error}"))?;
    }
    image.flush().map_err(|error| format!("{file}: {error}"))?;
    println!("checker image done pages={pages}");
    Ok(0)
}
