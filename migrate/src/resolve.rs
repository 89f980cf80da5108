//! What became of a session whose hand-over is in doubt.

use std::net::TcpStream;

use crate::registry::{Outcome, Registry, RegistryError};
use crate::session::SessionId;

#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    #[error("could not ask {to}")]
    Link { to: String, source: std::io::Error },
    #[error("{to} answered rubbish: {text}")]
    Peer { to: String, text: String },
    #[error("{to} cannot say: {text}")]
    Refused { to: String, text: String },
}

/// Asks the target's daemon once, bounded in time. [`Outcome::NotThere`] burns the session: it can never start there.
pub fn resolve(_to: &str, _session: SessionId) -> Result<Outcome, ResolveError> {
    todo!()
}

/// The daemon's side: burns the session unless it was committed, and says which.
///
/// # Errors
/// If the registry cannot say; the source hears that as well and asks again.
pub fn answer_resolve(
    _stream: &mut TcpStream,
    _session: SessionId,
    _registry: &dyn Registry,
) -> Result<Outcome, RegistryError> {
    todo!()
}
