//! The reference guest on the real KVM.

mod guest;

use guest::Guest;

#[test]
fn rewrite_verifies_its_pages() {
    for vcpus in [1, 4] {
        let Some(mut guest) = Guest::new("64M", vcpus, "rewrite:working-set=16M") else { return };
        guest.machine.start().unwrap();
        let counters = guest.wait("3 rounds", |counters| counters.rounds >= 3);
        assert_eq!(counters.mismatched_pages, 0, "{counters:?}");
    }
}
