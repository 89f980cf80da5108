//! The command line, and the error of a mode that could not do its work.

pub(crate) const USAGE: &str = "\
usage: checker memory SIZE ROUNDS|SECONDSs [sequential|random]
       checker disk DEVICE PIECES          checker image FILE SIZE
       checker files DIR                   checker tree DIR STEP STEP
       checker stream PORT                 checker send HOST PORT [SECONDS] (else until its input ends)
       checker beat                        checker echo PORT
       checker bench SECONDS [SIZE]";

/// The reason why a mode could not do its work.
pub(crate) type Failure = Box<dyn std::error::Error>;

pub(crate) fn number<T: std::str::FromStr>(text: &str) -> Result<T, Failure> {
    text.parse().map_err(|_| format!("{text} is not a number here\n{USAGE}").into())
}

/// A size as people write it: `64M`.
pub(crate) fn bytes(text: &str) -> Result<usize, Failure> {
    let shift = match text.as_bytes().last() {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
    let count: usize = number(digits)?;
    count.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(bytes("64M").expect("a size"), 64 << 20);
        assert_eq!(bytes("3G").expect("a size"), 3 << 30);
        assert_eq!(bytes("4096").expect("a size"), 4096);
        for wrong in ["", "M", "-1M", "99999999999999G"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
