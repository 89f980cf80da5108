//! Sizes as people write them: `4G`, `512M`, `1.5G`, `4096`. Units are binary (1K is 1024 bytes).
//!
//! [`Display`](fmt::Display) gives the shortest text that parses back to the very same number; the alternate form
//! (`{:#}`) rounds to three digits, for tables and progress bars.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Letters of the units, each 1024 times the one before; bytes have none.
const UNITS: [(char, u64); 4] = [('T', 1 << 40), ('G', 1 << 30), ('M', 1 << 20), ('K', 1 << 10)];

/// A number of bytes that is read and printed with a binary unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Size(pub u64);

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// The text is not a number with an optional unit.
    #[error("{0:?} is not a size: write a number and a unit, such as 4G, 1500M, 64K or 4096")]
    NotASize(String),
    /// The number does not fit 64 bits.
    #[error("{0:?} is too large: sizes end at 16777215T")]
    TooLarge(String),
}

impl Size {
    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let not_a_size = || SizeError::NotASize(text.to_owned());
        let trimmed = text.trim();
        let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(end);
        let multiplier = match unit.trim_start().to_ascii_uppercase().as_str() {
            "" | "B" => 1,
            unit => {
                let (letter, rest) = unit.split_at(unit.chars().next().map_or(0, char::len_utf8));
                let found = UNITS.iter().find(|(c, _)| letter.starts_with(*c)).ok_or_else(not_a_size)?;
                if !matches!(rest, "" | "B" | "IB") {
                    return Err(not_a_size());
                }
                found.1
            }
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || (number.contains('.') && (fraction.is_empty() || multiplier == 1)) {
            return Err(not_a_size());
        }
        // More than 15 digits behind the point are below a byte in every unit.
        if fraction.len() > 15 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return Err(not_a_size());
        }
        let too_large = || SizeError::TooLarge(text.to_owned());
        let whole: u128 = whole.parse().map_err(|_| too_large())?;
        let scale = 10u128.pow(fraction.len() as u32);
        let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| not_a_size())? };
        let whole_bytes = whole.checked_mul(u128::from(multiplier)).ok_or_else(too_large)?;
        let bytes = whole_bytes.checked_add(part * u128::from(multiplier) / scale).ok_or_else(too_large)?;
        u64::try_from(bytes).map(Size).map_err(|_| too_large())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = if f.alternate() { rounded(self.0) } else { exact(self.0) };
        f.pad(&text)
    }
}

fn exact(bytes: u64) -> String {
    match UNITS.iter().find(|(_, unit)| bytes >= *unit && bytes.is_multiple_of(*unit)) {
        Some((letter, unit)) => format!("{}{letter}", bytes / unit),
        None => bytes.to_string(),
    }
}

fn rounded(bytes: u64) -> String {
    let Some((letter, unit)) = UNITS.iter().find(|(_, unit)| bytes >= *unit) else {
        return bytes.to_string();
    };
    let value = bytes as f64 / *unit as f64;
    if bytes.is_multiple_of(*unit) || value >= 99.95 {
        format!("{value:.0}{letter}")
    } else if value >= 9.995 {
        format!("{value:.1}{letter}")
    } else {
        format!("{value:.2}{letter}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 64 << 10),
            ("1500M", 1500 << 20),
            ("4G", 4 << 30),
            ("4GiB", 4 << 30),
            ("4 gb", 4 << 30),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
            ("512b", 512),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        for text in ["", "G", "-1G", "4X", "4GG", "1.5", ".5G", "1.G", "1.2.3G", "0x10", "4 G B", "ж"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::NotASize(text.to_owned())), "{text}");
        }
        for text in ["16777216T", "99999999999999999999999999999999999999999999"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::TooLarge(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn prints_what_reads_back() {
        for bytes in [0, 1, 1023, 1024, 1536, 1500 << 20, 4 << 30, (4 << 30) + 4096, u64::MAX, 3 << 40] {
            assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }
        assert_eq!(Size(1500 << 20).to_string(), "1500M");
        assert_eq!(format!("{:#}", Size(1500 << 20)), "1.46G");
        assert_eq!(format!("{:#}", Size(4 << 30)), "4G");
        assert_eq!(format!("{:>6}", Size(4 << 30)), "    4G");
    }
}
