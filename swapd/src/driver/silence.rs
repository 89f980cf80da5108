//! Tiers that give nothing while the VM waits for them. The VM goes on when none of them is left.

use swapcore::units::{TIERS_MAX, TierId};

/// Which tiers are silent: one bit each.
#[derive(Debug, Default)]
pub(super) struct Silent(u8);

const _: () = assert!(TIERS_MAX <= u8::BITS as usize);

impl Silent {
    pub(super) fn falls(&mut self, tier: TierId) {
        self.0 |= 1 << tier.0;
    }

    /// Says whether none is silent any more. Else the VM waits for another one still: to let it go on now would only
    /// have it pause again.
    pub(super) fn answers(&mut self, tier: TierId) -> bool {
        self.0 &= !(1 << tier.0);
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vm_goes_on_when_the_last_silent_tier_answers() {
        let mut silent = Silent::default();
        silent.falls(TierId::STORE);
        silent.falls(TierId::ORIGIN);
        assert!(!silent.answers(TierId::STORE));
        assert!(silent.answers(TierId::ORIGIN));
        silent.falls(TierId::ORIGIN);
        silent.falls(TierId::STORE);
        silent.falls(TierId::STORE);
        assert!(!silent.answers(TierId::ORIGIN));
        assert!(silent.answers(TierId::STORE));
    }
}
