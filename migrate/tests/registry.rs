//! The records of hand-overs, on a real file system.

use std::path::PathBuf;
use std::time::Duration;

use migrate::{Outcome, Registry, RegistryError, SessionId};

struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn fresh() -> (Place, Registry, SessionId) {
    let session = SessionId::random().unwrap();
    let place = Place(std::env::temp_dir().join(format!("vmemd-registry-{session}")));
    let registry = Registry::new(&place.0).unwrap();
    (place, registry, session)
}

#[test]
fn what_is_committed_stays() {
    let (_place, registry, session) = fresh();
    registry.begin(session).unwrap();
    registry.commit(session).unwrap().keep().unwrap();
    assert_eq!(registry.burn(session).unwrap(), Outcome::RunningThere);
    assert!(matches!(registry.commit(session), Err(RegistryError::Exists(_))));
    assert!(matches!(registry.begin(session), Err(RegistryError::Exists(_))));
}

#[test]
fn what_is_burned_never_starts() {
    let (_place, registry, session) = fresh();
    registry.begin(session).unwrap();
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
    assert!(matches!(registry.commit(session), Err(RegistryError::Burned(_))));
}

#[test]
fn a_session_without_a_record_is_no_answer() {
    let (_place, registry, session) = fresh();
    assert!(matches!(registry.commit(session), Err(RegistryError::Unknown(_))));
    assert!(matches!(registry.burn(session), Err(RegistryError::Unknown(_))));
    registry.begin(session).unwrap();
}

#[test]
fn a_vm_that_could_not_start_goes_back() {
    let (_place, registry, session) = fresh();
    registry.begin(session).unwrap();
    registry.commit(session).unwrap().revoke().unwrap();
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
}

#[test]
fn nobody_hears_of_a_commit_before_the_vm_has_started() {
    let (place, registry, session) = fresh();
    registry.begin(session).unwrap();
    let committed = registry.commit(session).unwrap();
    // Whoever asks takes the lock first.
    let record = std::fs::File::open(place.0.join(session.to_string())).unwrap();
    assert!(matches!(record.try_lock(), Err(std::fs::TryLockError::WouldBlock)));
    committed.revoke().unwrap();
    assert!(matches!(record.try_lock(), Err(std::fs::TryLockError::WouldBlock)));
    drop(committed);
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
}

#[test]
fn a_commit_that_was_never_flushed_was_none_unless_the_host_went_down() {
    let (place, registry, session) = fresh();
    registry.begin(session).unwrap();
    let path = place.0.join(session.to_string());
    let this_boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    std::fs::write(&path, format!("COMMIT?\n{}", "another-boot-".repeat(3))).unwrap();
    assert!(matches!(registry.burn(session), Err(RegistryError::Lost(_))));
    assert!(matches!(registry.commit(session), Err(RegistryError::Exists(_))));
    std::fs::write(&path, format!("COMMIT?\n{this_boot}")).unwrap();
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
}

#[test]
fn a_damaged_record_is_no_answer() {
    let (place, registry, session) = fresh();
    registry.begin(session).unwrap();
    std::fs::write(place.0.join(session.to_string()), "COMMITS\n").unwrap();
    assert!(matches!(registry.burn(session), Err(RegistryError::Damaged { .. })));
}

#[test]
fn commit_and_burn_never_both_win() {
    for _ in 0..20 {
        let (_place, registry, session) = fresh();
        registry.begin(session).unwrap();
        let (committed, outcome) = std::thread::scope(|scope| {
            let commit = scope.spawn(|| registry.commit(session).is_ok());
            let burn = scope.spawn(|| registry.burn(session).unwrap());
            (commit.join().unwrap(), burn.join().unwrap())
        });
        assert_eq!(committed, outcome == Outcome::RunningThere);
    }
}

#[test]
fn pruning_keeps_what_a_source_may_ask_for() {
    let (_place, registry, open) = fresh();
    let [committed, burned] = [(); 2].map(|()| SessionId::random().unwrap());
    [open, committed, burned].into_iter().for_each(|session| registry.begin(session).unwrap());
    drop(registry.commit(committed).unwrap());
    registry.burn(burned).unwrap();
    registry.prune(Duration::ZERO).unwrap();
    assert_eq!(registry.burn(committed).unwrap(), Outcome::RunningThere, "or the VM would run at both hosts");
    assert!(matches!(registry.commit(burned), Err(RegistryError::Unknown(_))));
    drop(registry.commit(open).unwrap());
}
