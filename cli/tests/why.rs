// SPDX-License-Identifier: GPL-2.0

//! `exitmeter why` on saved snapshots, in all its forms.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;

use self::{
    ioctl::answer_details,
    tool::{exitmeter, failed, succeeded},
};

mod ioctl;
mod tool;

const SNAPSHOT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../src/meter/tests/snapshot-1.3.bin"
);
const WITHOUT_TABLES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../src/meter/tests/snapshot-1.2.bin"
);
const SAVED: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.3.bin");

/// Header: TSC of the snapshot, and offset of the records of tables.
const NOW: usize = 40;
const TABLES: usize = 144;
/// Header: number of records of vCPUs, and of tables.
const VCPUS: usize = 96;
const TABLE_RECORDS: usize = 152;
/// In a record of tables and in a section: sizes of the heads.
const RECORD_HEAD: usize = 32;
const SECTION_HEAD: usize = 16;
/// In a section: size and number of its entries.
const ENTRY_SIZE: usize = 8;
const ENTRIES: usize = 12;
/// In an entry: code of its reason, kind of its key, its key, exits, kernel ticks.
const CODE: usize = 4;
const KIND: usize = 8;
const KEY: usize = 16;
const EXITS: usize = 24;
const KERNEL: usize = 32;

fn why(arguments: &[&str]) -> Output {
    let arguments = [&["why"], arguments].concat();
    exitmeter(&arguments).output().unwrap()
}

/// Return the output of a run that succeeds.
fn output_of(arguments: &[&str]) -> String {
    succeeded(why(arguments))
}

/// Return the exit status and the message of a run that fails.
fn error_of(arguments: &[&str]) -> (Option<i32>, String) {
    failed(why(arguments))
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&output_of(arguments)).unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// Write a file of the folder, and return its path.
fn file(folder: &TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Return the rows of a table as lines of words, from the titles on.
fn table<'a>(text: &'a str, title: &str) -> Vec<Vec<&'a str>> {
    let lines = text.lines().skip_while(|line| !line.starts_with(title));
    let lines = lines.take_while(|line| !line.is_empty());
    lines
        .map(|line| {
            line.split("  ")
                .map(str::trim)
                .filter(|cell| !cell.is_empty())
                .collect()
        })
        .collect()
}

/// Return the saved snapshot with details as of real guests for the first vCPU's MSR_WRITE.
fn named() -> Vec<u8> {
    let mut bytes = SAVED.to_vec();
    let u32_at =
        |bytes: &[u8], at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap()) as usize;
    let record = u32_at(&bytes, TABLES);
    let section = record + RECORD_HEAD;
    assert_eq!(u32_at(&bytes, section), 1, "details come first");
    let mut msrs = [0x6e0, 0x830, 0x4000_0070].into_iter();
    for entry in 0..u32_at(&bytes, section + ENTRIES) {
        let at = section + SECTION_HEAD + entry * u32_at(&bytes, section + ENTRY_SIZE);
        if (u32_at(&bytes, at + CODE), bytes[at + KIND]) == (32, 2) {
            let msr: u64 = msrs.next().unwrap() | 1 << 32;
            bytes[at + KEY..at + KEY + 8].copy_from_slice(&msr.to_le_bytes());
        }
    }
    assert_eq!(msrs.next(), None);
    bytes
}

#[test]
fn details_are_listed_by_reason_with_their_names() {
    let folder = TempDir::new().unwrap();
    let snapshot = file(&folder, "named", named());
    let printed = output_of(&[text(&snapshot)]);
    assert!(
        printed.starts_with("since details are on (VMX)\n"),
        "{printed}"
    );
    assert!(printed.contains("\nno memory for the tables of 1 vCPU: their exits are not below\n"));
    assert!(printed.contains("\nkvm-1234, process 1234: 13,124 exits in 25.0 s, 2 vCPUs\n"));
    let rows = table(&printed, "about");
    assert_eq!(
        rows[0],
        ["about", "exits", "share", "kernel", "mean", "user", "bound"]
    );
    let at = rows.iter().position(|row| row[0] == "MSR_WRITE").unwrap();
    assert_eq!(
        rows[at],
        ["MSR_WRITE", "4,765", "36.3%", "7,486,600", "1,571", "0"]
    );
    // The second vCPU wrote other MSRs, so the rows of the two stay separate.
    let of_reason: Vec<_> = rows[at + 1..at + 7].iter().map(|row| row[0]).collect();
    for name in [
        "write 0x6e0 IA32_TSC_DEADLINE",
        "write 0x830 X2APIC_ICR",
        "write 0x40000070 HV_X64_MSR_EOI",
    ] {
        assert!(of_reason.contains(&name), "{of_reason:?}");
    }
    let deadline = rows.iter().find(|row| row[0].contains("DEADLINE")).unwrap();
    assert_eq!(deadline[6], "exact");
    let user = table(&printed, "to user space");
    assert_eq!(user[0], ["to user space", "exits", "share", "mean", "user"]);
    assert_eq!(user[1][..2], ["IO_INSTRUCTION", "974"]);
    assert_eq!(user[2][..2], ["KVM_EXIT_IO", "974"]);
}

#[test]
fn rows_and_others_sum_to_the_report() {
    let mut report = Command::new(env!("CARGO_BIN_EXE_exitmeter"));
    let report = report
        .args(["report", "--json", "--input", SNAPSHOT])
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    let why = json(&["--json", SNAPSHOT]);
    assert_eq!(why["format"], 1);
    assert_eq!(why["host"], report["host"]);
    let vm = &why["vms"][0];
    let told: BTreeMap<_, _> = report["vms"][0]["reasons"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| number(&row["exits"]) != 0)
        .map(|row| {
            let cycles = &row["cycles"];
            (
                row["code"].to_string(),
                [&row["exits"], &cycles["kernel"], &cycles["user"]].map(number),
            )
        })
        .collect();
    assert_eq!(told.len(), 8);
    for (table, columns) in [("details", 3), ("code", 2)] {
        let groups = vm[table].as_array().unwrap();
        assert_eq!(groups.len(), told.len());
        for group in groups {
            let names = ["exits", "kernel", "user"];
            let of = |row: &Value| -> Vec<u64> {
                names[..columns]
                    .iter()
                    .map(|name| number(&row[*name]))
                    .collect()
            };
            let mut sum = of(&group["others"]);
            for row in group["rows"].as_array().unwrap() {
                for (sum, number) in sum.iter_mut().zip(of(row)) {
                    *sum += number;
                }
            }
            assert_eq!(sum, of(group));
            assert_eq!(sum, told[&group["code"].to_string()][..columns]);
        }
    }
}

#[test]
fn json_has_keys_and_words() {
    let folder = TempDir::new().unwrap();
    let snapshot = file(&folder, "named", named());
    let why = json(&["--json", "--reason", "msr_write", text(&snapshot)]);
    let groups = why["vms"][0]["details"].as_array().unwrap();
    assert_eq!(groups.len(), 1);
    assert_eq!(
        (&groups[0]["name"], &groups[0]["code"]),
        (&"MSR_WRITE".into(), &32.into())
    );
    let rows = groups[0]["rows"].as_array().unwrap();
    let row = rows
        .iter()
        .find(|row| row["detail"]["msr"] == 0x6e0)
        .unwrap();
    assert_eq!(
        row["detail"],
        serde_json::json!({ "kind": "msr", "msr": 0x6e0, "write": true })
    );
    assert_eq!(row["name"], "IA32_TSC_DEADLINE");
    assert_eq!(
        (&row["nested"], &row["exact"]),
        (&false.into(), &true.into())
    );
    // An address does not fit into the numbers of JSON.
    let code = &why["vms"][0]["code"][0]["rows"][0];
    assert_eq!(code["rip"], "0xffffffff81000000");
    assert_eq!(code["half"], "kernel");
    assert_eq!(json(&["--json", "--reason", "32", text(&snapshot)]), why);
    assert_eq!(json(&["--json", "--reason", "0x20", text(&snapshot)]), why);
}

#[test]
fn code_has_the_symbols_of_its_guest() {
    let folder = TempDir::new().unwrap();
    let symbols = file(
        &folder,
        "kallsyms",
        "ffffffff81000000 T native_write_msr\nffffffff81000100 t other\t[module]\n",
    );
    let code = |more: &[&str]| {
        let arguments = [
            &["--vm", "kvm-1234", "--symbols", text(&symbols), SNAPSHOT],
            more,
        ];
        output_of(&arguments.concat())
    };
    let tables = code(&["--reason", "MSR_WRITE"]);
    assert!(tables.contains("\ncannot read the RIP of 1 vCPU: encrypted registers\n"));
    let rows = table(&tables, "about");
    assert_eq!(
        rows[0],
        ["about", "exits", "share", "kernel", "mean", "bound"]
    );
    assert_eq!(rows[2][..2], ["native_write_msr+0x0", "2,323"]);
    assert_eq!(rows[3][..2], ["native_write_msr+0x1", "2,322"]);
    assert_eq!(rows[4][..2], ["others", "120"]);
    // A profile has one frame for a symbol.
    assert_eq!(
        code(&["--reason", "MSR_WRITE", "--collapsed", "--weight", "exits"]),
        "kvm-1234;MSR_WRITE;[others] 120\nkvm-1234;MSR_WRITE;native_write_msr 4645\n"
    );
    // Without symbols there are addresses.
    let plain = output_of(&["--vm", "1234", "--code", "--reason", "32", SNAPSHOT]);
    assert!(plain.contains("\n  0xffffffff81000001 (kernel)"), "{plain}");

    let (status, said) = error_of(&["--symbols", text(&symbols), SNAPSHOT]);
    assert_eq!(status, Some(1));
    assert!(
        said.contains("2 VMs are shown: name the guest by --vm"),
        "{said}"
    );
    let damaged = file(&folder, "damaged", "ffffffff81000000 T _text\nnonsense\n");
    let (status, said) = error_of(&["--vm", "1234", "--symbols", text(&damaged), SNAPSHOT]);
    assert_eq!(status, Some(1));
    assert!(
        said.contains("damaged: line 2 does not begin with an address"),
        "{said}"
    );
}

#[test]
fn profiles_sum_to_the_exits() {
    let collapsed = output_of(&["--collapsed", "--weight", "exits", SNAPSHOT]);
    let weights = collapsed.lines().map(|line| {
        let (stack, weight) = line.rsplit_once(' ').unwrap();
        assert_eq!(stack.split(';').count(), 3, "{line}");
        weight.parse::<u64>().unwrap()
    });
    assert_eq!(weights.sum::<u64>(), 13_124);

    let file = json(&["--speedscope", "--weight", "exits", SNAPSHOT]);
    assert_eq!(
        file["$schema"],
        "https://www.speedscope.app/file-format-schema.json"
    );
    let frames = file["shared"]["frames"].as_array().unwrap();
    let profiles = file["profiles"].as_array().unwrap();
    assert_eq!(profiles.len(), 1);
    let profile = &profiles[0];
    assert_eq!(
        (&profile["type"], &profile["unit"]),
        (&"sampled".into(), &"none".into())
    );
    let samples = profile["samples"].as_array().unwrap();
    let weights = profile["weights"].as_array().unwrap();
    assert_eq!(samples.len(), weights.len());
    assert_eq!(weights.iter().map(number).sum::<u64>(), 13_124);
    assert_eq!(
        (&profile["startValue"], &profile["endValue"]),
        (&0.into(), &13_124.into())
    );
    let stacks: Vec<_> = samples
        .iter()
        .zip(weights)
        .map(|(sample, weight)| {
            let names = sample.as_array().unwrap().iter();
            let names = names.map(|frame| frames[number(frame) as usize]["name"].as_str().unwrap());
            format!("{} {weight}", names.collect::<Vec<_>>().join(";"))
        })
        .collect();
    assert_eq!(stacks, collapsed.lines().collect::<Vec<_>>());
}

#[test]
fn csv_has_a_line_for_each_row() {
    let csv = output_of(&["--csv", SNAPSHOT]);
    let mut lines = csv.lines();
    let titles: Vec<_> = lines.next().unwrap().split(',').collect();
    let exits = titles.iter().position(|title| *title == "exits").unwrap();
    let mut sum = 0;
    for line in lines {
        // A text in quotes may have commas of its own.
        let mut quoted = false;
        let fields = line.split(|at| {
            quoted ^= at == '"';
            at == ',' && !quoted
        });
        let fields: Vec<_> = fields.collect();
        assert_eq!(fields.len(), titles.len(), "{line}");
        if fields[5] == "details" {
            sum += fields[exits].parse::<u64>().unwrap();
        }
    }
    assert_eq!(sum, 13_124);
    let code = output_of(&["--csv", "--code", SNAPSHOT]);
    assert!(code.lines().skip(1).all(|line| line.contains(",code,")));
}

#[test]
fn two_snapshots_are_compared() {
    let folder = TempDir::new().unwrap();
    let before = file(&folder, "before", named());
    let after = file(&folder, "after", one_second_later());

    let text_of = output_of(&["--diff", text(&before), text(&after)]);
    assert!(text_of.starts_with("in 1.0 s (VMX)\n"), "{text_of}");
    assert!(text_of.contains("\nkvm-1234, process 1234: 1,000 exits in 1.0 s, 2 vCPUs\n"));
    let rows = table(&text_of, "about");
    assert_eq!(rows.len(), 3);
    assert_eq!(
        rows[1],
        ["MSR_WRITE", "1,000", "100.0%", "1,480,000", "1,480", "0"]
    );
    assert_eq!(
        rows[2],
        [
            "write 0x6e0 IA32_TSC_DEADLINE",
            "1,000",
            "100.0%",
            "1,480,000",
            "1,480",
            "0",
            "exact"
        ]
    );
    let (status, said) = error_of(&["--diff", text(&after), text(&before)]);
    assert_eq!(status, Some(1));
    assert!(said.contains("name the older one first"), "{said}");
}

#[test]
fn missing_details_are_an_error() {
    let (status, said) = error_of(&[WITHOUT_TABLES]);
    assert_eq!(status, Some(1));
    assert!(
        said.contains("snapshot-1.2.bin has no details: they were off"),
        "{said}"
    );
    let (status, said) = error_of(&["--vm", "7", SNAPSHOT]);
    assert_eq!(status, Some(1));
    assert_eq!(
        said,
        "exitmeter: no VM runs that is called '7' or belongs to process '7'; \
         those that run are kvm-1234, kvm-1300\n"
    );
    let (status, said) = error_of(&["--reason", "NPF", SNAPSHOT]);
    assert_eq!(status, Some(1));
    assert!(
        said.contains("no exit reason of vmx is called 'NPF'"),
        "{said}"
    );
    let (status, _) = error_of(&["--json", "--csv", SNAPSHOT]);
    assert_eq!(status, Some(2));
    // A file that is not the device is refused, and nothing is run.
    let folder = TempDir::new().unwrap();
    let mark = folder.path().join("ran");
    let (status, said) = error_of(&["--device", SNAPSHOT, "--", "touch", text(&mark)]);
    assert_eq!(status, Some(125));
    assert!(said.contains("has no details"), "{said}");
    assert!(!mark.exists());
}

#[test]
fn output_goes_to_a_file_on_request() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("why");
    assert_eq!(output_of(&["-o", text(&path), SNAPSHOT]), "");
    assert_eq!(fs::read_to_string(&path).unwrap(), output_of(&[SNAPSHOT]));
}

#[test]
fn rows_are_limited_and_columns_dropped() {
    let short = output_of(&["--limit", "1", SNAPSHOT]);
    let rows = table(&short, "about");
    let at = rows
        .iter()
        .position(|row| row[0] == "EPT_VIOLATION")
        .unwrap();
    assert_eq!(rows[at + 2][..2], ["2 more", "326"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitmeter"));
    let output = command
        .args(["why", SNAPSHOT])
        .env("COLUMNS", "80")
        .output()
        .unwrap();
    let narrow = String::from_utf8(output.stdout).unwrap();
    assert!(
        narrow.lines().all(|line| line.chars().count() <= 80),
        "{narrow}"
    );
}

/// Prepare the tool with a file that stands for the device.
fn on_a_file_as_device(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitmeter"));
    command.arg("why").args(arguments);
    command.env_remove("NO_COLOR").env_remove("COLUMNS");
    answer_details(&mut command, 0);
    command
}

/// Return the snapshot one second later, with 1000 more writes of the TSC deadline.
fn one_second_later() -> Vec<u8> {
    let mut later = named();
    let key = (0x6e0_u64 | 1 << 32).to_le_bytes();
    let row = later.windows(8).position(|bytes| bytes == key).unwrap() - KEY;
    for (at, more) in [
        (NOW, 2_400_000_000),
        (row + EXITS, 1000),
        (row + KERNEL, 1_480_000),
    ] {
        let number = later[at..].first_chunk_mut::<8>().unwrap();
        *number = (u64::from_le_bytes(*number) + more).to_le_bytes();
    }
    later
}

#[test]
fn a_command_is_watched_and_its_status_handed_on() {
    let folder = TempDir::new().unwrap();
    let device = file(&folder, "device", named());
    let later = file(&folder, "later", one_second_later());
    let script = "dd if=\"$1\" of=\"$0\" bs=1M conv=notrunc status=none; exit 7";
    let arguments = [
        "--device",
        text(&device),
        "--",
        "sh",
        "-c",
        script,
        text(&device),
        text(&later),
    ];
    let output = on_a_file_as_device(&arguments).output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert_eq!(output.status.code(), Some(7));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.starts_with("in 1.0 s (VMX)\n"), "{printed}");
    let rows = table(&printed, "about");
    assert_eq!(rows.len(), 3, "{printed}");
    assert_eq!(rows[2][..2], ["write 0x6e0 IA32_TSC_DEADLINE", "1,000"]);
}

/// A VM that goes while the command runs is reported with its latest reading.
#[test]
fn a_vm_that_went_is_reported() {
    let folder = TempDir::new().unwrap();
    let device = file(&folder, "device", named());
    let later = file(&folder, "later", one_second_later());
    let mut gone = one_second_later();
    // Neither vCPUs nor tables are left; the rest stays behind them, unused.
    gone[NOW] ^= 1;
    for count in [VCPUS, TABLE_RECORDS] {
        gone[count..count + 4].fill(0);
    }
    let gone = file(&folder, "gone", gone);
    let script = "dd if=\"$1\" of=\"$0\" bs=1M conv=notrunc status=none; sleep 2; \
                  dd if=\"$2\" of=\"$0\" bs=1M conv=notrunc status=none";
    let arguments = [
        "--device",
        text(&device),
        "--vm",
        "1234",
        "--",
        "sh",
        "-c",
        script,
        text(&device),
        text(&later),
        text(&gone),
    ];
    let output = on_a_file_as_device(&arguments).output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        printed.contains("\nkvm-1234, process 1234, gone: 1,000 exits in 1.0 s, 2 vCPUs\n"),
        "{printed}"
    );
}

#[test]
fn intervals_come_one_after_the_other() {
    let folder = TempDir::new().unwrap();
    let device = file(&folder, "device", named());
    let arguments = [
        "--device",
        text(&device),
        "--interval",
        "0.1",
        "--count",
        "2",
        "--json",
    ];
    let output = on_a_file_as_device(&arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(printed.lines().count(), 2, "{printed}");
    for line in printed.lines() {
        let why: Value = serde_json::from_str(line).unwrap();
        // The file does not change: nothing happened.
        assert_eq!(why["interval"]["ticks"], 0);
    }
}
