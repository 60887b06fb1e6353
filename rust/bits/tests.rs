use super::*;
use crate::gemm::tests::noise;

fn round<T: Coded>(bits: Bits, rows: usize, columns: usize, data: &[T], threads: usize) -> (Vec<u8>, Vec<T>) {
    let (cx, format) = (Context::new(threads), Format { rows, columns, bits });
    let mut packed = vec![7u8; rows * bits.row_bytes::<T>(columns)];
    pack(cx, vec![(format, data, &mut packed[..])]).unwrap();
    let mut back = vec![T::of(7.0); rows * columns];
    unpack(cx, vec![(format, &packed[..], &mut back[..])]).unwrap();
    (packed, back)
}

#[test]
fn entries_come_back_within_half_a_step_or_with_their_sign() {
    for (rows, columns) in [(1, 1), (3, 7), (5, 64), (2, 65), (40, 200), (300, 130), (0, 5), (4, 0)] {
        let data: Vec<f64> = noise(3, rows * columns);
        let (_, four) = round(Bits::Four, rows, columns, &data, 2);
        let (_, one) = round(Bits::One, rows, columns, &data, 2);
        for i in 0..rows {
            let row = &data[i * columns..(i + 1) * columns];
            let mean = row.iter().map(|x| x.abs()).sum::<f64>() / columns as f64;
            for (j, x) in row.iter().enumerate() {
                let from = j / BLOCK * BLOCK;
                let block = &row[from..columns.min(from + BLOCK)];
                let step = block.iter().fold(0.0f64, |m, x| m.max(x.abs())) / LEVELS;
                assert!((four[i * columns + j] - x).abs() <= 0.5001 * step);
                let sign = if *x < 0.0 { -1.0 } else { 1.0 };
                assert!((one[i * columns + j] - sign * mean).abs() <= 1e-14 * mean);
            }
        }
    }
}

#[test]
fn zeros_stay_zeros_and_the_bytes_are_those_of_one_thread() {
    for bits in [Bits::One, Bits::Four] {
        let (_, back) = round(bits, 3, 70, &[0.0f32; 210], 2);
        assert_eq!(back, [0.0f32; 210]);
        let data: Vec<f32> = noise(5, 700 * 90).into_iter().map(|x: f64| x as f32).collect();
        assert_eq!(round(bits, 700, 90, &data, 1), round(bits, 700, 90, &data, 3));
    }
}

#[test]
fn a_mean_is_packed_from_what_the_ranks_packed() {
    let (rows, columns, ranks) = (30, 130, 3);
    for bits in [Bits::One, Bits::Four] {
        let format = Format { rows, columns, bits };
        let each: Vec<_> =
            (0..ranks).map(|k| round(bits, rows, columns, &noise(k as u64, rows * columns), 2)).collect();
        let all: Vec<u8> = each.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
        let mut mean = vec![0u8; all.len() / ranks];
        average::<f64>(Context::new(2), vec![(format, ranks, &all[..], &mut mean[..])]).unwrap();
        let exact: Vec<f64> =
            (0..rows * columns).map(|i| (each[0].1[i] + each[1].1[i] + each[2].1[i]) / 3.0).collect();
        assert_eq!(mean, round(bits, rows, columns, &exact, 1).0);
    }
}

/// T and H of a rank, its bytes, and the next H.
fn change(bits: Bits, rows: usize, columns: usize, seed: u64, threads: usize) -> [Vec<f64>; 3] {
    let (cx, format) = (Context::new(threads), Format { rows, columns, bits });
    let (matrix, known) = (noise(seed, rows * columns), noise(seed + 100, rows * columns));
    let mut next = vec![9.0; rows * columns];
    let mut packed = vec![7u8; rows * bits.row_bytes::<f64>(columns)];
    let changes = Changes { matrix: &matrix, known: &known, next: &mut next, fade: 0.5 };
    pack_changes(cx, vec![(format, changes, &mut packed[..])]).unwrap();
    let change: Vec<f64> = matrix.iter().zip(&known).map(|(t, h)| t - h).collect();
    let (bytes, sent) = round(bits, rows, columns, &change, 1);
    assert_eq!(packed, bytes);
    let expected: Vec<f64> = known.iter().zip(&sent).map(|(h, c)| (h + c) * 0.5).collect();
    assert_eq!(next, expected);
    [matrix, known, sent]
}

#[test]
fn changes_are_what_is_packed_and_owners_know_their_own_rows() {
    let (rows, columns, ranks, own) = (300, 130, 3, 1);
    for bits in [Bits::One, Bits::Four] {
        let (cx, format) = (Context::new(2), Format { rows, columns, bits });
        let each: Vec<_> = (0..ranks).map(|k| change(bits, rows, columns, k as u64, 1 + k)).collect();
        let mut all = Vec::new();
        for [matrix, known, _] in &each {
            let change: Vec<f64> = matrix.iter().zip(known).map(|(t, h)| t - h).collect();
            all.extend(round(bits, rows, columns, &change, 1).0);
        }
        let width = all.len() / ranks;
        all[own * width..(own + 1) * width].fill(0xAA); // is not read
        let (mut next, mut mean) = (vec![0.0; rows * columns], vec![0u8; width]);
        let [matrix, known, _] = &each[own];
        let changes = Changes { matrix, known, next: &mut next, fade: 0.5 };
        average_changes(cx, vec![(format, ranks, own, &all[..], changes, &mut mean[..])]).unwrap();
        let now: Vec<f64> =
            (0..rows * columns).map(|i| known[i] + (each[0][2][i] + each[2][2][i]) / 2.0).collect();
        assert_eq!(next, now.iter().map(|x| x * 0.5).collect::<Vec<_>>());
        let exact: Vec<f64> = matrix.iter().zip(&now).map(|(t, h)| (t + 2.0 * h) / 3.0).collect();
        assert_eq!(mean, round(bits, rows, columns, &exact, 1).0);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let cx = Context::new(1);
    let format = Format { rows: 2, columns: 5, bits: Bits::Four };
    let mut bytes = vec![0u8; 2 * Bits::Four.row_bytes::<f32>(5)];
    assert!(pack(cx, vec![(format, &[0.0f32; 9][..], &mut bytes[..])]).is_err());
    assert!(pack(cx, vec![(format, &[0.0f32; 10][..], &mut bytes[1..])]).is_err());
    assert!(unpack(cx, vec![(format, &bytes[1..], &mut [0.0f32; 10][..])]).is_err());
    let all = bytes.clone();
    assert!(average::<f32>(cx, vec![(format, 2, &all[..], &mut bytes[..])]).is_err());
    assert!(average::<f32>(cx, vec![(format, 0, &all[..0], &mut bytes[..])]).is_err());
    assert!(Bits::of(2).is_err());
    let (matrix, mut next) = ([0.0f32; 10], [0.0f32; 10]);
    let mut one = |known, bytes: &mut [u8], own| {
        let changes = Changes { matrix: &matrix, known, next: &mut next, fade: 1.0 };
        average_changes(cx, vec![(format, 1, own, &all[..], changes, bytes)])
    };
    assert!(one(&matrix, &mut bytes, 0).is_ok());
    assert!(one(&matrix[1..], &mut bytes, 0).is_err());
    assert!(one(&matrix, &mut bytes[1..], 0).is_err());
    assert!(one(&matrix, &mut bytes, 1).is_err());
    let changes = Changes { matrix: &matrix, known: &matrix[..9], next: &mut next, fade: 1.0 };
    assert!(pack_changes(cx, vec![(format, changes, &mut bytes[..])]).is_err());
}
