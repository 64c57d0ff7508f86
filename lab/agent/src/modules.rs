// SPDX-License-Identifier: GPL-2.0

//! Loading kernel modules together with their dependencies.

use std::{
    ffi::CString,
    fs::{self, File},
    path::Path,
};

use anyhow::{bail, Context as _, Result};
use rustix::io::Errno;

/// Load the module `name` (as in modules.dep, without folder and `.ko`) with `parameters`, after its dependencies.
/// Modules that are loaded already stay as they are.
pub fn load(name: &str, parameters: &str) -> Result<()> {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let folder = Path::new("/lib/modules").join(release);
    let list = folder.join("modules.dep");
    let list =
        fs::read_to_string(&list).with_context(|| format!("{} cannot be read", list.display()))?;
    let Some((path, needs)) = find(&list, name) else {
        bail!("the host has no module {name}");
    };
    // The list has the deepest dependency last.
    for need in needs.split_whitespace().rev() {
        insert(&folder.join(need), "")?;
    }
    insert(&folder.join(path), parameters)
}

/// Find a module's line in modules.dep. Return its path and its dependencies.
fn find<'a>(list: &'a str, name: &str) -> Option<(&'a str, &'a str)> {
    list.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(path, _)| Path::new(path).file_stem().and_then(|stem| stem.to_str()) == Some(name))
}

fn insert(path: &Path, parameters: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("{} cannot be read", path.display()))?;
    match rustix::system::finit_module(&file, &CString::new(parameters)?, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| {
            format!(
                "{} cannot be loaded with the parameters \"{parameters}\"",
                path.display()
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_module_is_found_by_its_name() {
        let list = "kernel/virt/lib/irqbypass.ko:\n\
                    kernel/arch/x86/kvm/kvm.ko: kernel/virt/lib/irqbypass.ko\n";
        assert_eq!(
            super::find(list, "kvm"),
            Some((
                "kernel/arch/x86/kvm/kvm.ko",
                " kernel/virt/lib/irqbypass.ko"
            ))
        );
        assert_eq!(super::find(list, "vm"), None);
    }
}
