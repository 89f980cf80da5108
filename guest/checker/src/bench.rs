//! A fixed job that computes and touches memory and waits for nothing. Its score is the work that a guest's processor
//! gets done.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::arguments::Failure;
use crate::content::{self, PAGE};
use crate::differences::Mismatched;
use crate::pages::PageBuffer;

/// Memory of the job, unless said otherwise.
pub(crate) const SIZE: usize = 64 << 20;
/// Scattered touches of a unit of work.
const TOUCHES: usize = 4096;
/// Neighbouring pages that a unit of work writes and verifies.
const PAGES: usize = 64;

/// Works for so long; the score is units of work a second.
pub(crate) fn run(time: Duration, size: usize) -> Result<Mismatched, Failure> {
    let pages = size / PAGE;
    if pages < PAGES {
        return Err(format!("{size} bytes are too few for a benchmark").into());
    }
    let mut memory = PageBuffer::new(pages * PAGE);
    // All of the memory is resident before the clock starts.
    memory.as_mut_slice().chunks_exact_mut(PAGE).for_each(|bytes| content::fill(bytes, 0, 0));
    let started = Instant::now();
    let (mut units, mut place, mut wrong) = (0, 0, 0);
    while started.elapsed() < time {
        let memory = memory.as_mut_slice();
        // Where the next touch goes depends on what this one found.
        for _ in 0..TOUCHES {
            let at = content::mix(place) as usize % memory.len();
            place = place.wrapping_add(u64::from(memory[at])).wrapping_add(1);
            memory[at] = memory[at].wrapping_add(1);
        }
        let first = units as usize * PAGES % (pages - PAGES + 1);
        for page in first..first + PAGES {
            let bytes = &mut memory[page * PAGE..][..PAGE];
            content::fill(bytes, units, page as u64);
            wrong += u64::from(!content::is_right(black_box(bytes), units, page as u64));
        }
        units += 1;
    }
    let elapsed = started.elapsed();
    let score = units as f64 / elapsed.as_secs_f64();
    println!(
        "checker bench done score={score:.2} units={units} mismatched={wrong} us={}",
        elapsed.as_micros()
    );
    Ok(wrong)
}
