//! Why there is no secure connection, in words that say what to do.

use std::io;

use rustls::{AlertDescription, CertificateError, Error};

/// Why there is no secure connection, or why there is none any more.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Certificates or key of this side.
    #[error("{0}")]
    Ours(String),
    /// What the peer is, or does.
    #[error("{0}")]
    Peer(String),
    /// The connection broke before both sides were sure of each other.
    #[error("the link broke while each side was to prove who it is")]
    Link(#[from] io::Error),
    /// The peer did not prove who it is within the limit.
    #[error("it took too long to prove who it is")]
    TooSlow,
}

impl From<Error> for TlsError {
    fn from(error: Error) -> TlsError {
        TlsError::Peer(match error {
            Error::NoCertificatesPresented => {
                "it shows no certificate, and one of the CA in ca.crt is asked for".to_string()
            }
            Error::InvalidCertificate(error) => format!("its certificate {}", certificate(&error)),
            Error::AlertReceived(alert) => match told(alert) {
                Some(text) => text.to_string(),
                None => format!("it broke off with the TLS alert {alert:?}"),
            },
            Error::InvalidMessage(_) => {
                "it does not speak TLS: let it serve with --tls, or do without TLS with --plain".to_string()
            }
            Error::PeerIncompatible(why) => format!("it cannot speak TLS 1.3 as it is done here: {why:?}"),
            Error::DecryptError => "what it sent was changed on the way".to_string(),
            error => format!("it breaks the rules of TLS: {error}"),
        })
    }
}

/// What is wrong with a certificate.
pub(super) fn certificate(error: &CertificateError) -> String {
    use CertificateError as C;
    match error {
        C::Expired | C::ExpiredContext { .. } => {
            "has expired (or a clock is wrong): issue a new one".to_string()
        }
        C::NotValidYet | C::NotValidYetContext { .. } => "is not valid yet: is a clock wrong?".to_string(),
        C::UnknownIssuer | C::BadSignature => "is not of the CA in ca.crt".to_string(),
        C::NotValidForName => "is for another name: see --tls-name".to_string(),
        C::NotValidForNameContext { expected, presented } => format!(
            "is not for {}, but for {}: see --tls-name",
            expected.to_str(),
            if presented.is_empty() { "no name".to_string() } else { presented.join(", ") }
        ),
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => "is for another purpose".to_string(),
        other => format!("cannot be used: {other}"),
    }
}

/// What the peer means by its alert.
fn told(alert: AlertDescription) -> Option<&'static str> {
    use AlertDescription as A;
    Some(match alert {
        A::UnknownCA | A::DecryptError => {
            "it says that this host's certificate (host.crt) is not of its CA: both need the same ca.crt"
        }
        A::CertificateExpired => {
            "it says that this host's certificate (host.crt) has expired, or its clock is wrong"
        }
        A::CertificateRequired => "it asks for a certificate: use --tls",
        A::BadCertificate | A::UnsupportedCertificate | A::CertificateUnknown | A::CertificateRevoked => {
            "it does not accept this host's certificate (host.crt)"
        }
        A::ProtocolVersion | A::HandshakeFailure => "it does not speak TLS 1.3 as it is done here",
        _ => return None,
    })
}
