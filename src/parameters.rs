// SPDX-License-Identifier: GPL-2.0

//! The module's parameters and their ranges.

use kernel::{
    ffi::c_long,
    prelude::*, //
};

use crate::{
    linux::{
        clock,
        parameters::given, //
    },
    meter::{
        leaves::LeafMap,
        ledger::TRIES, //
    },
};

/// The parameters that are fixed when the module is loaded. `shim.c` describes each.
pub(crate) struct Parameters {
    pub(crate) leaf_map: LeafMap,
    pub(crate) host_scope: bool,
    pub(crate) max_vcpus: u32,
    pub(crate) details: bool,
    pub(crate) copy_tries: u32,
    slow_us: u32,
}

impl Parameters {
    /// Return the module's parameters, or `EINVAL` if one is out of its range.
    pub(crate) fn checked() -> Result<Self> {
        let given = given();
        let leaf_map = in_range(
            "leaf_map",
            given.leaf_map,
            "2021, 2022, or 0",
            LeafMap::from_number,
        )?;
        // Read again at each query, by `is_for_cpl_0_alone`.
        let _: bool = in_range("leaf_cpl", given.leaf_cpl, "3 or 0", |number| {
            matches!(number, 0 | 3).then_some(number == 0)
        })?;
        let max_vcpus = in_range("max_vcpus", given.max_vcpus, "1 to 65536", |number| {
            (1..=65536).contains(&number).then_some(number)
        })?;
        let flag = |number| (number <= 1).then_some(number == 1);
        let host_scope = in_range("host_scope", given.host_scope, "0 or 1", flag)?;
        let details = in_range("details", given.details, "0 or 1", flag)?;
        let slow_us = in_range("slow_us", given.slow_us, "0 to 1000000000", |number| {
            (number <= 1_000_000_000).then_some(number)
        })?;
        // Read again at each query, by `logs_queries`.
        let _: bool = in_range("log_queries", given.log_queries, "0 or 1", flag)?;
        let copy_tries = in_range("copy_tries", given.copy_tries, "0 to 24", |number| {
            (number <= TRIES).then_some(number)
        })?;
        Ok(Self {
            leaf_map,
            host_scope,
            max_vcpus,
            details,
            copy_tries,
            slow_us,
        })
    }

    /// Return the parameter `slow_us` in ticks, or 0 if the TSC's frequency is not known.
    pub(crate) fn slow_ticks(&self) -> u64 {
        let khz = clock::tsc_khz();
        if khz == 0 && self.slow_us != 0 {
            pr_warn!("slow_us is ignored: the TSC's frequency is not known\n");
        }
        u64::from(khz).wrapping_mul(self.slow_us.into()) / 1000
    }
}

/// Return true if only the guest's kernel gets answers, by `leaf_cpl`.
pub(crate) fn is_for_cpl_0_alone() -> bool {
    given().leaf_cpl == 0
}

/// Return true if queries get lines in the log, by `log_queries`.
pub(crate) fn logs_queries() -> bool {
    given().log_queries == 1
}

/// Convert a parameter's value with `convert`. If that returns `None`, log the range, and return `EINVAL`.
fn in_range<T>(
    name: &str,
    value: c_long,
    range: &str,
    convert: impl FnOnce(u32) -> Option<T>,
) -> Result<T> {
    let converted = u32::try_from(value).ok().and_then(convert);
    converted.ok_or_else(|| {
        pr_err!("{name}={value} is refused: it is {range}\n");
        EINVAL
    })
}
