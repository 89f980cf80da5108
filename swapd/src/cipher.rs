//! Encryption of the store: AES-256 in XTS mode (IEEE 1619, NIST SP 800-38E). A page is a data unit; its number is the tweak.
//!
//! The key is made at the start, is known to this process alone, and goes with it; so does all that the store holds. What XTS does not
//! tell (that content is not what was written, or is older) the checksums do, which are in memory and of the plain content.

use std::io;

use aes::Aes256;
use aes::cipher::KeyInit;
use xts_mode::{Xts128, get_tweak_default};

use crate::units::{PAGE_SIZE, Run};

const KEY_BYTES: usize = 32;

/// A key that nobody else has.
pub(crate) struct Cipher(Box<Xts128<Aes256>>);

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cipher")
    }
}

impl Cipher {
    /// A new key from the kernel. With `lock` it is kept out of the host's swap.
    ///
    /// # Errors
    /// If the kernel gives no random bytes, or does not lock memory.
    pub(crate) fn random(lock: bool) -> io::Result<Cipher> {
        let mut keys = [[0; KEY_BYTES]; 2];
        keys.iter_mut().try_for_each(|key| fill_random(key))?;
        let cipher = Cipher::of(&keys);
        // Not through a compiler that knows that nobody reads it again.
        keys.iter_mut().flatten().for_each(|byte| {
            // SAFETY: a byte of this function's own array.
            unsafe { std::ptr::write_volatile(byte, 0) }
        });
        if lock {
            let at = &raw const *cipher.0;
            // SAFETY: locking changes nothing of the content of the pages that the cipher is in.
            if unsafe { libc::mlock(at.cast(), size_of_val(&*cipher.0)) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(cipher)
    }

    fn of([content, tweak]: &[[u8; KEY_BYTES]; 2]) -> Cipher {
        let [content, tweak] = [content, tweak].map(|key| Aes256::new(key.into()));
        Cipher(Box::new(Xts128::new(content, tweak)))
    }

    /// # Panics
    /// If the bytes are not those of the run's pages, as for [`Cipher::decrypt`].
    pub(crate) fn encrypt(&self, run: Run, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), run.bytes());
        self.0.encrypt_area(bytes, PAGE_SIZE, run.start.0.into(), get_tweak_default);
    }

    pub(crate) fn decrypt(&self, run: Run, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), run.bytes());
        self.0.decrypt_area(bytes, PAGE_SIZE, run.start.0.into(), get_tweak_default);
    }
}

fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    // SAFETY: the kernel writes at most so many bytes there.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match usize::try_from(filled) {
        // Up to 256 bytes come whole.
        Ok(filled) if filled == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageNo;

    /// IEEE 1619-2018, annex B, vector 10: AES-256, data unit ff, the bytes 0 to 255 twice. A data unit of ours is longer and begins the same.
    #[test]
    fn the_standard_s_vector() {
        let hex = |text: &str| -> Vec<u8> {
            (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
        };
        let content = hex("2718281828459045235360287471352662497757247093699959574966967627");
        let tweak = hex("3141592653589793238462643383279502884197169399375105820974944592");
        let cipher = Cipher::of(&[content.try_into().unwrap(), tweak.try_into().unwrap()]);
        let plain: Vec<u8> = (0..PAGE_SIZE).map(|at| at as u8).collect();
        let run = Run::one(PageNo(0xff));
        let mut bytes = plain.clone();
        cipher.encrypt(run, &mut bytes);
        assert_eq!(bytes[..32], hex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"));
        cipher.decrypt(run, &mut bytes);
        assert_eq!(bytes, plain);
    }

    #[test]
    fn every_page_and_every_key_makes_something_else_of_it() {
        let cipher = Cipher::random(false).unwrap();
        let mut pages = vec![7; 3 * PAGE_SIZE];
        cipher.encrypt(Run::new(PageNo(4), 3), &mut pages);
        let mut other = vec![7; PAGE_SIZE];
        Cipher::random(false).unwrap().encrypt(Run::one(PageNo(4)), &mut other);
        let mut seen: Vec<&[u8]> = pages.chunks(PAGE_SIZE).chain([&other[..]]).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 4);
        // Runs are cut otherwise when they are read.
        cipher.decrypt(Run::one(PageNo(4)), &mut pages[..PAGE_SIZE]);
        cipher.decrypt(Run::new(PageNo(5), 2), &mut pages[PAGE_SIZE..]);
        assert!(pages.iter().all(|byte| *byte == 7));
    }
}
