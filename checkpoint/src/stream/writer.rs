//! Writing a stream, record by record.

use std::io::{self, Read, Write};

use swapd::{PAGE_SIZE, Run};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::record::{OPENING_BYTES, Record, RecordKind, opening, pages_bytes};

const CHUNK: usize = 256 << 10;

/// Writes a stream.
#[derive(Debug)]
pub struct StreamWriter<W> {
    to: W,
    total: u64,
    at: u64,
    /// Of all that was written.
    sum: u64,
    pages: u64,
}

impl<W: Write> StreamWriter<W> {
    /// Begins a stream that is to have so many bytes.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(mut to: W, total: u64) -> io::Result<StreamWriter<W>> {
        let (bytes, sum) = opening(total);
        to.write_all(&bytes)?;
        Ok(StreamWriter { to, total, at: OPENING_BYTES as u64, sum, pages: 0 })
    }

    /// Bytes that were written.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Writes a record as it is given; it is up to the caller that it fits those before it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn record(&mut self, record: Record, mut body: impl Read) -> io::Result<()> {
        let header = self.header(&record)?;
        let (mut sum, mut chunk) = (Xxh3::with_seed(header), vec![0; CHUNK.min(record.bytes as usize)]);
        let mut left = record.bytes;
        while left > 0 {
            let part = &mut chunk[..(CHUNK as u64).min(left) as usize];
            body.read_exact(part)?;
            sum.update(part);
            self.put(part)?;
            left -= part.len() as u64;
        }
        self.end(sum.digest())
    }

    /// Writes a record that is no pages.
    ///
    /// # Errors
    /// If it cannot be written, or the body has not as many bytes.
    pub fn part(&mut self, kind: RecordKind, bytes: u64, body: impl Read) -> io::Result<()> {
        self.record(Record { kind, pages: 0, count: 0, bytes }, body)
    }

    /// Writes pages, whose sums were found right.
    ///
    /// # Errors
    /// If they cannot be written.
    ///
    /// # Panics
    /// If there are not as many sums and contents as pages.
    pub fn pages(&mut self, runs: &[Run], sums: &[u64], content: &[u8]) -> io::Result<()> {
        let pages: u32 = runs.iter().map(|run| run.len).sum();
        assert_eq!((sums.len(), content.len()), (pages as usize, pages as usize * PAGE_SIZE));
        let count = runs.len() as u64;
        let record = Record { kind: RecordKind::Pages, pages, count, bytes: pages_bytes(pages, count) };
        let header = self.header(&record)?;
        let runs = runs.iter().map(|run| run.start.0 << 32 | u64::from(run.len));
        let list: Vec<u8> = runs.chain(sums.iter().copied()).flat_map(u64::to_le_bytes).collect();
        self.put(&list)?;
        self.put(content)?;
        self.pages += u64::from(pages);
        // The pages have sums of their own.
        self.end(xxh3_64_with_seed(&list, header))
    }

    /// Writes the last record.
    ///
    /// # Errors
    /// If it cannot be written.
    ///
    /// # Panics
    /// If the stream has not as many bytes as were announced.
    pub fn finish(mut self) -> io::Result<W> {
        let count = self.pages;
        self.record(Record { kind: RecordKind::End, pages: 0, count, bytes: 0 }, io::empty())?;
        assert_eq!(self.at, self.total, "the stream is of another length than was said at its beginning");
        self.to.flush()?;
        Ok(self.to)
    }

    /// What it was written to, with the stream as it is: for one that is put together from records.
    pub fn into_inner(self) -> W {
        self.to
    }

    fn header(&mut self, record: &Record) -> io::Result<u64> {
        let (bytes, sum) = record.encode(self.sum);
        self.put(&bytes)?;
        Ok(sum)
    }

    fn end(&mut self, sum: u64) -> io::Result<()> {
        self.put(&sum.to_le_bytes())?;
        self.sum = sum;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}
