//! Where a VM is, why it stands still, and who may let it go on: values in, decisions out.
//!
//! Where it is ([`Whereabouts`]) and why it stands still ([`Hold`]) change independently of each other. All changes of
//! a hold:
//!
//! | event | `Free` | `Paused` | `Stalled` | `StalledAndPaused` |
//! |---|---|---|---|---|
//! | [`pause`](Hold::pause), [`pause_by`](Hold::pause_by) | `Paused` | stays | `StalledAndPaused` | stays |
//! | [`unpause`](Hold::unpause) | stays | `Free` | stays | `Stalled` |
//! | [`free`](Hold::free) | stays | `Free` | `Free` | `Free` |
//! | [`found_still`](Hold::found_still), of a VM that ran before the stall | `Paused` | stays | stays | stays |
//! | the same, of one that stood still before | | | `StalledAndPaused` | stays |
//! | [`found_running`](Hold::found_running) | stays | `Free` | stays | `Stalled` |
//! | [`stall`](Hold::stall) | `Stalled` | `StalledAndPaused` | stays | stays |
//! | [`stood_before`](Hold::stood_before), [`ran_in_stall`](Hold::ran_in_stall), [`ease`](Hold::ease) | stays | stays | stays | stays |
//! | [`end_stall`](Hold::end_stall), if it is relieved | stays | stays | `Free` | `Paused` |
//!
//! Who may let it go on is [`may_resume`].

use std::time::Instant;

use migrate::SessionId;
use migrate::tls::Security;

/// Who wants a VM to stand still.
pub(crate) const BY_VMEMD: &str = "by `vmemd pause`";
pub(crate) const BY_ITS_MONITOR: &str = "by a monitor of its QEMU, not by vmemd";
pub(crate) const AS_IT_CAME: &str = "it was paused when it came";
pub(crate) const AS_SAVED: &str = "it was paused when it was saved";
pub(crate) const BY_RESTORE: &str = "by `vmemd restore --paused`";
pub(crate) const FOR_ITS_CHECKPOINT: &str =
    "by `vmemd checkpoint --stop`, which stops it when the checkpoint is durable";
pub(crate) const DID_NOT_GO_ON: &str = "it could not be let go on: see its log";

/// Where the VM is.
#[derive(Clone, Debug)]
pub(crate) enum Whereabouts {
    Arriving,
    Here,
    Migrating,
    InDoubt {
        session: SessionId,
        /// How to be sure that it is the target who answers.
        security: Security,
        to: String,
        since: Instant,
        /// What the target said when it was asked last, or why it could not be asked.
        said: String,
    },
    Moved {
        to: String,
    },
}

impl Whereabouts {
    /// Why nothing can be done with the VM `name` here, unless it is here and neither comes nor goes.
    pub(crate) fn elsewhere(&self, name: &str) -> Option<String> {
        match self {
            Whereabouts::Here => None,
            Whereabouts::Arriving => Some("it is still arriving".to_owned()),
            Whereabouts::Migrating => {
                Some("it is migrating; cancel that first (Ctrl-C of `vmemd migrate`)".to_owned())
            }
            Whereabouts::InDoubt { to, .. } => {
                Some(format!("it may run at {to}; see `vmemd resolve {name}`"))
            }
            Whereabouts::Moved { to } => Some(format!("it has moved to {to}")),
        }
    }
}

/// What a VM that is paused needs of a tier: its store, or the checkpoint that it was restored from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Want {
    /// Frames: the store takes no writes.
    Frames,
    /// Pages: the store, or the checkpoint, gives none.
    Pages,
}

/// A VM that is paused because it needs something that a tier does not do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Stall {
    /// One at least; the last one stays until the VM goes on.
    reasons: Vec<(Want, String)>,
    /// It ran until then: it goes on by itself.
    ran: bool,
    /// That is certain: it was seen to run since the stall began, so whatever has paused it since is vmemd's.
    seen_running: bool,
    /// It has what it needs again, but a migration had the VM then.
    relieved: bool,
}

/// Why a VM stands still, as far as vmemd knows. A monitor of its own may have let it go on all the same: of a machine
/// that says what it does, that counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Hold {
    /// For no reason: it runs.
    #[default]
    Free,
    /// Somebody wants it so: who, or what for.
    Paused(&'static str),
    /// For what a tier does not do. It goes on by itself.
    Stalled(Stall),
    /// For both. When the stall has ended, it is paused.
    StalledAndPaused(Stall, &'static str),
}

/// Who wants to let a VM go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Resumer {
    /// `vmemd resume`. In doubt, that asks the target first: see `doubt`.
    Operator,
    /// The tier, which does again what the VM stood still for.
    Store,
    /// A migration that has not taken it away. `stopped_it`: the VM was told to stand still for that.
    Source { stopped_it: bool },
    /// A migration that has brought it, or a restore.
    Target,
    /// A checkpoint. `stopped_it`: the VM was told to stand still for that.
    Checkpoint { stopped_it: bool },
}

/// Who may let a VM go on:
///
/// | who | where the VM has to be | what it may stand still for |
/// |---|---|---|
/// | the operator | here | anything |
/// | a tier | here | a stall that is relieved, before which it ran, and nothing else |
/// | a migration that failed, if that stopped it | migrating, or in doubt until now | nothing else |
/// | a migration that brought it, or a restore | here, as of the commit | anything but that it came paused, or was saved so |
/// | a checkpoint, if that stopped it | here | nothing else |
///
/// Nobody else may. A VM that somebody else lets go on would run at two hosts, or against the will of its pauser.
pub(crate) fn may_resume(who: Resumer, whereabouts: &Whereabouts, hold: &Hold) -> bool {
    let here = matches!(whereabouts, Whereabouts::Here);
    match who {
        Resumer::Operator => here,
        Resumer::Store => here && matches!(hold, Hold::Stalled(stall) if stall.relieved && stall.ran),
        Resumer::Source { stopped_it } => {
            let leaving = matches!(whereabouts, Whereabouts::Migrating | Whereabouts::InDoubt { .. });
            stopped_it && leaving && *hold == Hold::Free
        }
        Resumer::Target => here && hold.paused().is_none(),
        Resumer::Checkpoint { stopped_it } => here && stopped_it && *hold == Hold::Free,
    }
}

impl Hold {
    /// Who wants it to stand still, if somebody does.
    pub(crate) fn paused(&self) -> Option<&'static str> {
        match self {
            Hold::Free | Hold::Stalled(_) => None,
            Hold::Paused(by) | Hold::StalledAndPaused(_, by) => Some(by),
        }
    }

    fn stalled(&self) -> Option<&Stall> {
        match self {
            Hold::Free | Hold::Paused(_) => None,
            Hold::Stalled(stall) | Hold::StalledAndPaused(stall, _) => Some(stall),
        }
    }

    pub(crate) fn is_stalled(&self) -> bool {
        self.stalled().is_some()
    }

    /// It was stalled, and has what it needs.
    pub(crate) fn is_relieved(&self) -> bool {
        self.stalled().is_some_and(|stall| stall.relieved)
    }

    /// What is told of a stalled VM.
    pub(crate) fn stall_reason(&self) -> Option<String> {
        let told = self.stalled()?.reasons.iter().map(|(want, reason)| match want {
            Want::Frames => format!(
                "{reason}; it goes on by itself when the store takes writes; it may also get more RAM, or migrate"
            ),
            Want::Pages => format!("{reason}; it goes on by itself when that answers; nothing is lost"),
        });
        Some(told.collect::<Vec<_>>().join("; "))
    }

    fn change(&mut self, change: impl FnOnce(&mut Option<Stall>, &mut Option<&'static str>)) {
        let mut paused = self.paused();
        let mut stall = match std::mem::take(self) {
            Hold::Free | Hold::Paused(_) => None,
            Hold::Stalled(stall) | Hold::StalledAndPaused(stall, _) => Some(stall),
        };
        change(&mut stall, &mut paused);
        *self = match (stall, paused) {
            (None, None) => Hold::Free,
            (None, Some(by)) => Hold::Paused(by),
            (Some(stall), None) => Hold::Stalled(stall),
            (Some(stall), Some(by)) => Hold::StalledAndPaused(stall, by),
        };
    }

    /// For `vmemd pause` of a VM that stood still already, or did not. Whoever stopped it before is still to be named.
    /// Returns whether there was nothing to do.
    pub(crate) fn pause(&mut self, stood: bool) -> bool {
        let already = stood && !self.is_stalled();
        let by = match self.paused() {
            // A checkpoint that fails lets the VM go on, unless it is the user who wants it to stand still.
            Some(FOR_ITS_CHECKPOINT) => BY_VMEMD,
            by if already => by.unwrap_or(BY_ITS_MONITOR),
            _ => BY_VMEMD,
        };
        self.pause_by(by);
        already
    }

    /// From now on it stands still for this, whatever was said before.
    pub(crate) fn pause_by(&mut self, by: &'static str) {
        self.change(|_, paused| *paused = Some(by));
    }

    /// Nobody wants it to stand still any more. Returns who did.
    pub(crate) fn unpause(&mut self) -> Option<&'static str> {
        let by = self.paused();
        self.change(|_, paused| *paused = None);
        by
    }

    /// It goes on.
    pub(crate) fn free(&mut self) {
        *self = Hold::Free;
    }

    /// It stands still, by whatever means, such as a monitor of its user's; if not for a stall before which it ran.
    pub(crate) fn found_still(&mut self) {
        if !self.stalled().is_some_and(|stall| stall.ran) {
            self.pause_by(self.paused().unwrap_or(BY_ITS_MONITOR));
        }
    }

    /// It runs by its machine's own account: it was let go on past vmemd.
    pub(crate) fn found_running(&mut self) {
        self.unpause();
    }

    /// It needs something that a tier does not do. Returns whether it has to be paused for that: it was not stalled
    /// before.
    pub(crate) fn stall(&mut self, want: Want, reason: String) -> bool {
        let mut begins = true;
        self.change(|stall, _| match stall {
            Some(stall) if !stall.relieved => {
                stall.reasons.push((want, reason));
                begins = false;
            }
            _ => {
                let reasons = vec![(want, reason)];
                *stall = Some(Stall { reasons, ran: true, seen_running: false, relieved: false });
            }
        });
        begins
    }

    /// It stood still already when it was to be paused for the stall, so it does not go on by itself; unless it was
    /// [seen to run](Hold::ran_in_stall) since.
    pub(crate) fn stood_before(&mut self) {
        self.change(|stall, _| stall.iter_mut().for_each(|stall| stall.ran &= stall.seen_running));
    }

    /// A checkpoint or a migration pauses it, and finds it running in its stall: it came before whoever pauses the VM
    /// for that. Without this mark, the VM would then be taken for one that its user had paused, and never go on.
    pub(crate) fn ran_in_stall(&mut self) {
        self.change(|stall, _| stall.iter_mut().for_each(|stall| stall.seen_running |= stall.ran));
    }

    /// The tier does that again. A stall for something else goes on.
    pub(crate) fn ease(&mut self, want: Want) {
        self.change(|stall, _| {
            let Some(stall) = stall else { return };
            if stall.reasons.iter().any(|(other, _)| *other != want) {
                stall.reasons.retain(|(other, _)| *other != want);
            } else {
                stall.relieved = true;
            }
        });
    }

    /// Forgets a stall that has been relieved.
    pub(crate) fn end_stall(&mut self) {
        self.change(|stall, _| drop(stall.take_if(|stall| stall.relieved)));
    }
}

#[cfg(test)]
#[path = "hold_tests.rs"]
mod tests;
