use proptest::prelude::*;

use super::*;

fn run(start: u64, len: u32) -> Run {
    Run::new(PageNo(start), len)
}

/// Any kinds, in runs of some length, with sums and heat that tell the page.
fn memories() -> impl Strategy<Value = Vec<PageKind>> {
    let kind =
        prop_oneof![Just(PageKind::Zero), Just(PageKind::Here), Just(PageKind::Base), Just(PageKind::Lost)];
    prop::collection::vec((kind, 1_usize..700), 1..20)
        .prop_map(|runs| runs.into_iter().flat_map(|(kind, len)| std::iter::repeat_n(kind, len)).collect())
}

fn sum_of(page: u64) -> u64 {
    page.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

fn map_of(kinds: &[PageKind]) -> MemoryMap {
    let mut builder = MapBuilder::new(kinds.len() as u64);
    for (page, kind) in (0..).zip(kinds) {
        match kind.has_content() {
            true => builder.set_content(run(page, 1), *kind, &[sum_of(page)]),
            false => builder.set(run(page, 1), *kind),
        }
    }
    let heat: Vec<u8> = (0..kinds.len()).map(|page| page as u8).collect();
    builder.finish(&heat)
}

fn small() -> MemoryMap {
    use PageKind::{Base, Here, Lost, Zero};
    map_of(&[Zero, Zero, Here, Here, Base, Lost, Here, Zero])
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(kinds in memories()) {
        let map = map_of(&kinds);
        let bytes = map.encode();
        prop_assert_eq!(bytes.len() as u64, map.file_bytes());
        prop_assert_eq!(MemoryMap::decode(&bytes).unwrap(), map);
    }

    #[test]
    fn a_map_says_of_each_page_what_was_said_to_it(kinds in memories(), at: prop::sample::Index, len: prop::sample::Index) {
        let map = map_of(&kinds);
        let mut counts = PageCounts::default();
        for (page, kind) in kinds.iter().enumerate() {
            counts.add(*kind, 1);
            prop_assert_eq!(map.kind(PageNo(page as u64)), *kind);
            let sum = kind.has_content().then(|| sum_of(page as u64));
            prop_assert_eq!(map.sum(PageNo(page as u64)), sum);
        }
        prop_assert_eq!(map.counts(), counts);
        // Pieces, of all and of a part, have every page once and in order, with what belongs to it.
        let start = at.index(kinds.len());
        let part = run(start as u64, len.index(kinds.len() - start + 1) as u32);
        for (pieces, within) in [
            (map.pieces().collect::<Vec<_>>(), run(0, kinds.len() as u32)),
            (map.pieces_in(part).collect(), part),
        ] {
            let mut next = within.start;
            for piece in pieces {
                prop_assert_eq!(piece.run.start, next);
                next = piece.run.end();
                let content = if piece.kind.has_content() { piece.run.len as usize } else { 0 };
                prop_assert_eq!((piece.sums.len(), piece.heat.len()), (content, content));
                for (nth, page) in piece.run.pages().enumerate() {
                    prop_assert_eq!(kinds[page.index()], piece.kind);
                    if piece.kind.has_content() {
                        prop_assert_eq!((piece.sums[nth], piece.heat[nth]), (sum_of(page.0), page.0 as u8));
                    }
                }
            }
            prop_assert_eq!(next, within.end());
        }
    }

    #[test]
    fn standing_alone_means_that_what_was_in_the_base_is_here(kinds in memories()) {
        let alone: Vec<PageKind> = kinds
            .iter()
            .map(|kind| if *kind == PageKind::Base { PageKind::Here } else { *kind })
            .collect();
        prop_assert_eq!(map_of(&kinds).standing_alone(), map_of(&alone));
    }

    #[test]
    fn any_bytes_are_survived(mut bytes in prop::collection::vec(any::<u8>(), 0..200), begins: bool) {
        if begins && bytes.len() > 12 {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        }
        prop_assert!(MemoryMap::decode(&bytes).is_err());
    }
}

#[test]
fn no_beginning_of_a_map_is_one_and_nothing_more_may_follow() {
    let bytes = small().encode();
    for len in 0..bytes.len() {
        assert!(MemoryMap::decode(&bytes[..len]).is_err(), "the first {len} bytes");
    }
    let mut more = bytes.clone();
    more.push(0);
    assert!(matches!(MemoryMap::decode(&more), Err(FormatError::TooLong { .. })));
    // A file that is longer or shorter than is said cannot be read to its end.
    assert!(MemoryMap::read(&bytes[..bytes.len() - 1], bytes.len() as u64).is_err());
}

#[test]
fn no_bit_of_a_map_may_be_another() {
    let bytes = small().encode();
    for bit in 0..bytes.len() * 8 {
        let mut other = bytes.clone();
        other[bit / 8] ^= 1 << (bit % 8);
        assert!(MemoryMap::decode(&other).is_err(), "bit {bit}");
    }
}

#[test]
fn a_newer_version_is_told_from_damage() {
    let mut bytes = small().encode();
    bytes[8] = 2;
    let error = MemoryMap::decode(&bytes).unwrap_err();
    assert!(matches!(error, FormatError::Newer { found: 2, known: 1 }), "{error}");
    assert!(error.to_string().contains("newer"), "{error}");
}

/// What a header can say costs nothing before it is known to be true.
#[test]
fn a_header_that_lies_about_its_lengths_allocates_nothing() {
    for (pages, runs, content) in [
        (MAX_PAGES, MAX_PAGES, MAX_PAGES),
        (u64::MAX, 1, 1),
        (MAX_PAGES, u64::MAX, 0),
        (MAX_PAGES, 1, u64::MAX),
        (0, 0, 0),
    ] {
        let mut bytes = small().encode();
        for (at, value) in [(16, pages), (24, runs), (32, content)] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        assert!(MemoryMap::decode(&bytes).is_err());
    }
}

#[test]
fn a_page_may_change_its_kind_and_no_heat_is_cold() {
    let mut builder = MapBuilder::new(4096);
    builder.set_content(run(0, 2000), PageKind::Base, &[7; 2000]);
    builder.set(run(500, 1000), PageKind::Lost);
    builder.set(run(500, 500), PageKind::Zero);
    builder.set_content(run(900, 1), PageKind::Here, &[9]);
    assert_eq!((builder.kind(PageNo(900)), builder.sum(PageNo(900))), (PageKind::Here, Some(9)));
    assert_eq!((builder.kind(PageNo(1200)), builder.sum(PageNo(1200))), (PageKind::Lost, None));
    let map = builder.finish(&[]);
    let pieces: Vec<(u64, u32, PageKind)> =
        map.pieces().map(|piece| (piece.run.start.0, piece.run.len, piece.kind)).collect();
    use PageKind::{Base, Here, Lost, Zero};
    let expected = [
        (0, 500, Base),
        (500, 400, Zero),
        (900, 1, Here),
        (901, 99, Zero),
        (1000, 500, Lost),
        (1500, 500, Base),
        (2000, 2096, Zero),
    ];
    assert_eq!(pieces, expected);
    assert!(map.pieces().all(|piece| piece.heat.iter().all(|heat| *heat == 0)));
    assert_eq!(map.counts(), PageCounts { zero: 2595, here: 1, base: 1000, lost: 500 });
}

/// 64 GiB of zeros.
#[test]
fn what_was_never_written_takes_no_room() {
    let map = MapBuilder::new(16 << 20).finish(&[]);
    assert_eq!(map.encode().len(), 56);
}

#[test]
fn the_order_of_first_faults_is_read_again_and_no_other() {
    use crate::format::FirstFaults;
    let order = FirstFaults::new(1000, vec![run(990, 10), run(3, 1), run(100, 300)]).unwrap();
    let bytes = order.encode();
    assert_eq!(FirstFaults::decode(&bytes).unwrap(), order);
    for len in 0..bytes.len() {
        assert!(FirstFaults::decode(&bytes[..len]).is_err(), "the first {len} bytes");
    }
    for bit in 0..bytes.len() * 8 {
        let mut other = bytes.clone();
        other[bit / 8] ^= 1 << (bit % 8);
        assert!(FirstFaults::decode(&other).is_err(), "bit {bit}");
    }
    for wrong in [vec![run(1000, 1)], vec![run(999, 2)], vec![run(5, 0)], vec![run(0, 600), run(0, 600)]] {
        assert!(FirstFaults::new(1000, wrong).is_err());
    }
    assert!(FirstFaults::new(0, Vec::new()).is_err());
    assert!(FirstFaults::new(1, Vec::new()).is_ok());
}
