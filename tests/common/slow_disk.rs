//! A disk of a test whose flushes take their time, that falls silent, or that fails at everything for a while: a loop
//! device over the one file of a FUSE file system that this process serves.
//!
//! ```text
//!   ext4, with a journal, or nothing ─▶ loop device ─▶ disk.img on FUSE ─▶ this process ─▶ a sparse file
//!        a flush waits, if anything was written since the last ─────────────┤
//!        reads, writes and discards wait, or fail, while it is told to ─────┘
//! ```
//! Only as much of the protocol (`linux/fuse.h`) is spoken as a loop device needs of one file of a fixed length.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::disk::{run, text};

/// Threads that serve: a flush that waits does not hold up reads and writes.
const SERVERS: usize = 6;
/// Most bytes of one write.
const WRITE_MAX: usize = 1 << 20;
const HEADER_IN: usize = 40;
const HEADER_OUT: usize = 16;
const ROOT: u64 = 1;
const IMAGE: u64 = 2;
const NAME: &str = "disk.img";

/// The behaviour of the disk, which is changed while it is in use.
#[derive(Debug, Default)]
struct Manners {
    flush_delay_ms: AtomicU64,
    written: AtomicBool,
    flushes: AtomicU64,
    away: Mutex<Away>,
    back: Condvar,
}

/// How reads, writes and discards end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Away {
    #[default]
    Here,
    Silent,
    /// Discards alone wait.
    KeepsDiscards,
    /// They fail with this errno.
    Failing(i32),
}

impl Manners {
    fn become_away(&self, away: Away) {
        *self.away.lock().expect("no server panics") = away;
        self.back.notify_all();
    }

    /// Waits while the disk is silent.
    ///
    /// # Errors
    /// The errno that it fails with.
    fn be_here(&self, discards: bool) -> Result<(), i32> {
        let away = self.away.lock().expect("no server panics");
        let waits = |away: &mut Away| *away == Away::Silent || (*away == Away::KeepsDiscards && discards);
        let away = self.back.wait_while(away, waits).expect("no server panics");
        match *away {
            Away::Failing(errno) => Err(errno),
            _ => Ok(()),
        }
    }
}

/// A disk, with ext4 on it and mounted, or bare. Goes with the test.
#[derive(Debug)]
pub(crate) struct SlowDisk {
    manners: Arc<Manners>,
    directory: PathBuf,
    /// `/dev/loopN`.
    device: PathBuf,
    mounted: bool,
}

impl SlowDisk {
    /// A disk of so many bytes with ext4 on it, as quick as what it lies on.
    ///
    /// # Errors
    /// Why this host or this user makes no such disk.
    pub(crate) fn new(directory: &Path, bytes: u64) -> Result<SlowDisk, String> {
        let mut disk = SlowDisk::bare(directory, bytes)?;
        run("mkfs.ext4", &["-q", "-m", "0", "-E", "nodiscard", text(&disk.device)])?;
        run("mount", &[text(&disk.device), text(&disk.mount())])?;
        disk.mounted = true;
        Ok(disk)
    }

    /// The same with nothing on it.
    ///
    /// # Errors
    /// As [`SlowDisk::new`].
    pub(crate) fn bare(directory: &Path, bytes: u64) -> Result<SlowDisk, String> {
        let said = |error: io::Error| error.to_string();
        for part in ["fuse", "mount"] {
            fs::create_dir_all(directory.join(part)).map_err(said)?;
        }
        let backing = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(directory.join("backing"));
        let backing = backing.map_err(said)?;
        backing.set_len(bytes).map_err(said)?;
        let channel = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map_err(|error| format!("/dev/fuse: {error}"))?;
        mount(&directory.join("fuse"), channel.as_raw_fd()).map_err(|error| format!("FUSE: {error}"))?;
        let mut disk = SlowDisk {
            mounted: false,
            manners: Arc::default(),
            directory: directory.to_owned(),
            device: PathBuf::new(),
        };
        let served = Arc::new(Served { channel, backing, bytes, manners: disk.manners.clone() });
        for _ in 0..SERVERS {
            let served = served.clone();
            std::thread::spawn(move || served.serve());
        }
        let image = directory.join("fuse").join(NAME);
        disk.device = run("losetup", &["--find", "--show", text(&image)])?.into();
        Ok(disk)
    }

    /// `/dev/loopN`.
    pub(crate) fn device(&self) -> &Path {
        &self.device
    }

    /// From now on no read or write ends, until the disk [is back](SlowDisk::come_back).
    pub(crate) fn fall_silent(&self) {
        self.manners.become_away(Away::Silent);
    }

    /// From now on no discard ends, until the disk [is back](SlowDisk::come_back).
    pub(crate) fn keep_discards(&self) {
        self.manners.become_away(Away::KeepsDiscards);
    }

    /// From now on every read and write fails, until the disk [is back](SlowDisk::come_back).
    pub(crate) fn fail(&self, errno: i32) {
        self.manners.become_away(Away::Failing(errno));
    }

    /// Reads and writes that wait are done, and the disk works as before.
    pub(crate) fn come_back(&self) {
        self.manners.become_away(Away::Here);
    }

    /// Where its file system is.
    pub(crate) fn mount(&self) -> PathBuf {
        self.directory.join("mount")
    }

    /// Major and minor number, as cgroups name it.
    pub(crate) fn numbers(&self) -> String {
        let name = self.device.file_name().expect("a device").to_str().expect("ASCII");
        fs::read_to_string(format!("/sys/block/{name}/dev")).expect("a block device").trim().to_owned()
    }

    /// From now on a flush takes so long, if anything was written since the last one.
    pub(crate) fn delay_flushes(&self, delay: Duration) {
        self.manners.flush_delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Flushes so far that had something to flush.
    pub(crate) fn flushes(&self) -> u64 {
        self.manners.flushes.load(Ordering::SeqCst)
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        self.delay_flushes(Duration::ZERO);
        self.come_back();
        if self.mounted {
            let _ = run("umount", &["--lazy", text(&self.mount())]);
        }
        let _ = run("losetup", &["--detach", text(&self.device)]);
        // The servers end when the kernel has let go of it.
        let _ = run("umount", &["--lazy", text(&self.directory.join("fuse"))]);
        let _ = fs::remove_file(self.directory.join("backing"));
    }
}

fn mount(at: &Path, channel: i32) -> io::Result<()> {
    let c = |text: &str| std::ffi::CString::new(text).expect("no zero byte");
    let options = c(&format!("fd={channel},rootmode=40000,user_id=0,group_id=0,max_read={WRITE_MAX}"));
    let (what, at, kind) = (c("slow"), c(text(at)), c("fuse"));
    let flags = libc::MS_NOSUID | libc::MS_NODEV;
    let data = options.as_ptr().cast();
    // SAFETY: four texts that end with a zero byte and outlive the call.
    let done = unsafe { libc::mount(what.as_ptr(), at.as_ptr(), kind.as_ptr(), flags, data) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// One file system.
struct Served {
    channel: File,
    backing: File,
    bytes: u64,
    manners: Arc<Manners>,
}

/// Numbers of a request, from a byte on.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// An answer in the making.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn u64s(mut self, values: &[u64]) -> Body {
        values.iter().for_each(|value| self.0.extend(value.to_le_bytes()));
        self
    }

    fn u32s(mut self, values: &[u32]) -> Body {
        values.iter().for_each(|value| self.0.extend(value.to_le_bytes()));
        self
    }
}

impl Served {
    /// Serves requests until the file system is unmounted.
    fn serve(&self) {
        let mut request = vec![0; WRITE_MAX + (1 << 16)];
        loop {
            let length = match (&self.channel).read(&mut request) {
                Ok(length) => length,
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ENOENT | libc::EAGAIN)) =>
                {
                    continue;
                }
                Err(_) => return,
            };
            let (head, body) = request[..length].split_at(HEADER_IN);
            let (opcode, unique, node) = (u32_at(head, 4), u64_at(head, 8), u64_at(head, 16));
            let Some(answer) = self.answer(opcode, node, body) else { continue };
            let (error, body) = match answer {
                Ok(body) => (0, body.0),
                Err(errno) => (-errno, Vec::new()),
            };
            let mut reply = Vec::with_capacity(HEADER_OUT + body.len());
            reply.extend(((HEADER_OUT + body.len()) as u32).to_le_bytes());
            reply.extend(error.to_le_bytes());
            reply.extend(unique.to_le_bytes());
            reply.extend(body);
            // Whoever asked may have gone.
            let _ = (&self.channel).write(&reply);
        }
    }

    /// The answer to a request. None: the kernel does not wait for one.
    fn answer(&self, opcode: u32, node: u64, body: &[u8]) -> Option<Result<Body, i32>> {
        const LOOKUP: u32 = 1;
        const FORGET: u32 = 2;
        const GETATTR: u32 = 3;
        const SETATTR: u32 = 4;
        const OPEN: u32 = 14;
        const READ: u32 = 15;
        const WRITE: u32 = 16;
        const STATFS: u32 = 17;
        const RELEASE: u32 = 18;
        const FSYNC: u32 = 20;
        const FLUSH: u32 = 25;
        const INIT: u32 = 26;
        const INTERRUPT: u32 = 36;
        const BATCH_FORGET: u32 = 42;
        const FALLOCATE: u32 = 43;
        const YEAR_S: u64 = 31_536_000;
        Some(match opcode {
            FORGET | BATCH_FORGET | INTERRUPT => return None,
            INIT => {
                const ASYNC_READ: u32 = 1;
                const BIG_WRITES: u32 = 1 << 5;
                const MAX_PAGES: u32 = 1 << 22;
                let wanted = u32_at(body, 12) & (ASYNC_READ | BIG_WRITES | MAX_PAGES);
                let queues = 64 | 48 << 16;
                let pages = (WRITE_MAX >> 12) as u32;
                let known = [7, 31, u32_at(body, 8), wanted, queues, WRITE_MAX as u32, 1, pages];
                Ok(Body::default().u32s(&known).u32s(&[0; 8]))
            }
            LOOKUP if body.strip_suffix(b"\0") == Some(NAME.as_bytes()) => {
                Ok(self.attributes(Body::default().u64s(&[IMAGE, 0, YEAR_S, YEAR_S]).u32s(&[0, 0]), IMAGE))
            }
            LOOKUP => Err(libc::ENOENT),
            GETATTR | SETATTR => Ok(self.attributes(Body::default().u64s(&[YEAR_S]).u32s(&[0, 0]), node)),
            OPEN => {
                // Nothing is kept in the page cache: what is read or written is asked for here.
                const DIRECT_IO: u32 = 1;
                Ok(Body::default().u64s(&[0]).u32s(&[DIRECT_IO, 0]))
            }
            READ | WRITE | FALLOCATE if let Err(errno) = self.manners.be_here(opcode == FALLOCATE) => {
                Err(errno)
            }
            READ => {
                let mut content = vec![0; u32_at(body, 16) as usize];
                let read = self.backing.read_at(&mut content, u64_at(body, 8)).map_err(|_| libc::EIO);
                read.map(|length| {
                    content.truncate(length);
                    Body(content)
                })
            }
            WRITE => {
                let length = u32_at(body, 16);
                self.manners.written.store(true, Ordering::SeqCst);
                let written = self.backing.write_all_at(&body[40..40 + length as usize], u64_at(body, 8));
                written.map(|()| Body::default().u32s(&[length, 0])).map_err(|_| libc::EIO)
            }
            FALLOCATE => {
                let (at, length, mode) = (u64_at(body, 8), u64_at(body, 16), u32_at(body, 24));
                // SAFETY: four numbers.
                let done = unsafe {
                    libc::fallocate(self.backing.as_raw_fd(), mode as i32, at as i64, length as i64)
                };
                let errno = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
                if done == 0 { Ok(Body::default()) } else { Err(errno()) }
            }
            FSYNC => {
                if self.manners.written.swap(false, Ordering::SeqCst) {
                    self.manners.flushes.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(
                        self.manners.flush_delay_ms.load(Ordering::SeqCst),
                    ));
                }
                Ok(Body::default())
            }
            STATFS => Ok(Body::default().u64s(&[0; 5]).u32s(&[4096, 255, 4096, 0]).u32s(&[0; 6])),
            RELEASE | FLUSH => Ok(Body::default()),
            _ => Err(libc::ENOSYS),
        })
    }

    fn attributes(&self, body: Body, node: u64) -> Body {
        let (mode, bytes) =
            if node == ROOT { (libc::S_IFDIR | 0o700, 0) } else { (libc::S_IFREG | 0o600, self.bytes) };
        body.u64s(&[node, bytes, bytes / 512, 0, 0, 0]).u32s(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])
    }
}
