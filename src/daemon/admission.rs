//! Whether a VM that asks may come, and what it gets. Looks; changes nothing.

use std::path::Path;

use migrate::{RefuseKind, SessionHello};
use swapd::Engine;
use tracing::warn;
use vmprocess::control::client::VmClient;
use vmprocess::control::protocol::{EngineKind, State, VmStat};
use vmprocess::control::rundir::{RunDir, SocketName, check_name, name_taken};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::granted::{self, Share};
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

    pub(super) fn name_taken(socket: &SocketName) -> Refusal {
        Refusal { kind: RefuseKind::NameTaken, text: name_taken(socket).text }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        let kind = match failure.kind {
            FailureKind::Resources => RefuseKind::NoRoom,
            FailureKind::Name => RefuseKind::NameTaken,
            _ => RefuseKind::Other,
        };
        Refusal { kind, text: failure.text }
    }
}

/// RAM and room in the store that the daemon's living VMs hold and may still take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) ram_bytes: u64,
    /// Store space that they may still fill.
    pub(super) store_promised_bytes: u64,
    /// RAM that any VM of this host was promised and has not taken yet: the host still counts it as free.
    pub(super) untaken_bytes: u64,
}

impl Held {
    /// Of the VMs that arrived through the daemon of that listen address. One that does not answer has what it was
    /// granted all the same; of its store it may still fill everything.
    pub(super) fn ask(dir: &RunDir, daemon: &str) -> Result<Held, Failure> {
        let sockets = dir.sockets()?;
        let ask = |socket| VmClient::connect_to(dir, socket).and_then(|mut vm| vm.stat());
        // All at once: one that does not answer must not hold up the others.
        let stats: Vec<VmStat> = std::thread::scope(|scope| {
            let asked: Vec<_> = sockets.iter().map(|socket| scope.spawn(move || ask(socket))).collect();
            asked.into_iter().filter_map(|asked| asked.join().ok()?.ok()).collect()
        });
        // Only now: whoever had no record when it was asked has one by now, or has ended.
        Ok(Held::of(&stats, &granted::all(dir)?, daemon))
    }

    fn of(stats: &[VmStat], shares: &[Share], daemon: &str) -> Held {
        let mut held = Held::default();
        let ours = |of: &Option<String>| of.as_deref() == Some(daemon);
        stats.iter().filter(|stat| ours(&stat.daemon)).for_each(|stat| held.add(stat));
        for share in shares {
            held.untaken_bytes += share.untaken_bytes();
            if ours(&share.daemon) && !stats.iter().any(|stat| stat.pid == share.pid) {
                warn!(vm = share.name, pid = share.pid, "it does not answer; what it was granted counts");
                held.ram_bytes += share.ram_budget_bytes;
                held.promise_store(share.engine, share.memory_bytes.saturating_sub(share.ram_budget_bytes));
            }
        }
        held
    }

    fn add(&mut self, stat: &VmStat) {
        let memory = &stat.memory;
        // A budget that was lowered may not be kept yet.
        let ram = memory.ram_budget_bytes.max(memory.frames_bytes);
        self.ram_bytes += ram;
        let may_store = memory.memory_bytes.saturating_sub(ram);
        self.promise_store(stat.engine, may_store.saturating_sub(memory.stored_bytes));
    }

    fn promise_store(&mut self, engine: EngineKind, bytes: u64) {
        self.store_promised_bytes += if engine == EngineKind::Vmemd { bytes } else { 0 };
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
        let host_free = self.host_free_bytes.saturating_sub(self.held.untaken_bytes);
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
            (EngineKind::Vmemd, None) => left.min(hello.memory_bytes).min(host_free).max(minimum),
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
        if self.engine == EngineKind::Vmemd && wanted > host_free {
            return Err(Refusal::no_room(format!(
                "the VM needs {:#} of RAM, but the target host has {:#} free, of which VMs there may still take {:#}",
                Size(wanted),
                Size(self.host_free_bytes),
                Size(self.held.untaken_bytes)
            )));
        }
        Ok(wanted)
    }

    /// Checks that what does not fit the grant fits the store. Returns how much that is.
    pub(super) fn check_store(&self, hello: &SessionHello, granted: u64) -> Result<u64, Refusal> {
        match self.engine {
            EngineKind::Vmemd => {
                let beside = hello.memory_bytes.saturating_sub(granted);
                host::need_free_disk(self.store, beside, self.held.store_promised_bytes)?;
                Ok(beside)
            }
            EngineKind::Plain => Ok(0),
        }
    }
}

/// Checks the part of a hello that can be judged without looking at the host.
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
pub(super) fn tolerated_holders(dir: &RunDir, name: &str) -> Result<Vec<SocketName>, Refusal> {
    let sockets: Vec<SocketName> =
        dir.sockets()?.into_iter().filter(|socket| socket.name() == name).collect();
    for socket in &sockets {
        let state = match VmClient::connect_to(dir, socket).and_then(|mut vm| vm.stat()) {
            Ok(stat) => stat.state,
            // It ended between the two looks.
            Err(failure) if matches!(failure.kind, FailureKind::Name | FailureKind::Vm) => continue,
            Err(_) => return Err(Refusal::name_taken(socket)),
        };
        let tolerated = match socket {
            SocketName::Here(_) => state == State::Migrating,
            SocketName::Leaving(..) => state == State::Moved,
            SocketName::Arriving(..) => false,
        };
        if !tolerated {
            return Err(Refusal::name_taken(socket));
        }
    }
    Ok(sockets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate::SessionId;

    const G: u64 = 1 << 30;

    fn hello(memory_bytes: u64, ram_bytes: Option<u64>) -> SessionHello {
        SessionHello {
            versions: migrate::wire::VERSIONS,
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
            held: Held { ram_bytes: held, ..Held::default() },
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
        assert_eq!(pool(G, 0).check_store(&small, Engine::MIN_BUDGET_BYTES), Ok(0));
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
        // The wire carries it; no host takes it, and the source is told why.
        let long = SessionHello { name: "x".repeat(65), ..hello(G, None) };
        assert!(check_hello(&long).unwrap_err().text.contains("use 1 to 64 letters"));
    }
}
