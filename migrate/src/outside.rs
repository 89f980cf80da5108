//! The world outside of the sessions: connections, files, time, tasks, threads, and the engine.
//!
//! Everything that takes time or can fail is reached through here. Unit tests of this crate put a simulated world of the
//! same shape in its place (`sim/`), so what they drive are the sessions as they are; any other build has the real one.

#[cfg(test)]
pub(crate) use crate::sim::outside::*;
#[cfg(not(test))]
pub(crate) use real::*;

/// Whether a deliberate bug is planted, for the simulation to find; in a normal build it never is, and leaves no code.
#[cfg(not(test))]
macro_rules! planted {
    ($bug:ident) => {
        false
    };
}
#[cfg(test)]
macro_rules! planted {
    ($bug:ident) => {
        $crate::sim::bugs::is_planted($crate::sim::bugs::Bug::$bug)
    };
}
pub(crate) use planted;

#[cfg(not(test))]
mod real {
    use std::future::Future;
    use std::io;
    use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
    use std::time::Duration;

    pub(crate) use std::fs::{File, OpenOptions, create_dir_all};
    pub(crate) use std::net::TcpStream as StdStream;
    pub(crate) use std::os::unix::fs::FileExt;
    pub(crate) use std::thread::sleep as pause;
    pub(crate) use std::time::Instant;
    pub(crate) use swapd::EngineHandle;
    pub(crate) use tokio::task::{JoinHandle, JoinSet};
    pub(crate) use tokio::time::{sleep, timeout};
    pub(crate) use tokio_uring::fs::File as StoreFile;
    pub(crate) use tokio_uring::net::TcpStream;
    pub(crate) use tokio_uring::{Runtime, spawn};

    use crate::tls::{Client, TlsError};

    /// Makes sure of who is at the other end, for a connection that nobody on the way can read.
    pub(crate) fn secure(
        client: &Client,
        stream: StdStream,
        to: &str,
        limit: Duration,
    ) -> Result<StdStream, TlsError> {
        client.secure(stream, to, limit)
    }

    pub(crate) fn runtime() -> io::Result<Runtime> {
        Runtime::new(&tokio_uring::builder())
    }

    pub(crate) fn timeout_at<F: Future>(deadline: Instant, work: F) -> tokio::time::Timeout<F> {
        tokio::time::timeout_at(deadline.into(), work)
    }

    /// The runtime hands operations to the kernel when it has nothing else to do: gives it the occasion.
    pub(crate) async fn breathe() {
        let _ = tokio_uring::no_op().await;
    }

    /// Another one each time that this host is started.
    pub(crate) fn boot_id() -> io::Result<String> {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
    }

    pub(crate) fn random_bytes(into: &mut [u8]) -> io::Result<()> {
        // SAFETY: the pointer and length are those of a live slice; getrandom writes no more than that.
        let got = unsafe { libc::getrandom(into.as_mut_ptr().cast(), into.len(), 0) };
        if got == into.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// What another thread is working on.
    pub(crate) struct Elsewhere<T>(Receiver<T>);

    /// Does what can be neither cancelled nor waited for in small steps on a thread of its own, which ends by itself. If nobody
    /// waits for the result any more, it is dropped.
    pub(crate) fn elsewhere<T: Send + 'static>(
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Elsewhere<T>> {
        let (done, result) = sync_channel(1);
        let builder = std::thread::Builder::new().name(name.to_string());
        builder.spawn(move || drop(done.send(work()))).map(|_| Elsewhere(result))
    }

    impl<T> Elsewhere<T> {
        pub(crate) fn wait(&self, limit: Duration) -> Result<T, RecvTimeoutError> {
            self.0.recv_timeout(limit)
        }
    }
}
