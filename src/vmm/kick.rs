//! Getting a vCPU thread out of KVM_RUN from another thread, and hearing of lost pages, both by signals.
//!
//! The handler of the kick sets `immediate_exit` in the vCPU's shared page, so a kick that arrives just before
//! KVM_RUN makes that return at once: none is lost, if the thread clears the byte first and looks second at what
//! it should do. KVM reports a page whose content is lost (poisoned) by SIGBUS to the vCPU's thread.

use std::cell::Cell;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering, compiler_fence};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

use crate::vmm::error::VmmError;

/// The real-time signal that kicks, counted from SIGRTMIN.
const KICK_OFFSET: libc::c_int = 3;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, or null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
    /// Address of the lost page that this thread touched, or 0.
    static LOST_PAGE: Cell<usize> = const { Cell::new(0) };
}

/// What handled SIGBUS before, for threads that run no vCPU.
static PREVIOUS_SIGBUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

fn signal() -> libc::c_int {
    libc::SIGRTMIN() + KICK_OFFSET
}

/// Installs the handlers, once in the process.
pub(super) fn install() -> Result<(), VmmError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED.get_or_init(install_handlers).map_err(|errno| VmmError::Thread {
        action: "install the signal handlers that stop vCPUs",
        source: std::io::Error::from_raw_os_error(errno),
    })
}

fn install_handlers() -> Result<(), i32> {
    // SAFETY: zero is a valid sigaction; both handlers only touch thread-local cells and the vCPU's shared page,
    // which is safe in a signal; the old action is leaked on purpose, so the pointer to it stays valid.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        set_action(libc::SIGBUS, on_bus_error, &raw mut old)?;
        PREVIOUS_SIGBUS.store(Box::into_raw(Box::new(old)), Ordering::Release);
        set_action(signal(), on_kick, ptr::null_mut())
    }
}

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// # Safety
/// `handler` must be safe to run in a signal; `old` must be null or writable.
unsafe fn set_action(signal: libc::c_int, handler: Handler, old: *mut libc::sigaction) -> Result<(), i32> {
    // SAFETY: zero is a valid sigaction, filled in below; the caller answers for handler and old.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(signal, &raw const action, old)
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
    }
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    ask_to_exit();
}

fn ask_to_exit() {
    let byte = IMMEDIATE_EXIT.get();
    if !byte.is_null() {
        // SAFETY: non-null only between enter and leave of this thread, while the vCPU's page is mapped.
        unsafe { ptr::write_volatile(byte, 1) };
    }
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if !IMMEDIATE_EXIT.get().is_null() {
        // SAFETY: the kernel hands a valid siginfo to an SA_SIGINFO handler; SIGBUS carries an address.
        LOST_PAGE.set(unsafe { (*info).si_addr() } as usize);
        ask_to_exit();
        return;
    }
    let previous = PREVIOUS_SIGBUS.load(Ordering::Acquire);
    // SAFETY: the pointer is null or a leaked sigaction; a previous handler is called as the kernel would; with
    // none, the default action comes back and the failing instruction, executed again, ends the process.
    unsafe {
        match (!previous.is_null()).then(|| *previous) {
            Some(old) if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN => {
                let handler: Handler = std::mem::transmute(old.sa_sigaction);
                handler(signal, info, context);
            }
            _ => {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
    }
}

/// Makes this thread the one that the signals for a vCPU go to.
pub(super) fn enter(vcpu: &mut VcpuFd) {
    LOST_PAGE.set(0);
    IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
}

/// Ends what [`enter`] began; signals do nothing to this thread any more.
pub(super) fn leave() {
    IMMEDIATE_EXIT.set(ptr::null_mut());
}

/// Forgets earlier kicks. Whatever they announced must be looked at after this.
pub(super) fn forget() {
    let byte = IMMEDIATE_EXIT.get();
    assert!(!byte.is_null(), "a thread forgets kicks only while it runs a vCPU");
    // SAFETY: as in ask_to_exit.
    unsafe { ptr::write_volatile(byte, 0) };
    compiler_fence(Ordering::SeqCst);
}

/// Host address of the lost page that this thread's vCPU has touched, if any.
pub(super) fn lost_page() -> Option<usize> {
    Some(LOST_PAGE.get()).filter(|address| *address != 0)
}

/// Kicks the vCPU of that thread.
pub(super) fn kick(thread: &JoinHandle<()>) {
    // SAFETY: a thread that has not been joined has a valid pthread_t, even when it has ended.
    let result = unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
    assert!(result == 0 || result == libc::ESRCH, "pthread_kill of a vCPU thread failed: {result}");
}
