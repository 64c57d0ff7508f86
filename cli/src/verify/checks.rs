// SPDX-License-Identifier: GPL-2.0

//! The checks: guests with known exits, compared with the numbers of the meter, of the kernel and
//! of the guests themselves.

use std::collections::BTreeMap;

use exitmeter_meter::{
    detail::Kind,
    leaves::{phases_of_query, LeafMap},
    phase::Phase,
    reasons::Isa,
    snapshot::{Reason, TABLE_DETAILS},
};
use tiny_guests::{Config, Expected, Mode, Program, Registers64};

use super::{
    hist::Hist,
    host::{thread, MeteredHost},
    model::{Check, Verdict},
    own::{Exits, MeteredGuest},
};
use crate::{numbers::exact, source, stop::Stopped, why::device};

/// Loop iterations of a guest.
const LOOPS: u32 = 500;
/// Loop iterations of the guest that only computes.
const SPINS: u32 = 1_000_000;

/// Guests whose exits are counted.
const GUESTS: [(Program, Mode); 21] = [
    (Program::Cpuid, Mode::Long),
    (Program::OutUser, Mode::Long),
    (Program::InUser, Mode::Long),
    (Program::OutEventfd, Mode::Long),
    (Program::HltUser, Mode::Long),
    (Program::Rdmsr, Mode::Long),
    (Program::Wrmsr, Mode::Long),
    (Program::WrmsrFast, Mode::Long),
    (Program::CrWrite, Mode::Long),
    (Program::Hypercall, Mode::Long),
    (Program::Invd, Mode::Long),
    (Program::Wbinvd, Mode::Long),
    (Program::Touch, Mode::Long),
    (Program::Spin, Mode::Long),
    (Program::Cpuid, Mode::User),
    (Program::OutUser, Mode::User),
    (Program::Touch, Mode::User),
    (Program::Cpuid, Mode::Real),
    (Program::OutUser, Mode::Real),
    (Program::Wrmsr, Mode::Real),
    (Program::Touch, Mode::Real),
];

/// Describe what a guest does.
fn describe(program: Program) -> &'static str {
    match program {
        Program::Cpuid | Program::Query => "CPUID",
        Program::OutUser => "OUT to the VMM",
        Program::InUser => "IN from the VMM",
        Program::InKernel => "IN from KVM's speaker",
        Program::OutEventfd => "OUT to an ioeventfd",
        Program::HltKernel => "HLT that sleeps in KVM",
        Program::HltUser => "HLT that goes to the VMM",
        Program::Rdmsr => "RDMSR",
        Program::Wrmsr => "WRMSR",
        Program::WrmsrFast => "WRMSR in the fastpath",
        Program::CrWrite => "MOV to CR0",
        Program::Hypercall => "hypercall",
        Program::Invd => "INVD",
        Program::Wbinvd => "WBINVD",
        Program::Spin => "computation",
        Program::Touch => "touched pages",
        Program::Look => "read pages",
        Program::Call => "called pages",
        Program::Device => "registers of a device",
        Program::Undefined => "UD2",
        Program::Varied => "many reasons",
        Program::Debug => "debug registers",
    }
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Real => "real mode",
        Mode::Long => "64-bit mode",
        Mode::User => "CPL 3",
    }
}

/// Verdict of a check, with a text on what was found.
type Outcome = anyhow::Result<(Verdict, String)>;

/// Make all checks, and report each as it ends.
///
/// # Errors
///
/// Returns [`Stopped`], or an error of `report_check`.
pub fn make(
    host: &MeteredHost,
    report_check: &mut dyn FnMut(Check) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let hist = Hist::begin(thread(), host.isa);
    let mut ledgers = Ledgers::default();
    for (program, guest_mode) in GUESTS {
        let name = format!("counts: {}, {}", describe(program), mode(guest_mode));
        let count = match program {
            Program::Spin => SPINS,
            _ => LOOPS,
        };
        let config = Config::new(program, guest_mode, count);
        let hist = hist.as_ref().ok();
        report_check(check(name, counts(host, config, hist, &mut ledgers))?)?;
    }
    if let Err(error) = &hist {
        let text = format!("{error}: the counts were compared only with what the guests did");
        report_check(Check::new("the kernel's histogram", Verdict::NotMade, text))?;
    }
    // The kernel's count ends here.
    drop(hist);
    report_check(ledgers.check())?;
    for guest_mode in [Mode::Long, Mode::Real] {
        let name = format!("answers: CPUID in {}", mode(guest_mode));
        report_check(check(name, answers(host, guest_mode))?)?;
    }
    details(host, report_check)
}

/// Turn an outcome into a check. Every error fails the check, except the user's request to end.
fn check(name: String, outcome: Outcome) -> Result<Check, Stopped> {
    match outcome {
        Ok((verdict, text)) => Ok(Check::new(name, verdict, text)),
        Err(error) => match error.downcast_ref::<Stopped>() {
            Some(stopped) => Err(*stopped),
            None => Ok(Check::new(name, Verdict::Failed, format!("{error:#}"))),
        },
    }
}

/// Sums over the guests' ledgers.
#[derive(Debug, Default)]
struct Ledgers {
    vcpus: u32,
    ticks: u64,
    wrong: Option<String>,
}

impl Ledgers {
    fn add(&mut self, name: &str, guest: &MeteredGuest) {
        self.vcpus += 1;
        self.ticks = self.ticks.wrapping_add(guest.life);
        if let Some(wrong) = guest.imbalance() {
            self.wrong.get_or_insert(format!("{name}: {wrong}"));
        }
    }

    fn check(self) -> Check {
        let (verdict, text) = match (self.wrong, self.vcpus) {
            (Some(wrong), _) => (Verdict::Failed, wrong),
            (None, 0) => (Verdict::Failed, "no guest was metered".to_owned()),
            (None, vcpus) => {
                let ticks = exact(self.ticks);
                let text = format!("the cells of {vcpus} vCPUs sum to their lives, {ticks} ticks");
                (Verdict::Passed, text)
            }
        };
        Check::new("ledger: to the tick", verdict, text)
    }
}

/// Return the exits that a guest is known to cause.
fn known(host: &MeteredHost, config: &Config) -> Expected {
    let expected = Expected::of(host.isa, config.program, config.mode, config.loops(), 1);
    match host.nested_paging {
        true => expected,
        false => expected.without_nested_paging(),
    }
}

/// Compare a guest's exits with the kernel's histogram, and with what it does.
fn counts(
    host: &MeteredHost,
    config: Config,
    hist: Option<&Hist>,
    ledgers: &mut Ledgers,
) -> Outcome {
    if config.mode == Mode::Real && !host.real_mode {
        let text = "KVM emulates real mode with unrestricted_guest=0";
        return Ok((Verdict::NotMade, text.to_owned()));
    }
    let expected = known(host, &config);
    let name = format!("{}, {}", describe(config.program), mode(config.mode));
    let before = hist.map(Hist::read).transpose()?;
    let (_machine, guest) = host.run_metered(config, None)?;
    ledgers.add(&name, &guest);
    let counted = match hist.zip(before) {
        Some((hist, before)) => Some(since(&hist.read()?, &before)),
        None => None,
    };
    Ok(compare(host, &guest, expected.exact(), counted.as_ref()))
}

/// Return the exits since an earlier moment.
fn since(now: &Exits, before: &Exits) -> Exits {
    let mut exits = Exits::new();
    for (code, count) in now {
        let more = count.saturating_sub(before.get(code).copied().unwrap_or(0));
        if more != 0 {
            exits.insert(*code, more);
        }
    }
    exits
}

/// Compare the metered exits with those that the guest caused, and with the kernel's count if there
/// is one.
fn compare(
    host: &MeteredHost,
    guest: &MeteredGuest,
    known: &BTreeMap<u32, u64>,
    counted: Option<&Exits>,
) -> (Verdict, String) {
    let mut wrong = Vec::new();
    let count = |exits: &BTreeMap<u32, u64>, code| exits.get(&code).copied().unwrap_or(0);
    if guest.others != 0 {
        wrong.push(format!("{} exits have no row", guest.others));
    }
    // A page that the host takes back, for example to balance its memory, faults once more.
    let fault = host.by_vendor(48, 0x400);
    for (code, due) in known {
        let metered = guest.exits_of(*code);
        let right = match *code == fault {
            true => metered >= *due,
            false => metered == *due,
        };
        if !right {
            let name = host.name(*code);
            wrong.push(format!(
                "{name} metered {} times, but the guest caused {}",
                exact(metered),
                exact(*due)
            ));
        }
    }
    let total = exact(guest.total());
    let text = match counted {
        Some(counted) => {
            let mut codes: Vec<u32> = guest.exits.keys().chain(counted.keys()).copied().collect();
            codes.sort_unstable();
            codes.dedup();
            for code in codes {
                let (metered, due) = (guest.exits_of(code), count(counted, code));
                if metered != due {
                    wrong.push(format!(
                        "{} metered {} times, but {} times in the kernel's histogram",
                        host.name(code),
                        exact(metered),
                        exact(due)
                    ));
                }
            }
            format!("{total} exits, as the kernel's histogram has them and the guest caused them")
        }
        None => {
            for (code, count) in &guest.exits {
                if !known.contains_key(code)
                    && host.nested_paging
                    && !is_caused_by_host(host, *code)
                {
                    let name = host.name(*code);
                    wrong.push(format!(
                        "{name} metered {count} times, but the guest caused none"
                    ));
                }
            }
            format!("{total} exits, as the guest caused them")
        }
    };
    match wrong.is_empty() {
        true => (Verdict::Passed, text),
        false => (Verdict::Failed, wrong.join("; ")),
    }
}

/// Return true for exits that the host causes and not the guest: interrupts, NMIs, SMIs, the end of a
/// time slice.
fn is_caused_by_host(host: &MeteredHost, code: u32) -> bool {
    match host.isa {
        Isa::Vmx => matches!(code, 0 | 1 | 5 | 6 | 7 | 8 | 52 | 75),
        Isa::Svm => matches!(code, 0x60..=0x64),
    }
}

/// Leaves that the guest queries; docs/interface.md.
const IDENTITY: u32 = 0x4fff_fff0;
const INTERFACE: u32 = 0x4fff_fff1;
const PHASE_CYCLES: u32 = 0x4fff_fff2;
const EXITS: u32 = 0x4fff_fff3;
const LIFE: u32 = 0x4fff_fff4;

/// Return the leaves of a map: exits in all, exits of a reason, cycles of a reason.
fn leaves(map: LeafMap) -> Option<[u32; 3]> {
    match map {
        LeafMap::Off => None,
        LeafMap::Map2021 => Some([0x4fff_ffff, 0x4fff_fffd, 0x4fff_fffc]),
        LeafMap::Map2022 => Some([0x4fff_fffc, 0x4fff_fffe, 0x4fff_ffff]),
    }
}

fn join(high: u64, low: u64) -> u64 {
    high << 32 | low
}

/// Let a guest query its own numbers, and compare the answers with the snapshot.
fn answers(host: &MeteredHost, guest_mode: Mode) -> Outcome {
    let not_made = |text: &str| Ok((Verdict::NotMade, text.to_owned()));
    if host.by_bpf {
        return not_made("guests get no answers from BPF");
    }
    let Some([total, of_reason, cycles]) = host.leaf_map.and_then(leaves) else {
        return not_made("guests get no answers from the module (leaf_map=0)");
    };
    if host.host_scope {
        return not_made("guests read the sums of the host (host_scope=1)");
    }
    if guest_mode == Mode::Real && !(host.real_mode && host.nested_paging) {
        return not_made("KVM emulates real mode here");
    }
    let (cpuid, io, msr, hlt, fault) = (
        host.by_vendor(10, 0x72),
        host.by_vendor(30, 0x7b),
        host.by_vendor(32, 0x7c),
        host.by_vendor(12, 0x78),
        host.by_vendor(48, 0x400),
    );
    let mut asked = vec![(IDENTITY, 0), (INTERFACE, 0), (LIFE, 0), (total, 0)];
    for code in [cpuid, io, msr, hlt, fault] {
        asked.extend([(of_reason, code), (EXITS, code)]);
    }
    asked.push((cycles, fault));
    let phases: Vec<_> = (0..).map_while(phases_of_query).zip(0_u32..).collect();
    asked.extend(
        phases
            .iter()
            .map(|(_, number)| (PHASE_CYCLES, fault | number << 16)),
    );
    let queries = asked
        .iter()
        .map(|(leaf, sub)| Registers64::cpuid(*leaf, *sub));
    let (machine, guest) = host.run_metered(Config::query(guest_mode, queries.collect()), None)?;

    let mut wrong = Vec::new();
    let by_chance: u64 = guest
        .exits
        .iter()
        .filter(|(code, _)| is_caused_by_host(host, **code))
        .map(|(_, exits)| exits)
        .sum();
    let word = |text: &[u8; 4]| u64::from(u32::from_le_bytes(*text));
    let all = asked.len() as u64;
    // If a page faults once more after all queries for faults, its numbers differ at the end.
    let place = asked.iter().position(|query| *query == (EXITS, fault));
    let answer = place.and_then(|place| machine.answers(0).get(place).copied());
    let faults_then = answer.map(|answer| join(answer.rdx, answer.rax));
    let no_fault_since = faults_then == Some(guest.exits_of(fault));
    for (number, ((leaf, sub), answer)) in (0_u64..).zip(asked.iter().zip(machine.answers(0))) {
        let (exits, ticks) = (join(answer.rbx, answer.rax), join(answer.rdx, answer.rax));
        let right = match *leaf {
            IDENTITY => {
                let name = [word(b"Exit"), word(b"Mete"), word(b"r\0\0\0")];
                [answer.rbx, answer.rcx, answer.rdx] == name
            }
            INTERFACE => {
                let isa = match host.isa {
                    Isa::Vmx => 1,
                    Isa::Svm => 2,
                };
                answer.rax >= 1
                    && answer.rbx == isa
                    && Some(answer.rdx) == host.leaf_map.map(|map| map as u64)
            }
            LIFE => ticks == host.life,
            leaf if leaf == total => {
                // Still to come in the guest's life: the later queries, and the OUT at its end.
                let left = all - number;
                let most = guest.total().saturating_sub(left);
                (most.saturating_sub(by_chance)..=most).contains(&exits)
            }
            leaf if leaf == of_reason || leaf == EXITS => {
                let answered = if leaf == EXITS { ticks } else { exits };
                match *sub {
                    // The query itself is counted; those after it are not yet.
                    code if code == cpuid => answered == number + 1,
                    // The OUT at the end is not yet counted.
                    code if code == io => answered + 1 == guest.exits_of(io),
                    // A page may fault once more after that.
                    code if code == fault => {
                        answered != 0 && answered <= guest.exits_of(fault) || !host.nested_paging
                    }
                    code => answered == guest.exits_of(code),
                }
            }
            leaf if leaf == cycles => {
                let answered = join(answer.rbx, answer.rcx);
                answered == guest.ticks_of(fault, Phase::Kernel) || !no_fault_since
            }
            _ => {
                let phase = usize::try_from(*sub >> 16)
                    .ok()
                    .and_then(|at| phases.get(at));
                let held = phase.map(|((_, summed), _)| {
                    let ticks = summed.iter().map(|phase| guest.ticks_of(fault, *phase));
                    ticks.sum::<u64>()
                });
                held == Some(ticks) || !no_fault_since
            }
        };
        if !right {
            wrong.push(format!(
                "CPUID({leaf:#x}, {sub:#x}) gave {:#x} {:#x} {:#x} {:#x}, but the snapshot has other numbers",
                answer.rax, answer.rbx, answer.rcx, answer.rdx
            ));
        }
    }
    Ok(match wrong.is_empty() {
        true => {
            let text = format!("{all} answers, and the snapshot has the same numbers");
            (Verdict::Passed, text)
        }
        false => (Verdict::Failed, wrong.join("; ")),
    })
}

/// A guest with known details: the kind of its detail, and some bits of the key.
struct Touched {
    name: &'static str,
    program: Program,
    kind: Kind,
    mask: u64,
    key: u64,
}

const TOUCHED: [Touched; 5] = [
    Touched {
        name: "details: port of OUT",
        program: Program::OutUser,
        kind: Kind::Port,
        mask: 0x1_0000_ffff,
        key: 0x3f0,
    },
    Touched {
        name: "details: port of IN",
        program: Program::InUser,
        kind: Kind::Port,
        mask: 0x1_0000_ffff,
        key: 0x1_0000_03f0,
    },
    Touched {
        name: "details: MSR of RDMSR",
        program: Program::Rdmsr,
        kind: Kind::Msr,
        mask: 0x1_ffff_ffff,
        key: 0x8b,
    },
    Touched {
        name: "details: MSR of WRMSR",
        program: Program::Wrmsr,
        kind: Kind::Msr,
        mask: 0x1_ffff_ffff,
        key: 0x1_0000_008b,
    },
    Touched {
        name: "details: leaf of CPUID",
        program: Program::Cpuid,
        kind: Kind::Cpuid,
        mask: 0xffff_ffff,
        key: 0,
    },
];

/// Compare the module's details with what the guests touched, if details are permitted.
fn details(
    host: &MeteredHost,
    report_check: &mut dyn FnMut(Check) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if host.by_bpf {
        let text = "this tool does not compare the details that BPF keeps".to_owned();
        return report_check(Check::new("details", Verdict::NotMade, text));
    }
    let device = match device::Device::open_by(source::Choice::Module, source::DEVICE.as_ref()) {
        Ok(device) => device,
        Err(error) => {
            return report_check(Check::new("details", Verdict::NotMade, error.to_string()));
        }
    };
    for touched in &TOUCHED {
        let outcome = compare_details(host, &device, touched);
        report_check(check(touched.name.to_owned(), outcome)?)?;
    }
    Ok(())
}

fn compare_details(host: &MeteredHost, device: &device::Device, touched: &Touched) -> Outcome {
    let config = Config::new(touched.program, Mode::Long, LOOPS);
    let (_machine, guest) = host.run_metered(config, Some(device))?;
    if !guest.has_tables {
        let text = "the guest's vCPU has no tables, for lack of memory";
        return Ok((Verdict::NotMade, text.to_owned()));
    }
    let entries = || {
        guest
            .entries
            .iter()
            .filter(|entry| entry.table == TABLE_DETAILS)
    };
    let alike = entries().filter(|entry| {
        let is_kind = entry.detail_kind == touched.kind as u8;
        is_kind && !entry.others && entry.key & touched.mask == touched.key
    });
    let found: u64 = alike.map(|entry| entry.exits).sum();
    let sum: u64 = entries().map(|entry| entry.exits).sum();
    let metered: u64 = guest.total();
    let reasons = entries()
        .filter(|entry| matches!(entry.reason, Reason::Code(_)))
        .count();
    Ok(if found != u64::from(LOOPS) {
        let text = format!("{found} exits have this detail, and the guest caused {LOOPS}");
        (Verdict::Failed, text)
    } else if sum != metered {
        let text = format!("the rows hold {sum} exits of {metered}");
        (Verdict::Failed, text)
    } else {
        let text = format!("{found} exits, as the guest caused; {reasons} rows hold all {metered}");
        (Verdict::Passed, text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stop::Stop;

    fn host() -> MeteredHost {
        MeteredHost {
            isa: Isa::Vmx,
            nested_paging: true,
            real_mode: true,
            tsc_khz: None,
            tsc_stable: true,
            leaf_map: None,
            host_scope: false,
            life: 1,
            has_details: false,
            by_bpf: false,
            path: source::DEVICE.into(),
            cpu: 0,
            pid: None,
            stop: Stop::default(),
        }
    }

    fn guest(exits: &[(u32, u64)]) -> MeteredGuest {
        MeteredGuest {
            exits: exits.iter().copied().collect(),
            ..MeteredGuest::default()
        }
    }

    #[test]
    fn wrong_counts_fail() {
        let (host, known) = (host(), Exits::from([(10, 500), (30, 1), (48, 4)]));
        let verdict = |guest: &MeteredGuest, counted: Option<&Exits>| {
            compare(&host, guest, &known, counted).0
        };
        let right = guest(&[(1, 3), (10, 500), (30, 1), (48, 4)]);
        assert_eq!(verdict(&right, None), Verdict::Passed);
        assert_eq!(verdict(&right, Some(&right.exits.clone())), Verdict::Passed);
        let missed = guest(&[(1, 3), (10, 499), (30, 1), (48, 4)]);
        assert_eq!(verdict(&missed, None), Verdict::Failed);
        // The kernel counts an interrupt that the meter does not.
        let more = Exits::from([(1, 4), (10, 500), (30, 1), (48, 4)]);
        let (found, text) = compare(&host, &right, &known, Some(&more));
        assert_eq!(found, Verdict::Failed);
        assert_eq!(
            text,
            "EXTERNAL_INTERRUPT metered 3 times, but 4 times in the kernel's histogram"
        );
        // An exit that the guest does not cause.
        let other = guest(&[(10, 500), (18, 1), (30, 1), (48, 4)]);
        assert_eq!(verdict(&other, None), Verdict::Failed);
        // A page that faults twice is the host's doing; one that does not fault at all is wrong.
        let twice = guest(&[(10, 500), (30, 1), (48, 5)]);
        assert_eq!(verdict(&twice, None), Verdict::Passed);
        let none = guest(&[(10, 500), (30, 1)]);
        assert_eq!(verdict(&none, None), Verdict::Failed);
    }

    #[test]
    fn since_subtracts_the_earlier_counts() {
        let before = Exits::from([(1, 3), (10, 7)]);
        let now = Exits::from([(1, 3), (10, 9), (30, 1)]);
        assert_eq!(since(&now, &before), Exits::from([(10, 2), (30, 1)]));
    }
}
