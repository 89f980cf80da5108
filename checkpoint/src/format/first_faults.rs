//! `first-faults`: in which order a VM that was restored has first touched its pages, for whoever restores it next.
//!
//! It lies beside a checkpoint's map, and is no part of the checkpoint: a restore writes it anew and renames it into
//! place, and a checkpoint is whole without it. One that is damaged is as good as none.

use std::io::{self, Read, Write};

use swapd::{PageNo, Run};

use super::chunks::{Reader, SUM_BYTES, Writer, long};
use super::{FormatError, MAX_PAGES};

const WHAT: &str = "order of first faults";
const MAGIC: [u8; 8] = *b"VMEMDFFO";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
const RUN_BYTES: u64 = 8;
/// Bits of a run's word that are its length.
const LEN_BITS: u32 = 32;

/// Runs of pages in the order in which they were first touched.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FirstFaults {
    pages: u64,
    runs: Vec<Run>,
}

impl FirstFaults {
    /// Of a memory of so many pages. Of a page that is there twice, the later one is to be overlooked.
    ///
    /// # Errors
    /// If a run is empty or not in the memory, or all of them are more than the memory has.
    pub fn new(pages: u64, runs: Vec<Run>) -> Result<FirstFaults, FormatError> {
        if !(1..=MAX_PAGES).contains(&pages) {
            return Err(FormatError::Value("no VM has so much memory"));
        }
        if runs.iter().any(|run| run.len == 0 || run.start.0 >= pages || run.end().0 > pages) {
            return Err(FormatError::Value("a run that is not in the VM's memory"));
        }
        if runs.iter().map(|run| u64::from(run.len)).sum::<u64>() > pages {
            return Err(FormatError::Value("there is more in it than the VM has pages"));
        }
        Ok(FirstFaults { pages, runs })
    }

    /// Pages of the VM's memory.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The runs, the first touched first.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut writer = Writer::new(to);
        let mut opening = [0; 16];
        opening[..8].copy_from_slice(&MAGIC);
        opening[8..12].copy_from_slice(&VERSION.to_le_bytes());
        writer.bytes(&opening)?;
        writer.longs([self.pages, self.runs.len() as u64])?;
        writer.longs(self.runs.iter().map(|run| run.start.0 << LEN_BITS | u64::from(run.len)))?;
        writer.finish()
    }

    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write(&mut bytes).expect("memory can be written");
        bytes
    }

    /// What the file's bytes say.
    ///
    /// # Errors
    /// If they are no whole order.
    pub fn decode(bytes: &[u8]) -> Result<FirstFaults, FormatError> {
        FirstFaults::read(bytes, bytes.len() as u64)
    }

    /// Reads an order of so many bytes.
    ///
    /// # Errors
    /// If it cannot be read, or is no whole order.
    pub fn read(from: impl Read, bytes: u64) -> Result<FirstFaults, FormatError> {
        let (mut reader, header) = Reader::open::<HEADER_BYTES>(from, bytes, WHAT, MAGIC, VERSION)?;
        let [pages, count] = [16, 24].map(|at| long(&header, at));
        if header[12..16] != [0; 4] {
            return Err(FormatError::Value("bytes of the header that are always zero are not"));
        }
        if pages > MAX_PAGES || count > pages {
            return Err(FormatError::Value("there is more in it than the VM has pages"));
        }
        reader.must_have(HEADER_BYTES as u64 + count * RUN_BYTES + SUM_BYTES)?;
        let mut runs = Vec::with_capacity(count as usize);
        reader.longs(count, |word| {
            runs.push(Run::new(PageNo(word >> LEN_BITS), word as u32));
            Ok(())
        })?;
        reader.finish()?;
        FirstFaults::new(pages, runs)
    }
}
