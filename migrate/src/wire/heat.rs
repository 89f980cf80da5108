//! The heat map: one byte a page, in parts, each raw or as runs, whichever is shorter.
//!
//! A run is 3 bytes: length (u16, at least 1), heat.

use super::record::{FLAG_LAST, FLAG_RUNS, Header, MAX_CONTROL_META, MAX_PART_PAGES, RecordKind};
use super::{WireError, at_most};

const RUN_BYTES: usize = 3;
const _: () = assert!(MAX_PART_PAGES <= MAX_CONTROL_META);

/// The heat of some pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// Number of the first of these pages.
    pub first: u64,
    /// One byte a page, 0 for cold; at most [`MAX_PART_PAGES`].
    pub heat: Vec<u8>,
    /// The map ends here.
    pub last: bool,
}

/// Cuts a whole map into parts.
pub fn parts(map: &[u8]) -> impl Iterator<Item = Part> + '_ {
    let count = map.len().div_ceil(MAX_PART_PAGES);
    map.chunks(MAX_PART_PAGES).enumerate().map(move |(at, heat)| Part {
        first: (at * MAX_PART_PAGES) as u64,
        heat: heat.to_vec(),
        last: at + 1 == count,
    })
}

pub(super) fn encode(part: &Part) -> (Header, Vec<u8>) {
    let mut runs = Vec::new();
    for run in part.heat.chunk_by(|a, b| a == b) {
        for piece in run.chunks(usize::from(u16::MAX)) {
            runs.extend_from_slice(&(piece.len() as u16).to_le_bytes());
            runs.push(piece[0]);
        }
        if runs.len() >= part.heat.len() {
            break;
        }
    }
    let shorter = runs.len() < part.heat.len();
    let body = if shorter { runs } else { part.heat.clone() };
    let flags = if part.last { FLAG_LAST } else { 0 } | if shorter { FLAG_RUNS } else { 0 };
    let header = Header::plain(RecordKind::Heat, part.first, body.len()).with_flags(flags);
    (Header { pages: part.heat.len() as u32, ..header }, body)
}

pub(super) fn decode(header: &Header, body: &[u8]) -> Result<Part, WireError> {
    let pages = at_most("pages of heat", u64::from(header.pages), MAX_PART_PAGES as u64)? as usize;
    let heat = if header.has(FLAG_RUNS) { unpack(body, pages)? } else { body.to_vec() };
    if heat.len() != pages {
        return Err(WireError::Lengths("heat and pages"));
    }
    Ok(Part { first: header.number, heat, last: header.has(FLAG_LAST) })
}

fn unpack(body: &[u8], pages: usize) -> Result<Vec<u8>, WireError> {
    let (runs, rest) = body.as_chunks::<RUN_BYTES>();
    if !rest.is_empty() {
        return Err(WireError::Lengths("runs of heat"));
    }
    let mut heat = Vec::with_capacity(pages);
    for [low, high, value] in runs {
        let len = usize::from(u16::from_le_bytes([*low, *high]));
        if len == 0 || heat.len() + len > pages {
            return Err(WireError::Lengths("runs of heat and pages"));
        }
        heat.resize(heat.len() + len, *value);
    }
    Ok(heat)
}

/// Puts parts together, in order and not beyond the VM's memory.
#[derive(Debug)]
pub struct Assembly {
    pages: u64,
    heat: Vec<u8>,
}

impl Assembly {
    /// Without any part yet, for a memory of so many pages.
    pub fn new(pages: u64) -> Assembly {
        Assembly { pages, heat: Vec::new() }
    }

    /// The whole map, once its last part has come.
    pub fn add(&mut self, part: Part) -> Result<Option<Vec<u8>>, WireError> {
        let have = self.heat.len() as u64;
        if part.first != have || part.heat.is_empty() {
            return Err(WireError::BadValue {
                what: "the first page of a part of the heat map",
                value: part.first,
            });
        }
        at_most("pages of heat", have + part.heat.len() as u64, self.pages)?;
        self.heat.extend_from_slice(&part.heat);
        if !part.last {
            return Ok(None);
        }
        if self.heat.len() as u64 != self.pages {
            return Err(WireError::Lengths("the heat map and the memory"));
        }
        Ok(Some(std::mem::take(&mut self.heat)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_map_survives_cutting_and_assembling() {
        let mut map = vec![0; MAX_PART_PAGES + 1000];
        map[70_000..200_000].fill(9);
        (0..500).for_each(|at| map[MAX_PART_PAGES + at] = at as u8);
        let mut assembly = Assembly::new(map.len() as u64);
        let cut: Vec<_> = parts(&map).collect();
        assert_eq!(cut.len(), 2);
        assert_eq!(assembly.add(cut[0].clone()), Ok(None));
        assert!(assembly.add(cut[0].clone()).is_err());
        assert_eq!(assembly.add(cut[1].clone()), Ok(Some(map)));
    }

    #[test]
    fn even_heat_is_short() {
        let part = Part { first: 0, heat: vec![0; MAX_PART_PAGES], last: true };
        assert!(encode(&part).1.len() < 32);
    }

    proptest! {
        #[test]
        fn round_trip(runs in prop::collection::vec((1_usize..300, 0_u8..4), 1..30), first: u64, last: bool) {
            let heat = runs.iter().flat_map(|(len, heat)| std::iter::repeat_n(*heat, *len)).collect();
            let part = Part { first, heat, last };
            let (header, body) = encode(&part);
            prop_assert_eq!(decode(&header, &body), Ok(part));
        }

        #[test]
        fn arbitrary_bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..100), pages: u32, flags: u8) {
            let header = Header { pages, ..Header::plain(RecordKind::Heat, 0, body.len()).with_flags(flags) };
            if let Ok(part) = decode(&header, &body) {
                prop_assert_eq!(part.heat.len(), pages as usize);
            }
        }
    }
}
