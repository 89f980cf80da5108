//! QEMU's command line: a list of options, each with or without a value, and of words that are disks.
//!
//! QEMU takes `-name` and `--name` for the same, and for an option that has a value the next word, whatever it looks
//! like. So one has to know which options have none. Options not known here (of a newer QEMU) are guessed: a next word
//! that begins with `-` is not the value. [`CommandLine::unknown`] names them, for a note to the user.
//!
//! Printing gives the very words that were parsed, but for what was changed in between.

use vmprocess::failure::{Failure, FailureKind};

use super::props::Props;

/// Options that stand alone, of QEMU 2.x to 10.x.
const ALONE: &[&str] = &[
    "S",
    "alt-grab",
    "async-teardown",
    "audio-help",
    "ctrl-grab",
    "curses",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "jitdump",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-frame",
    "no-hpet",
    "no-kvm",
    "no-kvm-irqchip",
    "no-kvm-pit",
    "no-kvm-pit-reinjection",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "nouserconfig",
    "old-param",
    "only-migratable",
    "perfmap",
    "portrait",
    "preconfig",
    "rtc-td-hack",
    "s",
    "sdl",
    "semihosting",
    "show-cursor",
    "singlestep",
    "snapshot",
    "tdf",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-create",
    "xen-domid-restrict",
];

/// Options that take the next word.
const VALUED: &[&str] = &[
    "D",
    "L",
    "M",
    "accel",
    "acpitable",
    "action",
    "add-fd",
    "append",
    "audio",
    "audiodev",
    "balloon",
    "bios",
    "blockdev",
    "boot",
    "bt",
    "cdrom",
    "chardev",
    "chroot",
    "clock",
    "compat",
    "cpu",
    "d",
    "debugcon",
    "device",
    "dfilter",
    "display",
    "drive",
    "dtb",
    "dump-vmstate",
    "echr",
    "fda",
    "fdb",
    "fsdev",
    "fw_cfg",
    "g",
    "gdb",
    "global",
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "icount",
    "igd-passthru",
    "incoming",
    "initrd",
    "iscsi",
    "k",
    "kernel",
    "loadvm",
    "m",
    "machine",
    "mem-path",
    "mon",
    "monitor",
    "msg",
    "mtdblock",
    "name",
    "net",
    "netdev",
    "nic",
    "numa",
    "object",
    "option-rom",
    "overcommit",
    "parallel",
    "pflash",
    "pidfile",
    "plugin",
    "prom-env",
    "qmp",
    "qmp-pretty",
    "qtest",
    "qtest-log",
    "readconfig",
    "realtime",
    "redir",
    "rotate",
    "rtc",
    "run-with",
    "runas",
    "sandbox",
    "sd",
    "seed",
    "semihosting-config",
    "serial",
    "set",
    "shim",
    "smbios",
    "smp",
    "soundhw",
    "spice",
    "startdate",
    "tb-size",
    "tpmdev",
    "trace",
    "usbdevice",
    "uuid",
    "vga",
    "virtfs",
    "virtioconsole",
    "vnc",
    "watchdog",
    "watchdog-action",
    "writeconfig",
    "xen-domid",
];

/// Limits of what is taken as a command line, the source's of a migration included.
pub const MAX_WORDS: usize = 4096;
pub const MAX_BYTES: usize = 1 << 20;

/// One option with its value, or a disk's file name (a word without dashes).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// As written, with its dashes; None for a disk.
    flag: Option<String>,
    pub(super) value: Option<String>,
}

impl Word {
    /// An option of our own.
    pub(super) fn new(flag: &str, value: Option<String>) -> Word {
        Word { flag: Some(flag.to_owned()), value }
    }

    /// The option's name without dashes, aliases resolved; a disk given as a bare word is QEMU's `hda`.
    pub fn name(&self) -> &str {
        match self.flag.as_deref() {
            None => "hda",
            Some(flag) => match bare(flag) {
                "M" => "machine",
                name => name,
            },
        }
    }

    pub fn value(&self) -> Option<&str> {
        self.value.as_deref()
    }

    /// The value's properties.
    pub fn props(&self) -> Result<Props, Failure> {
        Props::parse(self.value().unwrap_or_default()).map_err(|why| {
            let text = format!("`{}` cannot be read: {why}", self.shown());
            Failure::new(FailureKind::Usage, text)
        })
    }

    /// As written, cut where it gets long: for messages.
    pub(super) fn shown(&self) -> String {
        const LONGEST: usize = 100;
        let words: Vec<&str> = [self.flag.as_deref(), self.value()].into_iter().flatten().collect();
        let text = words.join(" ");
        let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        match text.char_indices().nth(LONGEST) {
            Some((end, _)) => format!("{}…", &text[..end]),
            None => text,
        }
    }
}

fn bare(flag: &str) -> &str {
    let name = flag.strip_prefix('-').unwrap_or(flag);
    name.strip_prefix('-').unwrap_or(name)
}

/// QEMU's arguments, without the binary's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    pub(super) words: Vec<Word>,
}

impl CommandLine {
    pub fn parse<S: AsRef<str>>(args: &[S]) -> Result<CommandLine, Failure> {
        let bytes: usize = args.iter().map(|arg| arg.as_ref().len() + 1).sum();
        if args.len() > MAX_WORDS || bytes > MAX_BYTES {
            let text = format!(
                "QEMU's command line has {} words and {bytes} bytes: at most {MAX_WORDS} words and {MAX_BYTES} bytes are read",
                args.len()
            );
            return Err(Failure::new(FailureKind::Usage, text));
        }
        let mut words = Vec::new();
        let mut rest = args.iter().map(AsRef::as_ref).peekable();
        while let Some(arg) = rest.next() {
            if arg.contains('\0') {
                return Err(Failure::new(
                    FailureKind::Usage,
                    "QEMU's command line has a word with a zero byte",
                ));
            }
            if !arg.starts_with('-') {
                words.push(Word { flag: None, value: Some(arg.to_owned()) });
                continue;
            }
            let name = bare(arg);
            let value = if ALONE.contains(&name) {
                None
            } else if VALUED.contains(&name) {
                let Some(value) = rest.next() else {
                    let text =
                        format!("`{arg}` is the last word of QEMU's command line: write its value behind it");
                    return Err(Failure::new(FailureKind::Usage, text));
                };
                Some(value)
            } else {
                rest.next_if(|next| !next.starts_with('-'))
            };
            words.push(Word { flag: Some(arg.to_owned()), value: value.map(str::to_owned) });
        }
        Ok(CommandLine { words })
    }

    /// The words again.
    pub fn print(&self) -> Vec<String> {
        self.words.iter().flat_map(|word| [word.flag.clone(), word.value.clone()]).flatten().collect()
    }

    pub fn words(&self) -> &[Word] {
        &self.words
    }

    /// All options of a name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Word> {
        self.words.iter().filter(move |word| word.name() == name)
    }

    pub fn has(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }

    /// Options whose value, or lack of one, was guessed.
    pub fn unknown(&self) -> Vec<&str> {
        let known = |name: &str| ALONE.contains(&name) || VALUED.contains(&name);
        let flags = self.words.iter().filter_map(|word| word.flag.as_deref());
        flags.filter(|flag| !known(bare(flag))).collect()
    }

    /// A machine property, as the last `-machine` that has it says. The machine's name is `type`.
    pub fn machine(&self, property: &str) -> Result<Option<String>, Failure> {
        let mut found = None;
        for word in self.all("machine") {
            let props = word.props()?;
            let said = if property == "type" { props.first("type") } else { props.get(property) };
            found = said.or(found);
        }
        Ok(found)
    }

    /// Accelerators in the order in which QEMU tries them; none: QEMU's default.
    pub fn accelerators(&self) -> Result<Vec<String>, Failure> {
        let mut found = Vec::new();
        for word in self.all("accel") {
            found.extend(word.props()?.first("accel"));
        }
        if let Some(list) = self.machine("accel")? {
            found.extend(list.split(':').map(str::to_owned));
        }
        if self.has("enable-kvm") {
            found.push("kvm".to_owned());
        }
        Ok(found)
    }

    /// Whether KVM runs the guest, or may.
    pub fn uses_kvm(&self) -> Result<bool, Failure> {
        Ok(self.accelerators()?.iter().any(|accel| accel == "kvm"))
    }
}

/// A size as QEMU reads it: a number, with a fraction or in hexadecimal, and a unit; without one, `unit` bytes each.
pub fn size(text: &str, unit: u64) -> Option<u64> {
    let text = text.trim_start();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok()?.checked_mul(unit);
    }
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let scale = match suffix {
        "" => unit,
        "b" | "B" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        "p" | "P" => 1 << 50,
        "e" | "E" => 1 << 60,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // A fraction has a unit.
    if number.contains('.') && suffix.is_empty() {
        return None;
    }
    // More digits than these are below a byte in every unit.
    if whole.is_empty() || fraction.len() > 18 || fraction.contains('.') {
        return None;
    }
    let whole = u128::from(whole.parse::<u64>().ok()?);
    let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let bytes = whole * u128::from(scale) + part * u128::from(scale) / 10u128.pow(fraction.len() as u32);
    u64::try_from(bytes).ok()
}

/// The words of the operating system as text.
pub fn text(args: &[std::ffi::OsString]) -> Result<Vec<String>, Failure> {
    let one = |arg: &std::ffi::OsString| {
        arg.clone().into_string().map_err(|arg| {
            let text = format!("{arg:?} of QEMU's command line is not UTF-8: rename the file");
            Failure::new(FailureKind::Usage, text)
        })
    };
    args.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn options_take_the_next_word_unless_they_stand_alone() {
        let line =
            CommandLine::parse(&words("-S --machine q35 -append -v disk.img -nographic -m 1G")).unwrap();
        let names: Vec<_> = line.words().iter().map(|word| (word.name(), word.value())).collect();
        assert_eq!(
            names,
            [
                ("S", None),
                ("machine", Some("q35")),
                ("append", Some("-v")),
                ("hda", Some("disk.img")),
                ("nographic", None),
                ("m", Some("1G"))
            ]
        );
        assert_eq!(line.machine("type").unwrap().as_deref(), Some("q35"));
    }

    #[test]
    fn an_option_without_its_value_is_an_error() {
        let error = CommandLine::parse(&words("-S -m")).unwrap_err();
        assert!(error.text.contains("`-m` is the last word"), "{error}");
    }

    #[test]
    fn unknown_options_are_guessed_and_named() {
        let line = CommandLine::parse(&words("-new-thing 5 -newer -S")).unwrap();
        assert_eq!(line.words()[0].value(), Some("5"));
        assert_eq!(line.words()[1].value(), None);
        assert_eq!(line.unknown(), ["-new-thing", "-newer"]);
    }

    #[test]
    fn later_machine_options_win_and_properties_add_up() {
        let line =
            CommandLine::parse(&words("-M pc,usb=off -machine accel=kvm:tcg -machine type=q35")).unwrap();
        assert_eq!(line.machine("type").unwrap().as_deref(), Some("q35"));
        assert_eq!(line.machine("usb").unwrap().as_deref(), Some("off"));
        assert_eq!(line.accelerators().unwrap(), ["kvm", "tcg"]);
        assert!(line.uses_kvm().unwrap());
    }

    #[test]
    fn sizes_as_qemu_reads_them() {
        for (text, unit, bytes) in [
            ("1G", 1, 1 << 30),
            ("1024", 1 << 20, 1 << 30),
            ("1.5g", 1 << 20, 3 << 29),
            ("0x100", 1 << 20, 256 << 20),
            ("512b", 1 << 20, 512),
            ("4096", 1, 4096),
            ("15E", 1, 15 << 60),
        ] {
            assert_eq!(size(text, unit), Some(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "-1",
            "1.5",
            "1GB",
            "1.2.3",
            "16E",
            "0x",
            "99999999999999999999",
            "1.1234567890123456789",
        ] {
            assert_eq!(size(text, 1), None, "{text}");
        }
    }

    #[test]
    fn more_than_a_command_line_can_be_is_refused() {
        let error = CommandLine::parse(&vec!["-S"; MAX_WORDS + 1]).unwrap_err();
        assert!(error.text.contains("4097 words"), "{error}");
        let error = CommandLine::parse(&["x".repeat(MAX_BYTES)]).unwrap_err();
        assert!(error.text.contains("1 words and 1048577 bytes"), "{error}");
    }

    #[test]
    fn what_is_not_utf8_is_named() {
        use std::os::unix::ffi::OsStringExt;
        let error = text(&[std::ffi::OsString::from_vec(b"a\xff".to_vec())]).unwrap_err();
        assert!(error.text.contains("\"a\\xFF\""), "{error}");
    }

    proptest! {
        #[test]
        fn printing_gives_the_words_again(args in proptest::collection::vec("(-{0,2}[a-z]{0,6}|-m|-S|-device|[^\0]{0,12})", 0..20)) {
            if let Ok(line) = CommandLine::parse(&args) {
                prop_assert_eq!(line.print(), args);
            }
        }

        #[test]
        fn no_text_is_too_strange(text in ".*") {
            let _ = size(&text, 1 << 20);
            let _ = CommandLine::parse(&["-machine", &text, &text, "-accel", &text]).map(|line| {
                let _ = (line.accelerators(), line.machine("type"), line.unknown().len());
            });
        }
    }
}
