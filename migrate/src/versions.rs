//! Which version two sides speak that each know a range of them: the highest that both know. Pure.
//!
//! The protocol of migrations and that of control sockets choose by the same rule; how a range is written is theirs.

use std::fmt;
use std::ops::RangeInclusive;

/// Versions of a protocol that one side knows. A range that ends before it begins holds none.
pub type Versions = RangeInclusive<u16>;

/// The highest version in both ranges, whichever side they are of; None if no version is in both.
#[must_use]
pub fn highest_common(one: &Versions, other: &Versions) -> Option<u16> {
    let highest = *one.end().min(other.end());
    (highest >= *one.start().max(other.start())).then_some(highest)
}

/// A range as a sentence names it: `version 2`, or `versions 2 to 4`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named(pub Versions);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (lowest, highest) = (self.0.start(), self.0.end());
        match lowest == highest {
            true => write!(f, "version {lowest}"),
            false => write!(f, "versions {lowest} to {highest}"),
        }
    }
}

/// One of two sides, in a message that names both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// What the message calls this side, such as `source`.
    pub name: &'static str,
    /// The versions that this side knows.
    pub versions: Versions,
    /// What is to be done if this side is the older one.
    pub remedy: &'static str,
}

/// Two sides that have no version in common. The one whose highest version is lower is the older one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the {} speaks {} of the {protocol}, the {} {}: {}",
    sides[0].name, Named(sides[0].versions.clone()), sides[1].name, Named(sides[1].versions.clone()), self.older().remedy
)]
pub struct NoneInCommon {
    /// What the message calls the protocol, such as `migration protocol`.
    pub protocol: &'static str,
    /// Both sides, in the order in which the message names them.
    pub sides: [Side; 2],
}

impl NoneInCommon {
    /// The side that is to be updated.
    #[must_use]
    pub fn older(&self) -> &Side {
        let [one, other] = &self.sides;
        if one.versions.end() < other.versions.end() { one } else { other }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against the sets that the ranges stand for, whichever end is the larger.
        #[test]
        fn the_choice_is_the_highest_of_both(a in 0_u16..12, b in 0_u16..12, c in 0_u16..12, d in 0_u16..12) {
            let naive = (a..=b).filter(|version| (c..=d).contains(version)).max();
            prop_assert_eq!(highest_common(&(a..=b), &(c..=d)), naive);
            prop_assert_eq!(highest_common(&(c..=d), &(a..=b)), naive);
        }

        #[test]
        fn no_range_is_too_wide_or_upside_down(a: u16, b: u16, c: u16, d: u16) {
            let chosen = highest_common(&(a..=b), &(c..=d));
            prop_assert!(chosen.is_none_or(|it| (a..=b).contains(&it) && (c..=d).contains(&it)));
            prop_assert_eq!(chosen.is_some(), a.max(c) <= b.min(d));
        }

        #[test]
        fn the_older_side_is_the_lower_one(low in 0_u16..9, gap in 1_u16..9, widths in any::<[u8; 2]>()) {
            let older = low..=low + u16::from(widths[0]);
            let newer = older.end() + gap..=older.end() + gap + u16::from(widths[1]);
            prop_assert_eq!(highest_common(&older, &newer), None);
            prop_assert_eq!(none(older.clone(), newer.clone()).older().name, "left");
            prop_assert_eq!(none(newer, older).older().name, "right");
        }
    }

    fn none(left: Versions, right: Versions) -> NoneInCommon {
        let left = Side { name: "left", versions: left, remedy: "update the left" };
        let right = Side { name: "right", versions: right, remedy: "update the right" };
        NoneInCommon { protocol: "protocol", sides: [left, right] }
    }

    #[test]
    fn a_text_names_both_ranges_and_the_side_to_update() {
        let text = "the left speaks version 2 of the protocol, the right versions 3 to 5: update the left";
        assert_eq!(none(2..=2, 3..=5).to_string(), text);
        let text = "the left speaks versions 3 to 5 of the protocol, the right version 2: update the right";
        assert_eq!(none(3..=5, 2..=2).to_string(), text);
    }
}
