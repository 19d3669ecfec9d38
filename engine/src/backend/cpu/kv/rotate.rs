//! The rotation of heads before they are coded (QuaRot, Ashkboos et al. 2024, section 4).

/// Multiplies by the Hadamard matrix over the square root of its size, which is its own inverse and changes no
/// product of two vectors. The matrix is as large as the largest power of two that divides the length; a
/// longer head is rotated part by part.
#[inline(always)]
pub(in super::super) fn rotate(values: &mut [f32]) {
    let size = 1 << values.len().trailing_zeros();
    let factor = 1.0 / (size as f32).sqrt();
    for part in values.chunks_exact_mut(size) {
        let mut half = 1;
        while half < size {
            for pair in part.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        part.iter_mut().for_each(|x| *x *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_is_its_own_inverse() {
        for n in [1, 6, 64, 80, 128] {
            let values: Vec<f32> = (0..n).map(|i| ((i * 7) as f32).cos()).collect();
            let mut rotated = values.clone();
            rotate(&mut rotated);
            let square = |v: &[f32]| v.iter().map(|x| f64::from(x * x)).sum::<f64>();
            assert!((square(&values) - square(&rotated)).abs() < 1e-5 * square(&values));
            rotate(&mut rotated);
            assert!(values.iter().zip(&rotated).all(|(x, y)| (x - y).abs() < 1e-6), "{n}");
        }
        let mut unit = [1.0, 0.0, 0.0, 0.0];
        rotate(&mut unit);
        assert_eq!(unit, [0.5; 4]);
    }
}
