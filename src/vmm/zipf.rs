//! Zipf's law as a table that the guest program samples with a multiplication: quantiles of the rank.
//!
//! Entry k is the rank below which a share of k / `BUCKETS` of all touches falls. The guest draws a bucket and a
//! rank evenly within it, so the law is met to the width of a bucket: exact where ranks are hot, even over a run of
//! neighbouring ranks where they are cold. Sums over the cold ranks are taken as integrals (Euler and Maclaurin).

/// Parts into which the probability is cut.
pub(super) const BUCKETS: usize = 1 << BUCKET_BITS;
/// Bits of a random number that choose a bucket.
pub(super) const BUCKET_BITS: u32 = 12;
/// Entries of the table: both ends of every bucket.
pub(super) const TABLE_ENTRIES: usize = BUCKETS + 1;
/// Ranks whose sum is taken one by one.
const EXACT_RANKS: u64 = 4096;

/// The quantiles of the ranks `0..ranks` under the skew `theta`.
pub fn quantiles(ranks: u64, theta: f64) -> Vec<u32> {
    let exact = ranks.min(EXACT_RANKS);
    let mut sums = Vec::with_capacity(exact as usize);
    let mut sum = 0.0;
    for rank in 1..=exact {
        sum += (rank as f64).powf(-theta);
        sums.push(sum);
    }
    let tail_start = exact as f64 + 0.5;
    let total = if ranks > exact { sum + area(tail_start, ranks as f64 + 0.5, theta) } else { sum };
    let quantile = |bucket: usize| {
        let target = total * bucket as f64 / BUCKETS as f64;
        let rank = if target < sum {
            sums.partition_point(|sum| *sum <= target) as u64
        } else {
            (end_of_area(tail_start, target - sum, theta) - 0.5) as u64
        };
        rank.min(ranks - 1) as u32
    };
    (0..BUCKETS).map(quantile).chain([ranks as u32]).collect()
}

/// A rank by the law, from 64 random bits.
pub fn rank(quantiles: &[u32], random: u64) -> u32 {
    let bucket = (random >> (u64::BITS - BUCKET_BITS)) as usize;
    let (from, to) = (quantiles[bucket], quantiles[bucket + 1]);
    let width = u64::from(to - from).max(1);
    from + (((random & 0xffff_ffff) * width) >> 32) as u32
}

/// The integral of x^-theta.
fn area(from: f64, to: f64, theta: f64) -> f64 {
    let power = 1.0 - theta;
    if power.abs() < 1e-9 { (to / from).ln() } else { (to.powf(power) - from.powf(power)) / power }
}

/// Where the integral of x^-theta has that area.
fn end_of_area(from: f64, area: f64, theta: f64) -> f64 {
    let power = 1.0 - theta;
    if power.abs() < 1e-9 {
        from * area.exp()
    } else {
        (area * power + from.powf(power)).max(0.0).powf(1.0 / power)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Share of all touches that the first `ranks` ranks get, by the table.
    fn mass(table: &[u32], ranks: u32) -> f64 {
        table.windows(2).map(|ends| covered(ends[0], ends[1].max(ends[0] + 1), ranks)).sum::<f64>()
            / BUCKETS as f64
    }

    fn covered(from: u32, to: u32, ranks: u32) -> f64 {
        f64::from(ranks.clamp(from, to) - from) / f64::from(to - from)
    }

    #[test]
    fn follows_the_law() {
        for theta in [0.2, 0.8, 0.99, 1.0, 1.5] {
            for ranks in [10u64, 1000, 100_000] {
                let table = quantiles(ranks, theta);
                assert_eq!(table.len(), TABLE_ENTRIES);
                assert!(table.is_sorted());
                let weight = |to: u64| (1..=to).map(|rank| (rank as f64).powf(-theta)).sum::<f64>();
                for first in [1, ranks / 10, ranks / 2, ranks] {
                    let expected = weight(first) / weight(ranks);
                    let found = mass(&table, first as u32);
                    assert!((found - expected).abs() < 0.01, "{theta} {ranks} {first}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn one_rank_and_many() {
        assert!(quantiles(1, 0.99)[..BUCKETS].iter().all(|rank| *rank == 0));
        assert_eq!(quantiles(u64::from(u32::MAX), 0.99)[BUCKETS], u32::MAX);
    }
}
