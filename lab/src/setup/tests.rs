// SPDX-License-Identifier: GPL-2.0

//! The engine with small scripts of its own, and the plan with the real ones.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::engine::COMPLETE;
use super::*;
use crate::interrupt::{self, Interrupts};

/// A folder of scripts and an empty cache.
struct Room {
    folder: TempDir,
    progress: Progress,
    interrupts: Interrupts,
}

impl Room {
    fn new() -> Self {
        let room = Self {
            folder: TempDir::new().unwrap(),
            progress: Progress::new(Box::new(io::sink()), None),
            interrupts: interrupt::watch(),
        };
        fs::create_dir_all(room.scripts().join("patches")).unwrap();
        room.write("common.sh", "");
        room.write("in-root.sh", "");
        room
    }

    fn scripts(&self) -> PathBuf {
        self.folder.path().join("scripts")
    }

    /// A file outside of the cache, where scripts leave word.
    fn word(&self) -> PathBuf {
        self.folder.path().join("word")
    }

    fn said(&self) -> String {
        fs::read_to_string(self.word()).unwrap_or_default()
    }

    fn write(&self, name: &str, text: &str) {
        let text = text.replace("WORD", self.word().to_str().unwrap());
        fs::write(self.scripts().join(name), text).unwrap();
    }

    fn with<T>(&self, work: impl FnOnce(&Engine<'_>) -> T) -> T {
        let cache = self.folder.path().join("cache");
        let scripts = self.scripts();
        work(&Engine::new(
            &scripts,
            &cache,
            &self.progress,
            &self.interrupts,
        ))
    }

    fn step(&self, name: &'static str) -> Step {
        self.with(|engine| engine.step(&recipe(name))).unwrap()
    }

    fn make(&self, step: &Step) -> Result<(), SetupError> {
        self.with(|engine| engine.make(step))
    }
}

fn recipe(name: &'static str) -> Recipe<'static> {
    Recipe {
        name,
        mib: 1,
        settings: &[],
        on: &[],
    }
}

#[test]
fn a_step_is_made_once() {
    let room = Room::new();
    room.write(
        "egg.sh",
        "echo laying; echo yolk >$OUT/egg; echo ran >>WORD",
    );
    let step = room.step("egg");
    assert!(!step.is_complete());
    for _ in 0..2 {
        room.make(&step).unwrap();
        assert!(step.is_complete());
    }
    assert_eq!(fs::read_to_string(step.out.join("egg")).unwrap(), "yolk\n");
    assert_eq!(room.said(), "ran\n");
}

#[test]
fn a_script_is_told_its_settings_and_what_it_stands_on() {
    let room = Room::new();
    room.write("egg.sh", "true");
    room.write(
        "hen.sh",
        "echo $COLOUR $EGG $OUT $EXITMETER_CACHE $((JOBS > 0)) >WORD; cat >>WORD",
    );
    let egg = room.step("egg");
    let hen = Recipe {
        settings: &[("COLOUR", "brown")],
        on: &[("EGG", &egg)],
        ..recipe("hen")
    };
    let hen = room.with(|engine| engine.step(&hen)).unwrap();
    room.make(&hen).unwrap();
    let cache = room.folder.path().join("cache");
    assert_eq!(
        room.said(),
        format!(
            "brown {} {} {} 1\n",
            egg.out.display(),
            hen.out.display(),
            cache.display()
        )
    );
}

#[test]
fn a_failure_leaves_no_marker_and_the_next_run_goes_on() {
    let room = Room::new();
    room.write(
        "egg.sh",
        "[ -e $OUT/half ] && exit 0
        touch $OUT/half
        echo 'some detail' >&2
        echo 'exitmeter: the nest is full; empty it.' >&2
        exit 1",
    );
    let step = room.step("egg");
    let error = room.make(&step).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the nest is full; empty it (step egg of the set-up)"
    );
    assert!(!step.out.join(COMPLETE).exists());
    room.make(&step).unwrap();
    assert!(step.is_complete());
}

#[test]
fn a_script_that_dies_without_a_word_is_named() {
    let room = Room::new();
    room.write("egg.sh", "kill -SEGV $$");
    let error = room.make(&room.step("egg")).unwrap_err().to_string();
    let status = std::process::ExitStatus::from_raw(11).to_string();
    assert!(
        error.contains("egg.sh") && error.contains(&status),
        "{error}"
    );
}

#[test]
fn a_marker_without_its_seconds_does_not_count() {
    let room = Room::new();
    room.write("egg.sh", "echo ran >>WORD");
    let step = room.step("egg");
    fs::create_dir_all(&step.out).unwrap();
    fs::write(step.out.join(COMPLETE), "").unwrap();
    room.make(&step).unwrap();
    assert_eq!(room.said(), "ran\n");
}

#[test]
fn the_key_follows_everything_that_goes_in() {
    let room = Room::new();
    room.write("egg.sh", "true");
    room.write("hen.sh", "true");
    let keys = || {
        let egg = room.step("egg");
        let hen = Recipe {
            on: &[("EGG", &egg)],
            ..recipe("hen")
        };
        let hen = room.with(|engine| engine.step(&hen)).unwrap();
        (egg.key, hen.key)
    };
    let mut seen = vec![keys()];
    for (name, text) in [
        ("egg.sh", "true # really"),
        ("common.sh", "true"),
        ("in-root.sh", "true"),
        ("patches/egg-1.patch", "white"),
        ("patches/egg-1.patch", "brown"),
        ("patches/egg-2.patch", "brown"),
    ] {
        room.write(name, text);
        let (egg, hen) = keys();
        assert_eq!((egg.len(), hen.len()), (12, 12));
        for (old_egg, old_hen) in &seen {
            assert!(*old_egg != egg && *old_hen != hen, "{name} counts");
        }
        seen.push((egg, hen));
    }
    room.write("patches/fox-1.patch", "red");
    room.write("fox.sh", "true");
    assert_eq!(seen.last(), Some(&keys()), "another's files do not count");
}

#[test]
fn a_setting_makes_another_result() {
    let room = Room::new();
    room.write("egg.sh", "true");
    let key = |value| {
        let recipe = Recipe {
            settings: &[("COLOUR", value)],
            ..recipe("egg")
        };
        room.with(|engine| engine.step(&recipe)).unwrap().key
    };
    assert_ne!(key("brown"), key("white"));
    assert_eq!(key("brown"), key("brown"));
}

#[test]
fn of_two_runs_at_once_one_works_and_the_other_waits() {
    let room = Room::new();
    room.write("egg.sh", "echo ran >>WORD; sleep 0.5; touch $OUT/egg");
    let step = room.step("egg");
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                room.make(&step).unwrap();
                assert!(step.out.join("egg").exists());
            });
        }
    });
    assert_eq!(room.said(), "ran\n");
}

#[test]
fn a_script_that_lost_its_engine_keeps_others_out() {
    let room = Room::new();
    room.write("egg.sh", "echo ran >>WORD");
    let step = room.step("egg");
    // As an engine that was killed leaves it: the lock is open in the script alone.
    let (_, lock) = room.with(|engine| engine.lock_file(&step.out)).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut script = Command::new("sh")
        .args(["-c", "sleep 0.5; echo lone >>$0"])
        .arg(room.word())
        .stdin(lock)
        .spawn()
        .unwrap();
    room.make(&step).unwrap();
    assert_eq!(room.said(), "lone\nran\n");
    script.wait().unwrap();
}

#[test]
fn when_one_step_fails_the_other_is_ended_with_its_children() {
    let room = Room::new();
    room.write(
        "egg.sh",
        "sleep 600 & echo $! >WORD.new; mv WORD.new WORD; wait",
    );
    room.write("fox.sh", "until [ -e WORD ]; do sleep 0.05; done; exit 1");
    let (egg, fox) = (room.step("egg"), room.step("fox"));
    let started = Instant::now();
    room.with(|engine| {
        thread::scope(|scope| {
            let egg = scope.spawn(|| engine.make(&egg));
            assert!(matches!(
                engine.make(&fox),
                Err(SetupError::Script { step: "fox", .. })
            ));
            assert!(matches!(egg.join().unwrap(), Err(SetupError::Interrupted)));
        });
    });
    assert!(started.elapsed() < Duration::from_secs(60));
    assert!(!egg.is_complete());
    let sleeper = room.said();
    let state = fs::read_to_string(format!("/proc/{}/stat", sleeper.trim()));
    assert!(
        state.as_ref().map_or(true, |stat| stat.contains(") Z ")),
        "{sleeper} lives: {state:?}"
    );
}

#[test]
fn a_disk_that_is_too_small_is_seen_before_the_work() {
    let room = Room::new();
    room.write("egg.sh", "true");
    let huge = Recipe {
        mib: 1 << 40,
        ..recipe("egg")
    };
    let step = room.with(|engine| engine.step(&huge)).unwrap();
    let error = room
        .with(|engine| engine.check_space(&[&step]))
        .unwrap_err()
        .to_string();
    let needed = format!("and the set-up needs {} MiB; free some", 1_u64 << 40);
    for words in [&*needed, "XDG_CACHE_HOME to a larger disk"] {
        assert!(error.contains(words), "{error}");
    }
    room.make(&step).unwrap();
    room.with(|engine| engine.check_space(&[&step]))
        .expect("what is made needs no space");
}

/// What the real scripts would make for the hosts and the module, where nothing is made yet.
fn plan(kernel: Option<&str>) -> Plan {
    let progress = Progress::new(Box::new(io::sink()), None);
    let interrupts = interrupt::watch();
    let scripts = repository().join("scripts");
    let engine = Engine::new(&scripts, Path::new("/nowhere"), &progress, &interrupts);
    let wanted = Wanted {
        kernel: kernel.map(String::from),
        tree: true,
        bochs: true,
        ..Wanted::default()
    };
    Plan::new(&engine, &wanted).unwrap()
}

#[test]
fn what_the_documentation_says_of_the_disk_is_what_is_asked_for() {
    let needed = engine::needed(&plan(None).steps());
    let text = fs::read_to_string(repository().join("docs/testing.md")).unwrap();
    let sentence = format!("with less than {needed} MiB free the set-up does not begin");
    assert!(text.contains(&sentence), "no {sentence:?} in it");
}

#[test]
fn the_plan_keeps_what_another_kernel_does_not_touch() {
    let (newest, other) = (plan(None), plan(Some("7.2.12")));
    let keys =
        |plan: &Plan| -> Vec<String> { plan.steps().iter().map(|step| step.key.clone()).collect() };
    let same: Vec<bool> = keys(&newest)
        .iter()
        .zip(keys(&other))
        .map(|(one, two)| *one == two)
        .collect();
    assert_eq!(
        same,
        [true, false, false, true],
        "root, kernel, tree, bochs"
    );
    assert_eq!(keys(&newest), keys(&plan(None)));
    // One that is built here stands on the packaged one of its version, and comes with its tree.
    for (checked, packaged) in [
        ("debug", &newest),
        ("7.2.12-debug", &other),
        ("7.2.12-kcsan", &other),
        ("cfi", &newest),
    ] {
        let checked = plan(Some(checked));
        assert_eq!(checked.kernel.key, packaged.kernel.key);
        assert!(checked.checked.is_some() && checked.tree.is_none());
    }
    assert_ne!(
        keys(&plan(Some("7.2.12-debug"))),
        keys(&plan(Some("7.2.12-kcsan")))
    );
}

/// A room whose packaged kernel has this line in its configuration, and whose tree, selftests and debug kernel leave word.
fn room_of_kernel(config: &str) -> Room {
    let room = Room::new();
    fs::create_dir_all(room.scripts().join("configs")).unwrap();
    for name in ["common", "debug"] {
        room.write(&format!("configs/{name}.config"), "");
    }
    room.write("root.sh", "true");
    let kernel = format!("echo '{config}' >$OUT/config; echo 6.12.1-amd64 >$OUT/release");
    room.write("kernel.sh", &kernel);
    for name in ["tree", "selftests", "debug-kernel"] {
        let text = format!("echo {name} >>WORD; echo 6.12.1-debug >$OUT/release");
        room.write(&format!("{name}.sh"), &text);
    }
    room
}

/// Makes all that is wanted, twice, as the second run knows the kernel from the start; what the first lane was given.
fn prepared_in(room: &Room, wanted: &Wanted) -> Result<(Prepared, Vec<&'static str>), SetupError> {
    room.with(|engine| {
        let mut made = None;
        for _ in 0..2 {
            let plan = Plan::new(engine, wanted)?;
            let (prepared, ()) = plan.make(engine, || plan.prepared(), || Ok(()))?;
            let names = plan.steps().iter().map(|step| step.name).collect();
            let again = (prepared, names);
            if let Some((first, names)) = made.replace(again.clone()) {
                assert_eq!((first.tree, names), (again.0.tree, again.1));
            }
        }
        Ok(made.unwrap())
    })
}

#[test]
fn a_kernel_without_rust_gets_no_tree() {
    let wanted = Wanted {
        tree: true,
        ..Wanted::default()
    };
    for (config, rust) in [
        ("CONFIG_RUST=y", true),
        ("# CONFIG_RUST is not set", false),
        // Debian's 6.1 and 6.12 have this one alone: the kernel could be built with it.
        ("CONFIG_HAVE_RUST=y", false),
    ] {
        let room = room_of_kernel(config);
        let (prepared, steps) = prepared_in(&room, &wanted).unwrap();
        assert_eq!(prepared.rust, rust, "{config}");
        assert_eq!(prepared.tree.is_some(), rust, "{config}");
        assert_eq!(room.said(), if rust { "tree\n" } else { "" }, "{config}");
        assert_eq!(steps.contains(&"tree"), rust, "{config}");
    }
}

#[test]
fn what_takes_a_kernels_source_is_refused_where_none_is_fetched() {
    let debug = Wanted {
        kernel: Some(String::from("6.12-debug")),
        ..Wanted::default()
    };
    let selftests = Wanted {
        selftests: true,
        ..Wanted::default()
    };
    for (wanted, step, what) in [
        (&debug, "debug-kernel", "a kernel that checks itself"),
        (&selftests, "selftests", "KVM's selftests"),
    ] {
        let room = room_of_kernel("# CONFIG_RUST is not set");
        let error = prepared_in(&room, wanted).unwrap_err().to_string();
        for words in ["6.12.1-amd64 is built without Rust", what, "from 7.2 on"] {
            assert!(error.contains(words), "no {words:?} in {error}");
        }
        assert_eq!(room.said(), "");
        let room = room_of_kernel("CONFIG_RUST=y");
        prepared_in(&room, wanted).unwrap();
        assert_eq!(room.said(), format!("{step}\n"));
    }
}
