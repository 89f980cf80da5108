//! Takes the settings out of the environment, if they are for this program.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use vmprocess::qemu::{LIBRARY, PreloadSettings, QmpAddress, Role, VARIABLE};

const LD_PRELOAD: &str = "LD_PRELOAD";
const LD_SEPARATORS: [u8; 2] = [b':', b' '];

/// The settings, if this process is the QEMU that they are for. They are gone from the environment then: what QEMU
/// starts (network scripts) must not see them, nor the descriptors. Any other program, such as a shell script around
/// QEMU, hands all of it on.
///
/// # Safety
/// No other thread may use the environment meanwhile.
pub(crate) unsafe fn take() -> Option<Result<PreloadSettings, serde_json::Error>> {
    let text = std::env::var_os(VARIABLE)?;
    let settings: PreloadSettings = match serde_json::from_slice(text.as_bytes()) {
        Ok(settings) => settings,
        Err(error) => return Some(Err(error)),
    };
    if std::env::current_exe().ok()? != settings.program {
        return None;
    }
    // SAFETY: the caller's promise.
    unsafe {
        std::env::remove_var(VARIABLE);
        match std::env::var_os(LD_PRELOAD).and_then(|list| without_us(&list)) {
            Some(rest) => std::env::set_var(LD_PRELOAD, rest),
            None => std::env::remove_var(LD_PRELOAD),
        }
    }
    for fd in inherited(&settings) {
        // SAFETY: changes a flag of the descriptor; fails on one that is not open.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Some(Ok(settings))
}

/// The descriptors that the settings name.
fn inherited(settings: &PreloadSettings) -> Vec<RawFd> {
    let mut all: Vec<RawFd> =
        settings.backends.iter().filter_map(|backend| descriptor(&backend.path)).collect();
    if let QmpAddress::Descriptor { ours, theirs } = settings.qmp {
        all.extend([ours, theirs]);
    }
    if let Role::Arriving(arrival) = &settings.role {
        all.extend([arrival.control_fd, arrival.streams_fd, arrival.listener_fd, arrival.granted_fd]);
    }
    all
}

fn descriptor(path: &Path) -> Option<RawFd> {
    path.strip_prefix("/proc/self/fd").ok()?.to_str()?.parse().ok()
}

/// What is left of a preload list without this library.
fn without_us(list: &OsStr) -> Option<OsString> {
    let entries = list.as_bytes().split(|byte| LD_SEPARATORS.contains(byte));
    let others: Vec<&[u8]> =
        entries.filter(|entry| !entry.is_empty() && !entry.ends_with(LIBRARY.as_bytes())).collect();
    (!others.is_empty()).then(|| OsString::from_vec(others.join(&b':')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_stay_in_the_preload_list() {
        let rest = |list: &str| without_us(OsStr::new(list));
        assert_eq!(rest("/usr/lib/libvmemd_preload.so"), None);
        assert_eq!(rest("/a.so:/x/libvmemd_preload.so /b.so:"), Some("/a.so:/b.so".into()));
        assert_eq!(rest("/a.so"), Some("/a.so".into()));
        assert_eq!(rest(""), None);
    }

    #[test]
    fn inherited_descriptors_are_recognised() {
        assert_eq!(descriptor(Path::new("/proc/self/fd/17")), Some(17));
        assert_eq!(descriptor(Path::new("/dev/shm/vmemd-17")), None);
        assert_eq!(descriptor(Path::new("/proc/self/fd/x")), None);
    }
}
