// SPDX-License-Identifier: GPL-2.0

//! Names of VMs: reading them from command lines, defence against hostile ones, and finding a VM by
//! name.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use exitmeter::{
    model::Report,
    names::{
        command, find,
        process::Processes,
        unit,
        words::{ascii, clean, LONGEST},
        Candidate, NameBook, NoVm, VmNames,
    },
    output::TextOptions,
    recording::{read::Reader, write::Writer, Header},
    report::{csv, text, Selection, CSV_HEADER},
};
use exitmeter_meter::reader::Snapshot;
use proptest::prelude::*;
use tempfile::TempDir;

use self::tool::{exitmeter, failed, succeeded};

mod tool;

const SAVED: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.2.bin");

/// A case of `vmms.txt`.
#[derive(Debug, Default)]
struct Case {
    title: String,
    words: Vec<Vec<u8>>,
    cgroup: Vec<u8>,
    expected: VmNames,
}

/// Return the bytes of a line, with `\xNN` for any byte.
fn bytes(text: &str) -> Vec<u8> {
    unit::unescape(text.as_bytes())
}

/// Split a line at blanks outside ''.
fn words(line: &str) -> Vec<Vec<u8>> {
    let mut words = Vec::new();
    let mut rest = line.trim();
    while !rest.is_empty() {
        let (word, next) = match rest.strip_prefix('\'') {
            Some(quoted) => quoted.split_once('\'').unwrap(),
            None => rest.split_once(' ').unwrap_or((rest, "")),
        };
        words.push(bytes(word));
        rest = next.trim_start();
    }
    words
}

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in include_str!("vmms.txt").lines() {
        if let Some(title) = line.strip_prefix("= ") {
            cases.push(Case {
                title: title.to_owned(),
                ..Case::default()
            });
        }
        let Some(case) = cases.last_mut() else {
            continue;
        };
        if let Some(line) = line.strip_prefix('$') {
            case.words = words(line);
        } else if let Some(line) = line.strip_prefix("@ ") {
            // Escapes of a unit belong to its name; a hostile unit is written as bytes in the file.
            let line = match case.title.starts_with("hostile") {
                true => bytes(&line.replace(r"\\x", r"\x5cx")),
                false => line.as_bytes().to_vec(),
            };
            case.cgroup.extend(line);
            case.cgroup.push(b'\n');
        } else if let Some(line) = line.strip_prefix("> ") {
            case.expected = serde_json::from_str(line).unwrap();
        }
    }
    cases
}

fn given(words: &[Vec<u8>], cgroup: &[u8]) -> VmNames {
    let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
    let mut given = command::read(&words);
    unit::add(&mut given, cgroup);
    given
}

#[test]
fn names_are_read_from_command_lines() {
    let cases = cases();
    assert!(cases.len() >= 30, "{}", cases.len());
    for case in cases {
        let given = given(&case.words, &case.cgroup);
        assert_eq!(given, case.expected, "{}", case.title);
    }
}

/// Return true if no text has control characters or is too long.
fn is_harmless(given: &VmNames) -> bool {
    let VmNames {
        name,
        uuid,
        manager,
        id,
        unit,
        ..
    } = given;
    let label = given.label("kvm-1\x1b[m");
    let texts = [name, uuid, manager, id, unit];
    let mut texts = texts.into_iter().flatten().chain([&label]);
    texts.all(|text| {
        text.chars().count() <= 2 * LONGEST + 3
            && !text.chars().any(|c| {
                c.is_control()
                    || ('\u{200b}'..='\u{200f}').contains(&c)
                    || ('\u{202a}'..='\u{202e}').contains(&c)
            })
    })
}

/// Words of any bytes, including the options that the reader knows.
fn any_word() -> impl Strategy<Value = Vec<u8>> {
    const KNOWN: [&str; 20] = [
        "-name",
        "--id",
        "--id=",
        "-smbios",
        "-uuid",
        "-id",
        "guest=",
        "type=1,",
        "uuid=",
        ",",
        "--api-sock",
        "--api-socket",
        "--platform",
        "path=",
        "qemu-kvm",
        "firecracker",
        "cloud-hypervisor",
        "\x1b",
        "\u{202e}",
        "\n",
    ];
    let piece = prop_oneof![
        prop::sample::select(&KNOWN[..]).prop_map(|text| text.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..8),
        "\\PC*".prop_map(String::into_bytes),
    ];
    prop::collection::vec(piece, 0..4).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_command_line_is_harmless(
        words in prop::collection::vec(any_word(), 0..12),
        cgroup in prop::collection::vec(any::<u8>(), 0..64),
        scope in any_word(),
    ) {
        let cgroup = [&cgroup[..], b"\n0::/machine-qemu", &scope, b".scope\n"].concat();
        for program in [&b"qemu-kvm"[..], b"/firecracker", b"cloud-hypervisor", b"x"] {
            let words = [vec![program.to_vec()], words.clone()].concat();
            let given = given(&words, &cgroup);
            prop_assert!(is_harmless(&given), "{given:?}");
        }
    }

    #[test]
    fn clean_text_is_unchanged(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let text = clean(&bytes);
        prop_assert!(text.chars().count() <= LONGEST);
        prop_assert_eq!(&clean(text.as_bytes()), &text);
        prop_assert!(ascii(&text).is_ascii());
    }
}

/// A folder like /proc, with processes that a test made.
struct Proc(TempDir);

impl Proc {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn file(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// Add a process that began `begun` seconds after boot.
    fn process(&self, pid: u32, begun: u64, command: &[u8]) {
        let stat = format!("{pid} (a) b) S 1{} {} 0", " 0".repeat(17), begun * 100);
        self.file(&format!("{pid}/stat"), stat);
        self.file(&format!("{pid}/cmdline"), command);
        self.file(&format!("{pid}/cgroup"), format!("0::/vms/{pid}.service\n"));
        self.file(
            &format!("{pid}/status"),
            format!("Name:\tx\nNSpid:\t{pid}\t85\n"),
        );
    }

    /// Return the processes, `now` seconds after boot.
    fn at(&self, now: u64) -> Processes {
        Processes::in_folder(self.0.path())
            .unwrap()
            .at(Duration::from_secs(now))
    }
}

const AGE: Option<Duration> = Some(Duration::from_secs(60));

#[test]
fn a_process_younger_than_the_vm_is_ignored() {
    let proc = Proc::new();
    proc.process(7, 1000, b"qemu-kvm\0-name\0web\0");
    // The VM is 60 s old.
    assert_eq!(
        proc.at(1065).given(7, AGE).unwrap().name.as_deref(),
        Some("web")
    );
    assert_eq!(proc.at(1030).given(7, AGE), None);
    // Without the VM's age, it is not possible to tell.
    assert!(proc.at(1030).given(7, None).is_some());
    assert_eq!(proc.at(1065).given(8, AGE), None);
}

#[test]
fn long_and_empty_command_lines_are_read() {
    let proc = Proc::new();
    let long = [
        b"qemu-kvm\0-name\0".to_vec(),
        vec![b'a'; 1 << 20],
        b"\0-uuid\0".to_vec(),
    ]
    .concat();
    proc.process(7, 0, &long);
    // The name is cut off with the rest, so there is none.
    assert_eq!(proc.at(99).given(7, AGE).unwrap().name, None);
    let words = [
        b"qemu-kvm\0-name\0web\0".to_vec(),
        b"-device\0x\0".repeat(100_000),
    ]
    .concat();
    proc.process(7, 0, &words);
    assert_eq!(
        proc.at(99).given(7, AGE).unwrap().name.as_deref(),
        Some("web")
    );
    let name = [
        b"qemu-kvm\0-name\0".to_vec(),
        vec![0xff; 2000],
        b"\0".to_vec(),
    ]
    .concat();
    proc.process(7, 0, &name);
    let name = proc.at(99).given(7, AGE).unwrap().name.unwrap();
    assert!(name.len() == LONGEST && name.starts_with("\\xff\\xff") && name.ends_with("..."));

    for empty in [&b""[..], b"\0", b"\0\0\0"] {
        proc.process(7, 0, empty);
        let given = proc.at(99).given(7, AGE).unwrap();
        assert_eq!(
            (given.name, given.unit.as_deref()),
            (None, Some("7.service"))
        );
    }
    // Files that the kernel does not write in this way.
    for stat in [&b""[..], b")", b"7 (x", b"7 (x) S 1", b"7 (x) \xff"] {
        proc.file("7/stat", stat);
        assert_eq!(proc.at(99).given(7, AGE), None);
    }
}

#[test]
fn a_container_with_its_own_pids_has_no_names() {
    let proc = Proc::new();
    proc.process(7, 0, b"qemu-kvm\0-name\0web\0");
    let link = |of: &str, inode: u32| {
        let folder = proc.0.path().join(of).join("ns");
        fs::create_dir_all(&folder).unwrap();
        let _ = fs::remove_file(folder.join("pid"));
        std::os::unix::fs::symlink(format!("pid:[{inode}]"), folder.join("pid")).unwrap();
    };
    let is_available = || Processes::in_folder(proc.0.path()).is_some();
    assert!(is_available());
    link("self", 4_026_532_999);
    assert!(!is_available());
    // The host's /proc, in a container.
    link("1", 4_026_531_836);
    assert!(is_available());
    link("self", 4_026_531_836);
    link("1", 4_026_532_999);
    assert!(is_available());
}

/// Return a snapshot with a TSC `seconds` after the first event.
fn snapshot(seconds: u64) -> Vec<u8> {
    let mut bytes = SAVED.to_vec();
    let records = u64::from_le_bytes(*SAVED[88..].first_chunk().unwrap());
    let first = usize::try_from(records).unwrap() + 24;
    let first = u64::from_le_bytes(*SAVED[first..].first_chunk().unwrap());
    let now = first + seconds * 2_400_000_000;
    bytes[40..48].copy_from_slice(&now.to_le_bytes());
    bytes
}

/// The saved VMs with names: `web`, by Proxmox, and one with a name that imitates the first.
fn named(name: &[u8]) -> (Proc, NameBook, Vec<u8>) {
    let proc = Proc::new();
    let web = b"/usr/bin/kvm\0-id\x00103\0-name\0web\0-smbios\0type=1,uuid=1a0d83cb-68fa-4509-aa0c-75ffb16ef4f2\0";
    proc.process(1234, 5, web);
    proc.process(1300, 5, &[b"qemu-kvm\0-name\0", name, b"\0"].concat());
    let mut book = NameBook::with(Some(proc.at(1000)));
    let bytes = snapshot(30);
    let lines = book.read(&Snapshot::parse(&bytes).unwrap());
    assert_eq!(lines.len(), 2);
    // Each name is returned once.
    assert_eq!(book.read(&Snapshot::parse(&bytes).unwrap()), []);
    (proc, book, bytes)
}

fn report(book: &NameBook, bytes: &[u8]) -> Report {
    let mut report = Report::new(&Snapshot::parse(bytes).unwrap());
    book.name(&mut report);
    report
}

#[test]
fn reports_have_the_names() {
    let (_proc, book, bytes) = named("größe\x1b".as_bytes());
    let report = report(&book, &bytes);
    let all = Selection::default();
    let shown = text(&report, &all, TextOptions::default());
    assert!(
        shown.contains(
            "\nweb (kvm-1234), process 1234: 13,124 exits, 437/s, 2 vCPUs\n\nproxmox, id 103, uuid \
             1a0d83cb-68fa-4509-aa0c-75ffb16ef4f2, unit 1234.service\n\nphase"
        ),
        "{shown}"
    );
    assert!(
        shown.contains("\ngröße\\x1b (kvm-1300), process 1300: "),
        "{shown}"
    );
    let narrow = TextOptions {
        width: Some(80),
        ascii: true,
        ..TextOptions::default()
    };
    let shown = text(&report, &all, narrow);
    assert!(
        shown.is_ascii() && shown.lines().all(|line| line.len() <= 80),
        "{shown}"
    );
    assert!(shown.contains("uuid 1a0d83cb-68fa-4509-aa0c-75ffb16ef4f2"));
    assert!(shown.contains(r"gr\u{f6}\u{df}e\x1b (kvm-1300)"), "{shown}");
    assert!(shown.contains("  ####"), "{shown}");

    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["format"], 1);
    assert_eq!(json["vms"][0]["name"], "kvm-1234");
    assert_eq!(
        json["vms"][0]["vmm"],
        serde_json::json!({
            "name": "web",
            "uuid": "1a0d83cb-68fa-4509-aa0c-75ffb16ef4f2",
            "manager": "proxmox",
            "id": "103",
            "unit": "1234.service",
        })
    );
    let lines = CSV_HEADER.to_owned() + &csv(&report, &all);
    let fields: Vec<Vec<_>> = lines
        .lines()
        .map(|line| line.split(',').collect())
        .collect();
    assert!(fields.iter().all(|line| line.len() == fields[0].len()));
    assert!(fields[0].ends_with(&["vmm_name", "vmm_uuid", "vmm_manager", "vmm_id", "vmm_unit"]));
    assert!(fields[1].ends_with(&[
        "web",
        "1a0d83cb-68fa-4509-aa0c-75ffb16ef4f2",
        "proxmox",
        "103",
        "1234.service"
    ]));
}

#[test]
fn a_vm_is_found_by_each_of_its_names() {
    let (_proc, book, bytes) = named(b"web-2");
    let report = report(&book, &bytes);
    let found = |vm: &str| {
        let selection = Selection {
            vm: Some(vm),
            ..Selection::default()
        };
        let part = selection.apply(report.clone())?;
        Ok::<_, exitmeter::report::SelectError>(
            part.vms.iter().map(|vm| vm.pid).collect::<Vec<_>>(),
        )
    };
    for called in [
        "1234",
        "kvm-1234",
        "web",
        "103",
        "1a0d83cb-68fa-4509-aa0c-75ffb16ef4f2",
        "1A0D83CB-68FA-4509-AA0C-75FFB16EF4F2",
        "1234.service",
    ] {
        assert_eq!(found(called).unwrap(), [1234], "{called}");
    }
    assert_eq!(
        found("mail").unwrap_err().to_string(),
        "no VM runs that is called 'mail' or belongs to process 'mail'; those that run are web \
         (kvm-1234), web-2 (kvm-1300)"
    );
    // Both are 85 in their containers.
    assert_eq!(
        found("85").unwrap_err().to_string(),
        "several VMs are called '85': web (kvm-1234), web-2 (kvm-1300); say which by its kvm-PID"
    );
}

#[test]
fn a_vm_cannot_imitate_another() {
    // The second one has KVM's name of the first as its name: it is not found by that.
    let (_proc, book, bytes) = named(b"kvm-1234");
    let all = report(&book, &bytes);
    let known = || all.vms.iter().map(|vm| vm.candidate());
    let first = all.vms.iter().find(|vm| vm.pid == 1234).unwrap().vm;
    assert_eq!(
        find("kvm-1234", known())
            .unwrap()
            .into_iter()
            .collect::<Vec<_>>(),
        [first]
    );
    // A name that is a process or a name of another VM could mean both, so neither is found.
    for name in [&b"1234"[..], b"web"] {
        let (_proc, book, bytes) = named(name);
        let all = report(&book, &bytes);
        let name = String::from_utf8_lossy(name);
        let error = find(&name, all.vms.iter().map(|vm| vm.candidate())).unwrap_err();
        assert!(matches!(error, NoVm::Several { .. }), "{error}");
    }
}

#[test]
fn the_vms_of_one_process_are_one() {
    let given = VmNames::default();
    let known = |vm, pid| Candidate {
        vm,
        kvm: "kvm-1",
        pid,
        given: &given,
    };
    let found = find("kvm-1", [known(1, 1), known(2, 1)]).unwrap();
    assert_eq!(found.len(), 2);
}

fn recording(folder: &TempDir, name: &[u8]) -> PathBuf {
    let (proc, _, bytes) = named(name);
    let mut book = NameBook::with(Some(proc.at(1000)));
    let lines = book.read(&Snapshot::parse(&bytes).unwrap());
    let second = Duration::from_secs(1);
    let mut file = Vec::new();
    let header = Header {
        begun: second,
        interval: second,
    };
    let mut writer = Writer::new(&mut file, &header).unwrap();
    writer.names(Duration::ZERO, &lines).unwrap();
    for place in 0..3_u32 {
        writer
            .snapshot(second * place, snapshot(30 + u64::from(place)))
            .unwrap();
    }
    writer.end(second * 3, "tested").unwrap();
    let path = folder.path().join("names.rec");
    fs::write(&path, file).unwrap();
    path
}

#[test]
fn recordings_keep_the_names() {
    let folder = TempDir::new().unwrap();
    let path = recording(&folder, b"<b>\x1b[2J</b>");
    let bytes = fs::read(&path).unwrap();
    let mut reader = Reader::new(&bytes).unwrap();
    let report = {
        let taken = reader.next_snapshot().unwrap();
        Report::new(&Snapshot::parse(taken.snapshot).unwrap())
    };
    let vm = &report.vms[0];
    let given = reader.names().vm_of(report.host.life, vm.vm);
    assert_eq!(
        (vm.pid, given.name.as_deref(), given.id.as_deref()),
        (1234, Some("web"), Some("103"))
    );

    let path = path.to_str().unwrap();
    let plot = |vm: &str| {
        exitmeter(&["plot", path, "-o", "-", "--format", "html", "--vm", vm])
            .output()
            .unwrap()
    };
    let page = succeeded(plot("web"));
    assert!(page.contains("web (kvm-1234)") && !page.contains("kvm-1300"));
    let page = succeeded(plot("kvm-1300"));
    assert!(page.contains(r"&lt;b&gt;\x1b[2J&lt;/b&gt; (kvm-1300)") && !page.contains('\x1b'));
    let (status, said) = failed(plot("mail"));
    assert_eq!(status, Some(1));
    assert!(
        said.ends_with("those in it are <b>\\x1b[2J</b> (kvm-1300), web (kvm-1234)\n"),
        "{said}"
    );
}

#[test]
fn vms_with_equal_names_in_a_recording_are_distinct() {
    let folder = TempDir::new().unwrap();
    let path = recording(&folder, b"web");
    let path = path.to_str().unwrap();
    let (status, said) = failed(
        exitmeter(&["plot", path, "-o", "-", "--format", "svg", "--vm", "web"])
            .output()
            .unwrap(),
    );
    assert_eq!(status, Some(1));
    assert!(
        said.ends_with("several VMs are called 'web': web (kvm-1234), web (kvm-1300); say which by its kvm-PID\n"),
        "{said}"
    );
}

#[test]
fn names_in_a_hostile_recording_do_no_harm() {
    let mut book = NameBook::default();
    let line =
        "{\"life\":\"0x1f\",\"vm\":3,\"name\":\"\\u001b[2J\",\"unit\":\"\\u009b\",\"more\":[]}";
    book.add(serde_json::from_str(line).unwrap());
    let given = book.vm_of(0x1f, 3);
    assert_eq!(
        (given.name.as_deref(), given.unit.as_deref()),
        (Some("\\x1b[2J"), Some("\\x9b"))
    );
}

/// A process of this machine, by the real /proc.
#[test]
fn a_running_process_has_its_name() {
    let mut child = Command::new("sh")
        .arg0("qemu-system-x86_64")
        .args(["-c", "read -r line", "-name", "guest=a,,b,debug-threads=on"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let stat = PathBuf::from(format!("/proc/{}/cmdline", child.id()));
    // Until then it is still this test's program.
    let begun = std::time::Instant::now();
    while !fs::read(&stat).unwrap().starts_with(b"qemu-system") {
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
    // The tests may run in a container.
    let root = TempDir::new().unwrap();
    let link = root.path().join(child.id().to_string());
    std::os::unix::fs::symlink(Path::new("/proc").join(child.id().to_string()), link).unwrap();
    let processes = Processes::in_folder(root.path()).unwrap();
    let given = processes.given(child.id(), Some(Duration::ZERO)).unwrap();
    assert_eq!(given.name.as_deref(), Some("a,b"));
    assert_eq!(given.manager.as_deref(), Some("qemu"));
    // The process is some seconds old at most, so it has no VM that is an hour old.
    assert_eq!(
        processes.given(child.id(), Some(Duration::from_secs(3600))),
        None
    );
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    child.wait().unwrap();
    assert_eq!(processes.given(child.id(), None), None);
}
