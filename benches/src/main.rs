//! The `vmemd-bench` command.

fn main() {
    // Leaves threads that cannot end (a fault that is never served) to the kernel.
    std::process::exit(i32::from(vmemd_bench::cli::main()));
}
