//! Whether a VM that asks may come, and what it gets. Looks; changes nothing.

use std::path::Path;

use migrate::{RefuseKind, SessionHello};
use swapd::Engine;
use tracing::warn;
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::{EngineKind, State, VmStat};
use vmprocess::control::rundir::{Place, RunDir, check_name, name_taken};
use vmprocess::failure::{Failure, Kind};
use vmprocess::host;
use vmprocess::size::Size;

/// Guest memory comes in blocks of this size.
pub(super) const MEMORY_STEP: u64 = 2 << 20;

/// Why a VM may not come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) kind: RefuseKind,
    pub(super) text: String,
}

impl Refusal {
    pub(super) fn other(text: impl Into<String>) -> Refusal {
        Refusal { kind: RefuseKind::Other, text: text.into() }
    }

    pub(super) fn no_room(text: impl Into<String>) -> Refusal {
        Refusal { kind: RefuseKind::NoRoom, text: text.into() }
    }

    pub(super) fn name_taken(place: &Place) -> Refusal {
        Refusal { kind: RefuseKind::NameTaken, text: name_taken(place).text }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        let kind = match failure.kind {
            Kind::Resources => RefuseKind::NoRoom,
            Kind::Name => RefuseKind::NameTaken,
            _ => RefuseKind::Other,
        };
        Refusal { kind, text: failure.text }
    }
}

/// What the daemon's living VMs hold and may still take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) ram_bytes: u64,
    /// Store space that they may still fill.
    pub(super) store_promised_bytes: u64,
}

impl Held {
    /// Asks every VM that arrived through the daemon of that listen address.
    pub(super) fn ask(dir: &RunDir, daemon: &str) -> Result<Held, Failure> {
        let mut held = Held::default();
        for place in dir.places()? {
            match VmClient::connect_to(dir, &place).and_then(|mut vm| vm.stat()) {
                Ok(stat) if stat.daemon.as_deref() == Some(daemon) => held.add(&stat),
                Ok(_) => {}
                Err(error) => warn!(vm = place.name(), %error, "its RAM is not counted"),
            }
        }
        Ok(held)
    }

    fn add(&mut self, stat: &VmStat) {
        let memory = &stat.memory;
        self.ram_bytes += memory.ram_budget_bytes;
        if stat.engine == EngineKind::Vmemd {
            let may_store = memory.memory_bytes.saturating_sub(memory.ram_budget_bytes);
            self.store_promised_bytes += may_store.saturating_sub(memory.stored_bytes);
        }
    }
}

/// The pool that a daemon gives from.
#[derive(Clone, Debug)]
pub(super) struct Pool<'a> {
    pub(super) engine: EngineKind,
    pub(super) ram_bytes: u64,
    pub(super) store: &'a Path,
    pub(super) held: Held,
    /// RAM that the host has free.
    pub(super) host_free_bytes: u64,
}

impl Pool<'_> {
    /// The RAM that the VM gets.
    pub(super) fn grant(&self, hello: &SessionHello) -> Result<u64, Refusal> {
        let left = self.ram_bytes.saturating_sub(self.held.ram_bytes);
        let minimum = match self.engine {
            EngineKind::Vmemd => Engine::MIN_BUDGET_BYTES,
            EngineKind::Plain => hello.memory_bytes,
        };
        let wanted = match (self.engine, hello.ram_bytes) {
            (EngineKind::Plain, _) => hello.memory_bytes,
            (EngineKind::Vmemd, Some(ram)) if ram > hello.memory_bytes.max(minimum) => {
                return Err(Refusal::other(format!(
                    "a RAM budget of {} is above the VM's memory of {}",
                    Size(ram),
                    Size(hello.memory_bytes)
                )));
            }
            (EngineKind::Vmemd, Some(ram)) => ram,
            (EngineKind::Vmemd, None) => left.min(hello.memory_bytes).min(self.host_free_bytes).max(minimum),
        };
        if wanted < minimum {
            return Err(Refusal::other(format!(
                "a RAM budget of {} is below the minimum of {}",
                Size(wanted),
                Size(minimum)
            )));
        }
        if wanted > left {
            return Err(Refusal::no_room(format!(
                "the VM needs {:#} of RAM, of this daemon's {:#} there is {:#} left: migrate with a smaller --ram, stop a \
                 VM here, or serve with a larger --ram",
                Size(wanted),
                Size(self.ram_bytes),
                Size(left)
            )));
        }
        if self.engine == EngineKind::Vmemd && wanted > self.host_free_bytes {
            return Err(Refusal::no_room(format!(
                "the VM needs {:#} of RAM, but the target host has {:#} free",
                Size(wanted),
                Size(self.host_free_bytes)
            )));
        }
        Ok(wanted)
    }

    /// Checks that what does not fit the grant fits the store.
    pub(super) fn check_store(&self, hello: &SessionHello, granted: u64) -> Result<(), Refusal> {
        match self.engine {
            EngineKind::Vmemd => {
                let beside = hello.memory_bytes.saturating_sub(granted);
                Ok(host::need_free_disk(self.store, beside, self.held.store_promised_bytes)?)
            }
            EngineKind::Plain => Ok(()),
        }
    }
}

/// What of the hello can be judged without looking around.
pub(super) fn check_hello(hello: &SessionHello) -> Result<(), Refusal> {
    check_name(&hello.name)?;
    if hello.memory_bytes == 0 || !hello.memory_bytes.is_multiple_of(MEMORY_STEP) {
        return Err(Refusal::other(format!(
            "a memory of {} bytes is not a multiple of 2M",
            hello.memory_bytes
        )));
    }
    Ok(())
}

/// Those who hold the name and may go on doing so while the VM arrives: its source on this very host, which gives the
/// name up at the hand-over, and processes of a VM that has moved already and are ending.
pub(super) fn tolerated_holders(dir: &RunDir, name: &str) -> Result<Vec<Place>, Refusal> {
    let places: Vec<Place> = dir.places()?.into_iter().filter(|place| place.name() == name).collect();
    for place in &places {
        let state = match VmClient::connect_to(dir, place).and_then(|mut vm| vm.stat()) {
            Ok(stat) => stat.state,
            // It ended between the two looks.
            Err(failure) if matches!(failure.kind, Kind::Name | Kind::Vm) => continue,
            Err(_) => return Err(Refusal::name_taken(place)),
        };
        let tolerated = match place {
            Place::Here(_) => state == State::Migrating,
            Place::Leaving(..) => state == State::Moved,
            Place::Arriving(..) => false,
        };
        if !tolerated {
            return Err(Refusal::name_taken(place));
        }
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate::SessionId;

    const G: u64 = 1 << 30;

    fn hello(memory_bytes: u64, ram_bytes: Option<u64>) -> SessionHello {
        SessionHello {
            session: SessionId([1; 16]),
            name: "web".to_owned(),
            memory_bytes,
            ram_bytes,
            streams: 2,
            check_placement: false,
            offer: None,
        }
    }

    fn pool(ram_bytes: u64, held: u64) -> Pool<'static> {
        Pool {
            engine: EngineKind::Vmemd,
            ram_bytes,
            store: Path::new("/"),
            held: Held { ram_bytes: held, store_promised_bytes: 0 },
            host_free_bytes: 100 * G,
        }
    }

    #[test]
    fn a_vm_without_a_wish_gets_what_is_left_up_to_its_memory() {
        assert_eq!(pool(G, 0).grant(&hello(2 * G, None)), Ok(G));
        assert_eq!(pool(4 * G, G).grant(&hello(2 * G, None)), Ok(2 * G));
        assert_eq!(pool(4 * G, 3 * G).grant(&hello(2 * G, None)), Ok(G));
        assert_eq!(Pool { host_free_bytes: G / 2, ..pool(4 * G, 0) }.grant(&hello(2 * G, None)), Ok(G / 2));
    }

    #[test]
    fn a_wish_is_granted_or_refused_whole() {
        assert_eq!(pool(2 * G, G).grant(&hello(2 * G, Some(G))), Ok(G));
        assert_eq!(pool(2 * G, G).grant(&hello(2 * G, Some(G + 4096))).unwrap_err().kind, RefuseKind::NoRoom);
        assert_eq!(pool(4 * G, 0).grant(&hello(2 * G, Some(3 * G))).unwrap_err().kind, RefuseKind::Other);
        assert_eq!(pool(4 * G, 0).grant(&hello(2 * G, Some(4096))).unwrap_err().kind, RefuseKind::Other);
        // A VM with less memory than the smallest budget has that budget, and nothing for the store.
        let small = hello(2 << 20, Some(Engine::MIN_BUDGET_BYTES));
        assert_eq!(pool(G, 0).grant(&small), Ok(Engine::MIN_BUDGET_BYTES));
        assert_eq!(pool(G, 0).check_store(&small, Engine::MIN_BUDGET_BYTES), Ok(()));
    }

    #[test]
    fn a_full_daemon_or_host_has_no_room() {
        assert_eq!(pool(G, G).grant(&hello(2 * G, None)).unwrap_err().kind, RefuseKind::NoRoom);
        assert_eq!(pool(G, 5 * G).grant(&hello(2 * G, None)).unwrap_err().kind, RefuseKind::NoRoom);
        let full_host = Pool { host_free_bytes: 0, ..pool(G, 0) };
        assert_eq!(full_host.grant(&hello(2 * G, None)).unwrap_err().kind, RefuseKind::NoRoom);
    }

    #[test]
    fn plain_memory_takes_all_or_nothing() {
        let plain = |ram| Pool { engine: EngineKind::Plain, ..pool(ram, 0) };
        assert_eq!(plain(2 * G).grant(&hello(2 * G, Some(G))), Ok(2 * G));
        assert_eq!(plain(G).grant(&hello(2 * G, None)).unwrap_err().kind, RefuseKind::NoRoom);
    }

    #[test]
    fn hostile_hellos_are_refused() {
        assert!(check_hello(&hello(0, None)).is_err());
        assert!(check_hello(&hello(4097, None)).is_err());
        assert!(check_hello(&SessionHello { name: "../x".to_owned(), ..hello(G, None) }).is_err());
        assert!(check_hello(&hello(G, None)).is_ok());
    }
}
