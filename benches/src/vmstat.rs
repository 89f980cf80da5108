//! The kernel's counters of the whole host, in `/proc/vmstat`.

/// Pages that the whole host has swapped in and out since it was booted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Swapped {
    pub(crate) ins: u64,
    pub(crate) outs: u64,
}

impl Swapped {
    pub(crate) fn now() -> Swapped {
        let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
        let count = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|count| count.parse().ok()).unwrap_or(0)
        };
        Swapped { ins: count("pswpin"), outs: count("pswpout") }
    }

    pub(crate) fn until(self, later: Swapped) -> Swapped {
        Swapped { ins: later.ins.saturating_sub(self.ins), outs: later.outs.saturating_sub(self.outs) }
    }
}
