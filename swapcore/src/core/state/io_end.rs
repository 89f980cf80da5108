//! What becomes of each page of a read or a write when that ends: decided here from values, done by the core.

use super::ios::{Landing, Purpose};
use crate::error::IoErrorKind;
use crate::table::PageState;
use crate::units::PageNo;

/// What becomes of a page that has been read.
///
/// | its frame | the reading | waited for | landing | it |
/// |---|---|---|---|---|
/// | is nobody's any more | any | any | any | is where it went meanwhile: the frame is free |
/// | its own | failed, or another content | any | any | is bad |
/// | its own | right | yes | any | goes into the guest |
/// | its own | right | no | staging | waits in standby, and is to prove itself |
/// | its own | right | no | home | is to be written there |
/// | its own | right | no | guest, and it is the marker | waits in standby |
/// | its own | right | no | guest, and it is not | goes into the guest |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ReadEnd {
    Elsewhere,
    Bad(IoErrorKind),
    IntoGuest,
    Standby { prefetched: bool },
    GoesHome,
}

/// `content`: that on record, or why there is none or another one.
pub(crate) fn read_end(
    orphan: bool,
    content: Result<(), IoErrorKind>,
    waited_for: bool,
    page: PageNo,
    landing: Landing,
) -> ReadEnd {
    match (orphan, content, waited_for, landing) {
        (true, ..) => ReadEnd::Elsewhere,
        (false, Err(kind), ..) => ReadEnd::Bad(kind),
        (false, Ok(()), true, _) => ReadEnd::IntoGuest,
        (false, Ok(()), false, Landing::Staging) => ReadEnd::Standby { prefetched: true },
        (false, Ok(()), false, Landing::Home) => ReadEnd::GoesHome,
        (false, Ok(()), false, Landing::Guest { marker }) if marker == Some(page) => {
            ReadEnd::Standby { prefetched: false }
        }
        (false, Ok(()), false, Landing::Guest { .. }) => ReadEnd::IntoGuest,
    }
}

/// What becomes of a page that has been written.
///
/// | its frame | the page | the write | waited for | purpose | it |
/// |---|---|---|---|---|---|
/// | is nobody's any more | leaves anew | any | | | has its newer version written now |
/// | is nobody's any more | is empty or lost | any | | | needs nothing |
/// | is nobody's any more | is anywhere else | any | | | has a copy in the store, if that is what the sum on record is of |
/// | its own | leaves | any | yes | any | goes back into the guest |
/// | its own | leaves | ended well | no | page-out | is in standby |
/// | its own | leaves | ended well | no | placement, taken home | is in the store alone |
/// | its own | leaves, the origin has it | failed | no | any | is at the origin alone, as before |
/// | its own | leaves | failed | no | any | stays: its frame has the only newest version |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum WriteEnd {
    WriteNewer,
    Nothing,
    Elsewhere { has_copy: bool },
    Rescue,
    Standby,
    Stored,
    Stays,
}

/// What is known of a page at the end of its write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    pub(crate) orphan: bool,
    pub(crate) state: PageState,
    pub(crate) well: bool,
    /// What is stored of it was at the origin when the write ended.
    pub(crate) at_origin: bool,
    /// The checksum on record is that of the version written, and not a later one's.
    pub(crate) on_record: bool,
    pub(crate) waited_for: bool,
}

pub(crate) fn write_end(page: Written, purpose: Purpose) -> WriteEnd {
    let Written { orphan, state, well, at_origin, on_record, waited_for } = page;
    match (orphan, state, waited_for, well, purpose) {
        (true, PageState::Leaving, ..) => WriteEnd::WriteNewer,
        (true, PageState::Untouched | PageState::Poisoned, ..) => WriteEnd::Nothing,
        (true, ..) => WriteEnd::Elsewhere { has_copy: well && on_record },
        (false, _, true, ..) => WriteEnd::Rescue,
        (false, _, false, true, Purpose::PageOut) => WriteEnd::Standby,
        (false, _, false, true, Purpose::Placement | Purpose::TakenHome) => WriteEnd::Stored,
        (false, _, false, false, _) if at_origin => WriteEnd::Stored,
        (false, _, false, false, _) => WriteEnd::Stays,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::PageState::{Leaving, Poisoned, Resident, Standby, Stored, Untouched};

    const PAGE: PageNo = PageNo(7);
    const GUEST: Landing = Landing::Guest { marker: None };
    const MARKED: Landing = Landing::Guest { marker: Some(PAGE) };
    const BAD: IoErrorKind = IoErrorKind::Mismatch;

    #[test]
    fn each_row_of_a_read() {
        let rows = [
            ("given back while it was read", (true, Ok(()), false, GUEST), ReadEnd::Elsewhere),
            ("given back, and the read failed", (true, Err(BAD), false, GUEST), ReadEnd::Elsewhere),
            ("another content", (false, Err(BAD), false, GUEST), ReadEnd::Bad(BAD)),
            ("another content, and a vCPU waits", (false, Err(BAD), true, MARKED), ReadEnd::Bad(BAD)),
            ("a fault's own page", (false, Ok(()), true, GUEST), ReadEnd::IntoGuest),
            ("a neighbour", (false, Ok(()), false, Landing::Staging), ReadEnd::Standby { prefetched: true }),
            (
                "a neighbour that is touched meanwhile",
                (false, Ok(()), true, Landing::Staging),
                ReadEnd::IntoGuest,
            ),
            ("on its way home", (false, Ok(()), false, Landing::Home), ReadEnd::GoesHome),
            ("touched on its way home", (false, Ok(()), true, Landing::Home), ReadEnd::IntoGuest),
            (
                "on its way home, with another content",
                (false, Err(BAD), false, Landing::Home),
                ReadEnd::Bad(BAD),
            ),
            ("a stream's marker", (false, Ok(()), false, MARKED), ReadEnd::Standby { prefetched: false }),
            ("a marker that is touched meanwhile", (false, Ok(()), true, MARKED), ReadEnd::IntoGuest),
            ("another page of that window", (false, Ok(()), false, GUEST), ReadEnd::IntoGuest),
        ];
        for (name, (orphan, content, waited_for, landing), end) in rows {
            assert_eq!(read_end(orphan, content, waited_for, PAGE, landing), end, "{name}");
        }
    }

    #[test]
    fn each_row_of_a_write() {
        let own = Written {
            orphan: false,
            state: Leaving,
            well: true,
            at_origin: false,
            on_record: true,
            waited_for: false,
        };
        let at_origin = Written { at_origin: true, ..own };
        let gone = |state| Written { orphan: true, state, ..own };
        let (copy, none) = (WriteEnd::Elsewhere { has_copy: true }, WriteEnd::Elsewhere { has_copy: false });
        let rows = [
            ("arrived anew for the store", gone(Leaving), WriteEnd::WriteNewer),
            ("given back", gone(Untouched), WriteEnd::Nothing),
            ("arrived as lost", gone(Poisoned), WriteEnd::Nothing),
            ("rescued by a copy", gone(Resident), copy),
            ("rescued, and the write failed", Written { well: false, ..gone(Resident) }, none),
            ("two versions later in RAM", Written { on_record: false, ..gone(Resident) }, none),
            ("touched while it was written", Written { waited_for: true, ..own }, WriteEnd::Rescue),
            (
                "touched, and the write failed",
                Written { waited_for: true, well: false, ..own },
                WriteEnd::Rescue,
            ),
            ("a victim", own, WriteEnd::Standby),
            ("a victim, and the write failed", Written { well: false, ..own }, WriteEnd::Stays),
            ("from standby at the origin to standby at home", at_origin, WriteEnd::Standby),
            ("the same, and the write failed", Written { well: false, ..at_origin }, WriteEnd::Stored),
        ];
        for (name, page, end) in rows {
            assert_eq!(write_end(page, Purpose::PageOut), end, "{name}");
        }
        assert_eq!(write_end(own, Purpose::Placement), WriteEnd::Stored);
        assert_eq!(write_end(at_origin, Purpose::TakenHome), WriteEnd::Stored);
        assert_eq!(write_end(Written { well: false, ..at_origin }, Purpose::TakenHome), WriteEnd::Stored);
        assert_eq!(write_end(Written { well: false, ..own }, Purpose::Placement), WriteEnd::Stays);
        // A page whose frame is an orphan and that has itself left once more is where its state says.
        assert_eq!([Standby, Stored].map(|state| write_end(gone(state), Purpose::PageOut)), [copy, copy]);
    }
}
