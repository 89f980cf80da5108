//! What test guests run, and its counterparts on the host: writes, reads and verifies data that is known beforehand.
//!
//! Every mode prints lines `checker MODE [EVENT] key=value ...`, each with one write, and exits with 1 if anything differed,
//! with 2 if it could not do its work.

mod beat;
mod bench;
mod content;
mod disk;
mod memory;
mod stream;

use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str = "\
usage: checker memory SIZE ROUNDS|SECONDSs [sequential|random]
       checker disk DEVICE PIECES          checker image FILE SIZE
       checker stream PORT                 checker send HOST PORT [SECONDS] (else until its input ends)
       checker beat                        checker echo PORT
       checker bench SECONDS [SIZE]";

/// Why a mode could not do its work.
type Failure = Box<dyn std::error::Error>;

/// How many pages, of all that were checked, differed.
type Mismatched = u64;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(failure) => {
            // On the console too, where the lines are looked for.
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

fn number<T: std::str::FromStr>(text: &str) -> Result<T, Failure> {
    text.parse().map_err(|_| format!("{text} is not a number here\n{USAGE}").into())
}

/// A size as people write it: `64M`.
fn bytes(text: &str) -> Result<usize, Failure> {
    let shift = match text.as_bytes().last() {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
    let count: usize = number(digits)?;
    count.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large").into())
}

/// Zeroed memory that begins at a page; the kernel gives the pages when they are first touched.
#[derive(Debug)]
struct Memory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Memory {
        let bytes = vec![0; len + content::PAGE];
        let start = bytes.as_ptr().align_offset(content::PAGE);
        Memory { bytes, start, len }
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

/// Says which pages differ, the first few of them.
#[derive(Debug)]
struct Differences {
    mode: &'static str,
    count: Mismatched,
}

impl Differences {
    /// More than this many are counted only: the console is slow.
    const SHOWN: u64 = 8;

    fn none(mode: &'static str) -> Differences {
        Differences { mode, count: 0 }
    }

    fn check(&mut self, bytes: &[u8], series: u64, page: u64) {
        if content::is_right(bytes, series, page) {
            return;
        }
        self.count += 1;
        if self.count <= Differences::SHOWN {
            println!("checker {} mismatch {}", self.mode, content::difference(bytes, series, page));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(bytes("64M").expect("a size"), 64 << 20);
        assert_eq!(bytes("3G").expect("a size"), 3 << 30);
        assert_eq!(bytes("4096").expect("a size"), 4096);
        for wrong in ["", "M", "-1M", "99999999999999G"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn memory_begins_at_a_page() {
        let mut memory = Memory::new(3 * content::PAGE);
        assert_eq!(memory.as_slice().len(), 3 * content::PAGE);
        assert_eq!(memory.as_mut_slice().as_ptr() as usize % content::PAGE, 0);
    }
}
