//! Keeping vCPUs out of the guest for a share of the time.
//!
//! QEMU has it built in, for its own migration (auto-converge): every period each vCPU's thread waits, without QEMU's
//! lock and ready to be stopped. No QMP command reaches it, but the functions are exported for QEMU's modules, with the
//! same signature since QEMU 2.4. Signals would not do: QEMU blocks all of them in its vCPUs' threads.

use std::ffi::{CStr, c_int, c_void};

/// Greatest share: the guest must get on somehow.
const PERCENT_MAX: u8 = 99;

/// QEMU's own throttle.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Throttle {
    set: extern "C" fn(c_int),
    stop: extern "C" fn(),
}

fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is a C string; looking a symbol up changes nothing.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

impl Throttle {
    /// None in a QEMU that exports no such functions (one that was built without modules).
    pub(crate) fn find() -> Option<Throttle> {
        let (set, stop) = (symbol(c"cpu_throttle_set")?, symbol(c"cpu_throttle_stop")?);
        // SAFETY: these are functions of the program with that signature: void cpu_throttle_set(int), and
        // void cpu_throttle_stop(void). QEMU calls both from threads without its lock, as here.
        unsafe {
            Some(Throttle {
                set: std::mem::transmute::<*mut c_void, extern "C" fn(c_int)>(set),
                stop: std::mem::transmute::<*mut c_void, extern "C" fn()>(stop),
            })
        }
    }

    pub(crate) fn set(self, percent: u8) {
        match percent {
            0 => (self.stop)(),
            percent => (self.set)(c_int::from(percent.min(PERCENT_MAX))),
        }
    }
}
