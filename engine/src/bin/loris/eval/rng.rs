//! The randomness of samples: SplitMix64 (Steele, Lea, Flood 2014), so that a seed gives the same samples
//! on every machine and with every version of any library.

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// The stream of a seed and of what it is for; different parts give unrelated streams.
    pub(crate) fn new(seed: u64, parts: &[u64]) -> Self {
        let mut rng = Self(seed);
        for part in parts {
            let mixed = rng.next() ^ part.wrapping_mul(0xff51_afd7_ed55_8ccd);
            rng = Self(mixed);
        }
        rng
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0. The bias of the remainder is below n / 2^64.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// A number in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        #[allow(clippy::cast_precision_loss)] // 53 bits fit
        let mantissa = (self.next() >> 11) as f64;
        mantissa / (1_u64 << 53) as f64
    }

    pub(crate) fn choose<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// Puts the items in a random order (Fisher-Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// A number with this many decimal digits, the first of them not 0.
    pub(crate) fn digits(&mut self, n: usize) -> String {
        let first = 1 + self.below(9);
        let rest = (1..n).map(|_| char::from(b'0' + self.below(10) as u8));
        std::iter::once(first.to_string()).chain(rest.map(String::from)).collect()
    }
}
