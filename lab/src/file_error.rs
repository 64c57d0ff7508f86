// SPDX-License-Identifier: GPL-2.0

//! Errors of system calls on files: the part that the errors of this crate share.

use std::{
    error::Error,
    fmt,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use crate::paths;

/// Failed action on a file or folder. Its text is one sentence with the system's reason as source. If the disk is full,
/// it names the remedy and has no source.
#[derive(Debug)]
pub struct FileError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl FileError {
    /// Return a function that makes an error of the system's reason. `action` is the verb that failed on `path`, such as
    /// "read".
    pub fn on<E: From<Self>>(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> E {
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

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (action, path) = (self.action, self.path.display());
        if !self.is_full() {
            return write!(f, "cannot {action} {path}");
        }
        write!(f, "there is no space left to {action} {path}; free some")?;
        // For a path elsewhere, in the checkout, that would not help.
        if paths::cache().is_ok_and(|cache| self.path.starts_with(cache)) {
            write!(f, ", or {}", paths::LARGER_DISK)?;
        }
        Ok(())
    }
}

impl Error for FileError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        (!self.is_full()).then_some(&self.source)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Return the whole message for a failed write to `path`, with the reason for which a write to `target` fails.
    fn message(path: &Path, target: &str) -> String {
        let reason = fs::write(target, "text").unwrap_err();
        let refused: anyhow::Error = FileError::on("write", path)(reason);
        format!("{refused:#}")
    }

    #[test]
    fn a_full_disk_is_reported_once_with_its_remedy() {
        let cached = paths::cache().unwrap().join("images/base.part");
        assert_eq!(
            message(&cached, "/dev/full"),
            format!(
                "there is no space left to write {}; \
                 free some, or point XDG_CACHE_HOME to a larger disk",
                cached.display()
            )
        );
        assert_eq!(
            message(Path::new("/checkout/console.log"), "/dev/full"),
            "there is no space left to write /checkout/console.log; free some"
        );
    }

    #[test]
    fn any_other_reason_is_the_systems_and_reported_once() {
        assert_eq!(
            message(Path::new("/a"), "/nowhere/at/all"),
            "cannot write /a: No such file or directory (os error 2)"
        );
    }
}
