//! The system calls of a thread of another process, by ptrace(2).

use std::io;
use std::mem::MaybeUninit;

/// The signal of a traced thread's stop at a system call, with the bit by which `PTRACE_O_TRACESYSGOOD` tells it from
/// other stops.
const AT_A_CALL: i32 = libc::SIGTRAP | 0x80;

/// Calls `seen` with the number and the arguments of each system call that the thread makes from now on, until `seen`
/// returns false.
pub(crate) fn system_calls(thread: u32, mut seen: impl FnMut(i64, [u64; 6]) -> bool) {
    let thread = thread as i32;
    let options = libc::PTRACE_O_TRACESYSGOOD as usize;
    ask(libc::PTRACE_SEIZE, thread, 0, options).expect("a test may trace its own VMs");
    let _let_go = LetGo(thread);
    ask(libc::PTRACE_INTERRUPT, thread, 0, 0).expect("it runs");
    loop {
        let signal = stopped(thread);
        if signal == AT_A_CALL
            && let Some((number, arguments)) = entered(thread)
            && !seen(number, arguments)
        {
            break;
        }
        // A signal that came meanwhile is for the thread; a stop of ptrace's own is not.
        let passed = if signal == AT_A_CALL || signal == libc::SIGTRAP { 0 } else { signal };
        ask(libc::PTRACE_SYSCALL, thread, 0, passed as usize).expect("it is stopped");
    }
}

/// A thread that is traced, until this is dropped, also when `seen` panics: a process of which a thread is still
/// traced never ends for whoever waits for it.
struct LetGo(i32);

impl Drop for LetGo {
    fn drop(&mut self) {
        // It is stopped, or it has ended.
        let _ = ask(libc::PTRACE_DETACH, self.0, 0, 0);
    }
}

/// Waits until the thread stops, and returns the signal at which it stops.
fn stopped(thread: i32) -> i32 {
    let mut status = 0;
    // SAFETY: a status to write to, which outlives the call.
    let waited = unsafe { libc::waitpid(thread, &mut status, libc::__WALL) };
    assert_eq!(waited, thread, "{}", io::Error::last_os_error());
    assert!(libc::WIFSTOPPED(status), "the thread has ended: {status:#x}");
    libc::WSTOPSIG(status)
}

/// The call that the thread is about to make; none, if it returns from one.
fn entered(thread: i32) -> Option<(i64, [u64; 6])> {
    let mut info = MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
    let (at, bytes) = (info.as_mut_ptr() as usize, size_of::<libc::ptrace_syscall_info>());
    ask(libc::PTRACE_GET_SYSCALL_INFO, thread, bytes, at).expect("it is stopped at a call");
    // SAFETY: all zeros are a value of this type of numbers, and the kernel has written no more than that.
    let info = unsafe { info.assume_init() };
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: the kernel has just said which part of the union it is.
    let entry = unsafe { info.u.entry };
    Some((entry.nr as i64, entry.args))
}

fn ask(request: libc::c_uint, thread: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: the kernel checks the thread; `data` is a plain number, or the address of a place of `address` bytes.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
