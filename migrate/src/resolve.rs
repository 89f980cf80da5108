//! What became of a session whose hand-over is in doubt.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use crate::hello::{OpeningError, read_opening, refuse, write_opening};
use crate::limits::{RESOLVE_CALL_LIMIT, scaled_for_tests};
use crate::outside::{StdStream, secure};
use crate::registry::{Outcome, Registry, RegistryError};
use crate::session::SessionId;
use crate::tls::{Security, TlsError};
use crate::wire::opening::{Answer, Hello, RefuseKind};

/// Why the target gave no clear answer. The session is in doubt still, so the VM must stay paused at the source.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// There is no connection to the target, or it broke before the answer.
    #[error("could not ask {to}")]
    Link {
        /// `HOST:PORT` of the target, as given.
        to: String,
        /// The operating system's error.
        source: io::Error,
    },
    /// It is not known that the right target is there, so it was not asked, and would not have been believed.
    #[error("{to} was not asked")]
    Insecure {
        /// `HOST:PORT` of the target, as given.
        to: String,
        /// Why the connection is not secure.
        source: TlsError,
    },
    /// The answer is against the protocol.
    #[error("{to} answered rubbish: {text}")]
    Peer {
        /// `HOST:PORT` of the target, as given.
        to: String,
        /// What is wrong with the answer.
        text: String,
    },
    /// The target was asked and cannot say, for one of the reasons in [`RegistryError`].
    #[error("{to} cannot say: {text}")]
    Refused {
        /// `HOST:PORT` of the target, as given.
        to: String,
        /// The target's reason, for the operator.
        text: String,
    },
}

/// Asks the target's daemon once, bounded in time. [`Outcome::NotThere`] burns the session: it can never start there.
///
/// # Errors
/// If there is no clear answer: the session is in doubt still.
pub fn resolve(to: &str, security: &Security, session: SessionId) -> Result<Outcome, ResolveError> {
    let link = |source| ResolveError::Link { to: to.to_string(), source };
    let limit = scaled_for_tests(RESOLVE_CALL_LIMIT);
    let mut stream = connect(to, security, limit).map_err(|error| match error {
        ReachError::Link(source) => link(source),
        ReachError::Insecure(source) => ResolveError::Insecure { to: to.to_string(), source },
    })?;
    write_opening(&mut stream, &Hello::Resolve { session }.encode()).map_err(link)?;
    let rubbish = |text: String| ResolveError::Peer { to: to.to_string(), text };
    let (preamble, body) = read_opening(&mut stream, limit, || false).map_err(|error| match error {
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
    registry: &Registry,
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

/// Why there is no connection to a target, or none that may be used.
#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    /// No address of the target answers in time, or its name has none.
    #[error("cannot be reached")]
    Link(#[from] io::Error),
    /// The one that answers is not known to be the target.
    #[error("is not secure")]
    Insecure(#[from] TlsError),
}

/// Connects to the first address of `to` that answers, and makes sure that it is the right peer.
pub(crate) fn connect(to: &str, security: &Security, limit: Duration) -> Result<StdStream, ReachError> {
    let stream = connect_tcp(to, limit)?;
    match security {
        Security::Plain => Ok(stream),
        Security::ThisHost if is_this_host(&stream)? => Ok(stream),
        Security::ThisHost => Err(TlsError::Ours(
            "the VM's memory would go to another host unencrypted, and to whoever answers there: use --tls DIR \
             (`vmemd pki` makes one), or --plain if the network is yours alone"
                .to_string(),
        )
        .into()),
        Security::Tls(client) => Ok(secure(client, stream, to, limit)?),
    }
}

fn is_this_host(stream: &StdStream) -> io::Result<bool> {
    let [here, there] =
        [stream.local_addr()?, stream.peer_addr()?].map(|address| address.ip().to_canonical());
    Ok(there.is_loopback() || there == here)
}

fn connect_tcp(to: &str, limit: Duration) -> io::Result<StdStream> {
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
