//! Binary files in pieces, summed on the way: a header, lists of numbers, and the XXH3-64 of all of it.
//!
//! A file is never in memory as a whole beside what it says: the map of a VM of 1 TiB has gigabytes.

use std::io::{self, Read, Write};

use xxhash_rust::xxh3::Xxh3Default;

use super::FormatError;

/// Bytes of a piece; a multiple of every number's.
const CHUNK: usize = 64 << 10;
/// Bytes of the checksum at a file's end.
pub(super) const SUM_BYTES: u64 = 8;
/// Bytes of the magic and the version, with which every binary file begins.
const OPENING_BYTES: usize = 12;

/// Writes a file, and its checksum at the end.
pub(super) struct Writer<W> {
    to: W,
    sum: Xxh3Default,
    buffer: Vec<u8>,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(to: W) -> Writer<W> {
        Writer { to, sum: Xxh3Default::new(), buffer: Vec::with_capacity(CHUNK) }
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.flush()?;
        self.sum.update(bytes);
        self.to.write_all(bytes)
    }

    pub(super) fn longs(&mut self, longs: impl IntoIterator<Item = u64>) -> io::Result<()> {
        for long in longs {
            if self.buffer.len() == CHUNK {
                self.flush()?;
            }
            self.buffer.extend_from_slice(&long.to_le_bytes());
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sum.update(&self.buffer);
        self.to.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        let sum = self.sum.digest().to_le_bytes();
        self.to.write_all(&sum)?;
        self.to.flush()
    }
}

/// Reads a file of a length that is known.
pub(super) struct Reader<R> {
    from: R,
    sum: Xxh3Default,
    chunk: Vec<u8>,
    /// Bytes of the whole file.
    len: u64,
}

impl<R: Read> Reader<R> {
    /// Reads the magic, the version and the rest of the header. `what` names the file in an error.
    pub(super) fn open<const HEADER: usize>(
        mut from: R,
        len: u64,
        what: &'static str,
        magic: [u8; 8],
        newest: u32,
    ) -> Result<(Reader<R>, [u8; HEADER]), FormatError> {
        let mut header = [0; HEADER];
        let (opening, rest) = header.split_at_mut(OPENING_BYTES);
        if len < magic.len() as u64 {
            return Err(FormatError::Magic(what));
        }
        let here = opening.len().min(len as usize);
        from.read_exact(&mut opening[..here])?;
        if opening[..8] != magic {
            return Err(FormatError::Magic(what));
        }
        let should = HEADER as u64 + SUM_BYTES;
        if len < OPENING_BYTES as u64 {
            return Err(FormatError::CutOff { has: len, should });
        }
        // Before the length: another version may have another header.
        match u32::from_le_bytes(opening[8..].try_into().expect("four bytes")) {
            0 => return Err(FormatError::Value("no version of the format is 0")),
            found if found > newest => return Err(FormatError::Newer { found, known: newest }),
            _ => {}
        }
        if len < should {
            return Err(FormatError::CutOff { has: len, should });
        }
        from.read_exact(rest)?;
        let mut sum = Xxh3Default::new();
        sum.update(&header);
        Ok((Reader { from, sum, chunk: Vec::new(), len }, header))
    }

    /// Whether the file is as long as its header says. Before this, nothing is to be allocated by its header.
    pub(super) fn must_have(&self, should: u64) -> Result<(), FormatError> {
        match self.len {
            has if has < should => Err(FormatError::CutOff { has, should }),
            has if has > should => Err(FormatError::TooLong { has, should }),
            _ => Ok(()),
        }
    }

    /// Reads so many numbers.
    pub(super) fn longs(
        &mut self,
        count: u64,
        mut each: impl FnMut(u64) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let mut left = count * 8;
        while left > 0 {
            let len = left.min(CHUNK as u64);
            self.chunk.resize(len as usize, 0);
            self.from.read_exact(&mut self.chunk)?;
            self.sum.update(&self.chunk);
            self.chunk.as_chunks::<8>().0.iter().try_for_each(|bytes| each(u64::from_le_bytes(*bytes)))?;
            left -= len;
        }
        Ok(())
    }

    /// Reads so many bytes, of which the file is known to have as many.
    pub(super) fn bytes(&mut self, count: u64) -> Result<Vec<u8>, FormatError> {
        let mut bytes = vec![0; count as usize];
        self.from.read_exact(&mut bytes)?;
        self.sum.update(&bytes);
        Ok(bytes)
    }

    /// Whether what was read is what was written.
    pub(super) fn finish(mut self) -> Result<(), FormatError> {
        let mut sum = [0; SUM_BYTES as usize];
        self.from.read_exact(&mut sum)?;
        if u64::from_le_bytes(sum) == self.sum.digest() { Ok(()) } else { Err(FormatError::Sum) }
    }
}

/// The number at that place of a header.
pub(super) fn long(header: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"))
}
