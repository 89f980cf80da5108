//! Runs a crate's fuzz targets in its tests, without the fuzzer: each target gets its corpus, and random changes of
//! it.
//!
//! Crates take this file in by its path: it needs nothing of theirs.

use std::path::Path;

use proptest::prelude::*;
use proptest::sample::Index;

/// A target with its name, which is also that of its corpus and of its file in `fuzz_targets`.
type Target = (&'static str, fn(&[u8]));

fn corpus(fuzz: &Path, name: &str) -> Vec<Vec<u8>> {
    assert!(fuzz.join(format!("fuzz_targets/{name}.rs")).is_file(), "the fuzzer has no target {name}");
    let files = std::fs::read_dir(fuzz.join("corpus").join(name)).unwrap();
    files.map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect()
}

pub(crate) fn corpora(fuzz: &Path, targets: &[Target]) {
    for (name, target) in targets {
        let corpus = corpus(fuzz, name);
        assert!(corpus.len() > 2, "the corpus of {name} is almost empty");
        corpus.iter().for_each(|input| target(input));
    }
}

/// A short run of the target. `scripts/fuzz` runs it for longer, and keeps inputs that reach new code, which this
/// does not.
pub(crate) fn chance(fuzz: &Path, targets: &[Target]) {
    for (name, target) in targets {
        let corpus = corpus(fuzz, name);
        let inputs = (any::<Index>(), prop::collection::vec(change(), 1..12));
        proptest!(ProptestConfig::with_cases(4000), |((input, changes) in inputs)| {
            target(&make(&corpus, input, &changes));
        });
    }
}

#[derive(Debug, Clone)]
enum Change {
    Set(Index, u8),
    Flip(Index, u8),
    Remove(Index, Index),
    Double(Index, Index),
    /// The rest of the input is replaced by that of another one.
    GoOn(Index, Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        any::<(Index, u8)>().prop_map(|(at, byte)| Change::Set(at, byte)),
        any::<(Index, u8)>().prop_map(|(at, bit)| Change::Flip(at, bit % 8)),
        any::<(Index, Index)>().prop_map(|(from, to)| Change::Remove(from, to)),
        any::<(Index, Index)>().prop_map(|(from, to)| Change::Double(from, to)),
        any::<(Index, Index, Index)>().prop_map(|(at, other, from)| Change::GoOn(at, other, from)),
    ]
}

fn make(corpus: &[Vec<u8>], input: Index, changes: &[Change]) -> Vec<u8> {
    let mut bytes = input.get(corpus).clone();
    for change in changes {
        let range = |from: &Index, to: &Index| {
            let ends = [from.index(bytes.len() + 1), to.index(bytes.len() + 1)];
            ends[0].min(ends[1])..ends[0].max(ends[1])
        };
        match change {
            _ if bytes.is_empty() => bytes.push(0),
            Change::Set(at, byte) => *at.get_mut(&mut bytes) = *byte,
            Change::Flip(at, bit) => *at.get_mut(&mut bytes) ^= 1 << bit,
            Change::Remove(from, to) => {
                let gone = range(from, to);
                bytes.drain(gone);
            }
            Change::Double(from, to) => {
                let again = range(from, to);
                bytes.extend_from_within(again);
            }
            Change::GoOn(at, other, from) => {
                let kept = at.index(bytes.len());
                bytes.truncate(kept);
                let other = other.get(corpus);
                bytes.extend_from_slice(&other[from.index(other.len() + 1)..]);
            }
        }
        bytes.truncate(65_536);
    }
    bytes
}
