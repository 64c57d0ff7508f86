// SPDX-License-Identifier: GPL-2.0

//! Part of the initramfs that belongs to one run.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use lab_agent::{
    cpio::Archive,
    settings::{self, Settings},
};

use super::{base, ImageError};

/// A file or folder of this machine for the host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FileSpec {
    /// Path on this machine.
    pub source: PathBuf,
    /// Path in the host, absolute or relative to the script's folder. If `None`, it keeps its name.
    pub target: Option<String>,
}

impl FileSpec {
    /// Describe a file that goes to the script's folder and keeps its name.
    pub fn new(source: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            target: None,
        }
    }

    /// Describe a file with a given path in the host.
    pub fn at(source: impl Into<PathBuf>, target: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            target: Some(target.into()),
        }
    }

    /// Parse `SRC[:DEST]`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("", _)) | Some((_, "")) => Err("it is SRC or SRC:DEST".to_owned()),
            Some((source, target)) => Ok(Self::at(source, target)),
            None => Ok(Self::new(text)),
        }
    }

    fn path_in_host(&self) -> String {
        let name = || {
            self.source
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        };
        let target = match &self.target {
            Some(target) if target.ends_with('/') => format!("{target}{}", name()),
            Some(target) => target.clone(),
            None => name(),
        };
        if target.starts_with('/') {
            target
        } else {
            format!("{}/{target}", settings::HOME)
        }
    }
}

/// Write the archive to `target`. It includes the agent if it is for a host that boots.
///
/// # Errors
///
/// [`ImageError`] if one of the files cannot be read or the archive cannot be written.
pub fn write(
    target: &Path,
    agent: Option<&Path>,
    files: &[FileSpec],
    settings: &Settings,
) -> Result<(), ImageError> {
    let file = File::create(target).map_err(ImageError::io("write", target))?;
    let mut payload = Payload {
        archive: Archive::new(BufWriter::new(file)),
        folders: BTreeSet::new(),
        target,
    };
    if let Some(agent) = agent {
        payload.file("/init", agent)?;
        payload.link("/usr/bin/guest", "/init")?;
    }
    let text = serde_json::to_vec(settings).map_err(|error| ImageError::content(target, error))?;
    payload.bytes(settings::PATH, 0o644, &text)?;
    for spec in files {
        payload.add(&spec.path_in_host(), &spec.source)?;
    }
    payload
        .archive
        .finish(4096, 0)
        .map_err(ImageError::io("write", target))?;
    Ok(())
}

struct Payload<'a, W> {
    archive: Archive<W>,
    folders: BTreeSet<String>,
    target: &'a Path,
}

impl<W: Write> Payload<'_, W> {
    fn add(&mut self, path: &str, source: &Path) -> Result<(), ImageError> {
        if !source.is_dir() {
            return self.file(path, source);
        }
        let mut names: Vec<_> = fs::read_dir(source)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
            .map_err(ImageError::io("read", source))?;
        names.sort();
        self.parents(&format!("{path}/"))?;
        for name in names {
            self.add(
                &format!("{path}/{}", name.to_string_lossy()),
                &source.join(&name),
            )?;
        }
        Ok(())
    }

    fn file(&mut self, path: &str, source: &Path) -> Result<(), ImageError> {
        let file = File::open(source).map_err(ImageError::io("read", source))?;
        let facts = file.metadata().map_err(ImageError::io("read", source))?;
        self.parents(path)?;
        self.archive
            .file(path, facts.permissions().mode() & 0o7777, facts.len(), file)
            .map_err(ImageError::io("copy", source))
    }

    fn bytes(&mut self, path: &str, permissions: u32, bytes: &[u8]) -> Result<(), ImageError> {
        self.parents(path)?;
        self.archive
            .bytes(path, permissions, bytes)
            .map_err(ImageError::io("write", self.target))
    }

    fn link(&mut self, path: &str, to: &str) -> Result<(), ImageError> {
        self.archive
            .link(path, to)
            .map_err(ImageError::io("write", self.target))
    }

    /// Add the parent folders of `path`, except those of the base: the kernel keeps an existing folder, but gives it the
    /// permissions of the later entry.
    fn parents(&mut self, path: &str) -> Result<(), ImageError> {
        let path = path.trim_start_matches('/');
        for (at, _) in path.match_indices('/') {
            let folder = &path[..at];
            if !base::has_folder(folder) && self.folders.insert(folder.to_owned()) {
                self.archive
                    .folder(folder, 0o755)
                    .map_err(ImageError::io("write", self.target))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lab_agent::{cpio, settings::Task};

    use super::*;

    #[test]
    fn files_go_to_the_given_paths() {
        for (text, place) in [
            ("a/b.sh", "/root/b.sh"),
            ("a/b.sh:c", "/root/c"),
            ("a/b.sh:c/", "/root/c/b.sh"),
            ("a/b.sh:/usr/local/bin/", "/usr/local/bin/b.sh"),
            ("a/b.sh:/etc/c", "/etc/c"),
        ] {
            assert_eq!(
                FileSpec::parse(text).unwrap().path_in_host(),
                place,
                "{text}"
            );
        }
        assert!(FileSpec::parse(":/etc/c").is_err());
        assert!(FileSpec::parse("a:").is_err());
    }

    #[test]
    fn a_payload_holds_agent_settings_files_and_folders() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("data/deep")).unwrap();
        fs::write(at("data/deep/file"), "deep").unwrap();
        fs::write(at("agent"), "the agent").unwrap();
        let settings = Settings {
            kvm: None,
            task: Task::Run(vec!["true".to_owned()]),
        };
        let files = [FileSpec::at(at("data"), "/srv/data")];
        write(&at("payload"), Some(&at("agent")), &files, &settings).unwrap();

        let root = tempfile::tempdir().unwrap();
        // The base has unpacked its folders by then.
        for name in ["usr/bin", "lab"] {
            fs::create_dir_all(root.path().join(name)).unwrap();
        }
        cpio::unpack(&fs::read(at("payload")).unwrap(), root.path()).unwrap();
        let read = |name: &str| fs::read(root.path().join(name)).unwrap();
        assert_eq!(read("init"), b"the agent");
        assert_eq!(read("srv/data/deep/file"), b"deep");
        let unpacked: Settings = serde_json::from_slice(&read("lab/settings.json")).unwrap();
        assert_eq!(unpacked, settings);
    }

    #[test]
    fn a_missing_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            kvm: None,
            task: Task::Shell,
        };
        let files = [FileSpec::new("/nowhere/at/all")];
        let error = write(&folder.path().join("payload"), None, &files, &settings).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"));
    }
}
