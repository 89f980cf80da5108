//! The checker, which runs in test guests and, for the other end of disks and streams, on the host. It writes, reads
//! and verifies data that is known beforehand.
//!
//! Every mode prints lines `checker MODE [EVENT] key=value ...`, each with one write, and exits with 1 if anything
//! differed, with 2 if it could not do its work.

mod arguments;
mod beat;
mod bench;
mod content;
mod differences;
mod disk;
mod files;
mod memory;
mod pages;
mod stream;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use arguments::{Failure, USAGE, bytes, number};
use differences::Mismatched;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(failure) => {
            // To standard output, which is the console: tests look for lines there.
            println!("checker {} failed: {failure}", arguments.first().unwrap_or(&""));
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &[&str]) -> Result<Mismatched, Failure> {
    match *arguments {
        ["memory", size, until] => memory::check(bytes(size)?, until.parse()?, memory::Order::Sequential),
        ["memory", size, until, order] => memory::check(bytes(size)?, until.parse()?, order.parse()?),
        ["disk", device, pieces] => disk::check(device, number(pieces)?),
        ["image", file, size] => disk::write_image(file, bytes(size)?),
        ["files", dir] => files::check(dir),
        ["tree", dir, first, last] => files::tree(dir, number(first)?, number(last)?),
        ["stream", port] => stream::receive(number(port)?),
        ["send", host, port] => stream::send(host, number(port)?, stream::until_input_ends()),
        ["send", host, port, seconds] => {
            let (started, time) = (Instant::now(), Duration::from_secs(number(seconds)?));
            stream::send(host, number(port)?, move || started.elapsed() >= time)
        }
        ["beat"] => beat::beat(),
        ["echo", port] => beat::echo(number(port)?),
        ["bench", seconds] => bench::run(Duration::from_secs(number(seconds)?), bench::SIZE),
        ["bench", seconds, size] => bench::run(Duration::from_secs(number(seconds)?), bytes(size)?),
        _ => Err(USAGE.into()),
    }
}
