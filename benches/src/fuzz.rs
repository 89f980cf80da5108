//! The decoders of files that somebody else made, one function each: what the fuzzer calls, and what the tests call
//! with the corpus.
//!
//! A function here fails (panics) if the decoder does.

use crate::jobfile;
use crate::trace::file;

/// A decoder under test, by its name: that of its corpus and of its file in `fuzz/fuzz_targets`.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 2] = [("job_file", job_file), ("trace", trace)];

/// A benchmark's job file.
pub fn job_file(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = jobfile::parse("job", text).map_err(|faults| faults.show("job", text));
    }
}

/// A recorded trace.
pub fn trace(data: &[u8]) {
    let mut entries = 0_u64;
    if let Ok(header) = file::decode(data, data.len() as u64, |_| entries += 1) {
        assert_eq!(header.entries, entries);
    }
}

#[cfg(test)]
#[path = "../../fuzz/survive.rs"]
mod survive;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const FUZZ: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz");

    #[test]
    fn the_corpus_is_survived() {
        survive::corpora(Path::new(FUZZ), &TARGETS);
    }

    #[test]
    fn what_becomes_of_the_corpus_by_chance_is_survived() {
        survive::chance(Path::new(FUZZ), &TARGETS);
    }
}
