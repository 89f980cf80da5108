//! The kinds of things outside of a command line, and who is told of them.

/// What a name in a command line stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    /// A disk image or block device.
    Disk,
    /// A file that QEMU reads: kernel, initrd, device tree, keys, tables.
    File,
    /// As [`File`](What::File), but a name without a `/` is one of QEMU's own.
    Firmware,
    /// A file that QEMU writes: its directory must be there.
    Output,
    /// A directory.
    Directory,
    /// A device node of the host.
    Device,
    /// A Unix socket that QEMU makes.
    Listens,
    /// A Unix socket that another process has made.
    Connects,
    /// The same, but QEMU tries again until it is there.
    Reconnects,
    /// A program that QEMU starts.
    Program,
    /// A tap interface that must be there beforehand.
    Tap,
    /// A tap interface that QEMU makes if it is not there, and has a script to connect it.
    TapMade,
    /// A bridge.
    Bridge,
    /// A descriptor given to QEMU by the process that started it: nobody else has it.
    Descriptor,
    /// A window or terminal of the user who started it.
    Screen,
}

impl What {
    /// It is a path of the file system.
    pub fn is_path(self) -> bool {
        !matches!(self, What::Tap | What::TapMade | What::Bridge | What::Descriptor | What::Screen)
    }

    pub(in crate::qemu) fn is_socket(self) -> bool {
        matches!(self, What::Listens | What::Connects | What::Reconnects)
    }

    pub(in crate::qemu) fn noun(self) -> &'static str {
        match self {
            What::Disk => "disk",
            What::File | What::Firmware => "file",
            What::Output => "output file",
            What::Directory => "directory",
            What::Device => "device",
            What::Listens | What::Connects | What::Reconnects => "socket",
            What::Program => "program",
            What::Tap | What::TapMade => "tap interface",
            What::Bridge => "bridge",
            What::Descriptor => "descriptor",
            What::Screen => "screen",
        }
    }
}

/// Told, for one option, what it is and its name; gives a new name, or None to keep it.
pub(super) type SeeOne<'a> = &'a mut dyn FnMut(What, &str) -> Option<String>;
