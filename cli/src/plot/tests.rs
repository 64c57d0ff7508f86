// SPDX-License-Identifier: GPL-2.0

//! Tests of the pictures on recordings of guests that booted on emulated hosts. They check that the
//! pictures show what was recorded, and that each text is readable.

use std::{collections::BTreeSet, time::Duration};

use resvg::usvg::{Group, Node};

use super::*;
use crate::recording::{write::Writer, Header};

const INTEL: &[u8] = include_bytes!("../../tests/recordings/intel-boot.rec");
const AMD: &[u8] = include_bytes!("../../tests/recordings/amd-work.rec");
/// A recording with details, one snapshot each second.
const WHY: &[u8] = include_bytes!("../../tests/recordings/amd-why.rec");
/// A snapshot with tables. Its TSC has 2.4 GHz.
const TABLES: &[u8] = include_bytes!("../../../src/meter/tests/snapshot-1.3.bin");
/// A snapshot in which one VM runs and one is gone.
const SNAPSHOT: &[u8] = include_bytes!("../../../src/meter/tests/snapshot-1.2.bin");

fn series(bytes: &[u8]) -> Series {
    Series::read(Path::new("x.rec"), bytes, &Part::default()).expect("a recording")
}

/// Return all pictures of a recording.
fn pictures(series: &Series, subtitle: &str) -> Vec<(&'static str, Picture)> {
    let layers = palette::layers(series);
    let mut pictures = vec![
        ("rate", rate::draw(series, &layers, subtitle)),
        ("phases", phases::draw(series, subtitle)),
        ("cumulative", cumulative::draw(series, &layers, subtitle)),
        (
            "latency",
            latency::draw(series, &layers, subtitle).expect("exits with costs"),
        ),
    ];
    if series.details.is_some() {
        for (name, weight) in [("details", Weight::Exits), ("ticks", Weight::Ticks)] {
            let picture = details::draw(series, weight, None, 1234, subtitle);
            pictures.push((name, picture.expect("details")));
        }
        let picture = slow::draw(series, &layers, None, subtitle);
        pictures.push(("slow", picture.expect("slow exits")));
    }
    pictures
}

/// Return a recording of snapshots, one each second.
fn recording(snapshots: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    let second = Duration::from_secs(1);
    let (begun, interval) = (second, second);
    let mut writer = Writer::new(&mut file, &Header { begun, interval }).expect("memory");
    for (place, snapshot) in snapshots.iter().enumerate() {
        writer
            .snapshot(second * place as u32, snapshot.clone())
            .expect("memory");
    }
    writer.end(second * 9, "tested").expect("memory");
    file
}

/// Return the snapshot as it would be `seconds` later without an exit. Its TSC has 3 GHz.
fn later(seconds: u64) -> Vec<u8> {
    let mut snapshot = SNAPSHOT.to_vec();
    let khz = u32::from_le_bytes(snapshot[48..52].try_into().expect("4 bytes"));
    let tsc = u64::from_le_bytes(snapshot[40..48].try_into().expect("8 bytes"));
    let tsc = tsc + seconds * u64::from(khz) * 1000;
    snapshot[40..48].copy_from_slice(&tsc.to_le_bytes());
    snapshot
}

#[test]
fn recordings_keep_every_exit() {
    // Numbers of the last snapshot, as `exitmeter report` printed them on that host.
    for (bytes, exits, seconds, name) in [
        (INTEL, 13_063, 4.45, "kvm-99"),
        (AMD, 11_852, 14.5, "kvm-97"),
    ] {
        let series = series(bytes);
        assert_eq!(series.sum.exits, exits);
        let steps: u64 = series
            .steps
            .iter()
            .flat_map(|step| step.exits.values())
            .sum();
        assert_eq!(steps, exits);
        assert!(series.vms.iter().eq([name]));
        assert!(series.snapshots > 100 && series.steps.len() == series.snapshots - 1);
        let (from, to) = series.range();
        assert!(from == 0.0 && (to - seconds).abs() < 0.1, "{to}");
        assert!(series.steps.windows(2).all(|two| two[0].to == two[1].from));
        // The only vCPU is always in one phase, so no step has more time than its length.
        let khz = f64::from(series.tsc_khz.expect("a frequency"));
        let full = series.steps.iter().filter(|step| {
            let share = step.cycles.sum() as f64 / (khz * 1000.0) / step.seconds();
            assert!(share < 1.2, "{step:?}");
            share > 0.9
        });
        assert!(full.count() > series.steps.len() / 2);
    }
}

#[test]
fn merged_steps_keep_every_exit() {
    let series = series(AMD);
    for most in [1, 7, 100, 10_000] {
        let bins = series.bins(most);
        assert!(!bins.is_empty() && bins.len() <= (most as usize).min(series.steps.len()));
        let exits: u64 = bins.iter().flat_map(|bin| bin.exits.values()).sum();
        assert_eq!(exits, series.sum.exits);
        let cycles: u128 = bins.iter().map(|bin| bin.cycles.sum()).sum();
        assert_eq!(cycles, series.sum.cycles.sum());
        assert!(bins.windows(2).all(|two| two[0].to == two[1].from));
    }
}

#[test]
fn parts_select_time_and_vm() {
    let read = |part: &Part| Series::read(Path::new("x.rec"), INTEL, part);
    let (from, to) = (Some(1.0), Some(2.0));
    let middle = read(&Part {
        from,
        to,
        ..Part::default()
    });
    let middle = middle.expect("steps");
    assert!(middle.range().0 >= 1.0 && middle.range().1 <= 2.0);
    assert!(middle.sum.exits > 1000 && middle.sum.exits < 13_063);
    for vm in ["kvm-99", "99"] {
        let vm = Some(vm.to_owned());
        assert_eq!(
            read(&Part {
                vm,
                ..Part::default()
            })
            .expect("the VM")
            .sum
            .exits,
            13_063
        );
    }
    let refusal = |part: Part| read(&part).expect_err("nothing there").to_string();
    let vm = Some("9".to_owned());
    assert_eq!(
        refusal(Part {
            vm,
            ..Part::default()
        }),
        "x.rec has no VM that is called '9' or belongs to process '9'; those in it are kvm-99"
    );
    let text = refusal(Part {
        from: Some(60.0),
        ..Part::default()
    });
    assert!(
        text.starts_with("x.rec has 0 of the two snapshots"),
        "{text}"
    );
}

#[test]
fn mismatched_snapshots_are_refused() {
    let refusal = |snapshots: &[Vec<u8>]| {
        let series = Series::read(Path::new("x.rec"), &recording(snapshots), &Part::default());
        series.expect_err("no series").to_string()
    };
    assert!(refusal(&[later(0)]).contains("has 1 of the two snapshots"));
    let text = refusal(&[later(1), later(0)]);
    assert!(
        text.starts_with("the meter began anew between all snapshots of x.rec, "),
        "{text}"
    );
    let text = refusal(&[later(0), b"words".to_vec()]);
    assert_eq!(
        text,
        "x.rec, snapshot 2: this is not a snapshot of exitmeter"
    );
    let text = Series::read(Path::new("x.rec"), SNAPSHOT, &Part::default());
    let text = text.expect_err("a snapshot").to_string();
    assert!(
        text.starts_with("x.rec: this is not a recording of exitmeter: "),
        "{text}"
    );
}

/// Return a snapshot of another life of the meter.
fn anew(mut snapshot: Vec<u8>, life: u8) -> Vec<u8> {
    snapshot[120] = life;
    snapshot
}

/// The meter begins anew in three ways: with another life, with another life and TSC, and with
/// another TSC but no life number, as before version 1.2.
#[test]
fn both_sides_of_a_new_beginning_are_drawn() {
    let far = anew(later(9_000), 1);
    let mut old = later(0);
    old[120..128].fill(0);
    let mut older = later(4);
    older[120..128].fill(0);
    let lives = [
        [
            later(0),
            later(1),
            later(2),
            anew(later(3), 1),
            anew(later(4), 1),
        ],
        [
            later(5),
            later(6),
            later(7),
            anew(later(0), 1),
            anew(later(1), 1),
        ],
        [later(0), later(1), later(2), far, anew(later(9_001), 1)],
        [later(0), later(1), later(2), older, old],
    ];
    for (number, snapshots) in lives.iter().take(3).enumerate() {
        let series = series(&recording(snapshots));
        let steps: Vec<_> = series
            .steps
            .iter()
            .map(|step| (step.from, step.to))
            .collect();
        assert_eq!(steps, [(0.0, 1.0), (1.0, 2.0), (3.0, 4.0)], "{number}");
        let anew: Vec<_> = series.steps.iter().map(|step| step.begins_anew).collect();
        assert_eq!(anew, [false, false, true]);
        assert_eq!(series.breaks, [3.0]);
        assert_eq!(series.marks, [(3.0, "the meter began anew".to_owned())]);
        assert_eq!(series.snapshots, 5);
        // Merging keeps the two sides apart.
        assert_eq!(series.bins(1).len(), 2);
        let cycles: u128 = series.bins(1).iter().map(|bin| bin.cycles.sum()).sum();
        assert_eq!(cycles, series.sum.cycles.sum());
        let layers = palette::layers(&series);
        let area = |svg: &str| svg.matches("<title>guest</title>").count();
        let phases = phases::draw(&series, "").svg("");
        assert_eq!(area(&phases), 2);
        for svg in [
            phases,
            rate::draw(&series, &layers, "").svg(""),
            cumulative::draw(&series, &layers, "").svg(""),
        ] {
            assert!(svg.contains(">the meter began"), "{svg}");
            png::render(&svg).expect("pixels");
        }
        let facts = facts(&series);
        let new_life = facts
            .iter()
            .find(|(name, _)| name == "the meter began anew");
        assert!(new_life.is_some_and(|(_, text)| text.starts_with("at 3.00 s; ")));
    }
    let torn = Series::read(Path::new("x.rec"), &recording(&lives[3]), &Part::default());
    let torn = torn.expect("the steps before the first one");
    assert_eq!((torn.breaks.len(), torn.steps.len()), (2, 2));
    // Select one side only.
    let part = Part {
        to: Some(2.5),
        ..Part::default()
    };
    let part = Series::read(Path::new("x.rec"), &recording(&lives[0]), &part);
    let part = part.expect("steps");
    assert_eq!((part.breaks.len(), part.steps.len()), (0, 2));
}

/// Return the texts of a picture and their bounding boxes.
fn texts(svg: &str) -> Vec<(String, [f32; 4])> {
    fn walk(group: &Group, texts: &mut Vec<(String, [f32; 4])>) {
        for node in group.children() {
            match node {
                Node::Group(group) => walk(group, texts),
                Node::Text(text) => {
                    let words = text.chunks().iter().map(|chunk| chunk.text()).collect();
                    let place = text.abs_bounding_box();
                    texts.push((
                        words,
                        [place.left(), place.top(), place.right(), place.bottom()],
                    ));
                }
                _ => {}
            }
        }
    }
    let mut texts = Vec::new();
    walk(png::tree(svg).expect("an SVG").root(), &mut texts);
    texts
}

#[test]
fn texts_are_inside_and_do_not_overlap() {
    let long = "a very long word on what was recorded ".repeat(20);
    for (bytes, subtitle) in [
        (INTEL, "boot"),
        (AMD, "work"),
        (AMD, long.as_str()),
        (WHY, "why"),
    ] {
        for (name, picture) in pictures(&series(bytes), subtitle) {
            let svg = picture.svg(name);
            let size = png::tree(&svg).expect("an SVG").size();
            let texts = texts(&svg);
            assert!(texts.len() > 20, "{name} has {} texts", texts.len());
            for (place, (text, [left, top, right, bottom])) in texts.iter().enumerate() {
                let inside = *left >= 4.0
                    && *top >= 4.0
                    && *right <= size.width() - 4.0
                    && *bottom <= size.height() - 2.0;
                assert!(inside, "{name}: '{text}' is cut off");
                for (other, [l, t, r, b]) in &texts[..place] {
                    let apart = r + 2.0 <= *left
                        || right + 2.0 <= *l
                        || b - 6.0 <= *top
                        || bottom - 6.0 <= *t;
                    assert!(apart, "{name}: '{text}' is written over '{other}'");
                }
            }
        }
    }
}

#[test]
fn text_widths_match_the_font() {
    for text in [
        "EXTERNAL_INTERRUPT",
        "seconds since the recording began",
        "0123456789,.%",
        "~{|}@#Wij",
    ] {
        let svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"900\" height=\"90\">\
             <text x=\"9\" y=\"60\" font-size=\"20\">{}</text></svg>",
            svg::escape(text)
        );
        let (_, [left, _, right, _]) = texts(&svg).remove(0);
        let (drawn, reckoned) = (f64::from(right - left), font::width(text, 20.0));
        assert!(
            (drawn - reckoned).abs() < 0.02 * reckoned + 2.0,
            "{text}: {drawn}, {reckoned}"
        );
    }
    assert_eq!(
        font::fit("EXTERNAL_INTERRUPT", 12.0, 300.0),
        "EXTERNAL_INTERRUPT"
    );
    let cut = font::fit("EXTERNAL_INTERRUPT", 12.0, 80.0);
    assert!(cut.ends_with('\u{2026}') && cut.len() > 8 && font::width(&cut, 12.0) <= 80.0);
}

#[test]
fn legend_names_frequent_reasons_and_sums_the_rest() {
    let series = series(AMD);
    let layers = palette::layers(&series);
    let names: Vec<_> = layers.iter().map(|layer| layer.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "MSR",
            "INTR",
            "IOIO",
            "NPF",
            "CPUID",
            "VINTR",
            "HLT",
            "8 other reasons"
        ]
    );
    assert_eq!(
        layers.iter().map(|layer| layer.exits).sum::<u64>(),
        series.sum.exits
    );
    // No two layers look the same.
    let paints: BTreeSet<_> = layers.iter().map(|layer| layer.paint.fill()).collect();
    assert_eq!(paints.len(), layers.len());
}

#[test]
fn areas_are_proportional_to_the_numbers() {
    // Count the pixels of two reasons in one chart, and of two phases in the other.
    let series = series(INTEL);
    let pixels = |picture: &Picture| {
        let png = png::render(&picture.svg("x")).expect("pixels");
        let pixels = resvg::tiny_skia::Pixmap::decode_png(&png).expect("a PNG");
        let inside = move |color: &str| {
            let wanted =
                [1, 3, 5].map(|at| u8::from_str_radix(&color[at..at + 2], 16).expect("hex"));
            let data = pixels.pixels().iter().enumerate();
            let width = pixels.width() as usize;
            let here = data.filter(|(place, pixel)| {
                let (x, y) = ((place % width) as f64 / 2.0, (place / width) as f64 / 2.0);
                let color = [pixel.red(), pixel.green(), pixel.blue()];
                (chart::LEFT..chart::RIGHT).contains(&x) && y > chart::TOP && color == wanted
            });
            here.count() as f64
        };
        inside
    };
    let layers = palette::layers(&series);
    let rate = pixels(&rate::draw(&series, &layers, ""));
    let [interrupts, writes] = ["#0072b2", "#e69f00"].map(rate);
    let expected = layers[0].exits as f64 / layers[1].exits as f64;
    assert!(
        (interrupts / writes / expected - 1.0).abs() < 0.1,
        "{interrupts}, {writes}"
    );

    let phases = pixels(&phases::draw(&series, ""));
    let [guest, preempted] = ["#009e73", "#4d4d4d"].map(phases);
    let expected = series.sum.cycles.guest as f64 / series.sum.cycles.preempted as f64;
    assert!(
        (guest / preempted / expected - 1.0).abs() < 0.05,
        "{guest}, {preempted}"
    );
}

#[test]
fn recordings_without_exits_are_drawn() {
    let series = series(&recording(&[later(0), later(1), later(2)]));
    assert_eq!(series.sum.exits, 0);
    let layers = palette::layers(&series);
    assert!(layers.is_empty());
    for picture in [
        rate::draw(&series, &layers, "x"),
        phases::draw(&series, "x"),
        cumulative::draw(&series, &layers, "x"),
    ] {
        let svg = picture.svg("x");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        png::render(&svg).expect("pixels");
    }
    assert!(latency::draw(&series, &layers, "x").is_none());
}

#[test]
fn vm_names_are_escaped() {
    let hostile = "<b>&\"'\u{1}</title>";
    let escaped = svg::escape(hostile);
    assert_eq!(escaped, "&lt;b&gt;&amp;&quot;' &lt;/title&gt;");
    for (name, picture) in pictures(&series(INTEL), hostile) {
        assert!(texts(&picture.svg(name))
            .iter()
            .any(|(text, _)| text.contains("<b>&\"'")));
    }
}

#[test]
fn marks_are_drawn_at_their_time() {
    let mut file = Vec::new();
    let second = Duration::from_secs(1);
    let (begun, interval) = (second, second);
    let mut writer = Writer::new(&mut file, &Header { begun, interval }).expect("memory");
    for (place, name) in [
        (0_u32, "boot"),
        (1, ""),
        (2, "work"),
        (3, "reboot"),
        (4, ""),
    ] {
        if !name.is_empty() {
            writer.mark(second * place, name).expect("memory");
        }
        let snapshot = later(place.into());
        writer.snapshot(second * place, snapshot).expect("memory");
    }
    writer.end(second * 4, "tested").expect("memory");

    let series = series(&file);
    let marks: Vec<_> = series
        .marks
        .iter()
        .map(|(time, name)| (time.round(), &**name))
        .collect();
    assert_eq!(marks, [(0.0, "boot"), (2.0, "work"), (3.0, "reboot")]);
    let layers = palette::layers(&series);
    let svg = cumulative::draw(&series, &layers, "").svg("");
    for (_, name) in marks {
        assert!(svg.contains(&format!(">{name}</text>")), "{name}");
    }
    let part = Part {
        from: Some(1.5),
        to: Some(2.5),
        ..Part::default()
    };
    let part = Series::read(Path::new("x.rec"), &file, &part);
    // One snapshot makes no interval.
    assert!(matches!(
        part,
        Err(series::Error::TooShort { found: 1, .. })
    ));
}

/// Return the snapshot with tables as it would be `seconds` later, with 1000 more exits per second
/// of one detail of its MSR_WRITE exits.
fn busier(seconds: u64) -> Vec<u8> {
    let mut bytes = TABLES.to_vec();
    let number = |bytes: &[u8], at: usize| {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes")) as usize
    };
    let is_write = |bytes: &[u8], at: usize| number(bytes, at) >> 32 == 32;
    let mut row = number(&bytes, 88) + 112;
    while !is_write(&bytes, row) {
        row += number(&bytes, 112) & 0xffff_ffff;
    }
    let section = number(&bytes, 144) + 32;
    let mut entry = section + 16;
    while !is_write(&bytes, entry) {
        entry += number(&bytes, section + 8) & 0xffff_ffff;
    }
    // Replace the MSR of that entry with one that has a name.
    bytes[entry + 16..entry + 24].copy_from_slice(&(0x6e0_u64 | 1 << 32).to_le_bytes());
    let exits = 1000 * seconds;
    for (at, more) in [
        (40, seconds * 2_400_000_000),
        (row + 8, exits),
        (row + 24, exits * 1200),
        (entry + 24, exits),
        (entry + 32, exits * 1200),
    ] {
        let sum = number(&bytes, at) as u64 + more;
        bytes[at..at + 8].copy_from_slice(&sum.to_le_bytes());
    }
    bytes
}

#[test]
fn details_are_shown_by_step_and_name() {
    let snapshots: Vec<_> = (0..4).map(busier).collect();
    let all = series(&recording(&snapshots));
    let exits = |step: &series::Step| {
        let rows = &step.details.as_ref().expect("details").by_key;
        rows.values().map(|row| row.numbers.exits).sum::<u64>()
    };
    assert!(all.steps.iter().map(exits).eq([1000, 1000, 1000]));
    // It exits 1000 times a second for 0.5 us: 0.05% of a CPU.
    for (weight, unit, sum) in [
        (Weight::Exits, "exits per second, means of 1 s", "3,000"),
        (
            Weight::Ticks,
            "time in the kernel, in % of one CPU, means of 1 s",
            "3.60M",
        ),
    ] {
        let picture = details::draw(&all, weight, None, 0, "").expect("details");
        let texts: Vec<_> = texts(&picture.svg(""))
            .into_iter()
            .map(|(text, _)| text)
            .collect();
        for word in [
            unit,
            sum,
            "write 0x6e0 IA32_TSC_DEADLINE",
            "MSR_WRITE",
            "100.0%",
        ] {
            assert!(texts.iter().any(|text| text == word), "{word}: {texts:?}");
        }
        let svg = picture.svg("");
        assert!(svg.contains("<title>MSR_WRITE: write 0x6e0 IA32_TSC_DEADLINE</title>"));
    }
    assert_eq!(details::exits_in_no_table(&all, None), 0);
    // The sum equals the steps, and lacks nothing.
    let groups = details::by_reason(&all, Weight::Exits);
    assert_eq!((groups.len(), groups[0].rows.len()), (1, 1));
    let row = &groups[0].rows[0];
    assert_eq!(
        (row.counts.exits, row.counts.kernel, row.exact),
        (3000, Some(3_600_000), true)
    );

    let of = |reason: &str| {
        let part = Part {
            reason: Some(reason.to_owned()),
            ..Part::default()
        };
        Series::read(Path::new("x.rec"), &recording(&snapshots), &part)
    };
    let none = of("CPUID").expect("a reason");
    assert!(details::draw(&none, Weight::Exits, Some("CPUID"), 0, "").is_none());
    let writes = of("msr_write").expect("a reason");
    let picture = details::draw(&writes, Weight::Exits, Some("MSR_WRITE"), 0, "");
    let svg = picture.expect("details").svg("");
    assert!(svg.contains(">What exits by MSR_WRITE were about<"));
    let refusal = of("NPF").expect_err("another vendor's").to_string();
    assert!(
        refusal.starts_with("no exit reason of vmx is called 'NPF'"),
        "{refusal}"
    );
}

#[test]
fn details_that_are_off_leave_a_gap() {
    let mut without = busier(2);
    without[128..160].fill(0);
    let snapshots = [busier(0), busier(1), without, busier(3), busier(4)];
    let series = series(&recording(&snapshots));
    let has_details: Vec<_> = series
        .steps
        .iter()
        .map(|step| step.details.is_some())
        .collect();
    assert_eq!(has_details, [true, false, false, true]);
    // Merging keeps them apart.
    assert_eq!(series.bins(1).len(), 3);
    let picture = details::draw(&series, Weight::Exits, None, 0, "").expect("details");
    let svg = picture.svg("");
    assert_eq!(svg.matches("<title>MSR_WRITE: write").count(), 2);
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    // Exits while details were off do not count as missing.
    assert_eq!(details::exits_in_no_table(&series, None), 0);
    assert!(facts(&series).iter().all(|(name, _)| name != "details"));
    let old = facts(&self::series(AMD));
    assert!(old
        .iter()
        .any(|(name, text)| name == "details" && text.starts_with("none: ")));
}

#[test]
fn exits_before_the_tables_are_reported() {
    // The row of the reason has exits that are in no table.
    let mut after = busier(1);
    let row = {
        let old = busier(0);
        (0..after.len())
            .step_by(8)
            .find(|at| *at > 160 && old[*at..at + 8] != after[*at..at + 8])
            .expect("a row that grows")
    };
    let exits = u64::from_le_bytes(after[row..row + 8].try_into().expect("8 bytes")) + 500;
    after[row..row + 8].copy_from_slice(&exits.to_le_bytes());
    let series = series(&recording(&[busier(0), after]));
    assert_eq!(details::exits_in_no_table(&series, None), 500);
    assert_eq!(details::exits_in_no_table(&series, Some(32)), 500);
    assert_eq!(details::exits_in_no_table(&series, Some(10)), 0);
    let picture = details::draw(&series, Weight::Exits, None, 500, "").expect("details");
    assert!(picture
        .svg("")
        .contains(">500 exits more, 33.3%, are in no table<"));
}

#[test]
fn each_slow_exit_is_one_mark_at_its_time() {
    let series = series(WHY);
    let (from, to) = series.range();
    let mut last = u64::MAX;
    let mut times = BTreeSet::new();
    for slow in &series.slow {
        assert!(
            times.insert((slow.exit.vcpu, slow.exit.tsc)),
            "{slow:?} is drawn twice"
        );
        assert!((from..=to).contains(&slow.at) && slow.exit.took <= last);
        last = slow.exit.took;
    }
    // One vCPU, and several windows of 2^35 ticks.
    let khz = f64::from(series.tsc_khz.expect("a frequency"));
    let windows = ((to - from) * khz * 1000.0 / 2_f64.powi(35)).ceil() + 1.0;
    let most = (windows * 16.0) as usize;
    assert!(
        (16..=most).contains(&times.len()),
        "{} of {most}",
        times.len()
    );
    let layers = palette::layers(&series);
    let picture = slow::draw(&series, &layers, None, "").expect("slow exits");
    let svg = picture.svg("");
    assert_eq!(svg.matches("<circle ").count(), times.len());
    // The longest exit has a number, and a hint with all its facts.
    let longest = &series.slow[0].exit;
    for word in [
        ">1</text>".to_owned(),
        format!(">{}</text>", svg::escape(&longest.about())),
        format!("<title>{}: ", svg::escape(&longest.about())),
        longest.place().expect("an address"),
    ] {
        assert!(svg.contains(&word), "{word}");
    }
    let text = texts(&svg);
    let reasons: usize = layers
        .iter()
        .filter_map(|layer| {
            let at = text.iter().position(|(text, _)| *text == layer.name)?;
            text[at + 1].0.parse::<usize>().ok()
        })
        .sum();
    assert_eq!(reasons, times.len());
}

#[test]
fn tsc_is_interpolated_between_snapshots() {
    let times = [(100, 0.0), (200, 1.0), (400, 2.0)];
    let at = |tsc| series::moment(&times, tsc);
    assert_eq!([at(99), at(100), at(150)], [None, Some(0.0), Some(0.5)]);
    assert_eq!(
        [at(300), at(400), at(999)],
        [Some(1.5), Some(2.0), Some(2.0)]
    );
    assert_eq!(series::moment(&[], 5), None);
}
