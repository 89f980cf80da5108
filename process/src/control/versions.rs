//! Which version of the control protocol a client and a VM's process speak: the highest that both know.
//!
//! A client writes its range into each of its requests, where a process that knows of one version does not look. A
//! process writes the version that it has chosen in a line before its answer, to a client that has written a range. Who
//! writes neither speaks version 1. So a choice costs no exchange of its own, and a request is good for whoever reads
//! it.

use migrate::versions::{NoneInCommon, Side, Versions, highest_common};
use serde::Serialize;
use serde_json::Value;

use super::protocol::Request;
use crate::failure::{Failure, FailureKind};

/// The versions of the control protocol that this vmemd speaks. `docs/control.md` says when to raise which end.
pub const VERSIONS: Versions = 1..=1;
/// The version that a side speaks which says nothing of versions.
pub const UNSAID: u16 = 1;

const _: () = assert!(*VERSIONS.start() <= *VERSIONS.end());

/// A request, and the versions of which it is: in each of them it means the same, and its answer is understood.
#[derive(Debug, Serialize)]
pub(super) struct Offer<'a> {
    #[serde(flatten)]
    request: &'a Request,
    versions: [u16; 2],
}

impl<'a> Offer<'a> {
    pub(super) fn new(request: &'a Request, versions: &Versions) -> Offer<'a> {
        Offer { request, versions: [*versions.start(), *versions.end()] }
    }
}

/// A request as a VM's process reads it.
#[derive(Debug, PartialEq)]
pub struct Asked {
    /// What the client wants.
    pub request: Request,
    /// The version in which it is answered, for a client that wants to know.
    pub version: Option<u16>,
}

impl Asked {
    /// The versions are looked at first: a request of another version need not be one that we know.
    ///
    /// # Errors
    /// [`FailureKind::Link`] if there is no version in common, [`FailureKind::Usage`] if it is no request.
    pub fn new(line: Value, ours: &Versions) -> Result<Asked, Failure> {
        let versions = line.get("versions").map(Asked::versions).transpose()?;
        let theirs = versions.clone().unwrap_or(UNSAID..=UNSAID);
        let Some(version) = highest_common(ours, &theirs) else {
            return Err(none_in_common(theirs, ours.clone()));
        };
        let request = serde_json::from_value(line).map_err(|error| no_request(&error))?;
        Ok(Asked { request, version: versions.is_some().then_some(version) })
    }

    fn versions(value: &Value) -> Result<Versions, Failure> {
        match serde_json::from_value::<[u16; 2]>(value.clone()) {
            Ok([lowest, highest]) if lowest <= highest => Ok(lowest..=highest),
            Ok([lowest, highest]) => Err(no_request(&format!("versions {lowest} to {highest} are none"))),
            Err(error) => Err(no_request(&format!("its versions: {error}"))),
        }
    }
}

/// How every vmemd begins its answer to a line that is no request to it.
const NO_REQUEST: &str = "this is no request: ";

/// The answer to a client whose line is no request.
pub(super) fn no_request(why: &dyn std::fmt::Display) -> Failure {
    Failure::new(FailureKind::Usage, format!("{NO_REQUEST}{why}; docs/control.md describes them"))
}

/// Whether it is such an answer: of requests that we make, the process knows fewer than we.
pub(super) fn is_no_request(failure: &Failure) -> bool {
    failure.kind == FailureKind::Usage && failure.text.starts_with(NO_REQUEST)
}

/// The failure on both sides if they have no version in common.
pub(super) fn none_in_common(client: Versions, process: Versions) -> Failure {
    let client = Side { name: "command", versions: client, remedy: "use a newer vmemd" };
    let process = Side {
        name: "VM's process",
        versions: process,
        remedy: "use the vmemd with which the VM was started",
    };
    let none = NoneInCommon { protocol: "control protocol", sides: [client, process] };
    Failure::new(FailureKind::Link, none.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::{CheckpointBase, CheckpointRequest, Force, MigrateRequest, Trust};
    use serde_json::json;

    fn requests() -> Vec<Request> {
        let migrate = MigrateRequest {
            to: "b:7".to_owned(),
            ram_bytes: Some(u64::MAX),
            downtime_target_ms: 50,
            max_downtime_ms: None,
            streams: 2,
            max_rounds: 30,
            max_throttle: 99,
            check_placement: true,
            trust: Trust { plain: true, ..Trust::default() },
        };
        let checkpoint = CheckpointRequest {
            downtime_target_ms: 50,
            max_rounds: 30,
            max_throttle: 99,
            rate: Some(200 << 20),
            base: Some(CheckpointBase::Cloned),
            stop: true,
            without_disks: false,
            plain: false,
            encrypted: true,
        };
        vec![
            Request::Stat,
            Request::Pause,
            Request::Resume,
            Request::Resolve { force: Some(Force::Gone) },
            Request::Stop,
            Request::Cancel,
            Request::SetRam { ram_bytes: u64::MAX },
            Request::Migrate(migrate),
            Request::Checkpoint(checkpoint),
            Request::Checkpointed { name: "2026-11-29T23-20-00Z".to_owned(), bytes: u64::MAX },
            Request::RemoveSnapshot { file: "/d".to_owned(), snapshot: "vmemd-1".to_owned() },
            Request::RecordFaults { seconds: 7 },
        ]
    }

    #[test]
    fn every_request_is_read_with_its_versions_and_without() {
        for request in requests() {
            let offer = serde_json::to_value(Offer::new(&request, &(1..=3))).unwrap();
            assert_eq!(offer["versions"], json!([1, 3]));
            // As a process that knows of one version only reads it.
            assert_eq!(serde_json::from_value::<Request>(offer.clone()).unwrap(), request);
            let read = Asked::new(offer, &(2..=9)).unwrap();
            assert_eq!((read.request, read.version), (request.clone(), Some(3)));
            let unsaid = serde_json::to_value(&request).unwrap();
            assert_eq!(Asked::new(unsaid, &VERSIONS).unwrap(), Asked { request, version: None });
        }
    }

    #[test]
    fn a_cancel_is_short_enough_to_be_seen_beside_a_migration() {
        let widest = Offer::new(&Request::Cancel, &(u16::MAX..=u16::MAX));
        assert!(serde_json::to_vec(&widest).unwrap().len() < super::super::server::PEEKED);
    }

    #[test]
    fn the_highest_of_both_is_chosen_whatever_the_ranges() {
        let ends = 0..6_u16;
        for (a, b, c, d) in ends
            .clone()
            .flat_map(|a| ends.clone().map(move |b| (a, b)))
            .flat_map(|(a, b)| (1..4_u16).flat_map(move |c| (c..5).map(move |d| (a, b, c, d))))
        {
            let read = Asked::new(json!({ "op": "stat", "versions": [a, b] }), &(c..=d));
            match (a..=b).filter(|version| (c..=d).contains(version)).max() {
                Some(version) => {
                    assert_eq!(read, Ok(Asked { request: Request::Stat, version: Some(version) }))
                }
                None if a > b => assert_eq!(read.unwrap_err().kind, FailureKind::Usage),
                None => assert_eq!(read.unwrap_err().kind, FailureKind::Link),
            }
        }
    }

    #[test]
    fn no_version_in_common_is_told_before_the_request_is_looked_at() {
        for (theirs, text) in [
            (
                json!([2, 4]),
                "the command speaks versions 2 to 4 of the control protocol, the VM's process version 1: \
                             use the vmemd with which the VM was started",
            ),
            (
                json!([0, 0]),
                "the command speaks version 0 of the control protocol, the VM's process version 1: use a newer vmemd",
            ),
        ] {
            let read = Asked::new(json!({ "op": "of another version", "versions": theirs }), &VERSIONS);
            assert_eq!(read, Err(Failure::new(FailureKind::Link, text)));
        }
        // A client from before ranges, some day.
        let read = Asked::new(json!({ "op": "stat" }), &(2..=3));
        assert!(read.unwrap_err().text.ends_with("use a newer vmemd"));
    }

    #[test]
    fn what_is_no_range_is_no_request() {
        for versions in [
            json!(null),
            json!(1),
            json!([]),
            json!([1]),
            json!([1, 1, 1]),
            json!([-1, 1]),
            json!([1, 65536]),
            json!([1.5, 2]),
            json!("1..=1"),
            json!({ "lowest": 1 }),
            json!([2, 1]),
            json!([65535, 0]),
        ] {
            let read = Asked::new(json!({ "op": "stop", "versions": versions }), &VERSIONS);
            assert_eq!(read.unwrap_err().kind, FailureKind::Usage, "{versions}");
        }
        for line in [json!(null), json!([]), json!("stat"), json!({}), json!({ "versions": [1, 1] })] {
            assert_eq!(Asked::new(line.clone(), &VERSIONS).unwrap_err().kind, FailureKind::Usage, "{line}");
        }
    }
}
