//! The last lines that a program wrote before it ended, short enough to be sent to another host.

/// Most bytes that are sent.
const WORDS_MAX: usize = 600;
/// Bytes of a log's end that are read for that.
pub const LOG_BYTES_MAX: u64 = 64 << 10;

/// The lines as one; of a long one its end.
pub fn last_words<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let mut said = lines.collect::<Vec<_>>().join("; ");
    let cut = said.ceil_char_boundary(said.len().saturating_sub(WORDS_MAX));
    said.split_off(cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_short_and_whole() {
        let said = |log: &str| last_words(log.lines());
        assert_eq!(said(""), "");
        assert_eq!(said("a: b\nc\n"), "a: b; c");
        assert_eq!(said(&"x".repeat(WORDS_MAX)), "x".repeat(WORDS_MAX));
        // Two bytes each: a cut may not be in the middle of one.
        for ends in ["ends", "end"] {
            let long = said(&format!("{}{ends}", "ä".repeat(WORDS_MAX)));
            assert!(
                long.ends_with(ends) && (WORDS_MAX - 1..=WORDS_MAX).contains(&long.len()),
                "{}",
                long.len()
            );
        }
    }
}
