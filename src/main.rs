//! The `vmemd` command.

fn main() {
    // Leaves threads of a VM that cannot end (a fault that is never served) to the kernel.
    std::process::exit(i32::from(vmemd::cli::main()));
}
