//! Whether a program really gets the preload: asked of the program itself, before a VM depends on it.
//!
//! The loader drops what it cannot load (a damaged file, a file system mounted noexec) with a word on standard error,
//! and goes on without it; a wrapper may start QEMU with another environment. So the program is started once as
//! `--version`, with the environment that the VM's QEMU will have, and the preload answers over a pipe when the program
//! begins and when it exits.

use std::ffi::OsString;
use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use vmprocess::failure::{Failure, FailureKind};
use vmprocess::qemu::{LIBRARY, PreloadAnswer, QUESTION, VERSION};

use super::ask;
use super::inherit::inherit;

/// Far more than the answers of some programs in a row.
const ANSWERS_BYTES_MAX: u64 = 64 << 10;
/// It takes some hundredths of a second; a loaded host has its time all the same.
const LIMIT: Duration = Duration::from_secs(10);

/// Refuses a binary into which the preload does not get with that environment.
pub(super) fn check(binary: &Path, environment: &[(&'static str, OsString)]) -> Result<(), Failure> {
    let host = |text: String| Failure::new(FailureKind::Host, text);
    let (reader, writer) =
        std::io::pipe().map_err(|error| Failure::io("no pipe to ask QEMU over", &error))?;
    let mut command = Command::new(binary);
    command.arg("--version").envs(environment.iter().cloned()).env(QUESTION, writer.as_raw_fd().to_string());
    let number = [writer.as_raw_fd()];
    // SAFETY: between fork and exec the closure only makes async-signal-safe system calls and allocates nothing.
    unsafe { command.pre_exec(move || inherit(&number)) };
    let said = ask::output(LIMIT, &mut command)
        .map_err(|error| host(format!("{} cannot be started: {error}", binary.display())))?;
    drop(writer);
    let Some((status, _, err)) = said else {
        return Err(host(format!(
            "`{} --version` does not end within {LIMIT:?}: is it a QEMU?",
            binary.display()
        )));
    };
    let library = environment.iter().find(|(name, _)| *name == "LD_PRELOAD").map(|(_, value)| value);
    let library = library.map(|list| list.to_string_lossy().into_owned()).unwrap_or_default();
    let library = library.split(':').next().unwrap_or(LIBRARY);
    let answers = answers(reader);
    if answers.is_empty() && status.signal().is_some() {
        let text = format!(
            "the loader ends ({status}) while it takes {library} into {}: the file is damaged or cut short: reinstall it",
            binary.display()
        );
        return Err(host(text));
    }
    judge(binary, library, &answers, &err).map_err(|mut failure| {
        if !status.success() {
            failure.text += &format!(" (`--version` failed: {status})");
        }
        failure
    })
}

fn answers(reader: PipeReader) -> Vec<PreloadAnswer> {
    // A process that a wrapper left behind may hold the pipe open: what there is was written before the program ended.
    let _ = rustix::fs::fcntl_setfl(&reader, rustix::fs::OFlags::NONBLOCK);
    let mut text = Vec::new();
    let _ = reader.take(ANSWERS_BYTES_MAX).read_to_end(&mut text);
    String::from_utf8_lossy(&text).lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// `err`: what the program, and the loader in it, printed.
fn judge(binary: &Path, library: &str, answers: &[PreloadAnswer], err: &str) -> Result<(), Failure> {
    let shown = binary.display();
    let fail = |kind, text: String| Err(Failure::new(kind, text));
    let complaint = err.lines().find(|line| line.contains("ld.so") && line.contains(library));
    let Some(last) = answers.last() else {
        return match complaint {
            Some(line) => fail(
                FailureKind::Host,
                format!(
                    "the loader does not take {library} into {shown}, so QEMU's memory would have no budget: {}: reinstall \
                     it, readable for this user, on a file system that is not mounted noexec",
                    reason(line, library)
                ),
            ),
            None => fail(
                FailureKind::Host,
                format!(
                    "{shown} starts without {library}, so QEMU's memory would have no budget: name the QEMU binary \
                     itself, not a wrapper that starts it with another environment"
                ),
            ),
        };
    };
    if let Some(other) = answers.iter().find(|answer| answer.program != binary) {
        let text = format!(
            "{shown} is a wrapper that starts {}: name that, with the arguments that the wrapper adds",
            other.program.display()
        );
        return fail(FailureKind::Usage, text);
    }
    if last.version != VERSION {
        let text = format!(
            "{library} is of vmemd {}, and this is vmemd {VERSION}: install both of one version",
            last.version
        );
        return fail(FailureKind::Host, text);
    }
    if let Some(why) = answers.iter().find_map(|answer| answer.settings_error.as_ref()) {
        return fail(FailureKind::Host, format!("{library} in {shown}: {why}"));
    }
    if !last.exits {
        let text = format!(
            "{shown} becomes another program, without {library} (a wrapper that changes the environment): name the QEMU \
             binary itself"
        );
        return fail(FailureKind::Usage, text);
    }
    Ok(())
}

/// The loader's own reason: `ERROR: ld.so: object 'X' from LD_PRELOAD cannot be preloaded (REASON): ignored.`
fn reason<'a>(line: &'a str, library: &str) -> &'a str {
    let rest = line.split_once(library).map_or(line, |(_, rest)| rest);
    let found = rest.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map(|(reason, _)| reason);
    found.unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QEMU: &str = "/usr/bin/qemu-system-x86_64";
    const OBJECT: &str = "/opt/libvmemd_preload.so";

    fn answer(program: &str, exits: bool) -> PreloadAnswer {
        PreloadAnswer { program: program.into(), version: VERSION.to_owned(), settings_error: None, exits }
    }

    fn judged(answers: &[PreloadAnswer], err: &str) -> Result<(), Failure> {
        judge(Path::new(QEMU), OBJECT, answers, err)
    }

    #[test]
    fn the_program_that_was_named_has_to_begin_and_exit_with_the_preload() {
        let whole = [answer(QEMU, false), answer(QEMU, true)];
        assert_eq!(judged(&whole, "qemu: a warning"), Ok(()));
        let other = "/usr/lib/qemu";
        let old = whole.clone().map(|answer| PreloadAnswer { version: "0.0.1".to_owned(), ..answer });
        let garbled =
            whole.clone().map(|answer| PreloadAnswer { settings_error: Some("no".to_owned()), ..answer });
        for (answers, kind, says) in [
            (&[][..], FailureKind::Host, "starts without /opt/libvmemd_preload.so"),
            (&whole[..1], FailureKind::Usage, "becomes another program"),
            (
                &[answer(QEMU, false), answer(other, false), answer(other, true)],
                FailureKind::Usage,
                "starts /usr/lib/qemu",
            ),
            (&[answer(other, false), answer(other, true)], FailureKind::Usage, "starts /usr/lib/qemu"),
            (&old, FailureKind::Host, "is of vmemd 0.0.1, and this is vmemd"),
            (&garbled, FailureKind::Host, "preload.so in /usr/bin/qemu-system-x86_64: no"),
        ] {
            let failure = judged(answers, "").unwrap_err();
            assert!(failure.kind == kind && failure.text.contains(says), "{says}: {failure}");
        }
    }

    #[test]
    fn the_loader_says_why() {
        let line = "ERROR: ld.so: object '/opt/libvmemd_preload.so' from LD_PRELOAD cannot be preloaded (file too short): \
                    ignored.";
        let failure = judged(&[], &format!("hello\n{line}\nQEMU\n")).unwrap_err();
        assert!(failure.text.contains("no budget: file too short: reinstall it"), "{failure}");
        let strange = "ld.so: /opt/libvmemd_preload.so: strange";
        assert!(judged(&[], strange).unwrap_err().text.contains(strange));
    }
}
