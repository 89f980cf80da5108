//! From a stream to an archive. The caller's thread reads; a few threads compare pages with their sums and write them
//! into the image. There is a checkpoint only when all of the stream has been found whole.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, mpsc};
use std::thread;

use memmap2::MmapMut;
use swapd::PAGE_SIZE;
use swapd::units::bytes_of;

use super::buffers::{THREADS, buffers};
use super::error::StreamError;
use super::reader::{Expected, check};
use super::{Pages, StreamReader, Watch};
use crate::archive::{ArchiveError, Entry, IMAGE, Locked, MAP, Progress, STATE};
use crate::format::{Manifest, MemoryMap};

/// What the file system needs itself.
const REST_BYTES: u64 = 16 << 20;

/// What was read.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The checkpoint.
    pub entry: Entry,
    /// Bytes of the stream.
    pub bytes: u64,
}

/// Pages that are to be written, or what went wrong instead.
type Job = (MmapMut, Pages);

/// Makes a checkpoint of a stream. Its id is that which it had; its name is that of its time, in this archive.
///
/// # Errors
/// If the stream is not whole, is of another VM than the archive, or of a checkpoint that the archive has; or it cannot
/// be read, the archive not be written, or it was told to stop. The archive is then as it was.
pub fn import(archive: &Locked, from: impl Read, watch: Watch<'_>) -> Result<Imported, StreamError> {
    let mut reader = StreamReader::open(from)?;
    let manifest = reader.manifest()?;
    let known = archive.list()?.entries;
    if let Some(same) = known.iter().find(|entry| entry.manifest().id == manifest.id) {
        return Err(StreamError::There(same.name().to_owned()));
    }
    has_room(archive, &manifest)?;
    let pending = archive.new_checkpoint(&manifest.vm.name, manifest.vm.memory_bytes, None)?;
    let io = |what, name: &str| {
        let path = archive.path().join(name);
        move |error| StreamError::from(ArchiveError::io(what, path, error))
    };
    reader.map(&manifest, &mut pending.map()).map_err(ours(MAP, archive))?;
    pending.map().rewind().map_err(io("read", MAP))?;
    // A map that is sealed is taken as it is: whoever has the key sees whether it is whole.
    let sealed = manifest.encryption.is_some();
    let map = if sealed { None } else { Some(MemoryMap::read_file(pending.map())?) };
    let mut expected = Expected::new(map.as_ref(), &manifest)?;
    let mut state = BufWriter::with_capacity(1 << 20, pending.state());
    reader.state(&manifest, &mut state).map_err(ours(STATE, archive))?;
    state.flush().map_err(io("write", STATE))?;
    drop(state);
    let order = reader.first_faults(&manifest)?;
    read_pages(&mut reader, &mut expected, pending.image(), archive, watch)?;
    let bytes = reader.at();
    if !watch(Progress { bytes_done: bytes, bytes_total: bytes }) {
        return Err(StreamError::Cancelled);
    }
    let entry = pending.finish_as(manifest)?;
    if let Some(order) = order {
        // It only makes a restore faster.
        if let Err(error) = entry.put_first_faults(&order) {
            tracing::warn!("the order of first faults is not recorded: {error}");
        }
    }
    Ok(Imported { entry, bytes })
}

/// What cannot be written is a file of the archive, not the stream.
fn ours(name: &'static str, archive: &Locked) -> impl FnOnce(StreamError) -> StreamError {
    let path = archive.path().join(name);
    move |error| match error {
        StreamError::Write(source) => ArchiveError::io("write", path, source).into(),
        error => error,
    }
}

fn has_room(archive: &Locked, manifest: &Manifest) -> Result<(), StreamError> {
    let parts = &manifest.parts;
    let need = [bytes_of(manifest.pages.here), parts.map.bytes, parts.state.bytes, REST_BYTES]
        .into_iter()
        .fold(0, u64::saturating_add);
    let free = archive.free_bytes()?;
    if free >= need { Ok(()) } else { Err(StreamError::NoRoom { need, free }) }
}

fn read_pages(
    reader: &mut StreamReader<impl Read>,
    expected: &mut Expected<'_>,
    image: &File,
    archive: &Locked,
    watch: Watch<'_>,
) -> Result<(), StreamError> {
    let (free, to_read) = mpsc::channel();
    buffers()?.into_iter().for_each(|buffer| free.send(buffer).expect("the other end is here"));
    let (read, to_write) = mpsc::channel::<Job>();
    let to_write = Mutex::new(to_write);
    let failed: Mutex<Option<StreamError>> = Mutex::new(None);
    let write = |free: &mpsc::Sender<MmapMut>| loop {
        let job = to_write.lock().expect("nobody panics with it").recv();
        let Ok((buffer, pages)) = job else { return };
        if let Err(error) = put(image, &pages, &buffer, archive) {
            failed.lock().expect("nobody panics with it").get_or_insert(error);
        }
        // Also after an error: whoever reads must not wait for it.
        if free.send(buffer).is_err() {
            return;
        }
    };
    let ended = thread::scope(|scope| {
        for _ in 0..THREADS {
            let (free, write) = (free.clone(), &write);
            scope.spawn(move || write(&free));
        }
        drop(free);
        // Goes with this closure, however it ends, and the threads with it.
        let read = read;
        loop {
            let progress = Progress { bytes_done: reader.at(), bytes_total: reader.total() };
            if !watch(progress) {
                return Err(StreamError::Cancelled);
            }
            if failed.lock().expect("nobody panics with it").is_some() {
                return Ok(());
            }
            let mut buffer = to_read.recv().expect("threads give back what they get");
            let mut pages = Pages::default();
            if !reader.pages(expected, &mut pages, &mut buffer)? {
                return Ok(());
            }
            read.send((buffer, pages)).expect("threads take what they get");
        }
    });
    // What a thread has found comes first: the stream may have been read no further for it.
    failed.into_inner().expect("nobody panics with it").map_or(ended, Err)
}

/// Compares the pages with their sums, and writes them.
fn put(image: &File, pages: &Pages, content: &[u8], archive: &Locked) -> Result<(), StreamError> {
    check(pages, &content[..pages.sums.len() * PAGE_SIZE])?;
    let mut at = 0;
    for run in &pages.runs {
        image
            .write_all_at(&content[at..at + run.bytes()], run.start.offset())
            .map_err(|error| ArchiveError::io("write", archive.path().join(IMAGE), error))?;
        at += run.bytes();
    }
    Ok(())
}
