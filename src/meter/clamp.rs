// SPDX-License-Identifier: GPL-2.0

//! Bounds for numbers that a guest chose, which hold in speculation too.

/// Return the number if it is below the bound, else 0. Has no branch that a CPU could mispredict,
/// so a guest cannot make it read ahead behind a table.
#[inline]
pub(super) fn clamp(number: usize, bound: usize) -> usize {
    let mask: usize;
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: Compares two registers and spreads the carry; touches nothing else.
    unsafe {
        core::arch::asm!("cmp {0}, {1}", "sbb {2}, {2}", in(reg) number, in(reg) bound,
            out(reg) mask, options(pure, nomem, nostack));
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        mask = if number < bound { usize::MAX } else { 0 };
    }
    number & mask
}

#[cfg(test)]
mod tests {
    use super::clamp;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn clamp_stays_below_the_bound(number in any::<usize>(), bound in 1_usize..1 << 40) {
            prop_assert_eq!(clamp(number, bound), if number < bound { number } else { 0 });
            prop_assert_eq!(clamp(bound - 1, bound), bound - 1);
        }
    }
}
