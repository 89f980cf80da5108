//! The mode `memory`: every page is written, and in each round verified and written anew.

use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::arguments::{self, Failure};
use crate::content::{self, PAGE};
use crate::differences::{Differences, Mismatched};
use crate::pages::PageBuffer;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Order {
    Sequential,
    /// Every page once a round, scattered, in another order every round.
    Random,
}

impl FromStr for Order {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Order, Failure> {
        match text {
            "sequential" => Ok(Order::Sequential),
            "random" => Ok(Order::Random),
            _ => Err(format!("{text} is no order: write sequential or random").into()),
        }
    }
}

/// The end of the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Until {
    Rounds(u64),
    /// No round begins after this time.
    Time(Duration),
}

impl FromStr for Until {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Until, Failure> {
        match text.strip_suffix('s') {
            Some(seconds) => Ok(Until::Time(Duration::from_secs(arguments::number(seconds)?))),
            None => Ok(Until::Rounds(arguments::number(text)?)),
        }
    }
}

pub(crate) fn check(size: usize, until: Until, order: Order) -> Result<Mismatched, Failure> {
    let mut memory = PageBuffer::new(size / PAGE * PAGE);
    let pages = size / PAGE;
    let started = Instant::now();
    for (page, bytes) in memory.as_mut_slice().chunks_exact_mut(PAGE).enumerate() {
        content::fill(bytes, 0, page as u64);
    }
    println!("checker memory fill pages={pages} us={}", started.elapsed().as_micros());

    let mut round = 0;
    let mut mismatched = 0;
    let begun = Instant::now();
    while match until {
        Until::Rounds(rounds) => round < rounds,
        Until::Time(time) => begun.elapsed() < time,
    } {
        round += 1;
        let started = Instant::now();
        let mut differences = Differences::none("memory");
        for index in 0..pages {
            let page = match order {
                Order::Sequential => index,
                Order::Random => scatter(index, pages, round),
            };
            let bytes = &mut memory.as_mut_slice()[page * PAGE..][..PAGE];
            differences.check(bytes, round - 1, page as u64);
            content::fill(bytes, round, page as u64);
        }
        let (wrong, us) = (differences.count, started.elapsed().as_micros());
        println!("checker memory round={round} pages={pages} mismatched={wrong} us={us}");
        mismatched += wrong;
    }
    println!("checker memory done rounds={round} mismatched={mismatched}");
    Ok(mismatched)
}

/// The page at place `index` of a round's random order: a bijection on `0..pages`.
///
/// Each step below is a bijection on the next power of two; what falls outside of `pages` goes through again, until
/// inside.
fn scatter(index: usize, pages: usize, round: u64) -> usize {
    let bits = usize::BITS - (pages - 1).leading_zeros();
    let mask = (1 << bits) - 1;
    let key = content::mix(round) as usize;
    let mut place = index;
    loop {
        for turn in 0..3 {
            place = place.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(key >> turn) & mask;
            place ^= place >> (bits / 2 + 1);
        }
        if place < pages {
            return place;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_order_has_every_page_once() {
        for pages in [1, 2, 3, 5, 64, 1000, 1023, 1025] {
            for round in 0..4 {
                let mut seen: Vec<usize> = (0..pages).map(|index| scatter(index, pages, round)).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..pages).collect::<Vec<_>>(), "{pages} pages, round {round}");
            }
        }
    }

    #[test]
    fn random_order_is_not_sequential() {
        let near = (0..9999).filter(|&at| scatter(at, 10_000, 1).abs_diff(scatter(at + 1, 10_000, 1)) < 16);
        assert!(near.count() < 200);
    }

    #[test]
    fn rounds_or_seconds() {
        assert_eq!("4".parse::<Until>().expect("rounds"), Until::Rounds(4));
        assert_eq!("60s".parse::<Until>().expect("seconds"), Until::Time(Duration::from_secs(60)));
        assert!("s".parse::<Until>().is_err() && "4m".parse::<Until>().is_err());
    }

    #[test]
    fn what_was_written_is_found() {
        for order in [Order::Sequential, Order::Random] {
            assert_eq!(check(100 * PAGE, Until::Rounds(3), order).expect("memory"), 0);
        }
    }
}
