// SPDX-License-Identifier: GPL-2.0

//! A file that stands for the device: a seccomp filter answers the ioctl that turns details on, for
//! any file.

use std::{collections::BTreeMap, os::unix::process::CommandExt as _, process::Command};

use seccompiler::{
    apply_filter, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// Request `_IO(0xE7, 1)`, docs/interface.md.
const DETAILS: u64 = 0xe701;

/// Let the ioctl that turns details on return an error in a command and its children; 0 is success.
pub fn answer_details(command: &mut Command, errno: u32) {
    let is_details = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, DETAILS);
    let rule = SeccompRule::new(vec![is_details.unwrap()]).unwrap();
    let filter = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_ioctl, vec![rule])]),
        SeccompAction::Allow,
        SeccompAction::Errno(errno),
        TargetArch::x86_64,
    );
    let filter: BpfProgram = filter.unwrap().try_into().unwrap();
    // SAFETY: The filter is built already; applying it takes two system calls.
    unsafe {
        command.pre_exec(move || apply_filter(&filter).map_err(std::io::Error::other));
    }
}
