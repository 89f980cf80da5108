//! Takes the settings out of the environment, if they are for this program.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileTypeExt;
use std::sync::Mutex;

use vmprocess::qemu::{
    LIBRARY, PreloadAnswer, PreloadSettings, QUESTION, QmpAddress, Role, VARIABLE, VERSION,
};

use crate::qmp::lock;

const LD_PRELOAD: &str = "LD_PRELOAD";
const LD_SEPARATORS: [u8; 2] = [b':', b' '];

/// The settings in the environment, if they are meant for this program.
#[derive(Debug)]
pub(crate) enum Found {
    /// This process is the QEMU that they are for.
    Ours(Box<PreloadSettings>),
    /// Any other program, such as a shell script around QEMU, and why.
    NotMeant(String),
    /// Nobody can tell what they are for.
    Unreadable(String),
}

/// The settings, if this process is the QEMU that they are for. They are gone from the environment then: what QEMU
/// starts (network scripts) must not see them, nor the descriptors. Any other program hands all of it on.
///
/// # Safety
/// No other thread may use the environment meanwhile.
pub(crate) unsafe fn take() -> Found {
    let settings = match read() {
        Ok(Some(settings)) => settings,
        Ok(None) => return Found::NotMeant(format!("{VARIABLE} is missing in its environment")),
        Err(why) => return Found::Unreadable(why),
    };
    let here = match std::env::current_exe() {
        Ok(here) => here,
        Err(error) => return Found::NotMeant(format!("it cannot tell which program it is: {error}")),
    };
    if here != settings.program {
        let (here, meant) = (here.display(), settings.program.display());
        return Found::NotMeant(format!("{VARIABLE} is for {meant}, and this is {here}"));
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
    Found::Ours(Box::new(settings))
}

fn read() -> Result<Option<PreloadSettings>, String> {
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(None) };
    // The version first: another one has other settings.
    let value: serde_json::Value = serde_json::from_slice(text.as_bytes())
        .map_err(|error| format!("{VARIABLE} cannot be read: {error}"))?;
    let theirs = value["version"].as_str().unwrap_or("another version");
    if theirs != VERSION {
        let text = format!(
            "{VARIABLE} is of vmemd {theirs}, and {LIBRARY} of {VERSION}: install both of one version"
        );
        return Err(text);
    }
    serde_json::from_value(value).map(Some).map_err(|error| format!("{VARIABLE} cannot be read: {error}"))
}

/// Where the answers go, and which process answers: a child of it exits too.
static ASKED: Mutex<Option<(File, u32)>> = Mutex::new(None);

/// Whether somebody only wants to know if this library is in the program that they named. They are told then, now and
/// at the program's exit, and nothing else is done.
pub(crate) fn answer() -> bool {
    let Some(text) = std::env::var_os(QUESTION) else { return false };
    let fd: Option<RawFd> = text.to_str().and_then(|text| text.parse().ok());
    if let Some(fd) = fd.filter(|fd| *fd > libc::STDERR_FILENO) {
        // SAFETY: left open to this program for the answers; one that is not open, or another file, is not touched
        // below.
        let pipe = std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(fd) });
        let copy = pipe
            .metadata()
            .ok()
            .filter(|meta| meta.file_type().is_fifo())
            .and_then(|_| pipe.try_clone().ok());
        *lock(&ASKED) = copy.map(|copy| (copy, std::process::id()));
        // SAFETY: the handler may run at any exit of the process.
        unsafe { libc::atexit(at_exit) };
        tell(false);
    }
    true
}

fn tell(exits: bool) {
    let asked = lock(&ASKED);
    let Some((pipe, _)) = asked.as_ref().filter(|(_, pid)| *pid == std::process::id()) else { return };
    let program = std::env::current_exe().unwrap_or_default();
    let settings_error = if exits { None } else { read().err() };
    let answer = PreloadAnswer { program, version: VERSION.to_owned(), settings_error, exits };
    if let Ok(text) = serde_json::to_string(&answer) {
        // Whoever asked may have gone.
        let _ = (&*pipe).write_all(format!("{text}\n").as_bytes());
    }
}

extern "C" fn at_exit() {
    let _ = std::panic::catch_unwind(|| tell(true));
}

/// The descriptors that the settings name.
fn inherited(settings: &PreloadSettings) -> Vec<RawFd> {
    let mut all: Vec<RawFd> = Vec::new();
    if let QmpAddress::Descriptor { ours, theirs } = settings.qmp {
        all.extend([ours, theirs]);
    }
    if let Role::Arriving(arrival) = &settings.role {
        all.extend([arrival.control_fd, arrival.streams_fd, arrival.listener_fd, arrival.granted_fd]);
    }
    all
}

/// A preload list without this library.
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
}
