//! Encryption of pages, in the store and in an encrypted checkpoint: AES-256 in XTS mode (IEEE 1619, NIST SP 800-38E). A
//! page is a data unit; its number is the tweak.
//!
//! The mode is implemented here, on the AES blocks of a library, because a whole page at a time keeps the processor's
//! AES units busy. The library that has the mode works on one block after the other, which takes several times as
//! long. The tests compare the two.
//!
//! The store's key is made when the engine starts, is known to this process alone, and is gone when the process ends, as
//! is the content of the store. A checkpoint's key comes from its user. XTS does not detect content that was changed or
//! replaced by an older version. The checksums do: they are of the plain content, and in memory, or sealed beside the
//! checkpoint's pages.

use std::io;

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes256, Block};
use zeroize::Zeroize;

use swapcore::units::{PAGE_SIZE, PageNo, Run};

const KEY_BYTES: usize = 32;
const BLOCKS: usize = PAGE_SIZE / size_of::<Block>();
/// x^128 in the field of the tweaks: x^7 + x^2 + x + 1.
const CARRY: u128 = 0x87;

struct Keys {
    content: Aes256,
    tweak: Aes256,
}

/// A key of pages, ready for use.
pub struct Cipher(Box<Keys>);

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cipher")
    }
}

impl Cipher {
    /// Bytes of a key.
    pub const KEY_BYTES: usize = 2 * KEY_BYTES;

    /// A new key from the kernel. With `lock` it is kept out of the host's swap.
    ///
    /// # Errors
    /// If the kernel gives no random bytes, or does not lock memory.
    pub fn random(lock: bool) -> io::Result<Cipher> {
        let mut keys = [[0; KEY_BYTES]; 2];
        keys.iter_mut().try_for_each(|key| fill_random(key))?;
        let cipher = Cipher::of(&keys);
        keys.zeroize();
        if lock {
            cipher.lock()?;
        }
        Ok(cipher)
    }

    /// With a key that is known elsewhere: the half for the content, then the half for the tweaks. Whoever has it wipes
    /// its copy.
    pub fn with_key(key: &[u8; Cipher::KEY_BYTES]) -> Cipher {
        let (halves, _) = key.as_chunks::<KEY_BYTES>();
        Cipher::of(halves.try_into().expect("a key is two halves"))
    }

    /// Keeps the key out of the host's swap.
    ///
    /// # Errors
    /// If the kernel does not lock memory.
    pub fn lock(&self) -> io::Result<()> {
        let at = &raw const *self.0;
        // SAFETY: locking changes nothing of the content of the pages that the cipher is in.
        match unsafe { libc::mlock(at.cast(), size_of_val(&*self.0)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn of([content, tweak]: &[[u8; KEY_BYTES]; 2]) -> Cipher {
        let [content, tweak] = [content, tweak].map(|key| Aes256::new(key.into()));
        Cipher(Box::new(Keys { content, tweak }))
    }

    /// Encrypts pages where they are.
    ///
    /// # Panics
    /// If the bytes are not as many as the run's pages have.
    pub fn encrypt(&self, run: Run, bytes: &mut [u8]) {
        self.each_page(run, bytes, |blocks| self.0.content.encrypt_blocks(blocks));
    }

    /// Undoes [`Cipher::encrypt`], of the same pages.
    ///
    /// # Panics
    /// As that.
    pub fn decrypt(&self, run: Run, bytes: &mut [u8]) {
        self.each_page(run, bytes, |blocks| self.0.content.decrypt_blocks(blocks));
    }

    fn each_page(&self, run: Run, bytes: &mut [u8], work: impl Fn(&mut [Block])) {
        assert_eq!(bytes.len(), run.bytes());
        for (page, bytes) in run.pages().zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
            let masks = self.masks(page);
            let (blocks, _) = Block::slice_as_chunks_mut(bytes);
            apply(&masks, blocks);
            work(blocks);
            apply(&masks, blocks);
        }
    }

    /// The values with which the blocks of a page are combined before and after the cipher: the encrypted tweak,
    /// multiplied by x for each further block.
    fn masks(&self, page: PageNo) -> [u128; BLOCKS] {
        let mut tweak = Block::from(u128::from(page.0).to_le_bytes());
        self.0.tweak.encrypt_block(&mut tweak);
        let mut next = u128::from_le_bytes(tweak.into());
        std::array::from_fn(|_| {
            let mask = next;
            next = (mask << 1) ^ (CARRY * (mask >> 127));
            mask
        })
    }
}

fn apply(masks: &[u128; BLOCKS], blocks: &mut [Block]) {
    for (block, mask) in blocks.iter_mut().zip(masks) {
        *block = Block::from((u128::from_le_bytes((*block).into()) ^ mask).to_le_bytes());
    }
}

fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    let wanted = bytes.len();
    let filled = rustix::rand::getrandom(bytes, rustix::rand::GetRandomFlags::empty())?;
    // Up to 256 bytes come whole.
    if filled == wanted { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swapcore::units::PageNo;

    /// IEEE 1619-2018, annex B, vector 10: AES-256, data unit ff, the bytes 0 to 255 twice. A data unit of ours is
    /// longer and begins the same.
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
    fn the_library_says_the_same() {
        let keys = [[3; KEY_BYTES], [0xA5; KEY_BYTES]];
        let [content, tweak] = keys.map(|key| Aes256::new(&key.into()));
        let library = xts_mode::Xts128::new(content, tweak);
        let run = Run::new(PageNo((1 << 40) + 12345), 5);
        let plain: Vec<u8> =
            (0..run.bytes() as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let (mut ours, mut theirs) = (plain.clone(), plain.clone());
        Cipher::of(&keys).encrypt(run, &mut ours);
        library.encrypt_area(&mut theirs, PAGE_SIZE, run.start.0.into(), xts_mode::get_tweak_default);
        assert!(ours == theirs);
        let whole: Vec<u8> = keys.concat();
        Cipher::with_key(&whole.try_into().unwrap()).decrypt(run, &mut ours);
        assert!(ours == plain);
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
