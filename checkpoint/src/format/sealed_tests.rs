use proptest::prelude::*;

use super::*;

fn key(byte: u8) -> ChainKey {
    ChainKey::from_pipe(&[byte; 32][..]).unwrap()
}

fn sealed(plain: &[u8], salt: u8) -> Vec<u8> {
    let mut writer = SealedWriter::new(Vec::new(), &key(1), SealedAs::Map, [salt; SALT_BYTES]).unwrap();
    writer.write_all(plain).unwrap();
    writer.finish().unwrap()
}

/// What can be read, or why not. Whatever comes out before that is the beginning of what was written.
fn opened(bytes: &[u8], key: &ChainKey, purpose: SealedAs, plain: &[u8]) -> Result<(), String> {
    let mut reader =
        SealedReader::new(bytes, bytes.len() as u64, key, purpose).map_err(|error| error.to_string())?;
    let mut read = Vec::new();
    let result = reader.read_to_end(&mut read);
    assert!(plain.starts_with(&read), "bytes that were never written");
    result.map(|_| assert_eq!(read, plain)).map_err(|error| error.to_string())
}

fn is_refused(bytes: &[u8], plain: &[u8]) {
    assert!(opened(bytes, &key(1), SealedAs::Map, plain).is_err(), "{} bytes of a damaged file", bytes.len());
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[test]
fn what_is_sealed_is_read_again_and_nothing_of_it_shows() {
    for len in
        [0, 1, 4095, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 77]
    {
        let plain = bytes(len);
        let file = sealed(&plain, 9);
        assert_eq!(file.len() as u64, sealed_bytes(len as u64));
        assert_eq!(plain_bytes(file.len() as u64).unwrap(), len as u64);
        opened(&file, &key(1), SealedAs::Map, &plain).unwrap();
        let shows = |part: &[u8]| file.windows(part.len()).any(|window| window == part);
        assert!(len > 5000 || !plain.chunks_exact(16).any(shows));
        // The same once more is another file.
        assert_ne!(file, sealed(&plain, 8));
        // With another key, or as something else.
        assert!(opened(&file, &key(2), SealedAs::Map, &plain).is_err());
        assert!(opened(&file, &key(1), SealedAs::State, &plain).is_err());
    }
}

#[test]
fn every_bit_counts() {
    let plain = bytes(300);
    let file = sealed(&plain, 9);
    for at in 0..8 * file.len() {
        let mut damaged = file.clone();
        damaged[at / 8] ^= 1 << (at % 8);
        is_refused(&damaged, &plain);
    }
}

#[test]
fn a_file_that_is_cut_or_put_together_otherwise_is_refused() {
    let plain = bytes(3 * CHUNK_BYTES + 100);
    let file = sealed(&plain, 9);
    let chunk = |nth: usize| {
        let from = HEADER_BYTES + nth * SEALED_CHUNK;
        &file[from..file.len().min(from + SEALED_CHUNK)]
    };
    // At each border of a chunk, and beside it.
    for chunks in 0..=3 {
        let border = HEADER_BYTES + chunks * SEALED_CHUNK;
        for at in [border - 1, border, border + 1, border + TAG_BYTES, border + TAG_BYTES + 1] {
            is_refused(&file[..at.min(file.len() - 1)], &plain);
        }
    }
    let head = &file[..HEADER_BYTES];
    let other = sealed(&plain, 8);
    for order in [[1, 0, 2, 3], [0, 0, 2, 3], [0, 2, 1, 3], [0, 1, 2, 2], [3, 1, 2, 0]] {
        let parts: Vec<u8> = order.iter().flat_map(|nth| chunk(*nth)).copied().collect();
        is_refused(&[head, &parts].concat(), &plain);
    }
    is_refused(&[head, chunk(0), chunk(3)].concat(), &plain);
    is_refused(&[&file[..], chunk(3)].concat(), &plain);
    is_refused(&[&file[..], &[0]].concat(), &plain);
    is_refused(&[&other[..HEADER_BYTES], &file[HEADER_BYTES..]].concat(), &plain);
    is_refused(
        &[&file[..HEADER_BYTES + SEALED_CHUNK], &other[HEADER_BYTES + SEALED_CHUNK..]].concat(),
        &plain,
    );
}

#[test]
fn a_newer_file_is_told_as_such() {
    let mut file = sealed(&[], 9);
    file[8] = 2;
    let error = SealedReader::new(&file[..], file.len() as u64, &key(1), SealedAs::Map).unwrap_err();
    assert!(matches!(error, FormatError::Newer { found: 2, known: 1 }), "{error}");
}

proptest! {
    #[test]
    fn any_bytes_are_survived(mut bytes in prop::collection::vec(any::<u8>(), 0..200), whole: bool) {
        if whole && bytes.len() >= 16 {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..16].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
        }
        prop_assert!(opened(&bytes, &key(1), SealedAs::Map, &[]).is_err());
    }

    #[test]
    fn it_does_not_matter_in_which_pieces_it_is_written(cuts in prop::collection::vec(1_usize..90_000, 0..6)) {
        let plain = bytes(cuts.iter().sum());
        let mut writer = SealedWriter::new(Vec::new(), &key(1), SealedAs::Map, [9; SALT_BYTES]).unwrap();
        let mut rest = &plain[..];
        for cut in cuts {
            writer.write_all(&rest[..cut]).unwrap();
            rest = &rest[cut..];
        }
        prop_assert!(writer.finish().unwrap() == sealed(&plain, 9));
    }
}
