//! Floats of 8 and 16 bits, one at a time.

/// bf16 bits of `x`, rounded to nearest even; NaN stays a (quiet) NaN.
#[inline(always)]
pub(in super::super) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

/// The f32 that bf16 bits stand for.
#[inline(always)]
pub(in super::super) fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The f32 that f16 bits stand for: shifted into place, the exponent is 112 short, which a product sets
/// right for subnormals too; what was infinite or NaN is made so again.
#[inline(always)]
pub(in super::super) fn f16_value(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let scaled = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled | special | u32::from(bits & 0x8000) << 16)
}

/// An e4m3 number, divided by 256: its bits are those of an f16 with a smaller exponent.
#[inline(always)]
pub(in super::super) fn e4m3_value(code: u8) -> f32 {
    let code = u16::from(code);
    f16_value((code & 0x80) << 8 | (code & 0x7f) << 7)
}
