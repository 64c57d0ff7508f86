//! The Intel host: Bochs.
use super::Boot;
use crate::run::RunError;
use std::process::Command;
/// How to start it.
pub fn command(_boot: &Boot<'_>) -> Result<Command, RunError> {
    Err(RunError::Machine("not yet".into()))
}
