//! Where a page that arrives in a migration goes: into RAM or into the store.
//!
//! The source sends cold pages first and the hottest last. So as long as more pages are still to come than RAM
//! has room for, the present one is colder than enough of those to give way; once the rest fits, all of the rest goes
//! into RAM. Hot pages that are in the store in an old version count as still to come, for they will be sent again.

/// Facts at the time of one arrival, in pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arrivals {
    /// Pages that may be placed in RAM altogether.
    pub room: u64,
    /// Pages in RAM now.
    pub in_ram: u64,
    /// Pages that have not come yet in any version.
    pub to_come: u64,
    /// Hot pages that are in the store.
    pub hot_in_store: u64,
    /// All hot pages.
    pub hot: u64,
}

/// A page is hot from this heat on.
pub const HOT: u8 = 1;

impl Arrivals {
    /// Whether a page goes into RAM. `again`: another version of it had come before.
    pub fn into_ram(&self, heat: u8, again: bool) -> bool {
        let left = self.room.saturating_sub(self.in_ram);
        let hot_fits = self.hot <= self.room;
        left > 0 && (again || (heat >= HOT && hot_fits) || self.to_come + self.hot_in_store <= left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn everything_goes_to_ram_when_it_fits() {
        let facts = Arrivals { room: 100, in_ram: 0, to_come: 100, hot_in_store: 0, hot: 0 };
        assert!(facts.into_ram(0, false));
    }

    proptest! {
        /// Cold first, then hot: RAM ends up full, and every hot page is in it if they fit.
        #[test]
        fn cold_first_fills_ram_with_the_hot(total in 10u64..2000, hot_share in 0u64..100, room_share in 1u64..100) {
            let hot = total * hot_share / 100;
            let room = (total * room_share / 100).max(1);
            let (mut in_ram, mut hot_in_ram) = (0, 0);
            for nth in 0..total {
                let is_hot = nth >= total - hot;
                let facts = Arrivals { room, in_ram, to_come: total - nth, hot_in_store: 0, hot };
                if facts.into_ram(u8::from(is_hot), false) {
                    in_ram += 1;
                    hot_in_ram += u64::from(is_hot);
                }
            }
            prop_assert_eq!(in_ram, room.min(total));
            prop_assert_eq!(hot_in_ram, hot.min(room));
        }
    }
}
