//! The simulated guest: vCPUs that read and write, sleep in faults and look at what they get.

use super::Sim;
use super::kernel::Entry;
use crate::units::{PageNo, Run};

pub(super) const VCPUS: usize = 4;

#[derive(Clone, Copy, Debug)]
pub(super) enum Access {
    Read,
    Write(u64),
    /// Writes what the store has: the page is as it was when it left.
    WriteAsStored,
}

#[derive(Debug)]
pub(super) struct Guest {
    /// What each of them is about to do; who has met a fault does it again.
    pub(super) vcpus: [Option<(PageNo, Access)>; VCPUS],
    pub(super) awake: [bool; VCPUS],
    /// As when the store fails and no frame is left: who waits goes on to wait, nobody else does anything.
    pub(super) paused: bool,
    walk: u64,
    next_value: u64,
}

impl Guest {
    pub(super) fn new() -> Self {
        Guest { vcpus: [None; VCPUS], awake: [true; VCPUS], paused: false, walk: 0, next_value: 1 }
    }

    /// Content that no page has had before.
    pub(super) fn new_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }
}

impl Sim {
    /// One of the vCPUs does what comes next.
    pub(super) fn run_guest(&mut self) {
        let vcpu = self.random.below(VCPUS as u64) as usize;
        if self.guest.awake[vcpu] && !self.guest.paused {
            let (page, access) = self.guest.vcpus[vcpu].take().unwrap_or_else(|| self.next_access());
            self.access(vcpu, page, access);
        }
    }

    /// True if it got through.
    pub(super) fn access(&mut self, vcpu: usize, page: PageNo, access: Access) -> bool {
        let index = page.index();
        let content = match self.kernel.guest[index] {
            Entry::Missing => {
                self.guest.vcpus[vcpu] = Some((page, access));
                self.guest.awake[vcpu] = false;
                self.kernel.faults.push(page);
                return false;
            }
            Entry::Poison => {
                if self.oracle.truth[index].is_some() {
                    self.trace.suspect.set(Some(page));
                    panic!("{page} is poisoned though it was not lost");
                }
                return true;
            }
            Entry::Frame(content) => content,
        };
        let truth = self.oracle.truth[index];
        if Some(content) != truth {
            self.trace.suspect.set(Some(page));
            panic!("the guest reads {content:#x} from {page}, and wrote {truth:#x?}");
        }
        let value = match access {
            Access::Read => return true,
            Access::Write(value) => value,
            Access::WriteAsStored => self.disk.content[self.stored_place(page)],
        };
        self.kernel.guest[index] = Entry::Frame(value);
        self.kernel.written[index] = true;
        self.oracle.truth[index] = Some(value);
        self.oracle.written(page);
        self.trace.page("guest writes", page, Some(value));
        true
    }

    /// Walks, jumps, and a few pages that are used all the time.
    fn next_access(&mut self) -> (PageNo, Access) {
        let pages = self.memory.len() as u64;
        let page = match self.random.below(4) {
            0 => self.random.below(pages),
            1 => self.random.below(pages.min(40)),
            _ => {
                self.guest.walk = if self.random.one_in(50) {
                    self.random.below(pages)
                } else {
                    (self.guest.walk + 1) % pages
                };
                self.guest.walk
            }
        };
        let access = match self.random.below(20) {
            0..8 => Access::Read,
            8 => Access::Write(0),
            9 => Access::WriteAsStored,
            _ => Access::Write(self.guest.new_value()),
        };
        (self.memory[page as usize], access)
    }

    pub(super) fn wake(&mut self, run: Run) {
        for (vcpu, awake) in self.guest.vcpus.iter().zip(&mut self.guest.awake) {
            *awake |= vcpu.is_some_and(|(page, _)| run.contains(page));
        }
    }
}
