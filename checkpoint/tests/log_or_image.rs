//! Writing a checkpoint's pages in place, into a sparse image, beside appending them to a log: the same bytes, as a
//! live checkpoint writes them (buffers of 2 MiB, six at once, past the page cache). Prints figures, and asserts none.
//! `VMEMD_LONG=1`, built with `--release`.

#[macro_use]
extern crate testkit;

testkit::main!();

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use memmap2::MmapMut;
use swapd::PAGE_SIZE;
use testkit::{Reason, skip};

const MEMORY: u64 = 1 << 30;
const BUFFER: usize = 2 << 20;
const WRITES: usize = 6;
const TIMES: usize = 3;

/// What is written in a round, in pieces of so many bytes.
struct Round {
    what: &'static str,
    piece: usize,
    /// Where in the memory the pieces are.
    places: Vec<u64>,
}

fn rounds() -> [Round; 3] {
    let scattered = |what, piece: usize, bytes: u64| {
        let pieces = MEMORY / piece as u64;
        // An odd factor and a power of two: each place once, in no order.
        let nth = |nth: u64| (nth.wrapping_mul(0x9E37_79B9_7F4A_7C15) % pieces) * piece as u64;
        let mut places: Vec<u64> = (0..bytes / piece as u64).map(nth).collect();
        // A round goes over the memory from its start.
        places.sort_unstable();
        Round { what, piece, places }
    };
    let first = (0..MEMORY).step_by(BUFFER).collect();
    [
        Round { what: "first round, 1 GiB", piece: BUFFER, places: first },
        scattered("changed: 256 MiB in runs of 64 KiB", 64 << 10, 256 << 20),
        scattered("changed: 128 MiB in single pages", PAGE_SIZE, 128 << 20),
    ]
}

fn direct(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT);
    options.open(path).unwrap()
}

/// Seconds until the round is durable. In place, each piece goes where it belongs; in a log, a buffer of them at the
/// end.
fn write(file: &File, round: &Round, log: Option<&AtomicU64>) -> f64 {
    let a_buffer = BUFFER / round.piece;
    let next = AtomicU64::new(0);
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..WRITES {
            scope.spawn(|| {
                let mut buffer = MmapMut::map_anon(BUFFER).unwrap();
                buffer.fill(0xA5);
                loop {
                    let first = next.fetch_add(a_buffer as u64, Ordering::Relaxed) as usize;
                    let Some(places) = round.places.get(first..) else { break };
                    let places = &places[..a_buffer.min(places.len())];
                    if places.is_empty() {
                        break;
                    }
                    if let Some(end) = log {
                        let bytes = places.len() * round.piece;
                        let at = end.fetch_add(bytes as u64, Ordering::Relaxed);
                        file.write_all_at(&buffer[..bytes], at).unwrap();
                        continue;
                    }
                    for (nth, place) in places.iter().enumerate() {
                        file.write_all_at(&buffer[nth * round.piece..][..round.piece], *place).unwrap();
                    }
                }
            });
        }
    });
    file.sync_data().unwrap();
    began.elapsed().as_secs_f64()
}

#[test]
fn in_place_beside_appended() {
    if std::env::var_os("VMEMD_LONG").is_none() {
        skip(Reason::Long, "writes a few GiB: VMEMD_LONG=1");
    }
    let place = testkit::directory_in(env!("CARGO_TARGET_TMPDIR"), "log-or-image");
    let rounds = rounds();
    let mut took = [[const { Vec::new() }; 2], [const { Vec::new() }; 2], [const { Vec::new() }; 2]];
    for time in 0..TIMES {
        let image = direct(&place.path().join("image"));
        image.set_len(MEMORY).unwrap();
        let log = direct(&place.path().join("log"));
        let end = AtomicU64::new(0);
        for (nth, round) in rounds.iter().enumerate() {
            // Each is first as often as the other.
            for which in [time % 2, 1 - time % 2] {
                let (file, log) = if which == 0 { (&image, None) } else { (&log, Some(&end)) };
                took[nth][which].push(write(file, round, log));
            }
        }
    }
    for (nth, round) in rounds.iter().enumerate() {
        let bytes = (round.places.len() * round.piece) as f64 / (1 << 20) as f64;
        let rate = |times: &mut Vec<f64>| {
            times.sort_by(f64::total_cmp);
            (bytes / times[TIMES / 2], bytes / times[TIMES - 1])
        };
        let [image, log] = &mut took[nth];
        let ((image, image_worst), (log, log_worst)) = (rate(image), rate(log));
        println!(
            "{:<36} in place {image:>6.0} MiB/s (worst {image_worst:.0}), appended {log:>6.0} MiB/s (worst {log_worst:.0})",
            round.what
        );
    }
}
