//! The `vmemd-bench` command.

fn main() {
    // Ends the process without joining threads: one that waits for a fault which is never served cannot be joined.
    std::process::exit(i32::from(vmemd_bench::cli::main()));
}
