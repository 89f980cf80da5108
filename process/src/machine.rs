//! The machine of a VM, as the VM's process drives it: a trait, with one implementation for QEMU and one for the
//! reference guest.

use std::fmt;
use std::io::{Read, Write};

use checkpoint::format::Disk;

use crate::control::protocol::{GuestStat, State};
use crate::failure::Failure;

/// A VM's processors and devices, as its process drives them. Only one of these calls is under way at a time.
pub trait Machine: Send + fmt::Debug {
    /// Whether a target could make the same machine, as it is now. Asked before a byte moves, while the guest runs;
    /// what changes after that, [`save`](Self::save) finds.
    ///
    /// # Errors
    /// Why it cannot move ([`FailureKind::CannotMove`](crate::failure::FailureKind::CannotMove)).
    fn may_move(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    /// Returns when every write to guest memory has ended that devices had under way when this was called, such as a
    /// disk's read past the page cache. The guest runs on. Bounded in time.
    ///
    /// # Errors
    /// If they do not end in time.
    fn drain(&mut self) -> Result<(), Failure>;

    /// Returns when no vCPU is in the guest, and none will be until [`resume`](Self::resume). Pausing what is paused
    /// already is no error. Bounded in time: a vCPU may wait for a page that the store has no room for.
    ///
    /// # Errors
    /// If a vCPU does not stop in time, or the guest has failed.
    fn pause(&mut self) -> Result<(), Failure>;

    /// Whether its vCPUs are let into the guest. Not if it was paused, be it by other means than
    /// [`pause`](Self::pause).
    ///
    /// # Errors
    /// If the guest has failed.
    fn runs(&mut self) -> Result<bool, Failure>;

    /// Lets the vCPUs go on, or run for the first time after [`Newcomer::load`].
    ///
    /// # Errors
    /// If the guest has failed. No vCPU has entered it then, except with
    /// [`FailureKind::InDoubt`](crate::failure::FailureKind::InDoubt): it was told to go on and has not said that it
    /// does, so it may do so at any time.
    fn resume(&mut self) -> Result<(), Failure>;

    /// The disks that it can write to, and where a checkpoint's version of each would be: a snapshot is to be called
    /// `snapshot`. Asked before a byte is saved, while the guest runs; changes nothing.
    ///
    /// # Errors
    /// If a disk can have no such version: which, why, and what to do.
    fn disks(&mut self, _snapshot: &str) -> Result<Vec<Disk>, Failure> {
        Ok(Vec::new())
    }

    /// Gives each disk of the paused guest its version of this moment; all of them, or none. Before
    /// [`save`](Self::save): a machine that was saved has no disks until it goes on. Its time counts in the pause.
    ///
    /// # Errors
    /// As [`disks`](Self::disks); or if a version cannot be made.
    fn snapshot_disks(&mut self, snapshot: &str) -> Result<Vec<Disk>, Failure> {
        self.disks(snapshot)
    }

    /// Removes the versions that [`snapshot_disks`](Self::snapshot_disks) has made: there is no checkpoint after all,
    /// or no more. Only of a guest that has gone on since.
    ///
    /// # Errors
    /// If one stays, which is told by its name. It takes room in the disk's file, and does no other harm.
    fn forget_disks(&mut self, _disks: &[Disk]) -> Result<(), Failure> {
        Ok(())
    }

    /// Deletes the snapshot of a checkpoint that is gone, if one of its disks is in that file; tells whether one is. A
    /// snapshot that is not there is no error.
    ///
    /// # Errors
    /// If the snapshot stays.
    fn remove_snapshot(&mut self, _file: &str, _snapshot: &str) -> Result<bool, Failure> {
        Ok(false)
    }

    /// What another one has to be told to become this machine, as it is now: that of its start, with what has been
    /// chosen since.
    ///
    /// # Errors
    /// If it cannot be asked.
    fn offer(&mut self, offer: &str) -> Result<String, Failure> {
        Ok(offer.to_owned())
    }

    /// Writes everything of the paused guest that is not in its memory, as it is made: it goes over the network
    /// meanwhile. It can be resumed afterwards all the same.
    ///
    /// # Errors
    /// If it runs, cannot be saved, or has become one that [cannot move](Self::may_move); or if a write fails.
    fn save(&mut self, to: &mut dyn Write) -> Result<(), Failure>;

    /// Its disks that the guest can write to, in words for a user: for a checkpoint that has nothing of what
    /// is on them.
    ///
    /// # Errors
    /// If it cannot be asked.
    fn written_disks(&mut self) -> Result<Vec<String>, Failure> {
        Ok(Vec::new())
    }

    /// About how many bytes [`save`](Self::save) will give, as far as that is known while the guest runs.
    fn state_bytes(&mut self) -> Option<u64> {
        None
    }

    /// Keeps the vCPUs out of the guest for that share of the time, 0 to 99 percent.
    fn throttle(&mut self, percent: u8);

    /// The guest as `stat` shows it. Must not wait for anything: otherwise `stat` would.
    fn view(&self) -> GuestView;

    /// What it does by its own account, if it gives one: then that counts, for others than its process may stop it and
    /// let it go on. As of the last call of [`runs`](Self::runs) at least. Must not wait for anything.
    fn run_state(&self) -> Option<RunState> {
        None
    }

    /// Why its program is ending, if it does not answer any more and has said why.
    fn ended(&self) -> Option<Failure> {
        None
    }

    /// Ends it for good: the VM was stopped, or runs elsewhere. Called when it is paused or has failed.
    ///
    /// A machine in a process of ours has touched its memory for the last time when this returns. A program that is
    /// its own process (QEMU) is told to end, which it may do later: its memory is served until then.
    ///
    /// # Errors
    /// If it cannot be told.
    fn quit(self: Box<Self>) -> Result<(), Failure>;
}

/// A guest as `stat` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestView {
    /// Number of its virtual processors.
    pub vcpus: u32,
    /// What it runs, in a word.
    pub workload: String,
    /// What it reports itself; zeros from one that does not.
    pub guest: GuestStat,
    /// Why it cannot go on, if it has failed.
    pub failed: Option<String>,
}

/// Whether a machine runs, and why not, by its own account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunState {
    /// In its own word.
    pub word: String,
    /// What `stat` shows for it.
    pub state: State,
    /// Why it does not run. None of one that somebody told to stand still.
    pub why: Option<String>,
}

/// A VM's machine at the target, before its state has come. It knows its memory, which fills meanwhile.
pub trait Newcomer: Send {
    /// Takes the state of [`Machine::save`], to its end. Memory has its final content, or provides it when touched. No
    /// vCPU may run before [`Machine::resume`].
    ///
    /// # Errors
    /// If the state is not for this machine, or cannot be read. The guest then stays at the source.
    fn load(self: Box<Self>, state: &mut dyn Read) -> Result<Box<dyn Machine>, Failure>;
}
