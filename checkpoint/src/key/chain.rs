//! The key of a chain, and what is derived of it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use ring::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use ring::hkdf;
use swapd::Cipher;
use zeroize::{Zeroize, Zeroizing};

/// Bytes of a key file, and of a chain's key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a salt.
pub const SALT_BYTES: usize = 32;
/// Bytes of the check value.
pub const CHECK_BYTES: usize = 16;

/// The key of a chain of checkpoints.
#[derive(Clone)]
pub struct ChainKey(Zeroizing<[u8; KEY_BYTES]>);

impl fmt::Debug for ChainKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChainKey")
    }
}

impl ChainKey {
    pub(super) fn derive(whole: &[u8; KEY_BYTES], salt: &[u8; SALT_BYTES]) -> ChainKey {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        expand(salt, whole, b"vmemd checkpoint chain", &mut *key);
        ChainKey(key)
    }

    pub(super) fn check(&self) -> [u8; CHECK_BYTES] {
        let mut check = [0; CHECK_BYTES];
        expand(&[], &*self.0, b"vmemd checkpoint check", &mut check);
        check
    }

    /// For the pages of all images of the chain.
    pub fn pages(&self) -> Cipher {
        let mut key = Zeroizing::new([0; Cipher::KEY_BYTES]);
        expand(&[], &*self.0, b"vmemd checkpoint pages", &mut *key);
        Cipher::with_key(&key)
    }

    /// For a file that has this salt, and this use.
    pub(crate) fn file(&self, salt: &[u8; SALT_BYTES], purpose: &[u8]) -> LessSafeKey {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        expand(salt, &*self.0, purpose, &mut *key);
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &*key).expect("it is as long as keys are"))
    }

    /// The end of a pipe from which the key can be read once, by whoever is passed it.
    ///
    /// # Errors
    /// If there can be no pipe.
    pub fn to_pipe(&self) -> io::Result<File> {
        let (reader, mut writer) = io::pipe()?;
        // Far less than a pipe holds: this does not wait for the reader.
        writer.write_all(&*self.0)?;
        Ok(File::from(OwnedFd::from(reader)))
    }

    /// Takes a key out of such a pipe.
    ///
    /// # Errors
    /// If it is something else.
    pub fn from_pipe(mut pipe: impl Read) -> io::Result<ChainKey> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        pipe.read_exact(&mut *key)?;
        Ok(ChainKey(key))
    }
}

/// HKDF-SHA256 (RFC 5869).
fn expand(salt: &[u8], secret: &[u8], info: &[u8], out: &mut [u8]) {
    struct Len(usize);
    impl hkdf::KeyType for Len {
        fn len(&self) -> usize {
            self.0
        }
    }
    out.zeroize();
    let key = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    let filled = key.expand(&[info], Len(out.len())).and_then(|okm| okm.fill(out));
    filled.expect("keys are shorter than what can be made of one");
}

pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    if filled == N { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
