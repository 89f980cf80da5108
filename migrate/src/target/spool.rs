//! Where the state of vCPUs and devices waits until the VM's memory is complete: devices read guest memory when they
//! load.
//!
//! ```text
//!   parts from the wire ─▶ chunks in memory, up to a limit ─▶ chunks in a file without a name
//!                                        └──────── read in that order, once ────────┘
//! ```
//! A state of any size takes no more memory than the limit and the checksums of the chunks in the file, 8 bytes for
//! each. The file is in no directory, so nothing of it is left behind whoever ends. Writes to it are the page
//! cache's; the VM stands still meanwhile, and nothing is flushed.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::path::PathBuf;

use swapd::{Cipher, PageNo, Run};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::link::error::SessionError;
use crate::outside::{File, FileExt, planted, unnamed_file};
use crate::wire::control::MAX_STATE_PART;

/// Of a file's content, what is written, checked and read at once.
const CHUNK_BYTES: usize = MAX_STATE_PART;
const CHUNK_PAGES: u64 = (CHUNK_BYTES / swapd::PAGE_SIZE) as u64;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(swapd::PAGE_SIZE));

/// Where a target keeps a VM's state until it can be loaded.
#[derive(Clone, Debug)]
pub struct StateSpool {
    /// For what is too large for memory. It has to be on a disk, with room for the state.
    pub directory: PathBuf,
    /// Bytes of state that stay in memory.
    pub memory_bytes: usize,
    /// Bytes that a state may take on that disk: what of it was promised to no VM's store when this one was let in.
    /// Without a bound, a source could fill the disk on which the pages of other VMs are.
    pub disk_bytes: u64,
    /// What is on the disk is encrypted, with a key that this process alone knows.
    pub encrypt: bool,
    /// That key is kept out of the host's swap.
    pub lock: bool,
}

/// A VM's state as it arrives.
#[derive(Debug)]
pub(crate) struct Spool {
    options: StateSpool,
    in_memory: VecDeque<Vec<u8>>,
    file: Option<SpoolFile>,
    /// Behind all that, and less than a chunk.
    tail: Vec<u8>,
    bytes: u64,
}

/// What lies in a file: chunks of one size.
#[derive(Debug)]
struct SpoolFile {
    file: File,
    /// Of each chunk's content, seeded with its number.
    sums: Vec<u64>,
    cipher: Option<Cipher>,
    scratch: Vec<u8>,
    disk_bytes: u64,
}

impl Spool {
    pub(crate) fn new(options: StateSpool) -> Spool {
        Spool { options, in_memory: VecDeque::new(), file: None, tail: Vec::new(), bytes: 0 }
    }

    /// Bytes so far: where the next part begins.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes the next part.
    pub(crate) fn push(&mut self, mut part: &[u8]) -> Result<(), SessionError> {
        self.bytes += part.len() as u64;
        while !part.is_empty() {
            let (now, rest) = part.split_at(part.len().min(CHUNK_BYTES - self.tail.len()));
            self.tail.extend_from_slice(now);
            part = rest;
            if self.tail.len() == CHUNK_BYTES {
                match self.keep_chunk() {
                    Err(_) if planted!(BelievesAFullSpool) => {}
                    kept => kept.map_err(|source| self.failed(source))?,
                }
            }
        }
        Ok(())
    }

    fn failed(&self, source: io::Error) -> SessionError {
        SessionError::Spool { directory: self.options.directory.clone(), source }
    }

    fn keep_chunk(&mut self) -> io::Result<()> {
        let chunk = std::mem::take(&mut self.tail);
        if (self.in_memory.len() + 1) * CHUNK_BYTES <= self.options.memory_bytes {
            self.in_memory.push_back(chunk);
            return Ok(());
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(SpoolFile::new(&self.options)?),
        };
        if planted!(LosesWhatIsSpooled) {
            return Ok(());
        }
        file.append(&chunk)?;
        // Its memory is as large as the next chunk's.
        self.tail = chunk;
        self.tail.clear();
        Ok(())
    }

    /// For the machine that takes it. `lives` is called now and then, for the session's sake, which may have ended.
    pub(crate) fn read(self, lives: &mut dyn FnMut() -> Result<(), SessionError>) -> SpoolReader<'_> {
        SpoolReader { spool: self, chunk: Vec::new(), at: 0, chunks_read: 0, lives, trouble: None }
    }
}

impl SpoolFile {
    fn new(options: &StateSpool) -> io::Result<SpoolFile> {
        let key = |error: io::Error| io::Error::new(error.kind(), format!("no memory for its key: {error}"));
        let cipher = if options.encrypt { Some(Cipher::random(options.lock).map_err(key)?) } else { None };
        let file = unnamed_file(&options.directory)?;
        let disk_bytes = options.disk_bytes;
        Ok(SpoolFile { file, sums: Vec::new(), cipher, scratch: Vec::new(), disk_bytes })
    }

    fn append(&mut self, chunk: &[u8]) -> io::Result<()> {
        let number = self.sums.len() as u64;
        if (number + 1) * CHUNK_BYTES as u64 > self.disk_bytes {
            let text = format!(
                "No space left on device: {} bytes are free that no VM was promised",
                self.disk_bytes
            );
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        let sum = xxh3_64_with_seed(chunk, number);
        let bytes = match &self.cipher {
            None => chunk,
            Some(cipher) => {
                self.scratch.clear();
                self.scratch.extend_from_slice(chunk);
                cipher.encrypt(pages_of(number), &mut self.scratch);
                &self.scratch
            }
        };
        self.file.write_all_at(bytes, number * CHUNK_BYTES as u64)?;
        self.sums.push(sum);
        Ok(())
    }

    fn read(&self, number: u64, into: &mut Vec<u8>) -> io::Result<()> {
        into.resize(CHUNK_BYTES, 0);
        self.file.read_exact_at(into, number * CHUNK_BYTES as u64)?;
        if let Some(cipher) = &self.cipher {
            cipher.decrypt(pages_of(number), into);
        }
        if xxh3_64_with_seed(into, number) != self.sums[number as usize] && !planted!(TrustsTheSpool) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not what was written"));
        }
        Ok(())
    }
}

/// As a cipher counts: no two chunks have one in common.
fn pages_of(chunk: u64) -> Run {
    Run::new(PageNo(chunk * CHUNK_PAGES), CHUNK_PAGES as u32)
}

/// Reads a state from where it was kept, once: what has been read from memory is given back.
pub(crate) struct SpoolReader<'a> {
    spool: Spool,
    chunk: Vec<u8>,
    at: usize,
    /// Of those in the file.
    chunks_read: u64,
    lives: &'a mut dyn FnMut() -> Result<(), SessionError>,
    trouble: Option<SessionError>,
}

impl SpoolReader<'_> {
    /// Why a read has failed, if one has.
    pub(crate) fn into_trouble(self) -> Option<SessionError> {
        self.trouble
    }

    fn next_chunk(&mut self) -> Result<(), SessionError> {
        (self.lives)()?;
        self.at = 0;
        let file_first = planted!(ReadsTheSpoolFirst) && self.spool.file.is_some();
        if !file_first && let Some(chunk) = self.spool.in_memory.pop_front() {
            self.chunk = chunk;
            return Ok(());
        }
        if let Some(file) = &self.spool.file {
            if self.chunks_read < file.sums.len() as u64 {
                let read = file.read(self.chunks_read, &mut self.chunk);
                self.chunks_read += 1;
                return read.map_err(|source| self.spool.failed(source));
            }
            self.spool.file = None;
            return self.next_chunk();
        }
        self.chunk = std::mem::take(&mut self.spool.tail);
        Ok(())
    }
}

impl Read for SpoolReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.trouble.is_some() {
            return Err(ended());
        }
        if self.at == self.chunk.len()
            && let Err(trouble) = self.next_chunk()
        {
            self.trouble = Some(trouble);
            return Err(ended());
        }
        let from = &self.chunk[self.at..];
        let count = from.len().min(into.len());
        into[..count].copy_from_slice(&from[..count]);
        self.at += count;
        Ok(count)
    }
}

/// For whoever reads: the session has the reason.
fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the session has ended")
}

#[cfg(test)]
#[path = "spool_tests.rs"]
mod tests;
