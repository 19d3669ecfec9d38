//! Exponentials of which a compiler makes vectors.

/// e to the power of a number from -87 to 0, within 3e-7 of it: as good as logits are.
#[inline(always)]
pub(crate) fn exp32(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves no digits behind the point
    let rounded = x * std::f32::consts::LOG2_E + ROUND; // its last bits are the whole number
    let n = rounded - ROUND;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4; // n ln 2 in two parts
    let mut p = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    p * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

/// e to the power of a number that is at most 0, within 1e-15 of it; below -700 as of -700.
#[inline(always)]
pub(crate) fn exp64(x: f64) -> f64 {
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
    let x = x.max(-700.0);
    let rounded = x * std::f64::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * 0.693_147_180_369_123_8) - n * 1.908_214_929_270_587_7e-10; // n ln 2 in two parts
    let mut p = 1.0 / 6_227_020_800.0; // 1 / 13!
    for n in (0..13).rev() {
        p = p * r + INVERSE_FACTORIAL[n];
    }
    p * f64::from_bits(rounded.to_bits().wrapping_add(1023) << 52)
}

const INVERSE_FACTORIAL: [f64; 13] = {
    let mut inverse = [1.0; 13];
    let mut n = 1;
    while n < 13 {
        #[allow(clippy::cast_precision_loss)] // small
        let by = n as f64;
        inverse[n] = inverse[n - 1] / by;
        n += 1;
    }
    inverse
};

#[cfg(test)]
mod tests {
    use super::{exp32, exp64};

    #[test]
    fn they_are_those_of_the_standard_library() {
        for n in 0..200_000_i32 {
            let x = f64::from(n) * -3.5e-3;
            assert!((exp64(x) / x.exp() - 1.0).abs() < 1e-15 * 4.0, "{x}");
            if x >= -87.0 {
                #[allow(clippy::cast_possible_truncation)]
                let y = x as f32;
                let off = (f64::from(exp32(y)) / f64::from(y).exp() - 1.0).abs();
                assert!(off < 3e-7, "{y}: {off}");
            }
        }
        assert_eq!((exp32(0.0), exp64(0.0)), (1.0, 1.0));
        assert!(exp64(f64::NEG_INFINITY) < 1e-300);
    }
}
