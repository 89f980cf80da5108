//! What a session waits for the other side to do, and the limit that ends the waiting.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::limits::{
    ACCEPT_LIMIT, COMMIT_LIMIT, CONNECT_LIMIT, PLACEMENT_LIMIT, PREPARE_LIMIT, RESOLVE_LIMIT, RUNNING_LIMIT,
    SILENCE_LIMIT, WATCH_LIMIT, scaled_for_tests,
};

/// What is waited for. Each has one limit ([`Wait::limit`]), so that no session waits for ever.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// For a connection to the target's daemon.
    Connect,
    /// For the target to accept the VM.
    Accept,
    /// For the target to take the heat map.
    Heat,
    /// For the VM to show what it writes.
    Writes,
    /// For a round's pages to arrive.
    Round,
    /// For the target to have everything in its place.
    Prepared,
    /// For the source's commit.
    Commit,
    /// For the target's word that the VM runs there.
    Running,
    /// For an answer to what became of the commit.
    Resolve,
    /// For the target's look at what the VM touches.
    Placement,
    /// For any sign of life: the other side has been silent for longer than it is when all is well.
    Peer,
}

impl Wait {
    /// What is waited for, in words.
    pub fn what(self) -> &'static str {
        self.during().trim_start_matches("waiting for ")
    }

    pub(crate) const fn during(self) -> &'static str {
        match self {
            Wait::Connect => "waiting for a connection to the target",
            Wait::Accept => "waiting for the target to accept the VM",
            Wait::Heat => "waiting for the target to take the heat map",
            Wait::Writes => "waiting for the VM to show what it uses",
            Wait::Round => "waiting for the target to have all pages of the round",
            Wait::Prepared => "waiting for the target to have the whole VM in its place",
            Wait::Commit => "waiting for the source's commit",
            Wait::Running => "waiting for the target's word that the VM runs there",
            Wait::Resolve => "waiting for the target's answer to whether the VM runs there",
            Wait::Placement => "waiting for the target's look at what the VM touches",
            Wait::Peer => "waiting for a sign of life from the other side",
        }
    }

    /// The name of the limit that ends the waiting, and its value.
    pub fn limit(self) -> (&'static str, Duration) {
        let (name, limit) = match self {
            Wait::Connect => ("CONNECT_LIMIT", CONNECT_LIMIT),
            Wait::Accept => ("ACCEPT_LIMIT", ACCEPT_LIMIT),
            Wait::Heat | Wait::Peer => ("SILENCE_LIMIT", SILENCE_LIMIT),
            Wait::Writes => ("WATCH_LIMIT", WATCH_LIMIT),
            Wait::Round | Wait::Prepared => ("PREPARE_LIMIT", PREPARE_LIMIT),
            Wait::Commit => ("COMMIT_LIMIT", COMMIT_LIMIT),
            Wait::Running => ("RUNNING_LIMIT", RUNNING_LIMIT),
            Wait::Resolve => ("RESOLVE_LIMIT", RESOLVE_LIMIT),
            Wait::Placement => ("PLACEMENT_LIMIT", PLACEMENT_LIMIT),
        };
        (name, scaled_for_tests(limit))
    }
}
