// SPDX-License-Identifier: GPL-2.0

//! One run of one host, from the images to the verdict.

pub(crate) mod folder;
mod lines;
mod options;
mod record;
mod running;
mod saved;

use std::{
    ffi::OsString,
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread,
};

use lab_agent::settings::{Settings, Task, HOME};

pub(crate) use self::running::command;
use self::{
    folder::{tidy, CONSOLE},
    running::Running,
};
pub use self::{lines::Lines, options::Options, record::Event};
pub use crate::outcome::{Outcome, RunError, LIMITS};
use crate::{
    emulator::{Boot, Console, InitialState},
    host::Host,
    image::{
        payload::{self, FileSpec},
        Images,
    },
    module,
    programs::{self, Programs},
    setup::{self, Setup, SetupOptions},
};

/// Complete the set-up, boot the host, and run the script. `listener` gets the events of the run as they happen.
///
/// # Errors
///
/// [`RunError`] if the run cannot start. A run that fails has an [`Outcome`].
pub fn run(options: &Options, listener: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, RunError> {
    // Build the programs during the set-up, much of which waits for the network or keeps only one CPU busy.
    let ready = thread::scope(|scope| {
        let programs = scope.spawn(|| programs::build(options.tool));
        prepare(options, |prepared, note| {
            let programs = programs.join();
            let programs = programs.unwrap_or_else(|panic| resume_unwind(panic))?;
            let folder = folder::make(options.machine.host)?;
            let mut saved = None;
            if options.machine.host == Host::Intel && !options.fresh {
                let machine = saved::machine(options, prepared, &programs.agent, &folder, note)?;
                saved = Some(machine);
            }
            Ok((programs, folder, saved))
        })
    });
    let (prepared, module, (programs, folder, saved)) = match ready {
        Err(RunError::Boot(outcome)) => return Ok(*outcome),
        ready => ready?,
    };
    let (task, script) = task(&options.script);
    let mut files = files(options, module, &programs);
    files.extend(script);
    let payload = folder.join("payload");
    let (agent, kvm, initial_state) = match &saved {
        // The saved machine has its agent and KVM.
        Some(saved) => (None, None, InitialState::Saved(saved)),
        None => (
            Some(&*programs.agent),
            options.kvm_module(),
            InitialState::Boot,
        ),
    };
    payload::write(&payload, agent, &files, &Settings { kvm, task })?;
    let boot = Boot {
        prepared: &prepared,
        machine: &options.machine,
        images: &Images::new(&prepared, &payload)?,
        folder: &folder,
        console: Console::File(CONSOLE),
        initial_state,
    };
    let outcome = Running::start(&boot).and_then(|host| host.watch(options, &folder, listener));
    tidy(&folder);
    outcome
}

/// Return the files that a host gets in addition to its script.
pub(crate) fn files(
    options: &Options,
    module: Option<PathBuf>,
    programs: &Programs,
) -> Vec<FileSpec> {
    let mut files = vec![FileSpec::at(&programs.tool, "/usr/local/bin/exitmeter")];
    files.extend(module.map(FileSpec::new));
    files.extend(options.files.iter().cloned());
    files
}

/// Complete the set-up of the run, and build the module if the run wants one and the kernel is built with Rust.
/// Meanwhile, call `start` as soon as the host itself could start.
///
/// # Errors
///
/// [`RunError::Setup`], [`RunError::Module`], and errors of `start`.
pub fn prepare<T>(
    options: &Options,
    start: impl FnOnce(&Setup, &dyn Fn(&str)) -> Result<T, RunError>,
) -> Result<(Setup, Option<PathBuf>, T), RunError> {
    let wanted = SetupOptions {
        kernel: options.kernel.clone(),
        tree: options.module,
        bochs: options.machine.host == Host::Intel,
        ..SetupOptions::default()
    };
    let module = |prepared: &Setup, note: &dyn Fn(&str)| {
        if options.module && !prepared.rust {
            let release = &prepared.release;
            note(&format!(
                "The host has no exitmeter.ko, as its kernel {release} is built without Rust."
            ));
            return Ok(None);
        }
        let module = options.module.then(|| module::build(prepared));
        Ok(module.transpose()?)
    };
    setup::prepare_with(&wanted, module, start)
}

/// Return the host's task for a script, and the file that the host needs for it. A script is a file of this machine, a
/// command of the host, or a line for the host's shell.
fn task(script: &[OsString]) -> (Task, Option<FileSpec>) {
    let mut words: Vec<String> = script
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let first = words.first().cloned().unwrap_or_default();
    let path = Path::new(&first);
    if path.is_file() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let target = format!("{HOME}/{name}");
        words[0].clone_from(&target);
        // It is run by the shell, whatever its permissions and its first line are.
        words.insert(0, "/bin/sh".to_owned());
        return (Task::Run(words), Some(FileSpec::at(path, target)));
    }
    let is_line = |c: char| c.is_whitespace() || ";|&<>$`".contains(c);
    if words.len() == 1 && first.contains(is_line) {
        words = vec!["/bin/sh".to_owned(), "-c".to_owned(), first];
    }
    (Task::Run(words), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(script: &[&str]) -> (Vec<String>, Option<FileSpec>) {
        let script: Vec<OsString> = script.iter().map(Into::into).collect();
        match task(&script) {
            (Task::Run(words), file) => (words, file),
            (other, _) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_of_this_machine_is_a_script() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let (words, spec) = words(&[file, "a b"]);
        assert_eq!(words, ["/bin/sh", "/root/Cargo.toml", "a b"]);
        assert_eq!(spec, Some(FileSpec::at(file, "/root/Cargo.toml")));
    }

    #[test]
    fn other_words_are_a_command_of_the_host() {
        assert_eq!(
            words(&["cat", "a b"]),
            (vec!["cat".into(), "a b".into()], None)
        );
        assert_eq!(words(&["true"]), (vec!["true".into()], None));
    }

    #[test]
    fn several_commands_in_one_word_go_to_the_hosts_shell() {
        let (words, file) = words(&["cat /proc/cpuinfo | wc -l"]);
        assert_eq!(words, ["/bin/sh", "-c", "cat /proc/cpuinfo | wc -l"]);
        assert_eq!(file, None);
    }
}
