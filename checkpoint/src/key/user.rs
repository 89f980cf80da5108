//! The key that a user names, as it is in a file.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zeroize::Zeroizing;

use super::chain::{ChainKey, KEY_BYTES, random};
use crate::format::manifest::{Encryption, Hex, PageCipher};

/// Of 32 bytes as text: two digits each, and the end of the line.
const TEXT_MAX: usize = 2 * KEY_BYTES + 2;
/// Where systemd puts a unit's credentials.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// Why a file is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The operating system refuses something.
    #[error("cannot {what} {path}")]
    Io {
        /// The step, as a verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// It is another kind of file, or not this user's alone.
    #[error("{path} {why}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// The key that a user names, or that of one chain.
#[derive(Clone)]
pub struct ArchiveKey {
    /// For people: where it comes from.
    from: PathBuf,
    secret: Arc<Secret>,
}

enum Secret {
    /// Of any chain, by its salt.
    Whole(Zeroizing<[u8; KEY_BYTES]>),
    Chain(ChainKey),
}

impl fmt::Debug for ArchiveKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArchiveKey").field("from", &self.from).finish_non_exhaustive()
    }
}

impl ArchiveKey {
    /// Reads a key file: 32 bytes, or 64 hexadecimal digits, which may end a line.
    ///
    /// # Errors
    /// If it cannot be read, is something else, or others than its user may read it.
    pub fn read(path: &Path) -> Result<ArchiveKey, KeyFileError> {
        let io = |what| move |source| KeyFileError::Io { what, path: path.to_owned(), source };
        // A pipe that nobody writes to must not hold the command up.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
        let file = file.map_err(io("open"))?;
        let found = file.metadata().map_err(io("look at"))?;
        let refused = |why| Err(KeyFileError::Refused { path: path.to_owned(), why });
        if !found.is_file() {
            return refused("is no regular file");
        }
        if found.uid() != 0 && found.uid() != rustix::process::geteuid().as_raw() {
            return refused("belongs to another user, who is not root either (chown)");
        }
        if found.mode() & others(path) != 0 {
            return refused("can be read or written by others than its user (chmod 600)");
        }
        let mut bytes = Zeroizing::new([0; TEXT_MAX + 1]);
        let len = read_some(file, &mut *bytes).map_err(io("read"))?;
        let Some(key) = parse(&bytes[..len]) else {
            return refused(
                "is no key: 32 bytes are wanted, or 64 hexadecimal digits (`head -c 32 /dev/urandom` makes one)",
            );
        };
        Ok(ArchiveKey { from: path.to_owned(), secret: Arc::new(Secret::Whole(key)) })
    }

    /// The key of one chain, that another process has passed.
    pub fn of_chain(key: ChainKey) -> ArchiveKey {
        ArchiveKey { from: PathBuf::from("what was passed"), secret: Arc::new(Secret::Chain(key)) }
    }

    /// Where it comes from.
    pub fn from(&self) -> &Path {
        &self.from
    }

    /// The key of the chain that has this in its manifests; none if it was made with another key.
    pub fn chain(&self, encryption: &Encryption) -> Option<ChainKey> {
        let key = match &*self.secret {
            Secret::Whole(whole) => ChainKey::derive(whole, &encryption.salt.0),
            Secret::Chain(key) => key.clone(),
        };
        let check = key.check();
        // Who can time this knows the check value already: it stands in the manifest.
        (check == encryption.check.0).then_some(key)
    }

    /// The key of a new chain, and what its manifests say of it.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub fn new_chain(&self) -> io::Result<(Encryption, ChainKey)> {
        let salt = random()?;
        let key = match &*self.secret {
            Secret::Whole(whole) => ChainKey::derive(whole, &salt),
            Secret::Chain(_) => return Err(io::Error::other("it is the key of another chain")),
        };
        let encryption =
            Encryption { cipher: PageCipher::Aes256Xts, salt: Hex(salt), check: Hex(key.check()) };
        Ok((encryption, key))
    }
}

/// The bits of a mode that a key file must not have. In a unit's own directory of credentials, systemd lets the unit's
/// user in by an access list, whose mask is in the group's place.
fn others(path: &Path) -> u32 {
    let of_unit = |directory| path.starts_with(PathBuf::from(directory));
    if std::env::var_os(CREDENTIALS).is_some_and(of_unit) { 0o027 } else { 0o077 }
}

fn read_some(mut file: File, bytes: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < bytes.len() {
        match file.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

fn parse(bytes: &[u8]) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
    if let Ok(raw) = <&[u8; KEY_BYTES]>::try_from(bytes) {
        return Some(Zeroizing::new(*raw));
    }
    let text = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    if text.len() != 2 * KEY_BYTES {
        return None;
    }
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    for (byte, digits) in key.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(digits[0])? << 4 | digit(digits[1])?;
    }
    Some(key)
}

#[cfg(test)]
#[path = "user_tests.rs"]
mod tests;
