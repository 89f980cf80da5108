//! Whether QEMU was started with the command line that vmemd knows.
//!
//! A target starts its QEMU with what vmemd knows. If somebody else has started the source's with other words (a
//! wrapper that edits a path), the target would open another disk, or lack a device.

use std::fmt::Write as _;

/// The words of this process's command line behind its name, as the kernel keeps them.
pub(crate) fn own_words() -> std::io::Result<Vec<u8>> {
    std::fs::read("/proc/self/cmdline")
}

/// Why the VM stays, if `cmdline` (each word with a zero behind it, the program's name first) is not `printed`.
pub(crate) fn otherwise(cmdline: &[u8], printed: &[String]) -> Option<String> {
    let words = cmdline.strip_suffix(b"\0").unwrap_or(cmdline).split(|byte| *byte == 0).skip(1);
    let mut words = words.map(String::from_utf8_lossy);
    let mut printed = printed.iter();
    let mut text =
        "this VM cannot be moved: its QEMU was not started with what `vmemd qemu-args` printed: ".to_owned();
    let told = loop {
        break match (words.next(), printed.next()) {
            (None, None) => return None,
            (Some(is), Some(said)) if is == *said => continue,
            (Some(is), Some(said)) => write!(text, "it has {is:?} in the place of {said:?}"),
            (Some(is), None) => write!(text, "{is:?} was added"),
            (None, Some(said)) => write!(text, "{said:?} is missing"),
        };
    };
    told.expect("a text takes all");
    text += "; give `qemu-args` all of the command line, and change nothing of what it prints";
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_that_differs_is_told() {
        let printed = ["-m", "1G", "-drive", "file=/a"].map(str::to_owned);
        let now = |words: &[&str]| {
            let cmdline: String = words.iter().map(|word| format!("{word}\0")).collect();
            otherwise(cmdline.as_bytes(), &printed)
        };
        // By whatever name it is called.
        assert_eq!(now(&["/usr/bin/qemu", "-m", "1G", "-drive", "file=/a"]), None);
        assert_eq!(now(&["kvm", "-m", "1G", "-drive", "file=/a"]), None);
        for (words, says) in [
            (&["q", "-m", "1G", "-drive", "file=/b"][..], r#"it has "file=/b" in the place of "file=/a";"#),
            (&["q", "-m", "1G", "-drive", "file=/a", "-S"], r#""-S" was added;"#),
            (&["q", "-m", "1G", "-drive", "file=/a", ""], r#""" was added;"#),
            (&["q", "-m", "1G", "-drive"], r#""file=/a" is missing;"#),
            (&["q"], r#""-m" is missing;"#),
            (&[], r#""-m" is missing;"#),
        ] {
            let text = now(words).unwrap();
            assert!(
                text.contains(says) && text.starts_with("this VM cannot be moved: "),
                "{words:?}: {text}"
            );
        }
        assert_eq!(otherwise(b"q\0", &[]), None);
        assert!(otherwise(b"q\0\xff\0", &[]).is_some());
    }

    #[test]
    fn the_kernel_has_this_process_own_words() {
        let words: Vec<String> = std::env::args().skip(1).collect();
        assert_eq!(otherwise(&own_words().unwrap(), &words), None);
    }
}
