//! The source's side: whom it believes to be its target.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::{ClientConfig, ClientConnection, Resumption};
use rustls::pki_types::ServerName;
use rustls::version::TLS13;

use super::credentials::Credentials;
use super::error::TlsError;
use super::{handshake, provider, tunnel};

/// What a source asks of its target before it sends it anything.
#[derive(Clone, Debug, Default)]
pub enum Security {
    /// Nothing, but it must be on this very host.
    #[default]
    ThisHost,
    /// Nothing: everybody on the way can read the VM's memory, or be the target.
    Plain,
    /// A certificate of the CA for the right name, over TLS 1.3.
    Tls(Arc<Client>),
}

/// How to be sure of a target, and make it sure of this host.
#[derive(Debug)]
pub struct Client {
    config: Arc<ClientConfig>,
    /// Whom the target must be; None: whom the address names.
    name: Option<ServerName<'static>>,
}

impl Client {
    /// By this host's credentials. The target's certificate must be for `name`, or, without it, for the host in the
    /// target's address.
    ///
    /// # Errors
    /// If the credentials or the name are of no use.
    pub fn new(credentials: &Credentials, name: Option<&str>) -> Result<Client, TlsError> {
        let parsed = credentials.parse()?;
        let ours =
            |error: rustls::Error| TlsError::Ours(format!("host.crt and host.key cannot be used: {error}"));
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(ours)?
            .with_root_certificates(parsed.roots)
            .with_client_auth_cert(parsed.chain, parsed.key)
            .map_err(ours)?;
        // Every connection proves anew who is there.
        config.resumption = Resumption::disabled();
        let name = name.map(server_name).transpose()?;
        Ok(Client { config: Arc::new(config), name })
    }

    /// Makes sure of the target at `to` (`HOST:PORT`), within `limit`, and gives the near end of a tunnel to it.
    ///
    /// # Errors
    /// [`TlsError`]; the target has been told by a TLS alert if it could be.
    pub fn secure(&self, mut tcp: TcpStream, to: &str, limit: Duration) -> Result<TcpStream, TlsError> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => server_name(host_of(to))?,
        };
        let connection = ClientConnection::new(self.config.clone(), name);
        let mut tls = rustls::Connection::from(connection.map_err(TlsError::from)?);
        handshake::ask_in(&mut tls, &mut tcp, limit)?;
        Ok(tunnel::start(tls, tcp)?)
    }
}

fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    let wrong = |_| {
        TlsError::Ours(format!(
            "{name:?} is no name of a host: give the one in its certificate with --tls-name"
        ))
    };
    ServerName::try_from(name.to_owned()).map_err(wrong)
}

/// What is in front of the port.
fn host_of(to: &str) -> &str {
    let host = to.rsplit_once(':').map_or(to, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}
