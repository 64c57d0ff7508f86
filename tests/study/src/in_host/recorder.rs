// SPDX-License-Identifier: GPL-2.0

//! Records snapshots while the guest works, with a mark at the beginning of each stage.

use std::{
    fs::File,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};
use exitmeter::{
    recording::{write::Writer, Header},
    source,
};

/// A recording in progress.
pub struct Recorder {
    shared: Arc<Mutex<Shared>>,
    thread: JoinHandle<Result<()>>,
}

struct Shared {
    begun: Instant,
    writer: Writer<File>,
    ended: bool,
}

impl Recorder {
    /// Start a recording, with a snapshot each `interval`.
    pub fn begin(path: &Path, interval: Duration, about: Vec<(&str, String)>) -> Result<Self> {
        let file =
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let header = Header {
            begun: since_1970.unwrap_or_default(),
            interval,
        };
        let mut writer = Writer::new(file, &header)?;
        writer.about(about)?;
        let shared = Arc::new(Mutex::new(Shared {
            begun: Instant::now(),
            writer,
            ended: false,
        }));
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || loop {
                thread::sleep(interval);
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                if shared.ended {
                    return Ok(());
                }
                shared.take(None)?;
            }
        });
        Ok(Self { shared, thread })
    }

    /// Take a snapshot now, and mark it as the beginning of stage `name`.
    pub fn mark(&self, name: &str) -> Result<()> {
        println!("{name}");
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.take(Some(name))
    }

    /// End the recording.
    pub fn end(self) -> Result<()> {
        self.mark("end")?;
        {
            let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared.ended = true;
            let at = shared.begun.elapsed();
            shared.writer.end(at, "the study ended")?;
        }
        let done = self.thread.join();
        done.unwrap_or_else(|_| anyhow::bail!("the recording's thread ended early"))
    }
}

impl Shared {
    fn take(&mut self, mark: Option<&str>) -> Result<()> {
        let at = self.begun.elapsed();
        let snapshot = source::read(Path::new(source::DEVICE))?;
        if let Some(name) = mark {
            self.writer.mark(at, name)?;
        }
        self.writer.snapshot(at, snapshot)?;
        Ok(())
    }
}
