//! Whether what a command line names is there, on the host where it is to be started.

use std::ffi::CString;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use vmprocess::failure::{Failure, FailureKind};

use super::descriptors;
use super::walk::{Resource, SOCKET_PATH_MAX, fits_a_socket, list};
use super::what::What;
use crate::program;
use crate::qemu::options::CommandLine;

/// A host, as far as it can be seen; [`ThisHost`] looks at the real one.
pub trait Host: std::fmt::Debug {
    fn is_directory(&self, path: &Path) -> bool;
    /// It is there, whatever it is.
    fn exists(&self, path: &Path) -> bool;
    /// It is there and a program.
    fn is_program(&self, path: &Path) -> bool;
    fn has_interface(&self, name: &str) -> bool;
    /// Somebody listens at this Unix socket.
    fn is_bound(&self, path: &Path) -> bool;
    /// Where its links lead, if that is a place of the process that opens it.
    fn leads_into_process(&self, path: &Path) -> Option<PathBuf>;
}

/// The host that this process runs on, in its own namespaces.
#[derive(Clone, Copy, Debug)]
pub struct ThisHost;

impl Host for ThisHost {
    fn is_directory(&self, path: &Path) -> bool {
        path.is_dir()
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn is_program(&self, path: &Path) -> bool {
        program::is_program(path)
    }

    fn has_interface(&self, name: &str) -> bool {
        // Not by sysfs, which may be another network namespace's.
        let Ok(name) = CString::new(name) else { return false };
        // SAFETY: the name is zero-terminated and lives through the call.
        unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
    }

    fn is_bound(&self, path: &Path) -> bool {
        // A socket file whose owner has died is left behind; the kernel's list has the living ones.
        let is_socket = path.metadata().is_ok_and(|meta| meta.file_type().is_socket());
        let Some(path) = path.to_str().filter(|_| is_socket) else { return false };
        let bound = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
        // Numbers, then the path: the first slash is the path's.
        bound.lines().any(|line| line.find('/').is_some_and(|at| &line[at..] == path))
    }

    fn leads_into_process(&self, path: &Path) -> Option<PathBuf> {
        descriptors::behind(path)
    }
}

/// Everything that is missing, one line each; empty if nothing is.
pub(in crate::qemu) fn missing(line: &CommandLine, host: &dyn Host) -> Result<Vec<String>, Failure> {
    Ok(list(line)?.iter().filter_map(|resource| lacks(resource, host)).collect())
}

/// Fails if anything is missing, and names all of it.
pub(in crate::qemu) fn report(missing: &[String]) -> Result<(), Failure> {
    if missing.is_empty() {
        return Ok(());
    }
    let lines: String = missing.iter().map(|line| format!("\n  {line}")).collect();
    let text = format!("this host cannot take the VM:{lines}");
    Err(Failure::new(FailureKind::Host, text))
}

fn lacks(resource: &Resource, host: &dyn Host) -> Option<String> {
    let Resource { what, name, option } = resource;
    let path = PathBuf::from(name);
    let say = |text: String| Some(format!("`{option}`: {text}"));
    let noun = what.noun();
    if what.is_path() && !path.is_absolute() {
        // A name alone is looked up by QEMU itself.
        let of_qemu = *what == What::Firmware && !name.contains('/');
        return if of_qemu { None } else { say(format!("{noun} {name:?} is not an absolute path")) };
    }
    if what.is_path()
        && let Some(leads) = host.leads_into_process(&path)
    {
        let leads = leads.display();
        return say(format!(
            "{noun} {name} is a link to {leads}, which is another thing in each process: map its name to that of a file"
        ));
    }
    if what.is_socket() && !fits_a_socket(name) {
        let text = format!(
            "socket {name} is too long for a socket's path, which has {SOCKET_PATH_MAX} bytes at most: map it to a shorter \
             name by a rule"
        );
        return say(text);
    }
    let gone = || say(format!("{noun} {name} is missing here: make it, or map its name by a rule"));
    match what {
        What::Disk | What::File | What::Firmware | What::Connects => {
            if host.exists(&path) {
                None
            } else {
                gone()
            }
        }
        // QEMU takes `path`, or the pair `path.in` and `path.out`, for a pipe.
        What::Device => {
            let pipe = PathBuf::from(format!("{name}.in"));
            if host.exists(&path) || host.exists(&pipe) { None } else { gone() }
        }
        What::Directory => {
            if host.is_directory(&path) {
                None
            } else {
                gone()
            }
        }
        What::Program => {
            if host.is_program(&path) {
                None
            } else {
                gone()
            }
        }
        What::Output | What::Listens => {
            let parent = path.parent().unwrap_or(Path::new("/"));
            if !host.is_directory(parent) {
                return say(format!(
                    "directory {} of {noun} {name} is missing here: make it, or map it by a rule",
                    parent.display()
                ));
            }
            if *what == What::Listens && host.is_bound(&path) {
                return say(format!(
                    "socket {name} is another process's here: map it to another name by a rule"
                ));
            }
            None
        }
        What::Tap | What::Bridge => {
            if host.has_interface(name) {
                None
            } else {
                gone()
            }
        }
        What::TapMade | What::Reconnects => None,
        What::Descriptor => say(format!(
            "descriptor {name} was given to QEMU by the process that started it, and no other host has it: start the \
             VM with names of files, sockets and interfaces (file=, path=, ifname=) instead"
        )),
        What::Screen => {
            say("a window or terminal does not move: use -display none, -vnc or -spice, and a socket or a file for a serial line".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A host that has just these.
    #[derive(Debug, Default)]
    struct Fake {
        has: Vec<&'static str>,
        bound: Vec<&'static str>,
    }

    impl Host for Fake {
        fn is_directory(&self, path: &Path) -> bool {
            self.exists(path)
        }
        fn exists(&self, path: &Path) -> bool {
            self.has.iter().any(|name| Path::new(name) == path)
        }
        fn is_program(&self, path: &Path) -> bool {
            self.exists(path)
        }
        fn has_interface(&self, name: &str) -> bool {
            self.has.contains(&name)
        }
        fn is_bound(&self, path: &Path) -> bool {
            self.bound.iter().any(|name| Path::new(name) == path)
        }
        fn leads_into_process(&self, path: &Path) -> Option<PathBuf> {
            (path == Path::new("/link")).then(|| "/dev/fd/3".into())
        }
    }

    fn line(text: &str) -> CommandLine {
        CommandLine::parse(&text.split_whitespace().collect::<Vec<_>>()).unwrap()
    }

    fn check(line: &CommandLine, host: &dyn Host) -> Result<(), Failure> {
        report(&missing(line, host)?)
    }

    #[test]
    fn everything_that_is_missing_is_told_at_once() {
        let text = "-kernel /k -drive file=/d -netdev tap,id=n,ifname=t0,script=no -netdev bridge,id=b,br=br9 \
                    -serial file:/logs/s -chardev socket,id=c,path=/run/c,server=on -accel kvm -L /l \
                    -netdev tap,id=m,ifname=t1,script=/up,downscript=no";
        let error = check(&line(text), &Fake::default()).unwrap_err();
        assert_eq!(error.kind, FailureKind::Host);
        for says in [
            "`-kernel /k`: file /k is missing here: make it, or map its name by a rule",
            "disk /d is missing here",
            "tap interface t0 is missing here",
            "bridge br9 is missing here",
            "directory /logs of output file /logs/s is missing here",
            "directory /run of socket /run/c is missing here",
            "device /dev/kvm is missing here",
            "directory /l is missing here",
            "program /up is missing here",
        ] {
            assert!(error.text.contains(says), "{says}: {error}");
        }
        assert_eq!(error.text.lines().count(), 10, "{error}");
        let has = vec!["/k", "/d", "t0", "br9", "/logs", "/run", "/dev/kvm", "/l", "/up"];
        check(&line(text), &Fake { has: has.clone(), ..Fake::default() }).unwrap();
        let error = check(&line(text), &Fake { has, bound: vec!["/run/c"] }).unwrap_err();
        assert!(error.text.contains("socket /run/c is another process's here"), "{error}");
    }

    #[test]
    fn what_no_host_could_have() {
        for (text, says) in [
            ("-netdev tap,id=n,fd=3", "descriptor 3 was given to QEMU"),
            ("-display gtk", "use -display none, -vnc or -spice"),
            ("-kernel vmlinuz", "file \"vmlinuz\" is not an absolute path"),
        ] {
            let error = check(&line(text), &ThisHost).unwrap_err();
            assert!(error.text.contains(says), "{error}");
        }
        check(&line("-bios bios.bin"), &ThisHost).unwrap();
    }

    #[test]
    fn the_real_host() {
        let place = testkit::directory("check");
        let dir = place.path();
        let path = dir.join("a socket");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(ThisHost.is_bound(&path));
        drop(listener);
        assert!(ThisHost.exists(&path) && !ThisHost.is_bound(&path), "its owner is gone");
        assert!(ThisHost.is_directory(dir) && !ThisHost.is_program(dir));
        assert!(ThisHost.is_program(Path::new("/proc/self/exe")));
        assert!(
            ThisHost.has_interface("lo")
                && !ThisHost.has_interface("../net/lo")
                && !ThisHost.has_interface("")
        );
    }
}
