//! What became of a session whose hand-over is in doubt.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use crate::hello::{Hello, OpeningError, RefuseKind, read_opening, refuse, write_opening};
use crate::limits::RESOLVE_CALL_LIMIT;
use crate::outside::StdStream;
use crate::registry::{Outcome, Registry, RegistryError};
use crate::session::SessionId;
use crate::wire::opening::Answer;

#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    #[error("could not ask {to}")]
    Link { to: String, source: io::Error },
    #[error("{to} answered rubbish: {text}")]
    Peer { to: String, text: String },
    #[error("{to} cannot say: {text}")]
    Refused { to: String, text: String },
}

/// Asks the target's daemon once, bounded in time. [`Outcome::NotThere`] burns the session: it can never start there.
///
/// # Errors
/// If there is no clear answer: the session is in doubt still.
pub fn resolve(to: &str, session: SessionId) -> Result<Outcome, ResolveError> {
    let link = |source| ResolveError::Link { to: to.to_string(), source };
    let mut stream = connect(to, RESOLVE_CALL_LIMIT).map_err(link)?;
    write_opening(&mut stream, &Hello::Resolve { session }.encode()).map_err(link)?;
    let rubbish = |text: String| ResolveError::Peer { to: to.to_string(), text };
    let (preamble, body) =
        read_opening(&mut stream, RESOLVE_CALL_LIMIT, || false).map_err(|error| match error {
            OpeningError::Io(source) => link(source),
            OpeningError::Wire(error) => rubbish(error.to_string()),
            OpeningError::Cancelled => link(io::ErrorKind::Interrupted.into()),
        })?;
    match Answer::decode(&preamble, &body).map_err(|error| rubbish(error.to_string()))? {
        Answer::Resolved(outcome) => Ok(outcome),
        Answer::Refused { text, .. } => Err(ResolveError::Refused { to: to.to_string(), text }),
        Answer::Accepted { .. } => Err(rubbish("it accepted a VM that was not offered".to_string())),
    }
}

/// The daemon's side: burns the session unless it was committed, and says which.
///
/// # Errors
/// If the registry cannot say; the source hears that as well and asks again.
pub fn answer_resolve(
    stream: &mut StdStream,
    session: SessionId,
    registry: &dyn Registry,
) -> Result<Outcome, RegistryError> {
    match registry.burn(session) {
        Ok(outcome) => {
            if let Err(error) = write_opening(stream, &Answer::Resolved(outcome).encode()) {
                tracing::debug!(%error, "an outcome could not be delivered; the source will ask again");
            }
            Ok(outcome)
        }
        Err(error) => {
            refuse(stream, RefuseKind::Other, &error.to_string());
            Err(error)
        }
    }
}

/// Connects to the first address of `to` that answers.
pub(crate) fn connect(to: &str, limit: Duration) -> io::Result<StdStream> {
    let addresses: Vec<SocketAddr> = to.to_socket_addrs()?.collect();
    let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "no such address"));
    for address in addresses {
        result = StdStream::connect_timeout(&address, limit);
        if result.is_ok() {
            break;
        }
    }
    let stream = result?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
