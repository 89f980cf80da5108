use std::os::unix::fs::PermissionsExt;

use super::*;

const DIGITS: &str = "00112233445566778899aabbccddeeff00112233445566778899AABBCCDDEEFF";

fn write(directory: &testkit::TempDir, bytes: &[u8], mode: u32) -> PathBuf {
    let path = directory.path().join("key");
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, bytes).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    path
}

fn refusal(path: &Path) -> String {
    ArchiveKey::read(path).expect_err("it is no key file").to_string()
}

#[test]
fn a_key_is_32_bytes_or_as_many_in_digits() {
    let directory = testkit::directory("key");
    let raw: Vec<u8> = (0..4).flat_map(|_| [0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77]).collect();
    assert_eq!(raw.len(), KEY_BYTES);
    let bytes = [&raw[..8], &[0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]].concat().repeat(2);
    let (encryption, _) = ArchiveKey::read(&write(&directory, &bytes, 0o600)).unwrap().new_chain().unwrap();
    for text in [DIGITS.to_owned(), format!("{DIGITS}\n"), format!("{DIGITS}\r\n"), DIGITS.to_lowercase()] {
        let key = ArchiveKey::read(&write(&directory, text.as_bytes(), 0o400)).unwrap();
        assert!(key.chain(&encryption).is_some(), "{text:?}");
    }
    for other in [&b""[..], &bytes[1..], &[&bytes[..], b"\n"].concat(), &DIGITS.as_bytes()[1..], &[b'g'; 64]]
    {
        assert!(refusal(&write(&directory, other, 0o600)).contains("32 bytes are wanted"), "{other:?}");
    }
    let endless = [DIGITS.as_bytes(), &[b'\n'; 5000]].concat();
    assert!(refusal(&write(&directory, &endless, 0o600)).contains("32 bytes are wanted"));
}

#[test]
fn what_others_may_read_is_no_key() {
    let directory = testkit::directory("key");
    for mode in [0o640, 0o604, 0o620, 0o601] {
        assert!(refusal(&write(&directory, &[7; 32], mode)).contains("others than its user"), "{mode:o}");
    }
    assert!(refusal(directory.path()).contains("no regular file"));
    let missing = ArchiveKey::read(&directory.path().join("missing")).unwrap_err();
    assert!(matches!(missing, KeyFileError::Io { what: "open", .. }), "{missing}");
}

#[test]
fn a_chain_is_known_by_its_key_and_no_two_are_alike() {
    let directory = testkit::directory("key");
    let key = ArchiveKey::read(&write(&directory, &[7; 32], 0o600)).unwrap();
    let other = ArchiveKey::read(&write(&directory, &[8; 32], 0o600)).unwrap();
    let (one, chain) = key.new_chain().unwrap();
    let (two, _) = key.new_chain().unwrap();
    assert_ne!((one.salt, one.check), (two.salt, two.check));
    assert!(key.chain(&one).is_some() && key.chain(&two).is_some() && other.chain(&one).is_none());
    // Through a pipe, for a process that is to have no other.
    let passed = ArchiveKey::of_chain(ChainKey::from_pipe(chain.to_pipe().unwrap()).unwrap());
    assert!(passed.chain(&one).is_some() && passed.chain(&two).is_none());
    // Only where it is from, whose name may have any digit.
    let told = format!("{key:?}{chain:?}").replace(&directory.path().display().to_string(), "");
    assert!(!told.contains('7'), "a key is never printed: {told}");
}
