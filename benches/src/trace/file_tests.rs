use super::*;
use proptest::prelude::*;

/// Where a trace may be written; the directory goes with the test.
fn place() -> (PathBuf, testkit::TempDir) {
    let directory = testkit::directory("trace");
    (directory.path().join("trace"), directory)
}

fn header(kind: TraceKind) -> Header {
    Header { kind, pages: 1 << 20, ram_pages: 1 << 19, entries: 0, uncounted: 0, dropped: 7 }
}

fn bytes_of(kind: TraceKind, entries: &[Entry]) -> Vec<u8> {
    let (file, _directory) = place();
    let mut writer = TraceWriter::create(&file, kind).unwrap();
    entries.iter().for_each(|entry| writer.push(*entry).unwrap());
    let bytes = writer.finish(header(kind)).unwrap();
    let written = std::fs::read(&file).unwrap();
    assert_eq!(written.len() as u64, bytes);
    written
}

fn decoded(bytes: &[u8]) -> Result<(Header, Vec<Entry>), TraceError> {
    let mut entries = vec![];
    decode(bytes, bytes.len() as u64, |entry| entries.push(entry)).map(|header| (header, entries))
}

/// A trace whose checksum is right, with these eight bytes at `at` of the header.
fn with_field(at: usize, value: u64) -> Vec<u8> {
    let mut bytes = bytes_of(TraceKind::Touches, &[touch(1), touch(2)]);
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    seal(&mut bytes);
    bytes
}

fn seal(bytes: &mut [u8]) {
    let mut sum = Xxh3Default::new();
    sum.update(&bytes[HEADER_BYTES..]);
    sum.update(&bytes[..SUMMED_BYTES]);
    bytes[SUMMED_BYTES..HEADER_BYTES].copy_from_slice(&sum.digest().to_le_bytes());
}

fn touch(page: u32) -> Entry {
    Entry { page, what: What::Write, at_us: 0 }
}

fn entries(kind: TraceKind) -> impl Strategy<Value = Vec<Entry>> {
    let entry = (0u32..1 << 20, 0u64..3, 0u64..1 << 40).prop_map(move |(page, tag, at_us)| match kind {
        TraceKind::Touches => Entry { page, what: What::of(tag % 2).unwrap(), at_us: 0 },
        TraceKind::Faults => Entry { page, what: What::of(2 + tag).unwrap(), at_us },
    });
    prop::collection::vec(entry, 0..300).prop_map(|mut entries| {
        entries.sort_by_key(|entry| entry.at_us);
        entries
    })
}

proptest! {
    #[test]
    fn what_is_written_reads_back(
        touches in entries(TraceKind::Touches), faults in entries(TraceKind::Faults)
    ) {
        for (kind, entries) in [(TraceKind::Touches, touches), (TraceKind::Faults, faults)] {
            let (read, back) = decoded(&bytes_of(kind, &entries)).unwrap();
            prop_assert_eq!(read, Header { entries: entries.len() as u64, ..header(kind) });
            prop_assert_eq!(back, entries);
        }
    }

    /// One damaged byte anywhere is noticed.
    #[test]
    fn damage_is_an_error(entries in entries(TraceKind::Faults), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = bytes_of(TraceKind::Faults, &entries);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(decoded(&bytes).is_err());
    }

    /// Rubbish behind a good header, with a good checksum: an error or entries within the memory, never a panic.
    #[test]
    fn rubbish_is_survived(
        body in prop::collection::vec(any::<u8>(), 0..200), count in 0u64..200, faults in any::<bool>(),
    ) {
        let kind = if faults { TraceKind::Faults } else { TraceKind::Touches };
        let claims = Header { entries: count, ..header(kind) };
        let mut bytes = claims.to_bytes(body.len() as u64).to_vec();
        bytes.extend([0; 8]);
        bytes.extend(&body);
        seal(&mut bytes);
        if let Ok((header, entries)) = decoded(&bytes) {
            prop_assert_eq!(entries.len() as u64, count);
            prop_assert!(entries.iter().all(|entry| u64::from(entry.page) < header.pages));
        }
    }

    #[test]
    fn any_cut_is_an_error(entries in entries(TraceKind::Touches), at in any::<prop::sample::Index>()) {
        let bytes = bytes_of(TraceKind::Touches, &entries);
        let cut = at.index(bytes.len());
        let error = decoded(&bytes[..cut]).unwrap_err();
        prop_assert!(matches!(error, TraceError::CutOff { .. } | TraceError::Magic), "{error}");
    }
}

#[test]
fn the_bytes_are_as_documented() {
    let bytes = bytes_of(
        TraceKind::Faults,
        &[
            Entry { page: 5, what: What::StoreFault, at_us: 300 },
            Entry { page: 3, what: What::RescueFault, at_us: 301 },
        ],
    );
    assert_eq!(&bytes[..16], b"VMEMDTRC\x01\0\0\0\x01\0\0\0");
    let fields: Vec<u64> =
        bytes[16..64].chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect();
    assert_eq!(fields, [1 << 20, 1 << 19, 2, 0, 5, 7]);
    // +5 is 10 in zigzag, x 8 + 4; 300 in groups of seven; -2 is 3, x 8 + 3; 1.
    assert_eq!(&bytes[72..], [84, 0xAC, 0x02, 27, 1]);
}

#[test]
fn absurd_headers_are_one_clear_error_each() {
    let text = |bytes: &[u8]| decoded(bytes).unwrap_err().to_string();
    let good = with_field(40, 0);
    assert!(decoded(&good).is_ok());
    assert!(text(b"").contains("no trace"));
    assert!(text(b"[global]\nram=2g\n").contains("no trace"));
    assert!(text(&[b"x".as_slice(), &good].concat()).contains("no trace"));
    assert!(text(&good[..20]).contains("cut off: 20 of 72"));
    assert!(text(&[&good, b"x".as_slice()].concat()).contains("goes on"));
    let version = with_field(8, 2);
    assert!(text(&version).contains("version 2"));
    assert!(text(&with_field(8, 1 | 9 << 32)).contains("unknown kind"));
    for pages in [0, PAGES_MAX + 1, u64::MAX] {
        assert!(text(&with_field(16, pages)).contains("so much memory"), "{pages}");
    }
    assert!(text(&with_field(24, u64::MAX)).contains("more RAM"));
    for count in [TOUCHES_MAX + 1, u64::MAX] {
        assert!(text(&with_field(32, count)).contains("too many entries"), "{count}");
    }
    assert!(text(&with_field(32, TOUCHES_MAX)).contains("so many bytes"));
    assert!(text(&with_field(32, 1)).contains("behind the last entry"));
    assert!(text(&with_field(40, 3)).contains("do not count"));
    assert!(text(&with_field(48, u64::MAX)).contains("so many bytes"));
    assert!(text(&with_field(48, 20)).contains("cut off"));
    // A memory of two pages has no page 2.
    assert!(text(&with_field(16, 2).to_vec()).contains("more RAM"));
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 0x10;
    assert!(text(&damaged).contains("checksum"));
}

#[test]
fn a_page_beyond_the_memory_is_an_error() {
    let mut bytes = bytes_of(TraceKind::Touches, &[touch(1), touch(9)]);
    bytes[16..24].copy_from_slice(&9u64.to_le_bytes());
    bytes[24..32].copy_from_slice(&0u64.to_le_bytes());
    seal(&mut bytes);
    assert_eq!(decoded(&bytes).unwrap_err().to_string(), "entry 1 cannot be right");
}

#[test]
fn a_trace_that_is_not_finished_leaves_nothing() {
    let (file, _directory) = place();
    let mut writer = TraceWriter::create(&file, TraceKind::Touches).unwrap();
    writer.push(touch(1)).unwrap();
    let partial = writer.partial.clone();
    assert!(partial.exists());
    drop(writer);
    assert!(!partial.exists() && !file.exists());
}

#[test]
fn what_is_no_file_is_said_to_be_none() {
    let text = |path: &str| read(Path::new(path), |_| {}).unwrap_err().text;
    assert!(text("/dev/zero").contains("no regular file"));
    assert!(text("/").contains("no regular file"));
    assert!(text("/nonexistent/trace").contains("cannot read the trace /nonexistent/trace: No such file"));
}
