//! Lists of touches made from one word: `zipf:0.99`, `loop:1.1`, `stride:17`.

use std::fmt;
use std::str::FromStr;

use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;

use super::touches::Touches;
use crate::job::{Access, Job, Length, Order};

/// The pattern of the touches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Synthetic {
    Random,
    Zipf(f64),
    Seq,
    /// Round and round through memory of so many times the RAM budget.
    Loop(f64),
    Stride(u32),
}

impl FromStr for Synthetic {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once(':').map_or((text, None), |(name, value)| (name, Some(value)));
        let number = |default: f64, low: f64, high: f64| match value.map(str::parse::<f64>) {
            None => Ok(default),
            Some(Ok(number)) if (low..=high).contains(&number) => Ok(number),
            Some(_) => Err(format!("{name}: takes a number between {low} and {high}")),
        };
        match (name, value) {
            ("random", None) => Ok(Synthetic::Random),
            ("seq", None) => Ok(Synthetic::Seq),
            ("zipf", _) => number(0.99, 0.01, 5.0).map(Synthetic::Zipf),
            ("loop", _) => number(1.1, 0.01, 1000.0).map(Synthetic::Loop),
            ("stride", Some(pages)) => match pages.parse() {
                Ok(pages @ 1..=1_000_000) => Ok(Synthetic::Stride(pages)),
                _ => Err("stride: takes a number of pages between 1 and 1000000".to_owned()),
            },
            _ => Err("write random, zipf:0.99, seq, loop:1.1 or stride:3".to_owned()),
        }
    }
}

impl fmt::Display for Synthetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Synthetic::Random => f.write_str("random"),
            Synthetic::Seq => f.write_str("seq"),
            Synthetic::Zipf(theta) => write!(f, "zipf:{theta}"),
            Synthetic::Loop(ratio) => write!(f, "loop:{ratio}"),
            Synthetic::Stride(pages) => write!(f, "stride:{pages}"),
        }
    }
}

/// The number of touches, and of threads that make them in turns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SyntheticSettings {
    pub(crate) what: Synthetic,
    pub(crate) memory: Size,
    pub(crate) ram: Size,
    pub(crate) touches: u64,
    pub(crate) threads: u32,
    pub(crate) read_percent: u8,
}

impl SyntheticSettings {
    pub(crate) fn make(&self) -> Result<Touches, Failure> {
        let mut working_set_bytes = self.memory.bytes();
        let (order, stride_pages) = match self.what {
            Synthetic::Random => (Order::Uniform, 1),
            Synthetic::Zipf(theta) => (Order::Zipf(theta), 1),
            Synthetic::Seq => (Order::Sequential, 1),
            Synthetic::Stride(pages) => (Order::Sequential, pages),
            Synthetic::Loop(ratio) => {
                working_set_bytes = (self.ram.bytes() as f64 * ratio) as u64;
                (Order::Sequential, 1)
            }
        };
        if working_set_bytes > self.memory.bytes() {
            let needed = Size(working_set_bytes.next_multiple_of(2 << 20));
            let text = format!("{} with --ram {} needs --memory {needed} or more", self.what, self.ram);
            return Err(Failure::new(FailureKind::Usage, text));
        }
        let job = Job {
            name: self.what.to_string(),
            size_bytes: self.memory.bytes(),
            working_set_bytes,
            access: Access::Mixed,
            read_percent: self.read_percent,
            order,
            stride_pages,
            block_bytes: swapd::PAGE_SIZE as u64,
            threads: self.threads,
            length: Length::Loops(1),
            ramp_ms: 0,
            prefill: true,
            seed: 1,
        };
        Touches::of_jobs(&[job], self.memory.bytes(), self.touches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_prints() {
        for text in ["random", "seq", "zipf:0.99", "loop:1.1", "stride:17"] {
            assert_eq!(text.parse::<Synthetic>().map(|what| what.to_string()), Ok(text.to_owned()));
        }
        for text in
            ["", "zipf:", "zipf:x", "zipf:-1", "loop:0", "stride", "stride:0", "random:1", "lru", "zipf:NaN"]
        {
            assert!(text.parse::<Synthetic>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_loop_stays_in_its_working_set() {
        let settings = SyntheticSettings {
            what: Synthetic::Loop(1.5),
            memory: Size(8 << 20),
            ram: Size(4 << 20),
            touches: 5000,
            threads: 1,
            read_percent: 100,
        };
        let touches = settings.make().unwrap();
        assert_eq!((touches.pages, touches.count_from, touches.counted()), (2048, 2048 + 500, 5000));
        let mut looping = touches.list[2048..].iter().enumerate();
        assert!(looping.all(|(at, page)| *page == at as u32 % 1536));
        let too_small = SyntheticSettings { what: Synthetic::Loop(3.0), ..settings };
        assert!(too_small.make().unwrap_err().text.contains("--memory 12M"));
    }
}
