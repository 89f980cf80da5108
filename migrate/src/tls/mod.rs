//! Migrations over TLS 1.3: both sides show a certificate of the CA that they share, and check the other's.
//!
//! ```text
//!   session ─ plain ─▶ [socket pair] ─▶ tunnel thread ══ TLS over TCP ══▶ tunnel thread ─▶ [socket pair] ─▶ session
//!            the VM's process at the source                        the daemon at the target        the VM's process
//! ```
//! Sessions read and write plain descriptors, and at the target in another process than the one that has the host's
//! key. So a secured connection ends in a tunnel: its near end behaves as the TCP connection would, and whatever goes
//! wrong on the way (a record that was tampered with, an end without a farewell) is a connection that broke.

mod client;
mod credentials;
mod error;
mod handshake;
mod server;
mod tunnel;

pub use client::{Client, Security};
pub use credentials::Credentials;
pub use error::TlsError;
pub use rustls::pki_types::ServerName;
pub use server::{Secured, Server};

use std::sync::Arc;

use rustls::crypto::CryptoProvider;

/// What this program can do, rather than what some other part of the process has chosen.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
