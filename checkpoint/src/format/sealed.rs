//! Sealed files: the map and the state of an encrypted checkpoint. They have sums of plain pages and the registers of
//! processors, so they are as secret as the memory. `docs/checkpoint-format.md` has every byte.
//!
//! A file is chunks, each encrypted and authenticated by itself (AES-256-GCM), so that it is written and read in pieces
//! and nothing of a chunk is believed before all of it has been found right. A chunk's nonce has its number and whether it
//! is the last; the file's key is derived from its own salt and its use. So a chunk in another place, of another file, or
//! of the map in the place of the state is refused, and so is a file that was cut at the end of a chunk.

use std::fs::File;
use std::io::{self, Read, Write};

use ring::aead::{Aad, LessSafeKey, Nonce};
use zeroize::Zeroizing;

use super::{FormatError, MemoryMap};
use crate::key::{ChainKey, SALT_BYTES, random};

const WHAT: &str = "sealed file of a checkpoint";
const MAGIC: [u8; 8] = *b"VMEMDSEA";
const VERSION: u32 = 1;
/// Magic, version, zeros, salt.
pub const HEADER_BYTES: usize = 16 + SALT_BYTES;
/// Plain bytes of a chunk; of the last one, fewer.
pub const CHUNK_BYTES: usize = 64 << 10;
/// What makes a chunk longer.
pub const TAG_BYTES: usize = 16;
const SEALED_CHUNK: usize = CHUNK_BYTES + TAG_BYTES;

/// What a sealed file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SealedAs {
    /// The memory's map.
    Map,
    /// Processors and devices.
    State,
}

impl SealedAs {
    fn purpose(self) -> &'static [u8] {
        match self {
            SealedAs::Map => b"vmemd checkpoint map",
            SealedAs::State => b"vmemd checkpoint state",
        }
    }
}

/// The key of a file and its header, which each chunk is authenticated with.
struct Seal {
    key: LessSafeKey,
    header: [u8; HEADER_BYTES],
    /// Of the next chunk.
    number: u64,
}

impl Seal {
    fn new(key: &ChainKey, purpose: SealedAs, salt: [u8; SALT_BYTES]) -> Seal {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..].copy_from_slice(&salt);
        Seal { key: key.file(&salt, purpose.purpose()), header, number: 0 }
    }

    /// Of the next chunk. None comes twice: a chunk's number never does.
    fn nonce(&mut self, last: bool) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&self.number.to_le_bytes());
        nonce[8] = last.into();
        self.number += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    /// Encrypts a chunk in place, and puts its tag behind it.
    fn seal(&mut self, chunk: &mut Vec<u8>, last: bool) {
        let nonce = self.nonce(last);
        let sealed = self.key.seal_in_place_append_tag(nonce, Aad::from(&self.header), chunk);
        sealed.expect("a chunk is far shorter than what one nonce is good for");
    }

    /// Decrypts a chunk in place, if it is the next one.
    fn open<'a>(&mut self, chunk: &'a mut [u8], last: bool) -> Result<&'a mut [u8], FormatError> {
        let nonce = self.nonce(last);
        self.key.open_in_place(nonce, Aad::from(&self.header), chunk).map_err(|_| FormatError::Seal)
    }
}

/// Bytes of the file that has so many plain ones.
pub fn sealed_bytes(plain: u64) -> u64 {
    let chunks = plain.div_ceil(CHUNK_BYTES as u64).max(1);
    HEADER_BYTES as u64 + plain + chunks * TAG_BYTES as u64
}

/// Plain bytes of a file of so many.
///
/// # Errors
/// If no file is so long.
pub fn plain_bytes(sealed: u64) -> Result<u64, FormatError> {
    let should = sealed_bytes(0);
    let cut_off = FormatError::CutOff { has: sealed, should };
    let body = sealed.checked_sub(HEADER_BYTES as u64).ok_or(cut_off)?;
    let chunks = body.div_ceil(SEALED_CHUNK as u64).max(1);
    let plain = body.checked_sub(chunks * TAG_BYTES as u64);
    // Of a whole file the last chunk has something in it, unless it is the only one.
    match plain.filter(|plain| sealed_bytes(*plain) == sealed) {
        Some(plain) => Ok(plain),
        None => Err(FormatError::CutOff { has: sealed, should: sealed.saturating_add(1).max(should) }),
    }
}

/// Writes a sealed file. Without [`finish`](SealedWriter::finish) it is none.
pub struct SealedWriter<W> {
    to: W,
    seal: Seal,
    /// Plain bytes of the chunk that has begun. A whole one waits until it is known whether it is the last.
    chunk: Zeroizing<Vec<u8>>,
}

impl<W> std::fmt::Debug for SealedWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedWriter").field("chunks", &self.seal.number).finish_non_exhaustive()
    }
}

impl<W: Write> SealedWriter<W> {
    /// Begins a file, with a salt that no other one has.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(mut to: W, key: &ChainKey, purpose: SealedAs, salt: [u8; SALT_BYTES]) -> io::Result<Self> {
        let seal = Seal::new(key, purpose, salt);
        to.write_all(&seal.header)?;
        Ok(SealedWriter { to, seal, chunk: Zeroizing::new(Vec::with_capacity(SEALED_CHUNK)) })
    }

    /// Writes the last chunk, and hands back where all of it went.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.write_chunk(true)?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn write_chunk(&mut self, last: bool) -> io::Result<()> {
        self.seal.seal(&mut self.chunk, last);
        self.to.write_all(&self.chunk)?;
        self.chunk.clear();
        Ok(())
    }
}

impl<W: Write> Write for SealedWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.chunk.len() == CHUNK_BYTES && !bytes.is_empty() {
            self.write_chunk(false)?;
        }
        let count = bytes.len().min(CHUNK_BYTES - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    /// What is not a whole chunk yet stays here.
    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Reads a sealed file of a length that is known.
pub struct SealedReader<R> {
    from: R,
    seal: Seal,
    /// Sealed bytes that have not been read.
    left: u64,
    chunk: Zeroizing<Vec<u8>>,
    /// What of the chunk has been given out, of what there is.
    given: usize,
    plain: usize,
    /// A chunk was not right: none behind it is read in its place.
    broken: bool,
}

impl<R> std::fmt::Debug for SealedReader<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedReader").field("left", &self.left).finish_non_exhaustive()
    }
}

impl<R: Read> SealedReader<R> {
    /// Reads the header of a file of so many bytes.
    ///
    /// # Errors
    /// If it is no such file, or a newer one. That the key is another one shows with the first chunk.
    pub fn new(mut from: R, len: u64, key: &ChainKey, purpose: SealedAs) -> Result<Self, FormatError> {
        let mut header = [0; HEADER_BYTES];
        let here = len.min(HEADER_BYTES as u64) as usize;
        from.read_exact(&mut header[..here])?;
        if header[..8] != MAGIC {
            return Err(FormatError::Magic(WHAT));
        }
        match u32::from_le_bytes(header[8..12].try_into().expect("four bytes")) {
            _ if here < 12 => return Err(FormatError::CutOff { has: len, should: sealed_bytes(0) }),
            0 => return Err(FormatError::Value("no version of the format is 0")),
            found if found > VERSION => return Err(FormatError::Newer { found, known: VERSION }),
            _ => {}
        }
        plain_bytes(len)?;
        if header[12..16] != [0; 4] {
            return Err(FormatError::Value("bytes of the header that are always zero are not"));
        }
        let salt = header[16..].try_into().expect("the rest is the salt");
        Ok(SealedReader {
            from,
            seal: Seal::new(key, purpose, salt),
            left: len - HEADER_BYTES as u64,
            chunk: Zeroizing::new(Vec::new()),
            given: 0,
            plain: 0,
            broken: false,
        })
    }

    /// Reads the next chunk, if there is one.
    fn next(&mut self) -> Result<(), FormatError> {
        if self.broken {
            return Err(FormatError::Seal);
        }
        self.broken = true;
        let len = self.left.min(SEALED_CHUNK as u64);
        self.chunk.resize(len as usize, 0);
        self.from.read_exact(&mut self.chunk)?;
        self.left -= len;
        (self.given, self.plain) = (0, 0);
        self.plain = self.seal.open(&mut self.chunk, self.left == 0)?.len();
        self.broken = false;
        Ok(())
    }
}

impl<R: Read> Read for SealedReader<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.given == self.plain && (self.left > 0 || self.broken) && !bytes.is_empty() {
            self.next().map_err(|error| match error {
                FormatError::Io(error) => error,
                error => io::Error::new(io::ErrorKind::InvalidData, error),
            })?;
        }
        let count = bytes.len().min(self.plain - self.given);
        bytes[..count].copy_from_slice(&self.chunk[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

/// Reads a map from its file's start, which is sealed if there is a key.
///
/// # Errors
/// If it cannot be read, is no whole map, or is sealed with another key.
pub fn read_map(file: &File, key: Option<&ChainKey>) -> Result<MemoryMap, FormatError> {
    let Some(key) = key else { return MemoryMap::read_file(file) };
    let len = file.metadata()?.len();
    let reader = SealedReader::new(file, len, key, SealedAs::Map)?;
    MemoryMap::read(reader, plain_bytes(len)?).map_err(FormatError::of_sealed)
}

/// The bytes of a map's file, which is sealed if there is a key.
///
/// # Errors
/// If the kernel has no random bytes.
pub(crate) fn encode_map(map: &MemoryMap, key: Option<&ChainKey>) -> io::Result<Vec<u8>> {
    let Some(key) = key else { return Ok(map.encode()) };
    let mut writer = SealedWriter::new(Vec::new(), key, SealedAs::Map, random()?)?;
    map.write(&mut writer)?;
    writer.finish()
}

#[cfg(test)]
#[path = "sealed_tests.rs"]
mod tests;
