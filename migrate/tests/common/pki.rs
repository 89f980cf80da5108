//! Certificates of tests.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use migrate::tls::{Credentials, ServerName};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// No peer is waited for longer.
const PATIENCE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// When a certificate is valid.
#[derive(Clone, Copy)]
pub enum When {
    Now,
    TillYesterday,
    FromTomorrow,
}

pub struct Ca {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    /// All of them have the same name, as those of an impostor would.
    pub fn new() -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "the CA of the tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ca { pem: params.self_signed(&key).unwrap().pem(), issuer: Issuer::new(params, key) }
    }

    /// Of a host with that name.
    pub fn host(&self, name: &str, when: When) -> Credentials {
        let now = date_time_ymd(1970, 1, 1) + SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        (params.not_before, params.not_after) = match when {
            When::Now => (now - DAY, now + DAY),
            When::TillYesterday => (now - 9 * DAY, now - DAY),
            When::FromTomorrow => (now + DAY, now + 9 * DAY),
        };
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap().pem();
        Credentials { ca: self.pem.clone(), cert, key: key.serialize_pem() }
    }
}

/// A client that does not look at its own certificate before it shows it. Says whether it is let in.
pub fn show(to: SocketAddr, ca: &Ca, shown: Option<&Credentials>) -> io::Result<()> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match shown {
        Some(shown) => config.with_client_auth_cert(
            vec![CertificateDer::from_pem_slice(shown.cert.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(shown.key.as_bytes()).unwrap(),
        ),
        None => Ok(config.with_no_client_auth()),
    };
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let connection = ClientConnection::new(Arc::new(config.unwrap()), name).unwrap();
    let tcp = TcpStream::connect(to).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    // In TLS 1.3 it believes to be in when it has shown it.
    StreamOwned::new(connection, tcp).read_exact(&mut [0; 1])
}
