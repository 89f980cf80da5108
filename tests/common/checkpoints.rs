//! Checkpoints of a reference guest, made by hand: its memory and its state, in the files of
//! `docs/checkpoint-format.md`. For tests of what is made of them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use checkpoint::archive::Archive;
use checkpoint::format::{
    BaseRef, CheckpointId, Machine, Manifest, MapBuilder, MemoryMap, PageKind, Part, Parts, Save, VmFacts,
    manifest::Sum,
};
use memmap2::MmapOptions;
use swapd::digest::page_sum;
use swapd::{PAGE_SIZE, PageNo, Run};
use testkit::{OrSkip, Reason, wait_for};
use vmemd::vmm::{MachineConfig, ReferenceMachine};
use xxhash_rust::xxh3::xxh3_64;

/// A name as a checkpoint has it by itself.
pub(crate) const FIRST: &str = "2026-11-29T23-20-00Z";

/// What a checkpoint is of.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) name: &'static str,
    pub(crate) workload: &'static str,
    pub(crate) memory_bytes: u64,
    pub(crate) budget_bytes: u64,
    /// Rounds that it has done before.
    pub(crate) rounds: u64,
    pub(crate) paused: bool,
}

/// Runs the guest for some rounds, and makes a checkpoint of it in the archive. Returns its directory.
pub(crate) fn make(archive: &Path, checkpoint: &str, guest: &Guest) -> PathBuf {
    let mut options = MmapOptions::new();
    let options = options.len(guest.memory_bytes as usize).no_reserve_swap();
    let mut memory = options.map_anon().expect("memory for the guest");
    let workload = guest.workload.parse().expect("a workload");
    let config = MachineConfig { memory_bytes: guest.memory_bytes, vcpus: 1, workload };
    let mut machine = ReferenceMachine::new(config, memory.as_mut_ptr()).or_skip(Reason::Kvm);
    machine.start().expect("it starts");
    wait_for("rounds of the guest", || (machine.counters().rounds >= guest.rounds).then_some(()));
    machine.pause().expect("it pauses");
    let state = machine.save().expect("it can be saved");
    drop(machine);
    write(&archive.join(checkpoint), guest, &memory, &state)
}

/// Writes the files of a checkpoint, which needs no base.
pub(crate) fn write(dir: &Path, guest: &Guest, memory: &[u8], state: &[u8]) -> PathBuf {
    Archive::create(dir.parent().expect("an archive")).expect("an archive");
    fs::create_dir_all(dir).expect("a directory");
    let image = File::create(dir.join("memory.img")).expect("an image");
    image.set_len(memory.len() as u64).expect("its length");
    let mut map = MapBuilder::new((memory.len() / PAGE_SIZE) as u64);
    for page in touched(memory) {
        let bytes = &memory[page.index() * PAGE_SIZE..][..PAGE_SIZE];
        if bytes.iter().any(|byte| *byte != 0) {
            map.set_content(Run::one(page), PageKind::Here, &[page_sum(page, bytes)]);
            image.write_all_at(bytes, page.offset()).expect("a page");
        }
    }
    let map = map.finish(&[]);
    let part = |file: &str, bytes: &[u8]| {
        fs::write(dir.join(file), bytes).expect("a file");
        Part { file: file.to_owned(), bytes: bytes.len() as u64, xxh3: Sum(xxh3_64(bytes)) }
    };
    let manifest = Manifest {
        id: CheckpointId::random().expect("an id"),
        made_at_ms: 1_796_000_000_000,
        made_by: "a test".to_owned(),
        vm: VmFacts {
            name: guest.name.to_owned(),
            memory_bytes: guest.memory_bytes,
            vcpus: 1,
            machine: Machine::Reference,
            offer: None,
            budget_bytes: guest.budget_bytes,
            paused: guest.paused,
            disks: Vec::new(),
            without_disks: Vec::new(),
        },
        base: None,
        pages: map.counts(),
        encryption: None,
        parts: Parts { map: part("memory.map", &map.encode()), state: part("state", state) },
        save: Save::default(),
    };
    fs::write(dir.join("manifest"), manifest.encode()).expect("a manifest");
    dir.to_owned()
}

/// The pages that have memory at all: most of a large guest has none, and reading it would take some.
fn touched(memory: &[u8]) -> Vec<PageNo> {
    const ENTRY: usize = 8;
    let file = File::open("/proc/self/pagemap").expect("proc is mounted");
    let mut entries = vec![0; memory.len() / PAGE_SIZE * ENTRY];
    let first = memory.as_ptr() as u64 / PAGE_SIZE as u64;
    file.read_exact_at(&mut entries, first * ENTRY as u64).expect("an entry a page");
    // The highest bits: in memory, or swapped.
    let is_there = |entry: &[u8]| entry[ENTRY - 1] & 0xc0 != 0;
    (0..)
        .map(PageNo)
        .zip(entries.chunks(ENTRY))
        .filter(|(_, entry)| is_there(entry))
        .map(|(page, _)| page)
        .collect()
}

/// Has a page that reads as zeros be one that was lost, in a checkpoint that is whole.
pub(crate) fn lose(dir: &Path, map: &MemoryMap, page: u64) {
    let mut lost = MapBuilder::new(map.pages());
    for piece in map.pieces() {
        match piece.kind.has_content() {
            true => lost.set_content(piece.run, piece.kind, piece.sums),
            false => lost.set(piece.run, piece.kind),
        }
    }
    lost.set(Run::one(PageNo(page)), PageKind::Lost);
    let map = lost.finish(&[]);
    let bytes = map.encode();
    fs::write(dir.join("memory.map"), &bytes).expect("a map");
    let path = dir.join("manifest");
    let mut manifest = Manifest::decode(&fs::read(&path).expect("a manifest")).expect("a manifest");
    manifest.pages = map.counts();
    (manifest.parts.map.bytes, manifest.parts.map.xxh3) = (bytes.len() as u64, Sum(xxh3_64(&bytes)));
    fs::write(path, manifest.encode()).expect("a manifest");
}

/// Makes a checkpoint whose base is another one: every third page is its own, and damaged in the base.
pub(crate) fn make_on(base: &Path, checkpoint: &str) -> PathBuf {
    let dir = base.parent().expect("an archive").join(checkpoint);
    fs::create_dir_all(&dir).expect("a directory");
    let mut manifest =
        Manifest::decode(&fs::read(base.join("manifest")).expect("a manifest")).expect("a manifest");
    let base_map = MemoryMap::decode(&fs::read(base.join("memory.map")).expect("a map")).expect("a map");
    let below = File::options().read(true).write(true).open(base.join("memory.img")).expect("an image");
    let image = File::create(dir.join("memory.img")).expect("an image");
    image.set_len(manifest.vm.memory_bytes).expect("its length");
    let mut map = MapBuilder::new(base_map.pages());
    for piece in base_map.pieces().filter(|piece| piece.kind.has_content()) {
        for (page, sum) in piece.run.pages().zip(piece.sums) {
            let own = page.0.is_multiple_of(3);
            map.set_content(Run::one(page), if own { PageKind::Here } else { PageKind::Base }, &[*sum]);
            if own {
                let mut bytes = [0; PAGE_SIZE];
                below.read_exact_at(&mut bytes, page.offset()).expect("a page");
                image.write_all_at(&bytes, page.offset()).expect("a page");
                below.write_all_at(&[0xa5; PAGE_SIZE], page.offset()).expect("a page");
            }
        }
    }
    let map = map.finish(&[]);
    let bytes = map.encode();
    fs::write(dir.join("memory.map"), &bytes).expect("a map");
    fs::copy(base.join("state"), dir.join("state")).expect("a state");
    let name = base.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    manifest.base = Some(BaseRef { name, id: manifest.id });
    manifest.id = CheckpointId::random().expect("an id");
    (manifest.pages, manifest.made_at_ms) = (map.counts(), manifest.made_at_ms + 1000);
    (manifest.parts.map.bytes, manifest.parts.map.xxh3) = (bytes.len() as u64, Sum(xxh3_64(&bytes)));
    fs::write(dir.join("manifest"), manifest.encode()).expect("a manifest");
    dir
}
