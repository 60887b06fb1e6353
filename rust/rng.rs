//! A small counter-based generator: for stochastic rounding, tests and benches.

/// The distance of SplitMix64's counters.
pub(crate) const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's function of a counter.
#[inline(always)]
pub(crate) fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What the entries of a view are rounded by: entry `(i, j)` takes the upper half of the word that a generator with this
/// key gives for the counter `first + i·row + j·col`. All ranks and threads that have an entry draw the same for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    at: u64,
    row: u64,
    col: u64,
}

impl Draws {
    /// From the key, and the number of entry (0, 0), of a step down and of one to the right.
    pub fn new(key: u64, first: u64, row: u64, col: u64) -> Self {
        let at = key.wrapping_add(first.wrapping_add(1).wrapping_mul(STEP));
        Draws { at, row: row.wrapping_mul(STEP), col: col.wrapping_mul(STEP) }
    }

    /// Of the transposed view.
    pub(crate) fn t(self) -> Self {
        Draws { row: self.col, col: self.row, ..self }
    }

    /// Of the view from row `i` on.
    pub(crate) fn at_row(self, i: usize) -> Self {
        Draws { at: self.at.wrapping_add(self.row.wrapping_mul(i as u64)), ..self }
    }

    /// The counters from `(i, j)` down the column, and their distance.
    #[inline(always)]
    pub(crate) fn down(self, i: usize, j: usize) -> (u64, u64) {
        (self.at_row(i).t().at_row(j).at, self.row)
    }
}

/// SplitMix64 over a counter (Steele, Lea, Flood 2014); a stream is named by a seed and an index.
#[derive(Clone, Debug)]
pub struct Stream {
    state: u64,
}

impl Stream {
    /// The stream `index` of `seed`.
    pub fn new(seed: u64, index: u64) -> Self {
        let mut s = Stream { state: seed };
        let a = s.bits();
        s.state = a ^ index.wrapping_mul(0xd1b5_4a32_d192_ed03);
        s.bits();
        s
    }

    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        mixed(self.state)
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Standard normal, by Box and Muller's transform.
    pub fn normal(&mut self) -> f64 {
        let u = 1.0 - self.uniform();
        (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * self.uniform()).cos()
    }
}
