// SPDX-License-Identifier: GPL-2.0

//! What the system refused: the part that the errors of this crate have in common.

use std::error::Error;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::setup;

/// Something that could not be done to a file or folder. It is one sentence with the system's reason as its source; or,
/// when the disk is full, with the remedy in place of a source.
#[derive(Debug)]
pub struct Refused {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl Refused {
    /// What to make of the system's reason why `path` could not be read, written or what else `action` says.
    pub fn to<E: From<Self>>(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> E {
        let path = path.into();
        move |source| {
            E::from(Self {
                action,
                path,
                source,
            })
        }
    }

    fn is_full(&self) -> bool {
        matches!(
            self.source.kind(),
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded
        )
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (action, path) = (self.action, self.path.display());
        if !self.is_full() {
            return write!(f, "cannot {action} {path}");
        }
        write!(f, "there is no space left to {action} {path}; free some")?;
        // Elsewhere, which is in the checkout, that would not help.
        if setup::cache().is_ok_and(|cache| self.path.starts_with(cache)) {
            write!(f, ", or {}", setup::LARGER_DISK)?;
        }
        Ok(())
    }
}

impl Error for Refused {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        (!self.is_full()).then_some(&self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// All that is said of an attempt to write to `path`, which fails for the reason that writing to `target` does.
    fn said(path: &Path, target: &str) -> String {
        let reason = fs::write(target, "text").unwrap_err();
        let refused: anyhow::Error = Refused::to("write", path)(reason);
        format!("{refused:#}")
    }

    #[test]
    fn a_full_disk_is_told_with_its_remedy_and_once() {
        let cached = setup::cache().unwrap().join("images/base.part");
        assert_eq!(
            said(&cached, "/dev/full"),
            format!(
                "there is no space left to write {}; \
                 free some, or point XDG_CACHE_HOME to a larger disk",
                cached.display()
            )
        );
        assert_eq!(
            said(Path::new("/checkout/console.log"), "/dev/full"),
            "there is no space left to write /checkout/console.log; free some"
        );
    }

    #[test]
    fn any_other_reason_is_the_systems_and_told_once() {
        assert_eq!(
            said(Path::new("/a"), "/nowhere/at/all"),
            "cannot write /a: No such file or directory (os error 2)"
        );
    }
}
