//! Names of checkpoints: the UTC time at which the VM stood still.

/// The name for a time in milliseconds since 1970: `2026-11-29T23-20-00Z`. Without colons, which some file systems and
/// shells take for something else.
pub(super) fn of_time(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, seconds) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}-{minute:02}-{second:02}Z")
}

/// The name that is taken if `taken` others have the first one already.
pub(super) fn numbered(name: &str, taken: u32) -> String {
    if taken == 0 { name.to_owned() } else { format!("{name}-{}", taken + 1) }
}

/// The time and the number of a name that was given here: names go by them as their checkpoints do by age.
pub(super) fn parse(name: &str) -> Option<(&str, u32)> {
    const FORM: &[u8] = b"0000-00-00T00-00-00Z";
    let (time, number) = name.split_at_checked(FORM.len())?;
    let fits = |(has, form): (u8, &u8)| if *form == b'0' { has.is_ascii_digit() } else { has == *form };
    if !time.bytes().zip(FORM).all(fits) {
        return None;
    }
    match number.strip_prefix('-') {
        Some(number) => Some((time, number.parse().ok()?)),
        None if number.is_empty() => Some((time, 1)),
        None => None,
    }
}

/// Year, month and day of a day since 1970 (H. Hinnant, "chrono-compatible low-level date algorithms"). Years begin in
/// March there, so that a leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let since = days + 719_468;
    let (era, day_of_era) = (since / 146_097, since % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_become_names() {
        for (seconds, name) in [
            (0, "1970-01-01T00-00-00Z"),
            (951_782_399, "2000-02-28T23-59-59Z"),
            (951_782_400, "2000-02-29T00-00-00Z"),
            (1_795_994_400, "2026-11-29T23-20-00Z"),
            (4_107_542_400, "2100-03-01T00-00-00Z"),
            (4_107_542_399, "2100-02-28T23-59-59Z"),
        ] {
            assert_eq!(of_time(seconds * 1000 + 999), name);
        }
        assert_eq!(numbered("a", 0), "a");
        assert_eq!(numbered("a", 1), "a-2");
    }

    #[test]
    fn names_say_their_age() {
        let time = "2026-11-29T23-20-00Z";
        assert_eq!(parse(&of_time(1_795_994_400_000)), Some((time, 1)));
        assert_eq!(parse("2026-11-29T23-20-00Z-12"), Some((time, 12)));
        assert!(parse("2026-11-29T23-20-00Z-12") > parse("2026-11-29T23-20-00Z-2"));
        for other in
            ["before-upgrade", "2026-11-29", "2026-11-29T23-20-00Z-", "2026-11-29T23-20-00Zx", "\u{e9}\u{e9}"]
        {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
