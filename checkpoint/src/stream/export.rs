//! From an archive to a stream. A few threads read batches of pages ahead and compare them with their sums; the stream
//! is written in order, by the caller's thread.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;

use memmap2::MmapMut;
use swapd::digest::page_sum;
use swapd::{Cipher, PAGE_SIZE, Run};
use xxhash_rust::xxh3::xxh3_64;

use super::buffers::{THREADS, buffers};
use super::error::StreamError;
use super::record::{MAX_RECORD_PAGES, OPENING_BYTES, RecordKind, pages_bytes, record_bytes};
use super::{StreamWriter, Watch};
use crate::archive::{ArchiveError, Chain, IMAGE, MAP, Progress, STATE, Source};
use crate::format::manifest::Sum;
use crate::format::sealed::encode_map;
use crate::format::{FirstFaults, Manifest, MemoryMap, Part, Parts};
use crate::key::ChainKey;

/// A checkpoint, opened to be written into a stream.
#[derive(Debug)]
pub struct Export {
    chain: Chain,
    images: Vec<File>,
    map: MemoryMap,
    /// The map's file, if it is encrypted.
    sealed: Option<Vec<u8>>,
    /// With which the images are encrypted, if they are. They go into the stream so.
    cipher: Option<Cipher>,
    state: File,
    order: Option<FirstFaults>,
    manifest: Manifest,
    batches: Vec<Batch>,
    total: u64,
}

/// Pages of a record: runs by rising page, each with the image that it is in.
#[derive(Debug, Default)]
struct Batch {
    parts: Vec<(Run, u8)>,
    pages: u32,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Pages in the stream.
    pub pages: u64,
    /// Bytes of the whole stream.
    pub bytes: u64,
}

impl Export {
    /// Opens all that the checkpoint needs. Nobody removes any of it meanwhile.
    ///
    /// # Errors
    /// If something of it is missing or damaged.
    pub fn open(chain: Chain) -> Result<Export, StreamError> {
        let images = chain.images(true)?;
        let layers = chain.layers()?;
        let batches = batches(layers.pieces().filter_map(|piece| match piece.source {
            Source::Layer(layer) => Some((piece.run, layer)),
            Source::Zero | Source::Lost => None,
        }));
        let map = layers.map().standing_alone();
        drop(layers);
        let (top, order) = (chain.top(), chain.top().first_faults());
        let state = top.state_file()?;
        let key = top.chain_key()?;
        let seal = |key: &ChainKey| {
            let sealed = encode_map(&map, Some(key));
            sealed.map_err(|error| ArchiveError::io("seal", top.path().join(MAP), error))
        };
        let sealed = key.as_ref().map(seal).transpose()?;
        let cipher = chain.cipher()?;
        let manifest = standing_alone(top.manifest(), &map, sealed.as_deref());
        let mut export = Export {
            images,
            map,
            sealed,
            cipher,
            state,
            order,
            manifest,
            batches,
            total: 0,
            chain: chain.clone(),
        };
        export.total = export.count();
        Ok(export)
    }

    /// What the stream says of the checkpoint: what its manifest does, without a base.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Bytes of the whole stream.
    pub fn total(&self) -> u64 {
        self.total
    }

    fn count(&self) -> u64 {
        let Parts { map, state } = &self.manifest.parts;
        let order = self.order.as_ref().map(|order| record_bytes(order.encode().len() as u64));
        let pages = self.batches.iter().map(|one| pages_bytes(one.pages, one.parts.len() as u64));
        OPENING_BYTES as u64
            + record_bytes(self.manifest.encode().len() as u64)
            + record_bytes(map.bytes)
            + record_bytes(state.bytes)
            + order.unwrap_or(0)
            + pages.map(record_bytes).sum::<u64>()
            + record_bytes(0)
    }

    /// Writes the stream. `watch` is told how far it is, and says whether to go on.
    ///
    /// # Errors
    /// If a page is damaged, something cannot be read or written, or it was told to stop. What was written by then is
    /// no whole stream.
    pub fn write(&self, to: &mut impl Write, watch: Watch<'_>) -> Result<Exported, StreamError> {
        let mut stream = StreamWriter::new(to, self.total).map_err(StreamError::Write)?;
        let parts = |stream: &mut StreamWriter<_>| {
            let manifest = self.manifest.encode();
            stream.part(RecordKind::Manifest, manifest.len() as u64, manifest.as_slice())?;
            let plain = if self.sealed.is_none() { self.map.encode() } else { Vec::new() };
            let map = self.sealed.as_ref().unwrap_or(&plain);
            stream.part(RecordKind::Map, map.len() as u64, map.as_slice())?;
            stream.part(RecordKind::State, self.manifest.parts.state.bytes, &self.state)?;
            if let Some(order) = self.order.as_ref().map(FirstFaults::encode) {
                stream.part(RecordKind::FirstFaults, order.len() as u64, order.as_slice())?;
            }
            Ok(())
        };
        parts(&mut stream).map_err(StreamError::Write)?;
        let (free, to_fill) = mpsc::channel();
        buffers()?.into_iter().for_each(|buffer| free.send(buffer).expect("the other end is here"));
        let (to_fill, next) = (Mutex::new(to_fill), AtomicUsize::new(0));
        let (filled, to_write) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..THREADS.min(self.batches.len()) {
                let filled = filled.clone();
                let (to_fill, next) = (&to_fill, &next);
                scope.spawn(move || self.fill(to_fill, next, &filled));
            }
            drop(filled);
            // Takes the end of `free` along: the threads end when it does, however that is.
            self.write_pages(&mut stream, &to_write, free, watch)
        })?;
        stream.finish().map_err(StreamError::Write)?;
        Ok(Exported { pages: self.manifest.pages.here, bytes: self.total })
    }

    /// Reads batches until there are no more, or no buffers.
    fn fill(
        &self,
        to_fill: &Mutex<mpsc::Receiver<MmapMut>>,
        next: &AtomicUsize,
        filled: &mpsc::Sender<(usize, Result<MmapMut, StreamError>)>,
    ) {
        loop {
            let (nth, mut buffer) = {
                // Together: if a later batch had the last buffer, the one that is due would wait for ever.
                let to_fill = to_fill.lock().expect("nobody panics with it");
                let Ok(buffer) = to_fill.recv() else { return };
                (next.fetch_add(1, Ordering::Relaxed), buffer)
            };
            let Some(batch) = self.batches.get(nth) else { return };
            let read = self.read(batch, &mut buffer).map(|()| buffer);
            if filled.send((nth, read)).is_err() {
                return;
            }
        }
    }

    fn read(&self, batch: &Batch, buffer: &mut MmapMut) -> Result<(), StreamError> {
        let mut at = 0;
        for (run, layer) in &batch.parts {
            let bytes = &mut buffer[at..at + run.bytes()];
            at += run.bytes();
            let entry = &self.chain.entries()[usize::from(*layer)];
            self.images[usize::from(*layer)]
                .read_exact_at(bytes, run.start.offset())
                .map_err(|error| ArchiveError::io("read", entry.path().join(IMAGE), error))?;
            let pages = run.pages().zip(bytes.as_chunks::<PAGE_SIZE>().0).zip(self.sums(*run));
            let mut plain;
            for ((page, bytes), sum) in pages {
                let bytes = match &self.cipher {
                    None => bytes,
                    Some(cipher) => {
                        plain = *bytes;
                        cipher.decrypt(Run::one(page), &mut plain);
                        &plain
                    }
                };
                if page_sum(page, bytes) != *sum {
                    return Err(ArchiveError::Page { name: entry.name().to_owned(), page }.into());
                }
            }
        }
        Ok(())
    }

    /// The sums of pages that are neighbours with content.
    fn sums(&self, run: Run) -> &[u64] {
        self.map.pieces_in(run).next().expect("a run has a page").sums
    }

    fn write_pages(
        &self,
        stream: &mut StreamWriter<impl Write>,
        to_write: &mpsc::Receiver<(usize, Result<MmapMut, StreamError>)>,
        free: mpsc::Sender<MmapMut>,
        watch: Watch<'_>,
    ) -> Result<(), StreamError> {
        let mut early = BTreeMap::new();
        for (nth, batch) in self.batches.iter().enumerate() {
            if !watch(Progress { bytes_done: stream.at(), bytes_total: self.total }) {
                return Err(StreamError::Cancelled);
            }
            let buffer = loop {
                if let Some(read) = early.remove(&nth) {
                    break read;
                }
                let (which, read) = to_write.recv().expect("a thread has the batch that is due");
                early.insert(which, read);
            }?;
            let runs: Vec<Run> = batch.parts.iter().map(|(run, _)| *run).collect();
            let content = &buffer[..batch.pages as usize * PAGE_SIZE];
            let sums: Vec<u64> = match &self.cipher {
                None => runs.iter().flat_map(|run| self.sums(*run)).copied().collect(),
                // Of the bytes in the stream: those of the plain pages are as secret as the pages.
                Some(_) => {
                    let pages = runs.iter().flat_map(|run| run.pages());
                    pages
                        .zip(content.as_chunks::<PAGE_SIZE>().0)
                        .map(|(page, bytes)| page_sum(page, bytes))
                        .collect()
                }
            };
            stream.pages(&runs, &sums, content).map_err(StreamError::Write)?;
            // At the end, nobody takes it.
            let _ = free.send(buffer);
        }
        Ok(())
    }
}

/// Puts runs together until each record is full.
fn batches(runs: impl Iterator<Item = (Run, u8)>) -> Vec<Batch> {
    let (mut all, mut batch) = (Vec::new(), Batch::default());
    for (mut run, layer) in runs {
        while run.len > 0 {
            let len = run.len.min(MAX_RECORD_PAGES - batch.pages);
            batch.parts.push((run.part(0, len), layer));
            batch.pages += len;
            run = run.part(len, run.len - len);
            if batch.pages == MAX_RECORD_PAGES {
                all.push(std::mem::take(&mut batch));
            }
        }
    }
    if batch.pages > 0 {
        all.push(batch);
    }
    all
}

/// The manifest of the same checkpoint with that map, in which it has all pages itself.
fn standing_alone(manifest: &Manifest, map: &MemoryMap, sealed: Option<&[u8]>) -> Manifest {
    let (bytes, sum) = match sealed {
        Some(sealed) => (sealed.len() as u64, xxh3_64(sealed)),
        None => {
            let mut sum = Summed::default();
            map.write(&mut sum).expect("a sum takes anything");
            (map.file_bytes(), sum.0.digest())
        }
    };
    let map_part = Part { file: MAP.to_owned(), bytes, xxh3: Sum(sum) };
    let state = Part { file: STATE.to_owned(), ..manifest.parts.state.clone() };
    Manifest { base: None, pages: map.counts(), parts: Parts { map: map_part, state }, ..manifest.clone() }
}

/// Has the sum of what is written into it.
#[derive(Default)]
struct Summed(xxhash_rust::xxh3::Xxh3Default);

impl Write for Summed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
