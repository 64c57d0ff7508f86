// SPDX-License-Identifier: GPL-2.0

//! Tests of the recording file: what is written is read back, even from a damaged file.

use proptest::prelude::*;

use super::{
    frame,
    read::{Ending, Error, Reader},
    write::Writer,
    *,
};

const HEADER: Header = Header {
    begun: Duration::new(1_795_000_000, 123_456_789),
    interval: Duration::from_millis(20),
};

/// Write a recording of snapshots, one each 20 ms.
fn written(snapshots: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut writer = Writer::new(&mut file, &HEADER).unwrap();
    let command = "sh -c 'echo\nhello'".to_owned();
    writer
        .about([("tool", "0.1.0".to_owned()), ("command", command)])
        .unwrap();
    for (place, snapshot) in snapshots.iter().enumerate() {
        let at = HEADER.interval * place as u32;
        writer.snapshot(at, snapshot.clone()).unwrap();
    }
    writer
        .end(HEADER.interval * 9, "the command ended with status 3")
        .unwrap();
    assert_eq!(writer.snapshots(), snapshots.len() as u64);
    assert_eq!(writer.bytes(), file.len() as u64);
    file
}

/// Read all snapshots that can be read, and the ending.
fn read(file: &[u8]) -> (Vec<Vec<u8>>, Ending) {
    let mut reader = Reader::new(file).unwrap();
    let mut snapshots = Vec::new();
    while let Some(taken) = reader.next_snapshot() {
        assert_eq!(taken.at, HEADER.interval * snapshots.len() as u32);
        snapshots.push(taken.snapshot.to_vec());
    }
    (snapshots, reader.ending().unwrap().clone())
}

/// Generate snapshots of a few sizes, with some numbers that grow and some that do not.
fn snapshots() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let snapshot = (0_usize..3, prop::collection::vec(any::<u64>(), 12));
    prop::collection::vec(snapshot, 0..8).prop_map(|all| {
        let bytes = |(size, words): (usize, Vec<u64>)| {
            let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
            bytes[..[0, 64, 93][size]].to_vec()
        };
        all.into_iter()
            .map(bytes)
            .filter(|bytes| !bytes.is_empty())
            .collect()
    })
}

fn ended_properly() -> Ending {
    Ending::Complete("the command ended with status 3".to_owned())
}

#[test]
fn header_and_about_lines_are_read_back() {
    let file = written(&[]);
    assert_eq!(&file[..8], b"ExitMRec");
    let reader = Reader::new(&file).unwrap();
    assert_eq!(reader.header, HEADER);
    let about: Vec<_> = reader.about().collect();
    assert_eq!(
        about,
        [("tool", "0.1.0"), ("command", "sh -c 'echo hello'")]
    );
    assert_eq!(read(&file), (vec![], ended_properly()));
}

#[test]
fn other_files_are_refused() {
    let refusal = |bytes: &[u8]| Reader::new(bytes).map(|_| ()).unwrap_err();
    let file = written(&[]);
    assert_eq!(refusal(b""), Error::Magic);
    assert_eq!(refusal(b"ExitMetr and so on"), Error::Magic);
    for end in 8..HEADER_SIZE {
        assert_eq!(refusal(&file[..end]), Error::Header);
    }
    let mut later = file.clone();
    later[8] = 2;
    let (major, minor) = (2, MINOR);
    assert_eq!(refusal(&later), Error::Version { major, minor });
    let mut small = file;
    small[12] = 39;
    assert_eq!(refusal(&small), Error::Header);
}

#[test]
fn additions_of_a_later_minor_version_are_skipped() {
    let snapshots = [vec![1; 64], vec![2; 64]];
    let mut file = written(&snapshots);
    let frame = frame::Frame {
        kind: frame::Kind::Unknown(77),
        at: 5,
        body: b"unheard of".to_vec(),
    };
    // Insert it between the lines about the recording and the first snapshot, and behind that.
    for count in [1, 3] {
        let mut at = HEADER_SIZE;
        for _ in 0..count {
            let rest = frame::Frame::read(&file[at..]).unwrap().unwrap().1;
            at = file.len() - rest.len();
        }
        file.splice(at..at, frame.bytes().unwrap());
    }
    assert_eq!(read(&file), (snapshots.to_vec(), ended_properly()));
    // Enlarge the header.
    file[10] = 1;
    file[12] = HEADER_SIZE as u8 + 8;
    file.splice(HEADER_SIZE..HEADER_SIZE, [0xee; 8]);
    assert_eq!(read(&file), (snapshots.to_vec(), ended_properly()));
}

#[test]
fn a_difference_without_a_snapshot_before_it_is_damage() {
    let mut file = written(&[]);
    file.truncate(HEADER_SIZE);
    let frame = |kind, body: &[u8]| {
        let body = body.to_vec();
        frame::Frame { kind, at: 0, body }.bytes().unwrap()
    };
    file.extend(frame(frame::Kind::Difference, &[0; 8]));
    assert_eq!(read(&file), (vec![], Ending::Damaged));
    // Try a difference that is one number short, one that is too long, and a number over 64 bits.
    for difference in [
        &[0; 7][..],
        &[0; 9],
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2],
    ] {
        let mut file = written(&[]);
        file.truncate(HEADER_SIZE);
        file.extend(frame(frame::Kind::Whole, &[0; 64]));
        file.extend(frame(frame::Kind::Difference, difference));
        assert_eq!(read(&file), (vec![vec![0; 64]], Ending::Damaged));
    }
}

#[test]
fn growing_numbers_take_little_space() {
    // Use 1000 rows; each snapshot changes ten.
    let mut words = vec![0_u64; 8000];
    let mut all = Vec::new();
    for step in 0..100 {
        for row in 0..10 {
            words[(step * 37 + row * 700) % 8000] += 1000 * row as u64;
        }
        all.push(words.iter().copied().flat_map(u64::to_le_bytes).collect());
    }
    let file = written(&all);
    assert_eq!(read(&file), (all, ended_properly()));
    assert!(file.len() < 100 * 150, "{}", file.len());
}

proptest! {
    #[test]
    fn written_snapshots_are_read_back(snapshots in snapshots()) {
        prop_assert_eq!(read(&written(&snapshots)), (snapshots, ended_properly()));
    }

    /// All frames before the cut are read.
    #[test]
    fn a_recording_that_is_cut_off_reads_up_to_the_cut(snapshots in snapshots(), cut in any::<prop::sample::Index>()) {
        let file = written(&snapshots);
        let end = HEADER_SIZE + cut.index(file.len() - HEADER_SIZE);
        let (read, ending) = read(&file[..end]);
        prop_assert_eq!(ending, Ending::Cut);
        prop_assert_eq!(&snapshots[..read.len()], &read[..]);
        let mut whole = 0;
        let mut rest = &file[HEADER_SIZE..end];
        while let Some(Ok((frame, behind))) = frame::Frame::read(rest) {
            whole += usize::from(frame.kind != frame::Kind::About);
            rest = behind;
        }
        prop_assert_eq!(read.len(), whole);
    }

    /// For any wrong bit, the snapshots before it are right, and no more are read than were
    /// written.
    #[test]
    fn damage_is_noticed(snapshots in snapshots(), place in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let mut file = written(&snapshots);
        let place = HEADER_SIZE + place.index(file.len() - HEADER_SIZE);
        file[place] ^= 1_u8 << bit;
        let (read, ending) = read(&file);
        prop_assert_ne!(ending, ended_properly());
        prop_assert_eq!(&snapshots[..read.len()], &read[..]);
    }

    /// No bytes make the reader panic.
    #[test]
    fn reader_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut file = written(&[]);
        file.truncate(HEADER_SIZE);
        file.extend(bytes);
        let mut reader = Reader::new(&file).unwrap();
        while reader.next_snapshot().is_some() {}
        prop_assert!(reader.ending().is_some());
    }
}

#[test]
fn a_mark_belongs_to_the_snapshot_behind_it() {
    let mut file = Vec::new();
    let mut writer = Writer::new(&mut file, &HEADER).unwrap();
    writer.mark(Duration::ZERO, "boot").unwrap();
    writer.about([("tool", "0.1.0".to_owned())]).unwrap();
    for name in [None, Some("disk:\nwrite"), None] {
        if let Some(name) = name {
            writer.mark(Duration::ZERO, name).unwrap();
        }
        writer.snapshot(Duration::ZERO, vec![7; 16]).unwrap();
    }
    writer.end(Duration::ZERO, "done").unwrap();

    let mut reader = Reader::new(&file).unwrap();
    let mut marks = Vec::new();
    while let Some(taken) = reader.next_snapshot() {
        marks.push(taken.mark.map(str::to_owned));
    }
    let expected = [Some("boot"), Some("disk: write"), None];
    assert_eq!(marks, expected.map(|name| name.map(str::to_owned)));
    assert!(reader.about().eq([("tool", "0.1.0")]));
}
