use proptest::prelude::*;

use super::*;

#[test]
fn a_checkpoints_snapshots_are_told_from_others() {
    assert!(DiskVersion::is_snapshot(&DiskVersion::snapshot_at(1_796_000_000_123)));
    for other in
        ["", "vmemd-", "vmemd-before-1796000000123", "vmemd-1x", "vmemd-+1", "vmemd-01", "mine", "xvmemd-1"]
    {
        assert!(!DiskVersion::is_snapshot(other), "{other}");
    }
}

pub(crate) fn manifest() -> Manifest {
    let part = |file: &str, bytes| Part { file: file.to_owned(), bytes, xxh3: Sum(bytes * 77) };
    Manifest {
        id: CheckpointId(0x0123_4567_89AB_CDEF_0011_2233_4455_6677),
        made_at_ms: 1_795_994_400_123,
        made_by: "vmemd 0.1.0".to_owned(),
        vm: VmFacts {
            name: "web".to_owned(),
            memory_bytes: 4 << 20,
            vcpus: 2,
            machine: Machine::Qemu,
            offer: Some("{\"args\": [\"-m\", \"4M\"]}".to_owned()),
            budget_bytes: 2 << 20,
            paused: false,
            disks: Vec::new(),
            without_disks: Vec::new(),
        },
        base: Some(BaseRef { name: "2026-11-29T22-20-00Z".to_owned(), id: CheckpointId(5) }),
        pages: PageCounts { zero: 1000, here: 20, base: 3, lost: 1 },
        encryption: None,
        parts: Parts { map: part("memory.map", 123), state: part("state", 4567) },
        save: Save { pause_us: 12_345, total_us: 6_789_012, rounds: 3, bytes_saved: 81_920 },
    }
}

#[test]
fn what_is_written_is_read_again_and_is_text() {
    let bytes = manifest().encode();
    assert_eq!(Manifest::decode(&bytes).unwrap(), manifest());
    let text = String::from_utf8(bytes).unwrap();
    assert!(text.starts_with("{\n  \"format\": \"vmemd checkpoint\",\n  \"version\": 1,\n"), "{text}");
    assert!(text.lines().last().unwrap().starts_with("xxh3 "), "{text}");
    let none = Manifest { base: None, pages: PageCounts { zero: 1024, ..Default::default() }, ..manifest() };
    assert_eq!(Manifest::decode(&none.encode()).unwrap(), none);
}

proptest! {
    #[test]
    fn any_facts_are_read_again(name in ".*", offer: Option<String>, by in ".*", here in 0_u64..1024, paused: bool, at: u64) {
        let vm = VmFacts { name, offer, paused, ..manifest().vm };
        let pages = PageCounts { zero: 1024 - here, here, base: 0, lost: 0 };
        let manifest = Manifest { vm, made_by: by, pages, made_at_ms: at, ..manifest() };
        prop_assert_eq!(Manifest::decode(&manifest.encode()).unwrap(), manifest);
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), text in ".*") {
        prop_assert!(Manifest::decode(&bytes).is_err());
        prop_assert!(Manifest::decode(text.as_bytes()).is_err());
        prop_assert!(Manifest::decode(&sealed(&text)).is_err());
    }
}

fn sealed(json: &str) -> Vec<u8> {
    let json = format!("{json}\n");
    format!("{json}xxh3 {}\n", Sum(xxh3_64(json.as_bytes()))).into_bytes()
}

#[test]
fn no_beginning_of_a_manifest_is_one_and_no_bit_may_be_another() {
    let bytes = manifest().encode();
    for len in 0..bytes.len() {
        assert!(Manifest::decode(&bytes[..len]).is_err(), "the first {len} bytes");
    }
    for bit in 0..bytes.len() * 8 {
        let mut other = bytes.clone();
        other[bit / 8] ^= 1 << (bit % 8);
        assert!(Manifest::decode(&other).is_err(), "bit {bit}");
    }
    let mut more = bytes.clone();
    more.push(b'\n');
    assert!(Manifest::decode(&more).is_err());
}

#[test]
fn what_contradicts_itself_is_refused_though_its_checksum_is_right() {
    let text = |change: &dyn Fn(&mut Manifest)| {
        let mut changed = manifest();
        change(&mut changed);
        Manifest::decode(&changed.encode()).unwrap_err().to_string()
    };
    assert!(text(&|it| it.vm.memory_bytes = 0).contains("so much memory"));
    assert!(text(&|it| it.vm.memory_bytes = u64::MAX).contains("so much memory"));
    assert!(text(&|it| it.vm.memory_bytes += 1).contains("so much memory"));
    assert!(text(&|it| it.pages.here += 1).contains("pages of all kinds"));
    assert!(text(&|it| it.pages.lost = u64::MAX).contains("pages of all kinds"));
    assert!(text(&|it| it.base = None).contains("no base"));
    for name in ["memory.img", "manifest", "first-faults"] {
        assert!(text(&|it| it.parts.map.file = name.to_owned()).contains("another file"), "{name}");
        assert!(text(&|it| it.parts.state.file = name.to_owned()).contains("another file"), "{name}");
    }
    for name in ["", "..", ".new-1", "a/b", "/etc/passwd", &"x".repeat(65)] {
        assert!(text(&|it| it.parts.state.file = name.to_owned()).contains("name"), "{name}");
        assert!(text(&|it| it.base.as_mut().unwrap().name = name.to_owned()).contains("name"), "{name}");
    }
}

#[test]
fn a_newer_version_and_another_format_are_told() {
    let newer = sealed("{\"format\": \"vmemd checkpoint\", \"version\": 3, \"all\": \"else\"}");
    let error = Manifest::decode(&newer).unwrap_err();
    assert!(matches!(error, FormatError::Newer { found: 3, known: 2 }), "{error}");
    let other = sealed("{\"format\": \"something\", \"version\": 1}");
    assert!(matches!(Manifest::decode(&other), Err(FormatError::Magic(_))));
    assert!(Manifest::decode(&sealed("{\"format\": \"vmemd checkpoint\", \"version\": 0}")).is_err());
}

/// A field that a later vmemd adds, and that may be overlooked, is.
#[test]
fn a_field_that_is_not_known_is_overlooked() {
    let text = String::from_utf8(manifest().encode()).unwrap();
    let json = text.rsplit_once("\nxxh3").unwrap().0.replacen('{', "{ \"later\": [1, 2],", 1);
    assert_eq!(Manifest::decode(&sealed(&json)).unwrap(), manifest());
}

#[test]
fn names_stay_in_their_directory() {
    for name in ["memory.map", "2026-11-29T23-20-00Z-2", "a"] {
        assert!(is_name(name), "{name}");
    }
    for name in ["", ".", "..", ".hidden", "a/b", "a b", "ä", "a\0", &"x".repeat(65)] {
        assert!(!is_name(name), "{name}");
    }
}

#[test]
fn an_encrypted_one_is_of_a_version_that_an_older_vmemd_refuses() {
    let encryption = Encryption {
        cipher: PageCipher::Aes256Xts,
        salt: Hex([0x1f; SALT_BYTES]),
        check: Hex([7; CHECK_BYTES]),
    };
    let encrypted = Manifest { encryption: Some(encryption), ..manifest() };
    let text = String::from_utf8(encrypted.encode()).unwrap();
    assert!(text.contains("\"version\": 2,") && text.contains(&"1f".repeat(SALT_BYTES)), "{text}");
    assert_eq!(Manifest::decode(text.as_bytes()).unwrap(), encrypted);
    let json = text.rsplit_once("\nxxh3").unwrap().0;
    for (from, to) in [
        ("\"version\": 2,", "\"version\": 1,"),
        ("\"encryption\"", "\"forgotten\""),
        ("aes-256-xts", "rot13"),
        ("1f1f", "1F1f"),
        ("1f1f", "1f"),
    ] {
        let changed = sealed(&json.replacen(from, to, 1));
        assert!(Manifest::decode(&changed).is_err(), "{to} in the place of {from}");
    }
}
