// SPDX-License-Identifier: GPL-2.0

//! The atomics of ledger and table: those of `core`, or in the models of tests/loom.rs those of
//! loom, which tries every order in which threads can see them.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{
    fence, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, AtomicU8, AtomicUsize, Ordering,
};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{
    fence, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, AtomicU8, AtomicUsize, Ordering,
};

/// A cell that [`read_owned`] can read.
pub(crate) trait Cell {
    /// Type of the value.
    type Value;
    #[cfg(not(loom))]
    fn at(&self) -> *const Self::Value;
    #[cfg(loom)]
    fn value(&self) -> Self::Value;
}

macro_rules! cells {
    ($($cell:ident: $value:ident),*) => {
        $(
            impl Cell for $cell {
                type Value = $value;
                #[cfg(not(loom))]
                #[inline(always)]
                fn at(&self) -> *const $value {
                    self.as_ptr()
                }
                #[cfg(loom)]
                fn value(&self) -> $value {
                    self.load(Ordering::Relaxed)
                }
            }
        )*
    };
}

cells!(AtomicU16: u16, AtomicU32: u32, AtomicU64: u64);

impl<T> Cell for AtomicPtr<T> {
    type Value = *mut T;
    #[cfg(not(loom))]
    #[inline(always)]
    fn at(&self) -> *const *mut T {
        self.as_ptr()
    }
    #[cfg(loom)]
    fn value(&self) -> *mut T {
        self.load(Ordering::Relaxed)
    }
}

/// Read a cell that only this thread writes. Unlike an atomic load, the compiler can fold this read
/// into another instruction.
///
/// # Safety
///
/// No other thread may write the cell meanwhile. Others may read it.
#[cfg(not(loom))]
#[inline(always)]
pub(crate) unsafe fn read_owned<C: Cell>(cell: &C) -> C::Value {
    // SAFETY: The cell is valid, and by the contract of this function no other thread writes it.
    unsafe { cell.at().read() }
}

/// Read a cell that only this thread writes, by an atomic load of the models.
///
/// # Safety
///
/// No other thread may write the cell meanwhile.
#[cfg(loom)]
pub(crate) unsafe fn read_owned<C: Cell>(cell: &C) -> C::Value {
    cell.value()
}

/// Add to a cell that only this thread writes.
#[inline(always)]
pub(crate) fn add(cell: &AtomicU64, value: u64) {
    cell.store(
        cell.load(Ordering::Relaxed).wrapping_add(value),
        Ordering::Relaxed,
    );
}

/// Set a bit of a bitmap that only this thread writes. Do nothing if `place` is past its end.
pub(crate) fn mark(bits: &[AtomicU64], place: usize) {
    if let Some(word) = bits.get(place / 64) {
        let bit = 1_u64.wrapping_shl(place as u32 % 64);
        word.store(word.load(Ordering::Relaxed) | bit, Ordering::Relaxed);
    }
}
