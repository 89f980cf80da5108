//! Where a page that arrives in a migration goes: into RAM or into the store.
//!
//! RAM is for what is hot. The source sends cold pages first, so at the time of one arrival there may be no room kept
//! for hot ones that nobody knows yet. When such a page comes (again, or with a newer heat map), it goes into RAM all
//! the same, a little beyond what may be there, and the coldest pages of RAM give way to it. Of all other pages only
//! what is left when there is room for everything that is still expected: the pages to come, and the hot ones in the
//! store, for they will be sent again.

/// Facts at the time of one arrival, in pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arrivals {
    /// Pages that may be placed in RAM altogether.
    pub room: u64,
    /// How many more, until colder ones have given way.
    pub overdraft: u64,
    /// Pages in RAM now.
    pub in_ram: u64,
    /// Pages that have not come yet in any version.
    pub to_come: u64,
    /// Hot pages that are in the store.
    pub hot_in_store: u64,
    /// No page in RAM is known to be colder than this.
    pub coldest: u8,
}

/// A page is hot from this heat on.
pub const HOT: u8 = 1;
/// Heat of a page that comes again, at least: it was written while the migration went on.
pub const HEAT_AGAIN: u8 = 128;

impl Arrivals {
    /// Whether a page of this heat goes into RAM.
    pub fn into_ram(&self, heat: u8) -> bool {
        let left = self.room.saturating_sub(self.in_ram);
        if heat >= HOT {
            return left > 0 || (heat > self.coldest && self.in_ram < self.room + self.overdraft);
        }
        left > 0 && self.to_come + self.hot_in_store <= left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EMPTY: Arrivals =
        Arrivals { room: 100, overdraft: 8, in_ram: 0, to_come: 0, hot_in_store: 0, coldest: 0 };

    #[test]
    fn everything_goes_to_ram_when_it_fits() {
        assert!(Arrivals { to_come: 100, ..EMPTY }.into_ram(0));
        assert!(!Arrivals { to_come: 101, ..EMPTY }.into_ram(0));
    }

    #[test]
    fn beyond_the_room_only_what_is_hotter_than_something_there() {
        let full = Arrivals { in_ram: 100, ..EMPTY };
        assert!(!full.into_ram(0));
        assert!(full.into_ram(1));
        assert!(!Arrivals { coldest: 4, ..full }.into_ram(4));
        assert!(Arrivals { coldest: 4, ..full }.into_ram(5));
        assert!(!Arrivals { in_ram: 108, ..full }.into_ram(255), "until colder ones have given way");
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
                let facts = Arrivals { room, overdraft: 0, in_ram, to_come: total - nth, ..EMPTY };
                if facts.into_ram(u8::from(is_hot)) {
                    in_ram += 1;
                    hot_in_ram += u64::from(is_hot);
                }
            }
            prop_assert_eq!(in_ram, room.min(total));
            prop_assert_eq!(hot_in_ram, hot.min(room));
        }
    }
}
