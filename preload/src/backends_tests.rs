use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
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
    // SAFETY: the name is a C string; the new descriptor is owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) }
}

fn path_of(fd: &OwnedFd) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

/// Backends of 4 and 2 MiB on two files.
fn two() -> (Backends, [OwnedFd; 2], Arc<Notes>) {
    let (files, notes) = ([memfd(), memfd()], Arc::new(Notes::default()));
    let list = [(path_of(&files[0]), 4 * MIB), (path_of(&files[1]), 2 * MIB)];
    (Backends::new(list, Box::new(notes.clone())), files, notes)
}

fn at(wish: usize) -> Result<usize, c_int> {
    Ok(wish)
}

#[test]
fn files_are_known_by_identity_not_by_descriptor() {
    let (backends, files, _) = two();
    let again = std::fs::File::open(path_of(&files[1]).to_str().unwrap()).unwrap();
    assert_ne!(again.as_raw_fd(), files[1].as_raw_fd());
    assert_eq!(backends.of_descriptor(again.as_raw_fd()), Some(1));
    assert_eq!(backends.of_descriptor(memfd().as_raw_fd()), None);
    assert_eq!(backends.of_descriptor(-1), None);
}

#[test]
fn a_file_that_qemu_makes_is_known_once_it_exists_and_after_it_is_gone() {
    let path = std::env::temp_dir().join(format!("vmemd-backend-{}", std::process::id()));
    let name = CString::new(path.to_str().unwrap()).unwrap();
    let backends = Backends::new([(name, MIB)], Box::new(Arc::new(Notes::default())));
    assert_eq!(backends.of_descriptor(memfd().as_raw_fd()), None);
    let file = std::fs::File::create(&path).unwrap();
    assert_eq!(backends.of_descriptor(file.as_raw_fd()), Some(0));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(backends.of_descriptor(file.as_raw_fd()), Some(0));
}

#[test]
fn a_mapping_is_attached_once_and_whole() {
    let (backends, _files, notes) = two();
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
    let (file, notes) = (memfd(), Arc::new(Notes { refuse: true, ..Notes::default() }));
    let backends = Backends::new([(path_of(&file), MIB)], Box::new(notes));
    assert_eq!(backends.map(0, MIB, 0, MIB, true, at), Err(libc::ENOMEM));
    assert_eq!(backends.first_part(0, usize::MAX), None);
    assert_eq!(backends.part_of_file(0, 0, 4096), None);
}

#[test]
fn parts_of_address_ranges_and_of_the_file() {
    let (backends, _files, _) = two();
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
