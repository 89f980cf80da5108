//! Says in the log why somebody was turned away: once, for whoever scans ports must not fill it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

/// The same is not said again of the same address for so long.
const QUIET: Duration = Duration::from_secs(60);
/// Different things said in that time; of more there is only one line.
const TOLD_MAX: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<Told>);

/// What was said lately: of whom, when, and how often it would have been said since.
#[derive(Debug, Default)]
struct Told(HashMap<(Option<IpAddr>, String), (Instant, u64)>);

impl Refusals {
    /// `peer` is None if it is about this daemon itself.
    pub(super) fn tell(&self, peer: Option<IpAddr>, why: &str) {
        let unsaid = {
            let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            told.look(Instant::now(), peer, why)
        };
        let Some((why, unsaid)) = unsaid else { return };
        let peer = peer.map_or_else(String::new, |peer| peer.to_string());
        warn!(peer, unsaid, "refused: {why}");
    }
}

impl Told {
    /// What to say, and how often it was left unsaid before; None: nothing.
    fn look(&mut self, now: Instant, peer: Option<IpAddr>, why: &str) -> Option<(String, u64)> {
        let mut about = (peer, why.to_owned());
        if self.0.len() >= TOLD_MAX && !self.0.contains_key(&about) {
            self.0.retain(|_, (at, _)| now.duration_since(*at) < QUIET);
            if self.0.len() >= TOLD_MAX {
                about = (None, "others, more than can be listed".to_owned());
            }
        }
        let (at, unsaid) = match self.0.get_mut(&about) {
            Some(told) => told,
            None => {
                self.0.insert(about.clone(), (now, 0));
                return Some((about.1, 0));
            }
        };
        if now.duration_since(*at) < QUIET {
            *unsaid += 1;
            return None;
        }
        *at = now;
        Some((about.1, std::mem::take(unsaid)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)));

    fn said(why: &str, unsaid: u64) -> Option<(String, u64)> {
        Some((why.to_owned(), unsaid))
    }

    #[test]
    fn the_same_is_said_once_a_while_with_how_often_it_was_not() {
        let (mut told, start) = (Told::default(), Instant::now());
        assert_eq!(told.look(start, PEER, "no"), said("no", 0));
        assert_eq!(told.look(start, PEER, "no, really"), said("no, really", 0));
        assert_eq!(told.look(start, None, "no"), said("no", 0));
        for _ in 0..1000 {
            assert_eq!(told.look(start + QUIET / 2, PEER, "no"), None);
        }
        assert_eq!(told.look(start + QUIET, PEER, "no"), said("no", 1000));
        assert_eq!(told.look(start + QUIET, PEER, "no"), None);
    }

    #[test]
    fn a_crowd_gets_one_line_and_bounded_memory() {
        let (mut told, start) = (Told::default(), Instant::now());
        let lines =
            (0..10 * TOLD_MAX).filter_map(|number| told.look(start, PEER, &number.to_string())).count();
        assert_eq!(lines, TOLD_MAX + 1);
        assert_eq!(told.0.len(), TOLD_MAX + 1);
        assert_eq!(told.look(start + QUIET, PEER, "later"), said("later", 0));
        assert_eq!(told.0.len(), 1);
    }
}
