//! What a connection says of its segments, wherever the option lies.

use netmanager_common::frame::{Family, SliceFrame};
use netmanager_common::mss;
use netmanager_common::pipeline::outbound;
use netmanager_common::testing::*;
use netmanager_common::verdict::{Miss, Verdict};
use proptest::prelude::*;

/// A SYN with these options, all checksums right.
fn syn(v6: bool, options: &[u8]) -> Vec<u8> {
    let mut bytes = packet(CLIENT.of(v6), WEB.of(v6), Payload::Tcp(40_000, 80));
    let at = if v6 { 40 } else { 20 };
    bytes.truncate(at + 20);
    bytes.extend(options);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let len = bytes.len() - at;
    bytes[at + 12] = (len as u8 / 4) << 4;
    let claimed = if v6 { (4..6, len) } else { (2..4, len + 20) };
    bytes[claimed.0].copy_from_slice(&(claimed.1 as u16).to_be_bytes());
    seal(&mut bytes, at);
    bytes
}

fn seal(bytes: &mut [u8], at: usize) {
    use netmanager_common::checksum::{fold, sum};
    let addresses = if at == 40 { 8..40 } else { 12..20 };
    bytes[at + 16..at + 18].fill(0);
    let pseudo = sum(6 + (bytes.len() - at) as u32, &bytes[addresses]);
    let transport = !fold(sum(pseudo, &bytes[at..]));
    bytes[at + 16..at + 18].copy_from_slice(&transport.to_be_bytes());
    if at == 20 {
        bytes[10..12].fill(0);
        let header = !fold(sum(0, &bytes[..20]));
        bytes[10..12].copy_from_slice(&header.to_be_bytes());
    }
}

fn clamped(v6: bool, options: &[u8], limit: u16) -> Vec<u8> {
    let mut bytes = syn(v6, options);
    assert!(checksums_hold(&bytes));
    mss::clamp(&mut bytes[if v6 { 40 } else { 20 }..], limit, true);
    assert!(checksums_hold(&bytes), "{options:?}");
    bytes
}

#[test]
fn it_is_lowered_and_never_raised() {
    for v6 in [false, true] {
        for filler in 0..4 {
            let options = |mss: u16| [&[1; 3][..filler], &[2, 4], &mss.to_be_bytes(), &[4, 2]].concat();
            assert_eq!(clamped(v6, &options(1_460), 1_200), syn(v6, &options(1_200)), "{filler}");
            assert_eq!(clamped(v6, &options(1_200), 1_200), syn(v6, &options(1_200)));
            assert_eq!(clamped(v6, &options(536), 1_200), syn(v6, &options(536)));
            assert_eq!(clamped(v6, &options(0xffff), 0xff), syn(v6, &options(0xff)));
        }
        for without in [&[][..], &[1, 1], &[0, 2, 4, 5, 180], &[2, 3, 5], &[1, 1, 2, 4], &[3, 3, 7], &[8, 0], &[9]] {
            assert_eq!(clamped(v6, without, 1), syn(v6, without), "{without:?}");
        }
    }
}

#[test]
fn a_partial_checksum_covers_no_options() {
    let mut bytes = syn(false, &[2, 4, 5, 180]);
    let before = bytes.clone();
    mss::clamp(&mut bytes[20..], 1_000, false);
    assert_eq!(bytes[36..38], before[36..38]);
    assert_eq!(bytes[42..44], 1_000_u16.to_be_bytes());
}

#[test]
fn a_path_has_room_for_headers_without_options() {
    assert_eq!(mss::of_packet(Family::V4, 1_450), 1_410);
    assert_eq!(mss::of_packet(Family::V6, 1_450), 1_390);
    assert_eq!(mss::of_packet(Family::V6, 20), 0);
}

/// What the kernel carries: what fits, and nothing else, may it be cut or not.
#[test]
fn the_kernel_carries_what_fits() {
    for v6 in [false, true] {
        for (len, verdict) in [
            (NARROW_MTU as usize, Ok(Verdict::Send { peer: 4 })),
            (NARROW_MTU as usize + 1, Ok(Verdict::Slow(Miss::Narrow))),
        ] {
            let mut bytes = packet(CLIENT.of(v6), DB3_INSTANCE.of(v6), Payload::Udp(5_000, 53));
            bytes.resize(len, 0);
            if !v6 {
                bytes[6] = 0;
            }
            assert_eq!(outbound(&mut SliceFrame::new(&mut bytes), &mut World::sample(), PORT), verdict, "{len}");
        }
    }
}

/// What user space sends where no more than that fits.
#[test]
fn user_space_cuts_what_may_be_cut() {
    for v6 in [false, true] {
        let mut world = World::sample();
        let mut long = packet(CLIENT.of(v6), DB3_INSTANCE.of(v6), Payload::Udp(5_000, 53));
        long.resize(1_300, 0);
        let whole = outbound(&mut SliceFrame::new(&mut long.clone()), &mut world, 0);
        assert_eq!(whole, Ok(Verdict::Slow(Miss::Narrow)), "it says that it must not be cut, or nobody may");
        if v6 {
            long.truncate(1_280);
        } else {
            long[6] = 0;
        }
        assert_eq!(outbound(&mut SliceFrame::new(&mut long), &mut world, 0), Ok(Verdict::Send { peer: 4 }));
    }
}

proptest! {
    #[test]
    fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80), limit: u16, complete: bool) {
        let mut bytes = bytes;
        mss::clamp(&mut bytes, limit, complete);
    }

    #[test]
    fn checksums_stay_valid(options in proptest::collection::vec(0..12_u8, 0..40), limit: u16, v6: bool) {
        clamped(v6, &options, limit);
    }
}
