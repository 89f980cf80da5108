//! How reasons are put into words.

/// A list of reasons, for where only one line is shown.
pub fn one_line(text: &str) -> String {
    text.replace(":\n  ", ": ").replace("\n  ", "; ")
}
