// SPDX-License-Identifier: GPL-2.0

//! Tests of the verdict on saved consoles (see lab/tests/fault), whole and damaged.

use super::*;

const GOOD: &str = include_str!("../../tests/consoles/good-intel.log");
const WARN: &str = include_str!("../../tests/consoles/warn.log");
const OOPS: &str = include_str!("../../tests/consoles/oops.log");
const BUG: &str = include_str!("../../tests/consoles/bug.log");
const PANIC: &str = include_str!("../../tests/consoles/panic.log");
const SOFTLOCKUP: &str = include_str!("../../tests/consoles/softlockup.log");

const BAD: [(&str, Fault); 5] = [
    (WARN, Fault::Warning),
    (OOPS, Fault::Oops),
    (BUG, Fault::Oops),
    (PANIC, Fault::Panic),
    (SOFTLOCKUP, Fault::Lockup),
];

const LIMITS: Limits = Limits {
    time: Duration::from_secs(600),
    silence: Duration::from_secs(60),
};

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Return a watcher that got `console` in its first second.
fn watch(console: &[u8]) -> Watch {
    let mut watch = Watch::new(LIMITS);
    watch.console(seconds(1), console);
    watch
}

fn kernel(priority: u32, text: &str) -> Message {
    Message::Kernel(format!("{priority},1,1000000,-;{text}\n").into_bytes())
}

#[test]
fn a_good_run_has_the_scripts_status() {
    for status in [0, 3, 99] {
        let mut watch = watch(GOOD.as_bytes());
        watch.message(
            seconds(2),
            &Message::Stdout(b"BUG: in the script's words\n".to_vec()),
        );
        assert_eq!(watch.end(seconds(2)), None);
        watch.message(seconds(3), &Message::Verdict(status));
        let end = watch.end(seconds(3)).unwrap();
        assert_eq!(end, RunEnd::Script(status));
        assert_eq!(u32::from(end.status()), status);
    }
    assert_eq!(RunEnd::Script(139).status(), 99);
}

#[test]
fn a_fault_on_the_console_ends_the_run() {
    for (console, fault) in BAD {
        let watch = watch(console.as_bytes());
        assert_eq!(watch.end(seconds(1)), None, "it has not settled");
        assert_eq!(watch.end(seconds(4)), Some(RunEnd::Fault(fault)));
    }
}

#[test]
fn a_fault_is_worse_than_any_verdict() {
    for (console, fault) in BAD {
        let mut watch = watch(console.as_bytes());
        watch.message(seconds(2), &Message::Verdict(0));
        assert_eq!(watch.end(seconds(2)), Some(RunEnd::Fault(fault)));
    }
}

#[test]
fn every_end_has_its_own_status() {
    let ends = [
        RunEnd::Script(99),
        RunEnd::Failure(String::new()),
        RunEnd::Fault(Fault::Panic),
        RunEnd::Fault(Fault::Oops),
        RunEnd::Fault(Fault::Warning),
        RunEnd::Fault(Fault::Lockup),
        RunEnd::EmulatorDied,
        RunEnd::Silence(seconds(1)),
        RunEnd::TimeLimit(seconds(1)),
        RunEnd::NoVerdict(String::new()),
    ];
    let status: Vec<u8> = ends.iter().map(RunEnd::status).collect();
    assert_eq!(status, (99..=108).collect::<Vec<u8>>());
}

#[test]
fn the_console_may_arrive_in_any_pieces() {
    for (console, fault) in BAD {
        for size in [1, 7, 100] {
            let mut watch = Watch::new(LIMITS);
            for piece in console.as_bytes().chunks(size) {
                watch.console(seconds(1), piece);
            }
            assert_eq!(watch.end(seconds(4)), Some(RunEnd::Fault(fault)));
        }
    }
}

#[test]
fn a_truncated_console_is_judged_by_its_lines() {
    for (console, fault) in BAD {
        let telling = console
            .lines()
            .position(|line| fault_in(line) == Some(fault))
            .unwrap();
        let lines: Vec<&str> = console.lines().collect();
        let cut = lines[..=telling].join("\n") + "\n";
        assert_eq!(
            watch(cut.as_bytes()).end(seconds(4)),
            Some(RunEnd::Fault(fault))
        );
        let before = lines[..telling].join("\n");
        assert_ne!(
            watch(before.as_bytes()).end(seconds(4)),
            Some(RunEnd::Fault(fault))
        );
    }
    // Nothing follows a panic, not even an end of line.
    let line = "[    1.0] Kernel panic - not syncing: attempted to kill init";
    assert_eq!(
        watch(line.as_bytes()).end(seconds(4)),
        Some(RunEnd::Fault(Fault::Panic))
    );
}

#[test]
fn a_console_that_is_garbled_around_the_words_is_understood() {
    for (console, fault) in BAD {
        let mut garbled = Vec::new();
        for line in console.lines() {
            garbled.extend_from_slice(b"\xff\x00half of another line");
            garbled.extend_from_slice(line.as_bytes());
            garbled.extend_from_slice(b"[    2.\xfe\r\n");
        }
        assert_eq!(watch(&garbled).end(seconds(4)), Some(RunEnd::Fault(fault)));
    }
}

#[test]
fn a_truncated_panic_gives_no_verdict() {
    let mut watch = watch(&PANIC.as_bytes()[..PANIC.len() / 3]);
    watch.gone(false);
    assert!(matches!(
        watch.end(seconds(1)),
        Some(RunEnd::Fault(Fault::Panic) | RunEnd::EmulatorDied)
    ));
}

#[test]
fn further_output_does_not_delay_the_end_for_ever() {
    let mut watch = watch(OOPS.as_bytes());
    for second in 2..11 {
        watch.console(seconds(second), b"more\n");
        assert_eq!(watch.end(seconds(second)), None);
    }
    watch.console(seconds(11), b"more\n");
    assert_eq!(watch.end(seconds(11)), Some(RunEnd::Fault(Fault::Oops)));
}

#[test]
fn faults_after_an_oops_can_only_make_it_worse() {
    let mut watch = watch(OOPS.as_bytes());
    watch.console(seconds(2), PANIC.as_bytes());
    watch.console(seconds(2), WARN.as_bytes());
    assert_eq!(watch.end(seconds(5)), Some(RunEnd::Fault(Fault::Panic)));
}

#[test]
fn only_the_kernels_own_faults_count_in_the_kernel_log() {
    let text = "WARNING: fault.c:20 at fault_init+0x24/0xff0 [fault], CPU#0: insmod/91";
    let mut watch = watch(GOOD.as_bytes());
    watch.message(seconds(2), &kernel(4, text));
    assert_eq!(watch.end(seconds(5)), Some(RunEnd::Fault(Fault::Warning)));

    let mut watch = self::watch(GOOD.as_bytes());
    // Facility 1: a program wrote it.
    watch.message(seconds(2), &kernel(12, text));
    assert_eq!(watch.end(seconds(5)), None);
}

#[test]
fn harmless_lines_report_no_fault() {
    for line in [
        "[    0.5] debug: warning: unused",
        "WARNING: Spectre v2 mitigation leaves CPU vulnerable",
        "WARNING! power/level is deprecated",
        "rcu: \tRCU CPU stall warnings timeout set to 60",
        "watchdog: Delayed init of the lockup detector failed: -19",
        "NMI watchdog: Perf NMI watchdog permanently disabled",
        "systemd[1]: Oops proof",
        "kmemleak: Kernel memory leak detector initialized (mem pool available: 15866)",
        "Lock dependency validator: Copyright (c) 2006 Red Hat, Inc., Ingo Molnar",
        "kcsan: enabled early",
        "rcu: \tRCU lockdep checking is enabled.",
    ] {
        assert_eq!(fault_in(line), None, "{line}");
    }
}

#[test]
fn reports_of_other_kernels_are_recognized() {
    for (line, fault) in [
        (
            "WARNING: CPU: 1 PID: 92 at fs/read_write.c:312 vfs_read+0x1/0x2",
            Fault::Warning,
        ),
        (
            "WARNING: possible circular locking dependency detected",
            Fault::Warning,
        ),
        (
            "WARNING: SOFTIRQ-safe -> SOFTIRQ-unsafe lock order detected",
            Fault::Warning,
        ),
        ("WARNING: held lock freed!", Fault::Warning),
        (
            "WARNING: lock held when returning to user space!",
            Fault::Warning,
        ),
        ("INFO: trying to register non-static key.", Fault::Warning),
        ("[ BUG: Invalid wait context ]", Fault::Oops),
        ("BUG: MAX_LOCKDEP_ENTRIES too low!", Fault::Oops),
        (
            "turning off the locking correctness validator.",
            Fault::Warning,
        ),
        (
            "kmemleak: 1 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
            Fault::Warning,
        ),
        (
            "kmemleak: Kernel memory leak detector disabled",
            Fault::Warning,
        ),
        ("ODEBUG: Out of memory. ODEBUG disabled", Fault::Oops),
        (
            "BUG: scheduling while atomic: sh/91/0x00000002",
            Fault::Oops,
        ),
        (
            "general protection fault, probably for non-canonical address",
            Fault::Oops,
        ),
        (
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            Fault::Lockup,
        ),
        (
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            Fault::Lockup,
        ),
        (
            "watchdog: Watchdog detected hard LOCKUP on cpu 1",
            Fault::Lockup,
        ),
        (
            "INFO: task insmod:91 blocked for more than 122 seconds.",
            Fault::Lockup,
        ),
        (
            "Kernel panic - not syncing: softlockup: hung tasks",
            Fault::Lockup,
        ),
        ("Kernel panic - not syncing: RCU Stall", Fault::Lockup),
        (
            "Kernel panic - not syncing: VFS: Unable to mount root fs",
            Fault::Panic,
        ),
    ] {
        assert_eq!(fault_in(line), Some(fault), "{line}");
    }
}

#[test]
fn silence_ends_a_run_and_any_sign_delays_it() {
    let mut watch = watch(GOOD.as_bytes());
    assert_eq!(watch.end(seconds(60)), None);
    watch.message(seconds(60), &Message::Stage("loading".to_owned()));
    assert_eq!(watch.end(seconds(119)), None);
    assert_eq!(
        watch.end(seconds(120)),
        Some(RunEnd::Silence(LIMITS.silence))
    );
}

#[test]
fn the_time_limit_ends_a_run_with_output() {
    let mut watch = Watch::new(LIMITS);
    for second in 0..600 {
        watch.console(seconds(second), b".");
        assert_eq!(watch.end(seconds(second)), None);
    }
    watch.console(seconds(600), b".");
    assert_eq!(
        watch.end(seconds(600)),
        Some(RunEnd::TimeLimit(LIMITS.time))
    );
}

#[test]
fn the_end_of_the_emulator_is_noticed_at_once() {
    let mut dead = watch(GOOD.as_bytes());
    dead.gone(false);
    assert_eq!(dead.end(seconds(1)), Some(RunEnd::EmulatorDied));
    let mut ended = watch(GOOD.as_bytes());
    ended.gone(true);
    assert!(matches!(ended.end(seconds(1)), Some(RunEnd::NoVerdict(_))));
    // It may end right after the verdict.
    let mut done = watch(GOOD.as_bytes());
    done.message(seconds(1), &Message::Verdict(0));
    done.gone(true);
    assert_eq!(done.end(seconds(1)), Some(RunEnd::Script(0)));
}

#[test]
fn a_verdict_only_counts_if_no_message_was_lost() {
    let mut damaged = watch(GOOD.as_bytes());
    damaged.damage("frame 7 came in the place of frame 6");
    damaged.message(seconds(2), &Message::Verdict(0));
    assert!(
        matches!(damaged.end(seconds(2)), Some(RunEnd::NoVerdict(text)) if text.contains("frame 7"))
    );

    let mut twice = watch(GOOD.as_bytes());
    twice.message(seconds(2), &Message::Verdict(0));
    twice.message(seconds(2), &Message::Verdict(0));
    assert!(matches!(twice.end(seconds(2)), Some(RunEnd::NoVerdict(_))));
}

#[test]
fn a_host_that_cannot_start_gives_its_reason() {
    let mut watch = watch(GOOD.as_bytes());
    watch.message(
        seconds(2),
        &Message::Failure("no module kvm-intel".to_owned()),
    );
    let end = watch.end(seconds(2)).unwrap();
    assert_eq!(end.status(), 100);
    assert!(end.to_string().contains("no module kvm-intel"));
}

#[test]
fn records_of_the_kernel_log_are_parsed() {
    let record = KernelRecord::parse(
        b"4,321,5724123,-,caller=T1;caf\\xc3\\xa9 \\x5c\\x0asecond\n SUBSYSTEM=x\n",
    )
    .unwrap();
    assert_eq!(
        (record.facility, record.level, record.time),
        (0, 4, 5_724_123)
    );
    assert_eq!(record.text, "café \\\nsecond");
    assert_eq!(
        record.to_string(),
        "[    5.724123] café \\\n[    5.724123] second\n"
    );
    for bytes in [
        &b""[..],
        b"no record",
        b"x,1,2,-;text",
        b"4;text",
        b"\xff\xfe;",
    ] {
        assert_eq!(KernelRecord::parse(bytes), None);
    }
}

#[test]
fn a_data_race_counts_if_one_of_our_modules_takes_part() {
    let report = |frame: &str| {
        format!(
            "[    1.0] BUG: KCSAN: data-race in copy / work\n[    1.0] write to 0xffff of 8 bytes by task 7 on cpu 0:\n\
             [    1.0]  copy+0x1/0x2\n[    1.0]  {frame}\n[    1.0] Reported by Kernel Concurrency Sanitizer on:\n\
             [    1.0] Modules linked in: [exitmeter]\n"
        )
    };
    let (own, kernels) = (report("work+0x1/0x2 [exitmeter]"), report("work+0x1/0x2"));
    assert_eq!(
        watch(own.as_bytes()).end(seconds(5)),
        Some(RunEnd::Fault(Fault::Oops))
    );
    let mut watch = watch(kernels.as_bytes());
    assert_eq!(watch.end(seconds(5)), None);
    // A fault in the report or after it is not missed.
    watch.console(seconds(5), OOPS.as_bytes());
    assert_eq!(watch.end(seconds(9)), Some(RunEnd::Fault(Fault::Oops)));
    let cut = kernels.split("Reported").next().unwrap().to_owned() + PANIC;
    assert_eq!(
        self::watch(cut.as_bytes()).end(seconds(5)),
        Some(RunEnd::Fault(Fault::Panic))
    );
}
