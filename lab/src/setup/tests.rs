// SPDX-License-Identifier: GPL-2.0

//! Tests of the engine with small scripts, and of the plan with the real ones.

use std::{
    os::unix::process::ExitStatusExt as _,
    process::Command,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::{engine::COMPLETE, *};
use crate::interrupt::{self, Interrupts};

/// A folder of scripts and an empty cache.
struct Sandbox {
    folder: TempDir,
    progress: Progress,
    interrupts: Interrupts,
}

impl Sandbox {
    fn new() -> Self {
        let sandbox = Self {
            folder: TempDir::new().unwrap(),
            progress: Progress::new(Box::new(io::sink()), None),
            interrupts: interrupt::defer(),
        };
        fs::create_dir_all(sandbox.scripts().join("patches")).unwrap();
        sandbox.write("common.sh", "");
        sandbox.write("in-root.sh", "");
        sandbox
    }

    fn scripts(&self) -> PathBuf {
        self.folder.path().join("scripts")
    }

    /// Return the path of a file outside the cache, to which the scripts write.
    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn logged(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    fn write(&self, name: &str, text: &str) {
        let text = text.replace("LOG", self.log().to_str().unwrap());
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
        needs: &[],
    }
}

#[test]
fn a_step_is_made_once() {
    let sandbox = Sandbox::new();
    sandbox.write("egg.sh", "echo laying; echo yolk >$OUT/egg; echo ran >>LOG");
    let step = sandbox.step("egg");
    assert!(!step.is_complete());
    for _ in 0..2 {
        sandbox.make(&step).unwrap();
        assert!(step.is_complete());
    }
    assert_eq!(fs::read_to_string(step.out.join("egg")).unwrap(), "yolk\n");
    assert_eq!(sandbox.logged(), "ran\n");
}

#[test]
fn a_script_gets_its_settings_and_the_results_it_needs() {
    let sandbox = Sandbox::new();
    sandbox.write("egg.sh", "true");
    sandbox.write(
        "hen.sh",
        "echo $COLOUR $EGG $OUT $EXITMETER_CACHE $((JOBS > 0)) >LOG; cat >>LOG",
    );
    let egg = sandbox.step("egg");
    let hen = Recipe {
        settings: &[("COLOUR", "brown")],
        needs: &[("EGG", &egg)],
        ..recipe("hen")
    };
    let hen = sandbox.with(|engine| engine.step(&hen)).unwrap();
    sandbox.make(&hen).unwrap();
    let cache = sandbox.folder.path().join("cache");
    assert_eq!(
        sandbox.logged(),
        format!(
            "brown {} {} {} 1\n",
            egg.out.display(),
            hen.out.display(),
            cache.display()
        )
    );
}

#[test]
fn a_failure_leaves_no_marker_and_the_next_run_continues() {
    let sandbox = Sandbox::new();
    sandbox.write(
        "egg.sh",
        "[ -e $OUT/half ] && exit 0
        touch $OUT/half
        echo 'some detail' >&2
        echo 'exitmeter: the nest is full; empty it.' >&2
        exit 1",
    );
    let step = sandbox.step("egg");
    let error = sandbox.make(&step).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the nest is full; empty it (step egg of the set-up)"
    );
    assert!(!step.out.join(COMPLETE).exists());
    sandbox.make(&step).unwrap();
    assert!(step.is_complete());
}

#[test]
fn a_script_that_dies_without_a_message_is_named() {
    let sandbox = Sandbox::new();
    sandbox.write("egg.sh", "kill -SEGV $$");
    let error = sandbox.make(&sandbox.step("egg")).unwrap_err().to_string();
    let status = std::process::ExitStatus::from_raw(11).to_string();
    assert!(
        error.contains("egg.sh") && error.contains(&status),
        "{error}"
    );
}

#[test]
fn a_marker_without_its_seconds_does_not_count() {
    let sandbox = Sandbox::new();
    sandbox.write("egg.sh", "echo ran >>LOG");
    let step = sandbox.step("egg");
    fs::create_dir_all(&step.out).unwrap();
    fs::write(step.out.join(COMPLETE), "").unwrap();
    sandbox.make(&step).unwrap();
    assert_eq!(sandbox.logged(), "ran\n");
}

#[test]
fn the_key_depends_on_every_input() {
    let sandbox = Sandbox::new();
    sandbox.write("egg.sh", "true");
    sandbox.write("hen.sh", "true");
    let keys = || {
        let egg = sandbox.step("egg");
        let hen = Recipe {
            needs: &[("EGG", &egg)],
            ..recipe("hen")
        };
        let hen = sandbox.with(|engine| engine.step(&hen)).unwrap();
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
        sandbox.write(name, text);
        let (egg, hen) = keys();
        assert_eq!((egg.len(), hen.len()), (12, 12));
        for (old_egg, old_hen) in &seen {
            assert!(*old_egg != egg && *old_hen != hen, "{name} counts");
        }
        seen.push((egg, hen));
    }
    sandbox.write("patches/fox-1.patch", "red");
    sandbox.write("fox.sh", "true");
    assert_eq!(
        seen.last(),
        Some(&keys()),
        "the patches of another step do not count"
    );
}

#[test]
fn the_key_depends_on_settings() {
    let sandbox = Sandbox::new();
    sandbox.write("egg.sh", "true");
    let key = |value| {
        let recipe = Recipe {
            settings: &[("COLOUR", value)],
            ..recipe("egg")
        };
        sandbox.with(|engine| engine.step(&recipe)).unwrap().key
    };
    assert_ne!(key("brown"), key("white"));
    assert_eq!(key("brown"), key("brown"));
}

#[test]
fn concurrent_runs_make_a_step_once() {
    let sandbox = Sandbox::new();
    sandbox.write("egg.sh", "echo ran >>LOG; sleep 0.5; touch $OUT/egg");
    let step = sandbox.step("egg");
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                sandbox.make(&step).unwrap();
                assert!(step.out.join("egg").exists());
            });
        }
    });
    assert_eq!(sandbox.logged(), "ran\n");
}

#[test]
fn a_script_whose_engine_died_keeps_the_lock() {
    let sandbox = Sandbox::new();
    sandbox.write("egg.sh", "echo ran >>LOG");
    let step = sandbox.step("egg");
    // A killed engine leaves this state: only the script has the lock open.
    let (_, lock) = sandbox.with(|engine| engine.lock_file(&step.out)).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let mut script = Command::new("sh")
        .args(["-c", "sleep 0.5; echo lone >>$0"])
        .arg(sandbox.log())
        .stdin(lock)
        .spawn()
        .unwrap();
    sandbox.make(&step).unwrap();
    assert_eq!(sandbox.logged(), "lone\nran\n");
    script.wait().unwrap();
}

#[test]
fn a_failed_step_ends_the_other_with_its_children() {
    let sandbox = Sandbox::new();
    sandbox.write(
        "egg.sh",
        "sleep 600 & echo $! >LOG.new; mv LOG.new LOG; wait",
    );
    sandbox.write("fox.sh", "until [ -e LOG ]; do sleep 0.05; done; exit 1");
    let (egg, fox) = (sandbox.step("egg"), sandbox.step("fox"));
    let started = Instant::now();
    sandbox.with(|engine| {
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
    let sleeper = sandbox.logged();
    let state = fs::read_to_string(format!("/proc/{}/stat", sleeper.trim()));
    assert!(
        state.as_ref().map_or(true, |stat| stat.contains(") Z ")),
        "{sleeper} lives: {state:?}"
    );
}

#[test]
fn a_disk_that_is_too_small_is_reported_before_the_work() {
    let sandbox = Sandbox::new();
    sandbox.write("egg.sh", "true");
    let huge = Recipe {
        mib: 1 << 40,
        ..recipe("egg")
    };
    let step = sandbox.with(|engine| engine.step(&huge)).unwrap();
    let error = sandbox
        .with(|engine| engine.check_space(&[&step]))
        .unwrap_err()
        .to_string();
    let needed = format!("and the set-up needs {} MiB; free some", 1_u64 << 40);
    for words in [&*needed, "XDG_CACHE_HOME to a larger disk"] {
        assert!(error.contains(words), "{error}");
    }
    sandbox.make(&step).unwrap();
    sandbox
        .with(|engine| engine.check_space(&[&step]))
        .expect("a complete step needs no space");
}

/// Return the plan of the real scripts for the hosts and the module, in an empty cache.
fn plan(kernel: Option<&str>) -> Plan {
    let progress = Progress::new(Box::new(io::sink()), None);
    let interrupts = interrupt::defer();
    let scripts = repository().join("scripts");
    let engine = Engine::new(&scripts, Path::new("/nowhere"), &progress, &interrupts);
    let wanted = SetupOptions {
        kernel: kernel.map(String::from),
        tree: true,
        bochs: true,
        ..SetupOptions::default()
    };
    Plan::new(&engine, &wanted).unwrap()
}

#[test]
fn the_documentation_states_the_space_that_is_required() {
    let needed = engine::needed(&plan(None).steps());
    let text = fs::read_to_string(repository().join("docs/testing.md")).unwrap();
    let sentence = format!("with less than {needed} MiB free the set-up does not begin");
    assert!(text.contains(&sentence), "no {sentence:?} in it");
}

#[test]
fn another_kernel_only_changes_steps_that_depend_on_it() {
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
    // A debug kernel depends on the packaged kernel of its version, and comes with its tree.
    for (name, packaged) in [
        ("debug", &newest),
        ("7.2.12-debug", &other),
        ("7.2.12-kcsan", &other),
        ("cfi", &newest),
    ] {
        let plan = plan(Some(name));
        assert_eq!(plan.kernel.key, packaged.kernel.key);
        assert!(plan.debug.is_some() && plan.tree.is_none());
    }
    assert_ne!(
        keys(&plan(Some("7.2.12-debug"))),
        keys(&plan(Some("7.2.12-kcsan")))
    );
}

#[test]
fn each_configuration_is_a_kernel_that_the_help_and_the_documentation_name() {
    let read = |name: &str| fs::read_to_string(repository().join(name)).unwrap();
    let configs = fs::read_dir(repository().join("scripts/configs")).unwrap();
    let mut names: Vec<_> = configs
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| name.strip_suffix(".config").unwrap().to_owned())
        .filter(|name| name != "common")
        .collect();
    names.sort();
    let mut known = DEBUG_KERNELS.to_vec();
    known.sort();
    assert_eq!(names, known);
    let (help, page) = (read("lab/src/cli.rs"), read("docs/testing.md"));
    let kernels = page
        .lines()
        .find(|line| line.contains("| a debug kernel that is built here"))
        .unwrap();
    for name in names {
        let suffix = format!("CONFIG_LOCALVERSION=\"-{name}\"\n");
        assert!(read(&format!("scripts/configs/{name}.config")).contains(&suffix));
        let name = format!("`{name}`");
        assert!(help.contains(&name) && kernels.contains(&name), "{name}");
    }
}

/// Return a sandbox whose packaged kernel has this line in its configuration. Its tree, selftests and debug kernel write
/// their names to the log.
fn sandbox_with_kernel(config: &str) -> Sandbox {
    let sandbox = Sandbox::new();
    fs::create_dir_all(sandbox.scripts().join("configs")).unwrap();
    for name in ["common", "debug"] {
        sandbox.write(&format!("configs/{name}.config"), "");
    }
    sandbox.write("root.sh", "true");
    let kernel = format!("echo '{config}' >$OUT/config; echo 6.12.1-amd64 >$OUT/release");
    sandbox.write("kernel.sh", &kernel);
    for name in ["tree", "selftests", "debug-kernel"] {
        let text = format!("echo {name} >>LOG; echo 6.12.1-debug >$OUT/release");
        sandbox.write(&format!("{name}.sh"), &text);
    }
    sandbox
}

/// Make all that is wanted, twice, since the second run knows the kernel from the start. Return what `after_tree` saw and
/// the names of the steps.
fn prepared_in(
    sandbox: &Sandbox,
    wanted: &SetupOptions,
) -> Result<(Setup, Vec<&'static str>), SetupError> {
    sandbox.with(|engine| {
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
    let wanted = SetupOptions {
        tree: true,
        ..SetupOptions::default()
    };
    for (config, rust) in [
        ("CONFIG_RUST=y", true),
        ("# CONFIG_RUST is not set", false),
        // Debian's 6.1 and 6.12 only have this setting, which says that Rust would be possible.
        ("CONFIG_HAVE_RUST=y", false),
    ] {
        let sandbox = sandbox_with_kernel(config);
        let (prepared, steps) = prepared_in(&sandbox, &wanted).unwrap();
        assert_eq!(prepared.rust, rust, "{config}");
        assert_eq!(prepared.tree.is_some(), rust, "{config}");
        assert_eq!(
            sandbox.logged(),
            if rust { "tree\n" } else { "" },
            "{config}"
        );
        assert_eq!(steps.contains(&"tree"), rust, "{config}");
    }
}

#[test]
fn steps_that_need_a_source_are_refused_for_a_kernel_without_one() {
    let debug = SetupOptions {
        kernel: Some(String::from("6.12-debug")),
        ..SetupOptions::default()
    };
    let selftests = SetupOptions {
        selftests: true,
        ..SetupOptions::default()
    };
    for (wanted, step, what) in [
        (&debug, "debug-kernel", "a debug kernel"),
        (&selftests, "selftests", "KVM's selftests"),
    ] {
        let sandbox = sandbox_with_kernel("# CONFIG_RUST is not set");
        let error = prepared_in(&sandbox, wanted).unwrap_err().to_string();
        for words in ["6.12.1-amd64 is built without Rust", what, "from 7.2 on"] {
            assert!(error.contains(words), "no {words:?} in {error}");
        }
        assert_eq!(sandbox.logged(), "");
        let sandbox = sandbox_with_kernel("CONFIG_RUST=y");
        prepared_in(&sandbox, wanted).unwrap();
        assert_eq!(sandbox.logged(), format!("{step}\n"));
    }
}
