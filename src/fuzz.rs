//! Every decoder of bytes that somebody else chose, one function each: what the fuzzer calls, and what the tests call
//! with the corpus. Those of benchmarks are in theirs.
//!
//! A function here fails (panics) if the decoder does, or if a value that it let through does not come back the same
//! when it is written and read again. Checksums are made right first, where there are any: they keep accidents out, not
//! a peer.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use checkpoint::format::sealed::{SealedAs, SealedReader, SealedWriter, sealed_bytes};
use checkpoint::format::{FirstFaults, Manifest, MapBuilder, MemoryMap, PageKind};
use checkpoint::key::{ChainKey, KEY_BYTES, SALT_BYTES};
use checkpoint::stream::{self, Record, StreamWriter, inspect};
use migrate::versions::Versions;
use migrate::wire::VERSIONS;
use migrate::wire::control::{Control, sealed as sealed_record};
use migrate::wire::extents::{self, Bounds};
use migrate::wire::heat::Assembly;
use migrate::wire::opening::{Answer, PREAMBLE_BYTES, Preamble, sealed_as};
use migrate::wire::record::{HEADER_BYTES, Header, Lane, RecordKind, Sequence};
use migrate::{Hello, SessionId};
use swapd::{BLOCK_PAGES, PageNo, Run};
use vmprocess::control::protocol::{Reply, Request};
use vmprocess::control::versions::{Asked, VERSIONS as CONTROL_VERSIONS};
use xxhash_rust::xxh3::xxh3_64;

use crate::qemu::offer::Offer;
use crate::qemu::options::CommandLine;
use crate::qemu::refuse::{refuse, unmovable};
use crate::qemu::resources;
use crate::qemu::rewrite::{LinePlan, Monitor, Role, Settings};
use crate::qemu::rules::Rules;
use crate::vmm::{saved_config, state};

/// Of the VM whose memory records are about.
const MEMORY_PAGES: u64 = 64 * BLOCK_PAGES as u64;
const STREAMS: u32 = 2;
const SESSION: SessionId = SessionId([7; 16]);

/// A decoder under test, by its name: that of its corpus and of its file in `fuzz/fuzz_targets`.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 11] = [
    ("wire_opening", wire_opening),
    ("wire_record", wire_record),
    ("machine_state", machine_state),
    ("control_line", control_line),
    ("qemu_line", qemu_line),
    ("qemu_offer", qemu_offer),
    ("qemu_rules", qemu_rules),
    ("checkpoint_map", checkpoint_map),
    ("checkpoint_manifest", checkpoint_manifest),
    ("checkpoint_sealed", checkpoint_sealed),
    ("checkpoint_stream", checkpoint_stream),
];

/// The first bytes of a connection: a kind, then the body.
pub fn wire_opening(data: &[u8]) {
    if let Some(preamble) = data.first_chunk() {
        let _ = Preamble::open(preamble);
    }
    let Some((kind, body)) = data.split_first() else { return };
    // Of one that knows what we know, of one that knows more on both ends, and of one that knows later versions only.
    let (lowest, highest) = (*VERSIONS.start(), *VERSIONS.end());
    for versions in [VERSIONS, lowest - 1..=highest + 1, highest + 1..=highest + 9] {
        opening_of(&versions, *kind, body);
    }
}

fn opening_of(versions: &Versions, kind: u8, body: &[u8]) {
    let bytes = sealed_as(versions, kind, body);
    let (preamble, rest) = bytes.split_first_chunk::<PREAMBLE_BYTES>().expect("made whole");
    if Preamble::open(preamble).is_err() {
        return;
    }
    if let Ok(hello) = Hello::decode(preamble, rest) {
        let again = hello.encode();
        let (preamble, rest) = again.split_first_chunk().expect("made whole");
        assert_eq!(Hello::decode(preamble, rest).as_ref(), Ok(&hello));
    }
    if let Ok(answer) = Answer::decode(preamble, rest) {
        let again = answer.encode();
        let (preamble, rest) = again.split_first_chunk().expect("made whole");
        assert_eq!(Answer::decode(preamble, rest).as_ref(), Ok(&answer));
    }
}

/// Records, one behind the other: a header's fields (kind, flags, pages, number, metadata's length), then the metadata.
pub fn wire_record(mut data: &[u8]) {
    if let Some(head) = data.first_chunk() {
        let _ = Header::open(head);
    }
    let bounds = Bounds { memory_pages: MEMORY_PAGES, stream: 0, streams: STREAMS };
    let (mut runs, mut heat) = (Vec::new(), Assembly::new(MEMORY_PAGES));
    while let Some((fields, rest)) = data.split_first_chunk::<8>() {
        let [kind, flags, pages, pages_high, number, number_high, len, len_high] = *fields;
        let wanted = usize::from(u16::from_le_bytes([len, len_high]));
        let (meta, rest) = rest.split_at(wanted.min(rest.len()));
        data = rest;
        let kind = RecordKind::ALL[usize::from(kind) % RecordKind::ALL.len()];
        let pages = u32::from(u16::from_le_bytes([pages, pages_high]));
        let number = u64::from(u16::from_le_bytes([number, number_high]));
        let payload_bytes = if kind == RecordKind::Pages { pages << 12 } else { 0 };
        let header = Header { kind, flags, pages, number, meta_bytes: meta.len() as u32, payload_bytes };
        let lane = || Sequence::new(SESSION, Lane::ToTarget);
        let bytes = sealed_record(&header, meta, &mut lane());
        let (head, meta) = bytes.split_first_chunk::<HEADER_BYTES>().expect("made whole");
        let Ok(header) = Header::open(head) else { continue };
        assert_eq!(Header::verify(head, meta, &mut lane()), Ok(()));
        if kind.is_data() {
            let count = if kind == RecordKind::RoundEnd { 0 } else { 8 * header.number as usize };
            if bounds.decode(&meta[..count.min(meta.len())], header.pages, &mut runs).is_ok() {
                let encoded: Vec<u8> = runs.iter().flat_map(|run| extents::encode(*run)).collect();
                assert_eq!(encoded, meta[..encoded.len()]);
            }
            let _ = migrate::wire::control::read_totals(meta);
        } else if let Ok(message) = Control::decode(&header, meta) {
            let bytes = message.encode(&mut lane());
            let (head, meta) = bytes.split_first_chunk::<HEADER_BYTES>().expect("made whole");
            assert_eq!(
                Header::open(head).and_then(|header| Control::decode(&header, meta)),
                Ok(message.clone())
            );
            if let Control::Heat(part) = message {
                let _ = heat.add(part);
            }
        }
    }
}

/// What a peer says the reference guest's processors were at.
pub fn machine_state(data: &[u8]) {
    let _ = saved_config(&state::sealed(data));
}

/// A line of the control socket, either way.
pub fn control_line(data: &[u8]) {
    if let Ok(line) = serde_json::from_slice(data)
        && let Ok(Asked { version: Some(version), .. }) = Asked::new(line, &CONTROL_VERSIONS)
    {
        assert!(CONTROL_VERSIONS.contains(&version));
    }
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let again = serde_json::to_vec(&request).expect("requests can be written");
        assert_eq!(serde_json::from_slice::<Request>(&again).ok(), Some(request));
    }
    if let Ok(reply) = serde_json::from_slice::<Reply>(data) {
        let _ = serde_json::to_vec(&reply).expect("replies can be written");
    }
}

/// QEMU's arguments, one a line.
pub fn qemu_line(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let args: Vec<&str> = text.split('\n').collect();
    let Ok(mut line) = CommandLine::parse(&args) else { return };
    assert_eq!(CommandLine::parse(&line.print()).map(|again| again.print()).ok(), Some(line.print()));
    let _ = (refuse(&line), unmovable(&line));
    if let Ok(plan) = LinePlan::of(&line) {
        rewrite(plan);
    }
    let _ = (resources::list(&line), resources::absolute(&mut line, Path::new("/home")));
}

fn rewrite(plan: LinePlan) {
    let files = vec![PathBuf::from("/backend"); plan.backends.len()];
    for role in [Role::Start, Role::Arrive] {
        let settings = Settings { files: &files, monitor: Monitor::Socket(Path::new("/monitor")), role };
        if let Ok(made) = plan.clone().rewrite(&settings) {
            let again = CommandLine::parse(&made.args).and_then(|line| LinePlan::of(&line));
            assert!(again.is_err(), "it does not know its own work: {:?}", made.args);
        }
    }
}

/// A QEMU VM as another host describes it.
pub fn qemu_offer(data: &[u8]) {
    let Ok(offer) = serde_json::from_slice::<Offer>(data) else { return };
    let rules = "[[map]]\nfrom = \"/home\"\nto = \"/mnt\"\n";
    let rules = Rules::parse(rules, "rules").expect("these are rules");
    let Ok(mut line) = CommandLine::parse(&offer.args) else { return };
    if resources::map(&mut line, &rules).is_ok()
        && unmovable(&line).is_ok()
        && let Ok(plan) = LinePlan::of(&line)
    {
        rewrite(plan);
    }
}

/// The daemon's rules for names of other hosts; a path to map behind the last line.
pub fn qemu_rules(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (text, name) = text.rsplit_once('\n').unwrap_or((text, "/home/a"));
    if let Ok(rules) = Rules::parse(text, "rules") {
        let _ = rules.path(name);
    }
}

/// The binary files of a checkpoint, without their checksums.
pub fn checkpoint_map(data: &[u8]) {
    let mut bytes = data.to_vec();
    bytes.extend(xxh3_64(data).to_le_bytes());
    if let Ok(map) = MemoryMap::decode(&bytes) {
        assert_eq!(map.encode(), bytes, "a memory has one map");
        let pages: u64 = map.pieces().map(|piece| u64::from(piece.run.len)).sum();
        assert_eq!(pages, map.pages());
        let middle = Run::new(PageNo(map.pages() / 3), (map.pages() / 3) as u32);
        let pages: u32 = map.pieces_in(middle).map(|piece| piece.run.len).sum();
        assert_eq!(pages, middle.len);
        let alone = map.standing_alone();
        assert_eq!(MemoryMap::decode(&alone.encode()).expect("it is whole"), alone);
    }
    if let Ok(order) = FirstFaults::decode(&bytes) {
        assert_eq!(order.encode(), bytes);
    }
    let _ = (MemoryMap::decode(data), FirstFaults::decode(data));
}

/// A checkpoint's manifest, without its last line.
pub fn checkpoint_manifest(data: &[u8]) {
    let mut bytes = data.to_vec();
    bytes.push(b'\n');
    let sum = xxh3_64(&bytes);
    bytes.extend(format!("xxh3 {sum:016x}\n").into_bytes());
    if let Ok(manifest) = Manifest::decode(&bytes) {
        let again = Manifest::decode(&manifest.encode());
        assert_eq!(again.expect("it is whole"), manifest);
    }
    let _ = Manifest::decode(data);
}

/// A sealed file of a checkpoint: any bytes; and one of so many plain bytes that is then cut, or in which bits are others,
/// as the rest says: a place in a hundredth of the file, a distance from it, and what is changed there.
pub fn checkpoint_sealed(data: &[u8]) {
    let key = ChainKey::from_pipe(&[7; KEY_BYTES][..]).expect("as many bytes as a key has");
    assert!(unsealed(data, &key).is_err(), "nobody has sealed this");
    let Some(([low, high], changes)) = data.split_first_chunk::<2>() else { return };
    let plain: Vec<u8> =
        (0..3 * u32::from(u16::from_le_bytes([*low, *high]))).map(|at| (at / 3) as u8).collect();
    let mut writer =
        SealedWriter::new(Vec::new(), &key, SealedAs::Map, [9; SALT_BYTES]).expect("memory takes it");
    writer.write_all(&plain).expect("memory takes it");
    let whole = writer.finish().expect("memory takes it");
    assert_eq!(whole.len() as u64, sealed_bytes(plain.len() as u64));
    let mut changed = whole.clone();
    for [part, distance, bits] in changes.as_chunks::<3>().0 {
        let at = changed.len() * usize::from(*part) / 100 + usize::from(*distance);
        match changed.get_mut(at) {
            Some(_) if *bits == 0 => changed.truncate(at),
            Some(byte) => *byte ^= bits,
            None => changed.push(*bits),
        }
    }
    match unsealed(&changed, &key) {
        Ok(read) => assert!(changed == whole && read == plain, "a changed file counts as whole"),
        Err(read) => assert!(changed != whole && plain.starts_with(&read), "bytes that were never written"),
    }
}

/// What was sealed; or what of it came before an error.
fn unsealed(bytes: &[u8], key: &ChainKey) -> Result<Vec<u8>, Vec<u8>> {
    let mut read = Vec::new();
    let reader = SealedReader::new(bytes, bytes.len() as u64, key, SealedAs::Map);
    match reader.map(|mut reader| reader.read_to_end(&mut read)) {
        Ok(Ok(_)) => Ok(read),
        _ => Err(read),
    }
}

/// A stream of a checkpoint: records of a kind, a number of pages, of runs, and of bytes; then the body. All sums are made
/// right. A body of a map may be runs instead (a number of pages and a kind each), and an empty body of a manifest is
/// one of that map.
pub fn checkpoint_stream(data: &[u8]) {
    let _ = inspect(data, &mut |_, _| {});
    let (mut records, mut rest) = (Vec::new(), data);
    let mut map: Option<MemoryMap> = None;
    while let Some(([kind, pages, runs, len], behind)) = rest.split_first_chunk::<4>() {
        let (body, behind) = behind.split_at(usize::from(*len).min(behind.len()));
        rest = behind;
        let kind = stream::RecordKind::ALL[usize::from(*kind) % stream::RecordKind::ALL.len()];
        let mut record = Record { kind, pages: 0, count: 0, bytes: 0 };
        let mut body = body.to_vec();
        match kind {
            stream::RecordKind::Map if map.is_none() => {
                let made = map_of(&body);
                body = made.encode();
                map = Some(made);
            }
            stream::RecordKind::Pages => {
                (record.pages, record.count) = (u32::from(*pages), u64::from(*runs));
                body = pages_of(&body, record);
            }
            stream::RecordKind::End => record.count = u64::from(*pages) | u64::from(*runs) << 8,
            _ => {}
        }
        record.bytes = body.len() as u64;
        records.push((record, body));
    }
    let Some(map) = map else { return };
    for (record, body) in records
        .iter_mut()
        .filter(|(record, body)| record.kind == stream::RecordKind::Manifest && body.is_empty())
    {
        *body = manifest_of(&map);
        record.bytes = body.len() as u64;
    }
    let total = 32 + records.iter().map(|(record, _)| stream::record_bytes(record.bytes)).sum::<u64>();
    let mut writer = StreamWriter::new(Vec::new(), total).expect("memory can be written");
    for (record, body) in &records {
        writer.record(*record, body.as_slice()).expect("memory can be written");
    }
    let bytes = writer.into_inner();
    let mut here = 0;
    if let Ok(manifest) = inspect(bytes.as_slice(), &mut |pages, _| here += pages.sums.len() as u64) {
        assert_eq!(here, manifest.pages.here);
        assert!(
            inspect(&bytes[..bytes.len() - 1], &mut |_, _| {}).is_err(),
            "a stream that is cut is not whole"
        );
    }
}

/// What each page of a stream has, so that its sum is known.
fn page_of(page: u64) -> [u8; swapd::PAGE_SIZE] {
    [page as u8; swapd::PAGE_SIZE]
}

fn sum_of(page: u64) -> u64 {
    swapd::digest::page_sum(PageNo(page), &page_of(page))
}

fn map_of(runs: &[u8]) -> MemoryMap {
    let pages: u64 = runs.chunks_exact(2).map(|run| u64::from(run[0])).sum();
    let mut map = MapBuilder::new(pages.max(1));
    let mut at = 0;
    for run in runs.chunks_exact(2).filter(|run| run[0] > 0) {
        let (run, kind) = (Run::new(PageNo(at), run[0].into()), run[1] % 4);
        at = run.end().0;
        let sums: Vec<u64> = run.pages().map(|page| sum_of(page.0)).collect();
        match kind {
            0 => map.set(run, PageKind::Zero),
            1 => map.set_content(run, PageKind::Here, &sums),
            2 => map.set_content(run, PageKind::Base, &sums),
            _ => map.set(run, PageKind::Lost),
        }
    }
    map.finish(&[])
}

/// The body of a record of pages: runs of a first page and a length each.
fn pages_of(runs: &[u8], record: Record) -> Vec<u8> {
    let words = runs.chunks_exact(2).map(|run| u64::from(run[0]) << 32 | u64::from(run[1]));
    let mut words: Vec<u64> = words.take(record.count as usize).collect();
    let pages = words.clone().into_iter().flat_map(|run| (run >> 32)..(run >> 32) + (run & 0xff));
    let pages: Vec<u64> = pages.take(record.pages as usize).collect();
    words.extend(pages.iter().map(|page| sum_of(*page)));
    let list = words.into_iter().flat_map(u64::to_le_bytes);
    list.chain(pages.iter().flat_map(|page| page_of(*page))).collect()
}

fn manifest_of(map: &MemoryMap) -> Vec<u8> {
    let counts = map.counts();
    let bytes = map.encode();
    let json = serde_json::json!({
        "format": "vmemd checkpoint", "version": 1, "id": "0123456789abcdef0011223344556677", "made_at_ms": 1,
        "made_by": "a fuzzer", "base": null, "pages": counts,
        "vm": { "name": "web", "memory_bytes": swapd::units::bytes_of(map.pages()), "vcpus": 1, "machine": "reference",
            "offer": null, "budget_bytes": 4096, "paused": false },
        "parts": { "map": { "file": "memory.map", "bytes": bytes.len(), "xxh3": format!("{:016x}", xxh3_64(&bytes)) },
            "state": { "file": "state", "bytes": 2, "xxh3": "0000000000000011" } },
        "save": { "pause_us": 1, "total_us": 1, "rounds": 1, "bytes_saved": 1 },
    });
    let mut text = format!("{json}\n").into_bytes();
    let sum = xxh3_64(&text);
    text.extend(format!("xxh3 {sum:016x}\n").into_bytes());
    text
}

#[cfg(test)]
#[path = "../fuzz/survive.rs"]
mod survive;

#[cfg(test)]
mod tests {
    use super::*;

    const FUZZ: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz");

    #[test]
    fn the_corpus_is_survived() {
        survive::corpora(Path::new(FUZZ), &TARGETS);
    }

    #[test]
    fn what_becomes_of_the_corpus_by_chance_is_survived() {
        survive::chance(Path::new(FUZZ), &TARGETS);
    }
}
