//! Through libc's names, as QEMU calls them: this test's program has our functions in libc's place too.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};

use super::*;
use crate::backends::{Keeper, Part};

const MIB: usize = 1 << 20;
const BYTES: usize = 4 * MIB;
const PAGE: usize = swapd::PAGE_SIZE;
const FIXED_SHARED: c_int = libc::MAP_FIXED | libc::MAP_SHARED;
const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Notes discards, and zeroes as the engine would.
#[derive(Clone, Default)]
struct Memory {
    base: Arc<Mutex<usize>>,
    discarded: Arc<Mutex<Vec<(usize, usize)>>>,
}

impl Keeper for Memory {
    fn attach(&self, _: usize, address: usize, bytes: usize) -> Result<(), c_int> {
        assert_eq!(bytes, BYTES);
        *self.base.lock().unwrap() = address;
        Ok(())
    }

    fn discard(&self, Part { offset, bytes, .. }: Part) {
        if bytes == PAGE * 3 {
            panic!("a discard that panics");
        }
        self.discarded.lock().unwrap().push((offset, bytes));
        let at = *self.base.lock().unwrap() + offset;
        // SAFETY: within the mapping that was attached; the test holds no reference into it.
        let result = unsafe { libc::syscall(libc::SYS_madvise, at, bytes, libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
    }
}

fn memfd() -> File {
    // SAFETY: the name is a C string; the new descriptor is owned by nobody else.
    unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) }
}

fn mapped(addr: usize, len: usize, flags: c_int, file: &File) -> Result<usize, c_int> {
    // SAFETY: a fixed mapping goes over a reservation of this test only.
    let at = unsafe { libc::mmap64(addr as *mut c_void, len, READ_WRITE, flags, file.as_raw_fd(), 0) };
    if at == libc::MAP_FAILED { Err(errno()) } else { Ok(at as usize) }
}

fn reserve(bytes: usize) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at as usize
}

fn byte(at: usize) -> *mut u8 {
    at as *mut u8
}

/// One test: the backends are the process's.
#[test]
fn a_backend_is_anonymous_memory_that_behaves_as_a_shared_file() {
    let (other, memory) = (memfd(), Memory::default());
    other.set_len(BYTES as u64).unwrap();
    let path = vmprocess::qemu::memory_file(0);
    let no_file = || std::fs::File::open(&path).unwrap_err().raw_os_error();
    assert_eq!(no_file(), Some(libc::ENOENT), "before there are backends");
    let name = CString::new(path.to_str().unwrap()).unwrap();
    BACKENDS.set(Backends::new([(name.clone(), BYTES)], Box::new(memory.clone())).unwrap()).unwrap();

    // By each of the names that a QEMU may call, and no other file.
    let file = std::fs::File::open(&path).unwrap();
    // SAFETY: the name is a C string; the descriptors are owned by nobody else.
    unsafe {
        for fd in [
            libc::open(name.as_ptr(), libc::O_RDWR),
            libc::open64(name.as_ptr(), libc::O_RDWR),
            super::__open_2(name.as_ptr(), libc::O_RDWR),
            super::__open64_2(name.as_ptr(), libc::O_RDWR),
        ] {
            assert_eq!(BACKENDS.get().unwrap().of_descriptor(fd), Some(0));
            libc::close(fd);
        }
        assert_eq!((libc::open(std::ptr::null(), 0), errno()), (-1, libc::EFAULT));
    }
    let unknown = CString::new(vmprocess::qemu::memory_file(1).to_str().unwrap()).unwrap();
    // SAFETY: as above.
    assert_eq!((unsafe { libc::open(unknown.as_ptr(), libc::O_RDWR) }, errno()), (-1, libc::ENOENT));
    let place = testkit::directory("open");
    let made = place.path().join("file");
    std::fs::write(&made, b"other files are theirs").unwrap();
    assert_eq!(
        std::fs::metadata(&made).unwrap().mode() & 0o444,
        0o444,
        "made with the mode that was asked for"
    );

    // Other files are theirs.
    let shared = mapped(0, BYTES, libc::MAP_SHARED, &other).unwrap();
    // SAFETY: within the mapping of the other file.
    unsafe { byte(shared).write_volatile(7) };
    let mut content = [0];
    std::os::unix::fs::FileExt::read_at(&other, &mut content, 0).unwrap();
    assert_eq!(content, [7]);
    // SAFETY: the mapping is this test's, and has no reference into it.
    assert_eq!(unsafe { libc::munmap(shared as *mut c_void, BYTES) }, 0);
    assert_eq!(memory.discarded.lock().unwrap().len(), 0);

    // Ours is not: in a reservation, with a page behind it, as QEMU does.
    let at = reserve(BYTES + PAGE);
    assert_eq!(mapped(at, BYTES, FIXED_SHARED, &file), Ok(at));
    assert_eq!(*memory.base.lock().unwrap(), at);
    // SAFETY: all addresses below are within that mapping, to which there are no references.
    unsafe {
        for page in 0..8 {
            byte(at + page * PAGE).write_volatile(1);
        }
        std::os::unix::fs::FileExt::read_at(&file, &mut content, 0).unwrap();
        assert_eq!(content, [0], "the file stays empty");

        let advise = |at: usize, len: usize, advice| libc::madvise(at as *mut c_void, len, advice);
        for harmless in [
            libc::MADV_DONTNEED,
            libc::MADV_WILLNEED,
            libc::MADV_POPULATE_WRITE,
            libc::MADV_HUGEPAGE,
            libc::MADV_MERGEABLE,
            libc::MADV_DONTDUMP,
            libc::MADV_DONTFORK,
        ] {
            assert_eq!(advise(at, BYTES, harmless), 0, "{harmless}");
            assert_eq!(byte(at).read_volatile(), 1, "{harmless}");
        }
        assert_eq!((advise(at, PAGE, libc::MADV_FREE), errno()), (-1, libc::EINVAL));
        assert_eq!((advise(at + 1, PAGE, libc::MADV_REMOVE), errno()), (-1, libc::EINVAL));
        assert!(memory.discarded.lock().unwrap().is_empty());

        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let fd = file.as_raw_fd();
        assert_eq!(libc::fallocate64(fd, punch, PAGE as i64, PAGE as i64), 0);
        assert_eq!((byte(at + PAGE).read_volatile(), byte(at + 2 * PAGE).read_volatile()), (0, 1));
        assert_eq!(advise(at + 2 * PAGE, PAGE, libc::MADV_REMOVE), 0);
        assert_eq!(byte(at + 2 * PAGE).read_volatile(), 0);
        assert_eq!(libc::fallocate(fd, 0, 0, BYTES as i64), 0);
        assert_eq!((libc::fallocate(fd, punch, 1, 2), errno()), (-1, libc::EINVAL));
        assert_eq!(
            std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()),
            0,
            "the file stays empty"
        );
        assert_eq!(*memory.discarded.lock().unwrap(), [(PAGE, PAGE), (2 * PAGE, PAGE)]);

        // A panic stays on our side.
        assert_eq!((libc::fallocate(fd, punch, 0, 3 * PAGE as i64), errno()), (-1, libc::EFAULT));

        // Never twice; unmapped with what lies around it, it is given up, and the rest is unmapped.
        assert_eq!(mapped(0, BYTES, libc::MAP_SHARED, &file), Err(libc::ENOTSUP));
        assert_eq!(libc::munmap(at as *mut c_void, BYTES + PAGE), 0);
        assert_eq!(memory.discarded.lock().unwrap().last(), Some(&(0, BYTES)));
        assert_eq!(byte(at).read_volatile(), 0);
        assert_eq!((advise(at + BYTES, PAGE, libc::MADV_DONTNEED), errno()), (-1, libc::ENOMEM));
    }
}
