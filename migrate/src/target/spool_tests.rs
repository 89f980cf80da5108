use std::cell::RefCell;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;
use crate::sim::in_a_world;

fn options(memory_bytes: usize) -> StateSpool {
    StateSpool { directory: "/store".into(), memory_bytes, disk_bytes: u64::MAX, encrypt: true, lock: false }
}

fn whole(spool: Spool) -> Vec<u8> {
    let mut state = Vec::new();
    spool.read(&mut || Ok(())).read_to_end(&mut state).unwrap();
    state
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Against a vector.
    #[test]
    fn what_was_kept_comes_back(
        parts in prop::collection::vec((0_usize..600_000, any::<u8>()), 0..8), in_memory in 0_usize..5,
    ) {
        let parts: Vec<Vec<u8>> = parts.iter().map(|(len, byte)| {
            (0..*len).map(|at| (at as u8).wrapping_mul(*byte)).collect()
        }).collect();
        let expected = parts.concat();
        let found = Rc::new(RefCell::new(None));
        let into = found.clone();
        in_a_world(7, move || {
            crate::sim::sound_disk();
            let mut spool = Spool::new(options(in_memory * CHUNK_BYTES));
            parts.iter().for_each(|part| spool.push(part).unwrap());
            let kept: usize = spool.in_memory.iter().map(Vec::len).sum();
            assert!(kept <= in_memory * CHUNK_BYTES && spool.tail.len() < CHUNK_BYTES);
            *into.borrow_mut() = Some((spool.bytes(), whole(spool)));
        });
        let (bytes, state) = found.borrow_mut().take().unwrap();
        prop_assert_eq!(bytes, expected.len() as u64);
        prop_assert!(state == expected);
    }
}

#[test]
fn a_read_ends_with_the_session() {
    let mut spool = Spool::new(options(1 << 20));
    spool.push(&[1; 3000]).unwrap();
    let mut ends = || Err(SessionError::Cancelled);
    let mut reader = spool.read(&mut ends);
    assert!(reader.read(&mut [0; 10]).is_err());
    assert!(reader.read(&mut [0; 10]).is_err());
    assert!(matches!(reader.into_trouble(), Some(SessionError::Cancelled)));
}
