//! What the process that starts QEMU tells the preload: one JSON text in the environment.

use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The environment variable that holds the settings.
pub(crate) const VARIABLE: &str = "VMEMD_PRELOAD";
const LD_PRELOAD: &str = "LD_PRELOAD";
/// File name of this shared object, as it stands in `LD_PRELOAD`.
const LIBRARY: &str = "libvmemd_preload.so";
const LD_SEPARATORS: [u8; 2] = [b':', b' '];

/// A `memory-backend-file` of QEMU's command line. Guest memory is the backends in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Its `mem-path`.
    pub path: PathBuf,
    /// A multiple of 2 MiB.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreloadSettings {
    /// The QEMU binary, without links in its path. Every other program is left alone.
    pub program: PathBuf,
    pub backends: Vec<Backend>,
    /// The Unix socket of a QMP monitor of this QEMU.
    pub qmp: PathBuf,
    /// Where the log goes; standard error without it.
    pub log: Option<PathBuf>,
}

impl Backend {
    fn descriptor(&self) -> Option<libc::c_int> {
        self.path.strip_prefix("/proc/self/fd").ok()?.to_str()?.parse().ok()
    }

    pub(crate) fn c_path(&self) -> Option<CString> {
        CString::new(self.path.as_os_str().as_bytes()).ok()
    }
}

/// The settings, if this process is the QEMU that they are for. They are gone from the environment then: what QEMU
/// starts (network scripts) must not see them.
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
    for fd in settings.backends.iter().filter_map(Backend::descriptor) {
        // SAFETY: changes a flag of the descriptor; fails on one that is not open.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Some(Ok(settings))
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
        let fd = |path: &str| Backend { path: path.into(), bytes: 0 }.descriptor();
        assert_eq!(fd("/proc/self/fd/17"), Some(17));
        assert_eq!(fd("/dev/shm/vmemd-17"), None);
        assert_eq!(fd("/proc/self/fd/x"), None);
    }
}
