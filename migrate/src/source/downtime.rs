//! The texts about a downtime that is longer than it should be: before the VM is stopped, while it stands still, and in
//! the report.

use std::time::Duration;

use super::error::SendError;
use super::session::{Failed, Session};
use crate::link::error::SessionError;
use crate::pace::Standing;
use crate::report::DowntimeParts;

/// Why the VM is resumed: it has stood still for too long.
pub(super) fn stood_too_long(session: &Session<'_>, max: Duration) -> Failed {
    let max_ms = max.as_millis();
    refrain(
        session,
        format!("it has stood still for the {max_ms} ms that --max-downtime allows, and is not there yet"),
    )
}

/// Why the VM is not stopped: it would stand still for too long.
pub(super) fn too_long(session: &Session<'_>, standing: &Standing) -> Failed {
    let max_ms = session.options.max_downtime.unwrap_or_default().as_millis();
    let expected_ms = standing.expected().as_millis();
    let text = format!(
        "it would stand still for about {expected_ms} ms, where --max-downtime allows {max_ms} ms: {}",
        did_not_fit(session, standing)
    );
    refrain(session, text)
}

fn refrain(session: &Session<'_>, text: String) -> Failed {
    session.rounds.guard.failed(SessionError::Unable(text.clone()));
    Failed::Said(SendError::Downtime(text))
}

/// Says how things stood when no further round was allowed.
fn did_not_fit(session: &Session<'_>, standing: &Standing) -> String {
    let megabytes = |pages: f64| pages * swapd::PAGE_SIZE as f64 / 1e6;
    let held_back = match (session.options.max_throttle, standing.throttle) {
        (0, _) => " (--no-throttle)".to_string(),
        (_, 0) => String::new(),
        (_, percent) => format!(" held back by {percent} %"),
    };
    format!(
        "after {} rounds (--max-rounds) {:.1} MB were left to send; the guest writes {:.1} MB/s{held_back}, \
         the link carries {:.1} MB/s",
        standing.rounds,
        megabytes(standing.remaining_pages as f64),
        megabytes(standing.dirty_per_s),
        megabytes(standing.sent_per_s),
    )
}

/// Why the downtime was more than it should be, if it was.
pub(super) fn missed(
    session: &Session<'_>,
    standing: &Standing,
    downtime: Duration,
    parts: Option<&DowntimeParts>,
) -> Option<String> {
    let target = session.options.downtime_target;
    if downtime <= target {
        return None;
    }
    let Some(parts) = parts else { return Some("the link broke during the hand-over".to_string()) };
    let expected = standing.expected();
    if standing.rounds >= session.options.max_rounds && expected > target {
        return Some(did_not_fit(session, standing));
    }
    let (part, took) = parts.named().into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("there are parts");
    Some(format!("{} ms were expected; the longest part was {part}, {took:.1} ms", expected.as_millis()))
}
