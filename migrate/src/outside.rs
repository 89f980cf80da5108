//! The world outside of the sessions: connections, files, time, tasks, threads, and the engine.
//!
//! Everything that takes time or can fail is reached through here. Unit tests of this crate put a simulated world of
//! the same shape in its place (`sim/`), so what they drive are the sessions as they are; any other build has the real
//! one. With the feature `sim` a build has the reader twice, with either world: unit tests of other crates drive the
//! second.

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
#[cfg(not(test))]
pub(crate) use planted;

#[cfg(not(test))]
mod real {
    use std::fs::{DirBuilder, Metadata, Permissions};
    use std::future::Future;
    use std::io;
    use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
    use std::time::Duration;

    pub(crate) use std::fs::{File, OpenOptions, remove_file};
    pub(crate) use std::net::TcpStream as StdStream;
    pub(crate) use std::os::unix::fs::FileExt;
    pub(crate) use std::thread::sleep as pause;
    pub(crate) use std::time::Instant;
    pub(crate) use swapd::{DirtySubscription, EngineHandle};
    pub(crate) use tokio::task::{JoinHandle, JoinSet};
    pub(crate) use tokio::time::{sleep, timeout};
    pub(crate) use tokio_uring::net::TcpStream;
    pub(crate) use tokio_uring::{Runtime, spawn};

    use swapd::{IoError, IoErrorKind, PAGE_SIZE, PageNo, Run, StoredPart, TierId};
    use tokio_uring::buf::BoundedBuf;

    use crate::region::Region;
    use crate::tls::{Client, TlsError};

    /// Fewest pages of a portion: 64 MiB, so that reading it takes longer than having it tracked and devices drained.
    pub(crate) const PORTION_PAGES: u64 = 16 << 10;
    /// The group's right to write, and everybody's.
    const OTHERS_WRITE: u32 = 0o022;

    /// Makes sure that the peer is the right one, for a connection that nobody on the way can read.
    pub(crate) fn secure(
        client: &Client,
        stream: StdStream,
        to: &str,
        limit: Duration,
    ) -> Result<StdStream, TlsError> {
        client.secure(stream, to, limit)
    }

    /// Reads stored pages, on the runtime's ring; on threads what would keep the ring's own thread waiting.
    pub(crate) struct StoredReader {
        reader: swapd::StoredReader,
        store: Vec<tokio_uring::fs::File>,
        origin: Vec<tokio_uring::fs::File>,
        /// The origin's files once more, where reads may block.
        blocking: Vec<Option<Arc<File>>>,
    }

    /// Bytes that begin at a multiple of a page: direct I/O wants them so.
    struct Aligned {
        bytes: Vec<u8>,
        from: usize,
        len: usize,
    }

    impl Aligned {
        fn new(len: usize) -> Aligned {
            let bytes = vec![0; len + PAGE_SIZE];
            let from = bytes.as_ptr().align_offset(PAGE_SIZE);
            Aligned { bytes, from, len }
        }

        fn bytes(&mut self) -> &mut [u8] {
            &mut self.bytes[self.from..][..self.len]
        }
    }

    /// Reads on a thread, of which the runtime has some hundreds at most: callers have fewer reads under way.
    async fn read_on_thread(file: Arc<File>, at: u64, len: usize) -> io::Result<Aligned> {
        let read = tokio::task::spawn_blocking(move || {
            let mut into = Aligned::new(len);
            file.read_exact_at(into.bytes(), at).map(|()| into)
        });
        read.await.unwrap_or_else(|failed| Err(io::Error::other(failed)))
    }

    impl StoredReader {
        pub(crate) fn of(handle: &EngineHandle) -> io::Result<StoredReader> {
            let reader = handle.stored_reader();
            let files = |tier| -> io::Result<Vec<_>> {
                Ok(reader.files(tier)?.into_iter().map(tokio_uring::fs::File::from_std).collect())
            };
            let (store, origin) = (files(TierId::STORE)?, files(TierId::ORIGIN)?);
            let blocking = reader.files(TierId::ORIGIN)?.into_iter().enumerate();
            let blocking = blocking
                .map(|(nth, file)| reader.may_block(TierId::ORIGIN, nth).then(|| Arc::new(file)))
                .collect();
            Ok(StoredReader { reader, store, origin, blocking })
        }

        /// Reads pages of a tier, which must be held. If their checksums do not fit they are in the region all the
        /// same.
        pub(crate) async fn read<K: Unpin + 'static>(
            &self,
            tier: TierId,
            run: Run,
            sums: &[u64],
            mut region: Region<K>,
        ) -> (Result<(), IoError>, Region<K>) {
            let files = if tier == TierId::STORE { &self.store } else { &self.origin };
            for StoredPart { run: part, file, at } in self.reader.parts(tier, run) {
                let from = (part.start.0 - run.start.0) as usize * PAGE_SIZE;
                let blocking = self.blocking.get(file).cloned().flatten().filter(|_| tier == TierId::ORIGIN);
                let result = if let Some(file) = blocking {
                    let read = read_on_thread(file, at, part.bytes()).await;
                    read.map(|mut read| {
                        region.bytes_mut()[from..][..part.bytes()].copy_from_slice(read.bytes())
                    })
                } else {
                    let into = region.slice(from..from + part.bytes());
                    let (result, into) = files[file].read_exact_at(into, at).await;
                    region = into.into_inner();
                    result
                };
                if let Err(error) = result {
                    return (Err(IoError { tier, write: false, kind: IoErrorKind::of(&error) }), region);
                }
            }
            (self.reader.open(tier, run, sums, region.bytes_mut()), region)
        }

        /// Reads a page that is not held, to see whether its tier gives it. Its content says nothing: it may be written
        /// anew meanwhile, or its place dropped; or the tier never had it.
        pub(crate) async fn probe<K: Unpin + 'static>(
            &self,
            tier: TierId,
            page: PageNo,
            sum: u64,
            region: Region<K>,
        ) -> Result<(), IoError> {
            if !self.reader.has_place(tier, page) {
                return Err(IoError { tier, write: false, kind: IoErrorKind::Mismatch });
            }
            self.read(tier, Run::one(page), &[sum], region).await.0
        }
    }

    pub(crate) fn runtime() -> io::Result<Runtime> {
        Runtime::new(&tokio_uring::builder())
    }

    pub(crate) fn timeout_at<F: Future>(deadline: Instant, work: F) -> tokio::time::Timeout<F> {
        tokio::time::timeout_at(deadline.into(), work)
    }

    /// The runtime hands operations to the kernel when it has nothing else to do: gives it the occasion.
    pub(crate) async fn yield_to_ring() {
        let _ = tokio_uring::no_op().await;
    }

    /// Another one each time that this host is started.
    pub(crate) fn boot_id() -> io::Result<String> {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
    }

    /// Makes a directory in which nobody else may write. If this user has it already, others lose the right to.
    pub(crate) fn make_own(directory: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let found = std::fs::metadata(directory)?;
        if found.uid() == own_uid() && found.mode() & OTHERS_WRITE != 0 {
            let mode = found.mode() & 0o7777 & !OTHERS_WRITE;
            std::fs::set_permissions(directory, Permissions::from_mode(mode))?;
        }
        Ok(())
    }

    /// A directory of this user's on a file system that is memory: this one if it is on such, else another one. If the
    /// host has none, this one all the same.
    pub(crate) fn in_memory(directory: &Path) -> io::Result<PathBuf> {
        if is_memory(directory)? {
            return Ok(directory.to_path_buf());
        }
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let bases = [Some(PathBuf::from("/dev/shm")), runtime, Some(PathBuf::from("/run"))];
        for base in bases.into_iter().flatten() {
            let private = base.join(format!("vmemd-{}", own_uid()));
            match is_memory(&base).and_then(|memory| if memory { make_private(&private) } else { Ok(false) })
            {
                Ok(true) => return Ok(private),
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, path = %private.display(), "not for decisions"),
            }
        }
        tracing::warn!(
            path = %directory.display(),
            "no file system in memory is to be had: hand-overs to this host wait for its disk while the VM stands still"
        );
        Ok(directory.to_path_buf())
    }

    /// Where everybody may make directories, somebody else may have made this one: then it is not for root either.
    fn make_private(path: &Path) -> io::Result<bool> {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let found = std::fs::symlink_metadata(path)?;
        needs(path, &found, found.uid() == own_uid())?;
        is_memory(path)
    }

    /// Makes sure that nobody but this user or root can have written the file. The directory that it is in decides,
    /// which must be no link. For root, any one user will do: a VM may run as that user.
    pub(crate) fn vouch_for(path: &Path) -> io::Result<()> {
        let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let found = std::fs::symlink_metadata(directory)?;
        let ours = own_uid() == 0 || found.uid() == own_uid() || found.uid() == 0;
        needs(directory, &found, ours)
    }

    /// Makes sure that it is a directory of the right owner, in which nobody else may write.
    fn needs(directory: &Path, found: &Metadata, right_owner: bool) -> io::Result<()> {
        if found.is_dir() && right_owner && found.mode() & OTHERS_WRITE == 0 {
            return Ok(());
        }
        let text = format!("{} is not a directory of this user's alone", directory.display());
        Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
    }

    /// How long a question and its answer are on their way, as the kernel has measured it. None: no TCP connection.
    pub(crate) fn round_trip(socket: &StdStream) -> Option<Duration> {
        // SAFETY: an all-zero tcp_info is a valid value of that plain C struct.
        let mut found: libc::tcp_info = unsafe { std::mem::zeroed() };
        let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to `found`, which outlives the call.
        let got = unsafe {
            libc::getsockopt(
                std::os::fd::AsRawFd::as_raw_fd(socket),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut found).cast(),
                &mut length,
            )
        };
        (got == 0).then(|| Duration::from_micros(found.tcpi_rtt.into()))
    }

    fn own_uid() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn is_memory(path: &Path) -> io::Result<bool> {
        const RAMFS_MAGIC: libc::__fsword_t = 0x8584_58f6;
        let found = rustix::fs::statfs(path)?;
        Ok([libc::TMPFS_MAGIC, RAMFS_MAGIC].contains(&found.f_type))
    }

    /// A new file in a directory, which has no name there: it goes with whoever has it open.
    pub(crate) fn unnamed_file(directory: &Path) -> io::Result<File> {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
            // Not every file system can.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => removed_file(directory),
            opened => Ok(File::from(opened?)),
        }
    }

    fn removed_file(directory: &Path) -> io::Result<File> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut random = [0; 8];
        random_bytes(&mut random)?;
        let path = directory.join(format!(".vmemd-state-{:016x}", u64::from_ne_bytes(random)));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        remove_file(&path)?;
        Ok(file)
    }

    pub(crate) fn random_bytes(into: &mut [u8]) -> io::Result<()> {
        let bytes = into.len();
        let got = rustix::rand::getrandom(into, rustix::rand::GetRandomFlags::empty())?;
        // Up to 256 bytes come whole.
        if got == bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// What another thread is working on.
    pub(crate) struct Elsewhere<T>(Receiver<T>);

    /// Does work that can be neither cancelled nor waited for in small steps, on a thread of its own, which ends by
    /// itself. If nobody waits for the result any more, it is dropped.
    pub(crate) fn on_own_thread<T: Send + 'static>(
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
