//! Operations on the tiers that are under way.

use crate::core::event::IoId;
use crate::units::{PageNo, Run, Slot, SlotRun, TIERS_MAX, TierId};

/// Where pages go once they are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Landing {
    /// Into the guest, except the marker.
    Guest { marker: Option<PageNo> },
    /// They wait in staging for a touch.
    Staging,
    /// They were read at the origin, to be written to their home.
    Home,
}

/// Why pages are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    PageOut,
    /// Received in a migration and placed in the store.
    Placement,
    /// Read at the origin and taken home.
    TakenHome,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum IoKind {
    Read {
        landing: Landing,
    },
    /// To see whether the tier gives anything; so many more may follow.
    Probe {
        more: u32,
    },
    Write(Purpose),
    /// No frames are in it.
    Drop,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Io {
    pub(crate) kind: IoKind,
    pub(crate) tier: TierId,
    pub(crate) run: Run,
    pub(crate) slots: SlotRun,
    /// Of a write, one bit a page: the checksum on record has become that of a newer version.
    pub(crate) outdated: u64,
}

/// Operations under way, by number; numbers are used again.
#[derive(Debug, Default)]
pub(crate) struct Ios {
    entries: Vec<Option<Io>>,
    vacant: Vec<u32>,
    /// Reads under way, and probes.
    reads: u32,
    /// Writes under way, to each tier.
    writes: [u32; TIERS_MAX],
    drops: u32,
    /// Have left the guest with new content; the next burst of writes.
    unwritten: Vec<(PageNo, Slot)>,
}

impl Ios {
    /// The page's frame in that slot is to be written with the next burst.
    pub(crate) fn add_unwritten(&mut self, page: PageNo, slot: Slot) {
        self.unwritten.push((page, slot));
    }

    /// What waits for the next burst. A page that was rescued or given back is still in it, and one that has left twice
    /// is in it twice.
    pub(crate) fn unwritten(&mut self) -> &mut Vec<(PageNo, Slot)> {
        &mut self.unwritten
    }

    pub(crate) fn unwritten_count(&self) -> usize {
        self.unwritten.len()
    }

    pub(crate) fn start(&mut self, io: Io) -> IoId {
        *self.count(io) += 1;
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() as u32 - 1
        });
        self.entries[id as usize] = Some(io);
        IoId(id)
    }

    fn count(&mut self, io: Io) -> &mut u32 {
        match io.kind {
            IoKind::Read { .. } | IoKind::Probe { .. } => &mut self.reads,
            IoKind::Write(_) => &mut self.writes[io.tier.index()],
            IoKind::Drop => &mut self.drops,
        }
    }

    pub(crate) fn start_drop(&mut self, tier: TierId, run: Run) -> IoId {
        self.start(Io { kind: IoKind::Drop, tier, run, slots: SlotRun::new(Slot(0), 0), outdated: 0 })
    }

    pub(crate) fn end_drop(&mut self, id: IoId) -> (TierId, Run) {
        let Io { kind: IoKind::Drop, tier, run, .. } = self.end(id) else { panic!("{id:?} is not a drop") };
        (tier, run)
    }

    /// Whether the device works with the frame in the slot.
    pub(crate) fn work_with(&self, slot: Slot) -> bool {
        self.slots().any(|slots| slots.contains(slot))
    }

    /// The slots that the device works with.
    pub(crate) fn slots(&self) -> impl Iterator<Item = SlotRun> {
        self.entries.iter().flatten().map(|io| io.slots)
    }

    /// A newer version of the page gets its checksum on record while an older one is being written.
    pub(crate) fn outdate(&mut self, page: PageNo) {
        let of_page = |io: &&mut Io| matches!(io.kind, IoKind::Write(_)) && io.run.contains(page);
        if let Some(io) = self.entries.iter_mut().flatten().find(of_page) {
            io.outdated |= 1 << (page.0 - io.run.start.0);
        }
    }

    /// No read and no write is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.reads == 0 && self.writes.iter().all(|count| *count == 0)
    }

    /// Reads under way.
    pub(crate) fn reads(&self) -> u32 {
        self.reads
    }

    /// Whether a read of the page is under way.
    pub(crate) fn is_read(&self, page: PageNo) -> bool {
        self.reads_any(Run::one(page))
    }

    /// Whether a read of one of the run's pages is under way.
    pub(crate) fn reads_any(&self, run: Run) -> bool {
        let of_run = |io: &Io| {
            let meets = io.run.start < run.end() && run.start < io.run.end();
            matches!(io.kind, IoKind::Read { .. } | IoKind::Probe { .. }) && meets
        };
        self.reads > 0 && self.entries.iter().flatten().any(of_run)
    }

    pub(crate) fn end(&mut self, id: IoId) -> Io {
        self.vacant.push(id.0);
        let io = self.entries[id.0 as usize].take().expect("an operation ends once");
        *self.count(io) -= 1;
        io
    }

    /// Writes under way.
    pub(crate) fn writes(&self) -> u32 {
        self.writes.iter().sum()
    }

    pub(crate) fn writes_to(&self, tier: TierId) -> u32 {
        self.writes[tier.index()]
    }

    /// The device fills the slot for its page.
    pub(crate) fn is_reading(&self, slot: Slot) -> bool {
        let is_read = |io: &&Io| matches!(io.kind, IoKind::Read { .. });
        self.entries.iter().flatten().filter(is_read).any(|io| io.slots.contains(slot))
    }
}
