use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use super::*;

const MIB: usize = 1 << 20;

/// Notes what it is told.
#[derive(Default)]
struct Notes {
    refuse: bool,
    seen: Mutex<Vec<(&'static str, usize, usize, usize)>>,
}

impl Keeper for Arc<Notes> {
    fn attach(&self, index: usize, address: usize, bytes: usize) -> Result<(), c_int> {
        self.seen.lock().unwrap().push(("attach", index, address, bytes));
        if self.refuse { Err(libc::ENOMEM) } else { Ok(()) }
    }

    fn discard(&self, part: Part) {
        self.seen.lock().unwrap().push(("discard", part.index, part.offset, part.bytes));
    }
}

fn memfd() -> OwnedFd {
    memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap()
}

/// Backends of 4 and 2 MiB.
fn two() -> (Backends, Arc<Notes>) {
    let notes = Arc::new(Notes::default());
    let list = [(c"/memory/0".to_owned(), 4 * MIB), (c"/memory/1".to_owned(), 2 * MIB)];
    (Backends::new(list, Box::new(notes.clone())).unwrap(), notes)
}

fn opened(backends: &Backends, path: &CStr) -> OwnedFd {
    // SAFETY: a descriptor just made, which nobody else owns.
    unsafe { OwnedFd::from_raw_fd(backends.open(path).unwrap().unwrap()) }
}

fn at(wish: usize) -> Result<usize, c_int> {
    Ok(wish)
}

#[test]
fn files_are_opened_by_name_and_known_by_identity() {
    let (backends, _) = two();
    assert!(backends.open(c"/memory/2").is_none() && backends.open(c"/memory/").is_none());
    let (file, again) = (opened(&backends, c"/memory/1"), opened(&backends, c"/memory/1"));
    assert_ne!(again.as_raw_fd(), file.as_raw_fd());
    assert_eq!(backends.of_descriptor(again.as_raw_fd()), Some(1));
    assert_eq!(backends.of_descriptor(opened(&backends, c"/memory/0").as_raw_fd()), Some(0));
    assert_eq!(backends.of_descriptor(memfd().as_raw_fd()), None);
    assert_eq!(backends.of_descriptor(-1), None);
}

#[test]
fn a_file_of_guest_memory_cannot_become_memory_by_itself() {
    let (backends, _) = two();
    let file = std::fs::File::from(opened(&backends, c"/memory/0"));
    assert_eq!(file.metadata().unwrap().len(), 4 * MIB as u64, "QEMU compares it");
    let refused = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
    for bytes in [0, 8 * MIB as u64] {
        assert_eq!(refused(file.set_len(bytes)), Some(libc::EPERM));
    }
    assert_eq!(refused((&file).write_all(b"x")), Some(libc::EPERM));
    let (access, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
    // SAFETY: a new mapping, if there were one; by the kernel, as one that the interposed mmap does not see.
    let at = unsafe { libc::syscall(libc::SYS_mmap, 0, 4 * MIB, access, libc::MAP_SHARED, fd, 0) };
    assert_eq!((at, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EPERM)));
}

#[test]
fn a_mapping_is_attached_once_and_whole() {
    let (backends, notes) = two();
    assert_eq!(backends.map(0, 2 * MIB, 0, 16 * MIB, true, at), Err(libc::EINVAL));
    assert_eq!(backends.map(0, 4 * MIB, 4096, 16 * MIB, true, at), Err(libc::EINVAL));
    assert_eq!(backends.map(0, 4 * MIB, 0, 16 * MIB, true, |_| Err(libc::ENOMEM)), Err(libc::ENOMEM));
    assert_eq!(backends.first_part(0, usize::MAX), None);
    assert_eq!(backends.map(0, 4 * MIB, 0, 16 * MIB, true, at), Ok(16 * MIB));
    assert_eq!(backends.map(0, 4 * MIB, 0, 64 * MIB, true, at), Err(libc::ENOTSUP));
    assert_eq!(*notes.seen.lock().unwrap(), [("attach", 0, 16 * MIB, 4 * MIB)]);
    // A page over itself comes back empty.
    assert_eq!(backends.map(0, 4096, 8192, 16 * MIB + 8192, true, at), Ok(16 * MIB + 8192));
    assert_eq!(notes.seen.lock().unwrap()[1], ("discard", 0, 8192, 4096));
    assert_eq!(backends.map(0, 4096, 8192, 16 * MIB, true, at), Err(libc::ENOTSUP));
}

#[test]
fn a_mapping_that_is_refused_is_not_guest_memory() {
    let notes = Arc::new(Notes { refuse: true, ..Notes::default() });
    let backends = Backends::new([(c"/memory/0".to_owned(), MIB)], Box::new(notes)).unwrap();
    assert_eq!(backends.map(0, MIB, 0, MIB, true, at), Err(libc::ENOMEM));
    assert_eq!(backends.first_part(0, usize::MAX), None);
    assert_eq!(backends.part_of_file(0, 0, 4096), None);
}

#[test]
fn parts_of_address_ranges_and_of_the_file() {
    let (backends, _) = two();
    backends.map(1, 2 * MIB, 0, 32 * MIB, true, at).unwrap();
    backends.map(0, 4 * MIB, 0, 36 * MIB, true, at).unwrap();
    let part = |index, address, offset, bytes| Some(Part { index, address, offset, bytes });
    assert_eq!(backends.first_part(0, 32 * MIB), None);
    assert_eq!(backends.first_part(0, 64 * MIB), part(1, 32 * MIB, 0, 2 * MIB));
    assert_eq!(backends.first_part(33 * MIB, 64 * MIB), part(1, 33 * MIB, MIB, MIB));
    assert_eq!(backends.first_part(34 * MIB, 37 * MIB), part(0, 36 * MIB, 0, MIB));
    assert_eq!(backends.first_part(40 * MIB, 64 * MIB), None);
    let mib = MIB as i64;
    assert_eq!(backends.part_of_file(0, mib, mib), part(0, 37 * MIB, MIB, MIB));
    assert_eq!(backends.part_of_file(0, mib, i64::MAX), part(0, 37 * MIB, MIB, 3 * MIB));
    for (offset, bytes) in
        [(-1, 4096), (0, 0), (0, -4096), (1, 4096), (0, 100), (4 * mib, 4096), (i64::MAX, 1)]
    {
        assert_eq!(backends.part_of_file(0, offset, bytes), None, "{offset} {bytes}");
    }
}
