//! Writes of an encrypted store. A page is encrypted into a copy, which goes to the device: the page in staging must
//! stay readable, because a fault may rescue it from there meanwhile.

use std::sync::Arc;

use memmap2::MmapMut;

use crate::cipher::Cipher;
use swapcore::core::IO_PAGES_MAX;
use swapcore::units::{PAGE_SIZE, Run};

pub(super) struct Sealer {
    cipher: Arc<Cipher>,
    /// Free copies. The one that came back last is used first, so that only as many are ever touched as were needed
    /// at the same time.
    spare: Vec<MmapMut>,
}

impl Sealer {
    pub(super) fn new(cipher: Arc<Cipher>) -> Sealer {
        Sealer { cipher, spare: Vec::new() }
    }

    /// The run's encrypted content, at the beginning of a copy that goes to [`Sealer::written`].
    pub(super) fn seal(&mut self, run: Run, bytes: &[u8]) -> MmapMut {
        let mut copy = self.spare.pop().unwrap_or_else(|| {
            // Without address space for a copy no page can leave memory any more.
            MmapMut::map_anon(IO_PAGES_MAX as usize * PAGE_SIZE).expect("address space for a write")
        });
        let sealed = &mut copy[..bytes.len()];
        sealed.copy_from_slice(bytes);
        self.cipher.encrypt(run, sealed);
        copy
    }

    pub(super) fn written(&mut self, copy: MmapMut) {
        self.spare.push(copy);
    }

    pub(super) fn cipher(&self) -> &Cipher {
        &self.cipher
    }
}
