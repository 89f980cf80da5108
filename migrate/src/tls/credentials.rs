//! What a host proves by who it is, and by what it knows others: a directory of three PEM files, or their content.

use std::fmt;
use std::path::Path;

use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use serde::{Deserialize, Serialize};

use super::error::{TlsError, certificate};
use super::provider;

/// Longest file: a chain of a few certificates fits.
const FILE_BYTES_MAX: usize = 16 << 10;

/// PEM: `ca.crt`, `host.crt` and `host.key`.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// Whose certificates are believed.
    pub ca: String,
    /// This host's certificate, and those between it and the CA.
    pub cert: String,
    /// The private key of that certificate. A secret: neither logged nor shown.
    pub key: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(not shown)")
    }
}

/// The same, understood.
pub(super) struct Parsed {
    pub(super) roots: RootCertStore,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

impl Credentials {
    /// Most that there is to be told of them.
    pub const BYTES_MAX: usize = 3 * FILE_BYTES_MAX;

    /// Reads the three files of a directory. What is in them is looked at later.
    ///
    /// # Errors
    /// If one of the files is missing or cannot be read.
    pub fn read(dir: &Path) -> Result<Credentials, TlsError> {
        let read = |name: &str| {
            let path = dir.join(name);
            let fail =
                |why: String| TlsError::Ours(format!("{}: {why} (`vmemd pki` makes it)", path.display()));
            let bytes = std::fs::metadata(&path).map_err(|error| fail(error.to_string()))?.len();
            if bytes > FILE_BYTES_MAX as u64 {
                return Err(fail(format!("{bytes} bytes are too many: at most {FILE_BYTES_MAX}")));
            }
            std::fs::read_to_string(&path).map_err(|error| fail(error.to_string()))
        };
        Ok(Credentials { ca: read("ca.crt")?, cert: read("host.crt")?, key: read("host.key")? })
    }

    /// Checked as the peer will: that the certificate is the CA's, and valid now.
    pub(super) fn parse(&self) -> Result<Parsed, TlsError> {
        let wrong =
            |name: &str, why: &dyn fmt::Display| TlsError::Ours(format!("{name} cannot be used: {why}"));
        let certificates = |name: &str, text: &str| {
            let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
            match found {
                Ok(found) if found.is_empty() => Err(wrong(name, &"there is no certificate in it")),
                Ok(found) => Ok(found),
                Err(error) => Err(wrong(name, &error)),
            }
        };
        let mut roots = RootCertStore::empty();
        for root in certificates("ca.crt", &self.ca)? {
            roots.add(root).map_err(|error| wrong("ca.crt", &error))?;
        }
        let chain = certificates("host.crt", &self.cert)?;
        let leaf = ParsedCertificate::try_from(&chain[0]).map_err(|error| wrong("host.crt", &error))?;
        let algorithms = provider().signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&leaf, &roots, &chain[1..], UnixTime::now(), algorithms)
            .map_err(|error| match error {
                rustls::Error::InvalidCertificate(error) => {
                    TlsError::Ours(format!("this host's certificate (host.crt) {}", certificate(&error)))
                }
                error => wrong("host.crt", &error),
            })?;
        let key =
            PrivateKeyDer::from_pem_slice(self.key.as_bytes()).map_err(|error| wrong("host.key", &error))?;
        Ok(Parsed { roots, chain, key })
    }
}
