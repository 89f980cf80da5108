//! The records of hand-overs, on a real file system.

use std::path::PathBuf;
use std::time::Duration;

use migrate::{Outcome, Registry, RegistryError, SessionId};
use testkit::TempDir;

fn fresh() -> (TempDir, Registry, SessionId) {
    let session = SessionId::random().unwrap();
    let place = testkit::directory("vmemd-registry");
    let registry = Registry::new(place.path()).unwrap();
    (place, registry, session)
}

#[test]
fn what_is_committed_stays() {
    let (_place, registry, session) = fresh();
    let kept = registry.begin(session).unwrap().commit().unwrap().started();
    assert_eq!(registry.burn(session).unwrap(), Outcome::RunningThere, "decided, and not recorded yet");
    kept.flush().unwrap();
    assert_eq!(registry.burn(session).unwrap(), Outcome::RunningThere);
    assert!(matches!(registry.begin(session), Err(RegistryError::Exists(_))));
}

#[test]
fn what_is_burned_never_starts() {
    let (_place, registry, session) = fresh();
    let begun = registry.begin(session).unwrap();
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
    assert!(matches!(begun.commit(), Err(RegistryError::Burned(_))));
}

#[test]
fn a_session_without_a_record_is_no_answer() {
    let (_place, registry, session) = fresh();
    assert!(matches!(registry.burn(session), Err(RegistryError::Unknown(_))));
    drop(registry.begin(session).unwrap());
}

#[test]
fn a_vm_that_could_not_start_goes_back() {
    let (_place, registry, session) = fresh();
    registry.begin(session).unwrap().commit().unwrap().revoke().unwrap();
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
}

#[test]
fn nobody_hears_of_a_commit_before_the_vm_has_started() {
    let (place, registry, session) = fresh();
    let committed = registry.begin(session).unwrap().commit().unwrap();
    // Whoever asks takes the lock first.
    let record = std::fs::File::open(place.path().join(session.to_string())).unwrap();
    assert!(matches!(record.try_lock(), Err(std::fs::TryLockError::WouldBlock)));
    committed.revoke().unwrap();
    assert!(matches!(record.try_lock(), Err(std::fs::TryLockError::WouldBlock)));
    drop(committed);
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
}

#[test]
fn of_what_was_undecided_when_the_host_went_down_nobody_can_say() {
    let (place, registry, session) = fresh();
    let begun = registry.begin(session).unwrap();
    let path = place.path().join(session.to_string());
    let written = std::fs::read_to_string(&path).unwrap();
    let this_boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert!(written.starts_with(&format!("BEGUN  \n{this_boot}")), "{written}");
    std::fs::write(&path, written.replace(this_boot.trim(), &"another-boot".repeat(3))).unwrap();
    assert!(matches!(registry.burn(session), Err(RegistryError::Lost(_))));
    std::fs::write(&path, written).unwrap();
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
    assert!(matches!(begun.commit(), Err(RegistryError::Burned(_))));
}

#[test]
fn a_former_version_s_commit_that_was_never_flushed_was_none_unless_the_host_went_down() {
    let (place, registry, session) = fresh();
    drop(registry.begin(session).unwrap());
    let path = place.path().join(session.to_string());
    let this_boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    std::fs::write(&path, format!("COMMIT?\n{}", "another-boot-".repeat(3))).unwrap();
    assert!(matches!(registry.burn(session), Err(RegistryError::Lost(_))));
    std::fs::write(&path, format!("COMMIT?\n{this_boot}")).unwrap();
    assert_eq!(registry.burn(session).unwrap(), Outcome::NotThere);
}

fn decision_of(place: &TempDir, session: SessionId) -> PathBuf {
    let written = std::fs::read_to_string(place.path().join(session.to_string())).unwrap();
    PathBuf::from(written.lines().nth(2).unwrap())
}

#[test]
fn a_decision_that_somebody_has_removed_is_no_answer() {
    let (place, registry, session) = fresh();
    let begun = registry.begin(session).unwrap();
    let decision = decision_of(&place, session);
    std::fs::remove_file(&decision).unwrap();
    assert!(matches!(registry.burn(session), Err(RegistryError::Gone { .. })));
    assert!(matches!(begun.commit(), Err(RegistryError::Gone { .. })), "nobody could find it again");
    let (place, registry, session) = fresh();
    let kept = registry.begin(session).unwrap().commit().unwrap().started();
    std::fs::remove_file(decision_of(&place, session)).unwrap();
    assert!(matches!(registry.burn(session), Err(RegistryError::Gone { .. })), "it runs");
    kept.flush().unwrap();
    assert_eq!(registry.burn(session).unwrap(), Outcome::RunningThere);
}

#[test]
fn decisions_are_in_memory_where_nobody_else_writes_and_go_when_they_are_recorded() {
    use std::os::unix::fs::MetadataExt;
    let (place, registry, session) = fresh();
    let begun = registry.begin(session).unwrap();
    let decision = decision_of(&place, session);
    let directory = std::fs::symlink_metadata(decision.parent().unwrap()).unwrap();
    assert!(directory.is_dir() && directory.mode() & 0o022 == 0, "{directory:?}");
    let kind = std::process::Command::new("stat").args(["-f", "-c", "%T"]).arg(&decision).output().unwrap();
    let kind = String::from_utf8(kind.stdout).unwrap();
    assert!(["tmpfs", "ramfs"].contains(&kind.trim()), "{kind}");
    begun.commit().unwrap().started().flush().unwrap();
    assert!(!decision.exists());
    let [_, other] = [(); 2].map(|()| SessionId::random().unwrap());
    drop(registry.begin(other).unwrap());
    let decision = decision_of(&place, other);
    registry.burn(other).unwrap();
    assert!(!decision.exists());
}

#[test]
fn a_damaged_record_is_no_answer() {
    let (place, registry, session) = fresh();
    drop(registry.begin(session).unwrap());
    std::fs::write(place.path().join(session.to_string()), "COMMITS\n").unwrap();
    assert!(matches!(registry.burn(session), Err(RegistryError::Damaged { .. })));
}

#[test]
fn commit_and_burn_never_both_win() {
    for _ in 0..20 {
        let (_place, registry, session) = fresh();
        let begun = registry.begin(session).unwrap();
        let (committed, outcome) = std::thread::scope(|scope| {
            let commit = scope.spawn(|| begun.commit().is_ok());
            let burn = scope.spawn(|| registry.burn(session).unwrap());
            (commit.join().unwrap(), burn.join().unwrap())
        });
        assert_eq!(committed, outcome == Outcome::RunningThere);
    }
}

#[test]
fn pruning_keeps_what_a_source_may_ask_for() {
    let (place, registry, open) = fresh();
    let [committed, burned] = [(); 2].map(|()| SessionId::random().unwrap());
    let [open, committing, burning] =
        [open, committed, burned].map(|session| registry.begin(session).unwrap());
    committing.commit().unwrap().started().flush().unwrap();
    registry.burn(burned).unwrap();
    // One that cannot be read is in nobody's way.
    let damaged: Vec<_> = (0..8).map(|_| SessionId::random().unwrap()).collect();
    damaged
        .iter()
        .for_each(|session| std::fs::write(place.path().join(session.to_string()), "BURN").unwrap());
    registry.prune(Duration::ZERO).unwrap();
    assert!(damaged.iter().all(|session| place.path().join(session.to_string()).exists()));
    assert_eq!(registry.burn(committed).unwrap(), Outcome::RunningThere, "or the VM would run at both hosts");
    assert!(matches!(registry.burn(burned), Err(RegistryError::Unknown(_))));
    assert!(burning.commit().is_err());
    drop(open.commit().unwrap());
}

/// As a group-writable umask leaves it. In memory, where the decisions are in the same directory.
#[test]
fn a_directory_that_others_write_to_becomes_ones_own_or_is_refused_before_the_pause() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let session = SessionId::random().unwrap();
    let place = testkit::directory_in("/dev/shm", "vmemd-registry");
    let give = |mode| std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    give(0o775);
    let registry = Registry::new(place.path()).unwrap();
    assert_eq!(std::fs::metadata(place.path()).unwrap().mode() & 0o777, 0o755);
    drop(registry.begin(session).unwrap().commit().unwrap());
    give(0o775);
    let other = SessionId::random().unwrap();
    assert!(matches!(registry.begin(other), Err(RegistryError::Io { .. })), "the commit would fail");
    let decision = place.path().join(format!("{other}-0.decision"));
    assert!(!decision.exists());
    give(0o755);
    assert_eq!(registry.burn(other).unwrap(), Outcome::NotThere);
}

#[test]
fn who_asks_does_not_wait_for_ever() {
    let (_place, registry, session) = fresh();
    // Its process stands still just now.
    let committed = registry.begin(session).unwrap().commit().unwrap();
    let begun = std::time::Instant::now();
    assert!(matches!(registry.burn(session), Err(RegistryError::Busy(_))));
    assert!(begun.elapsed() < migrate::limits::RESOLVE_CALL_LIMIT, "{:?}", begun.elapsed());
    drop(committed.started());
    assert_eq!(registry.burn(session).unwrap(), Outcome::RunningThere);
}
