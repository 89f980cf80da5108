//! The target's side: whom its daemon lets in.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{
    NoServerSessionStorage, ParsedCertificate, ServerConfig, ServerConnection, WebPkiClientVerifier,
};
use rustls::version::TLS13;

use super::credentials::Credentials;
use super::error::TlsError;
use super::{handshake, provider, tunnel};

/// How to be sure of those who want to come: they have a certificate of the CA.
#[derive(Clone, Debug)]
pub struct Server(Arc<ServerConfig>);

/// A connection to somebody with a certificate of the CA.
#[derive(Debug)]
pub struct Secured {
    /// The near end of the tunnel.
    pub stream: TcpStream,
    certificate: CertificateDer<'static>,
}

impl Secured {
    /// Whether that name is in the peer's certificate.
    pub fn is(&self, name: &ServerName<'_>) -> bool {
        ParsedCertificate::try_from(&self.certificate)
            .and_then(|certificate| verify_server_name(&certificate, name))
            .is_ok()
    }
}

impl Server {
    /// By this host's credentials. Whoever has a certificate of their CA is let in.
    ///
    /// # Errors
    /// If the credentials are of no use.
    pub fn new(credentials: &Credentials) -> Result<Server, TlsError> {
        let parsed = credentials.parse()?;
        let ours = |error: &dyn std::error::Error| {
            TlsError::Ours(format!("host.crt and host.key cannot be used: {error}"))
        };
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(parsed.roots), provider())
            .build()
            .map_err(|error| ours(&error))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| ours(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(parsed.chain, parsed.key)
            .map_err(|error| ours(&error))?;
        // Every connection proves anew who is there.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Server(Arc::new(config)))
    }

    /// Makes sure of whoever has connected, within `limit`.
    ///
    /// # Errors
    /// [`TlsError`]; the peer has been told by a TLS alert if it could be.
    pub fn secure(&self, mut tcp: TcpStream, limit: Duration) -> Result<Secured, TlsError> {
        tcp.set_nodelay(true)?;
        let connection = ServerConnection::new(self.0.clone());
        let mut tls = rustls::Connection::from(connection.map_err(TlsError::from)?);
        handshake::let_in(&mut tls, &mut tcp, limit)?;
        let chain = tls.peer_certificates().unwrap_or_default();
        let certificate = chain.first().cloned().ok_or(rustls::Error::NoCertificatesPresented)?;
        Ok(Secured { stream: tunnel::start(tls, tcp)?, certificate })
    }
}
