// SPDX-License-Identifier: GPL-2.0

//! Detail of an exit: its port, MSR, address or vector.
//!
//! A detail is composed at each exit from the information that the CPU provides. On VMX that is the
//! exit qualification (SDM, "Basic VM-Exit Information"), the guest-physical address and the
//! interruption information; on SVM, EXITINFO1 and EXITINFO2 (APM, "SVM Intercept Exit Codes").
//!
//! A detail has at most [`BITS`] bits, so that it fits into one word with the reason: the key. Keys
//! hold the CPU's information in its own format, without the bits that do not matter. [`to_wire`]
//! decodes it when a reader asks.

use super::reasons::{self, Isa, Slot, SLOTS};

/// Number of bits in a detail.
pub const BITS: u32 = 55;

/// Highest CPUID subleaf that a key can hold; it stands for all higher ones too.
pub const LAST_SUBLEAF: u32 = (1 << 22) - 2;

/// Flag in the detail of a nested page fault: it holds an address, and not an access.
const IS_ADDRESS: u64 = 1 << (BITS - 1);
/// Mask of a guest-physical address.
const ADDRESS: u64 = (1 << 52) - 1;

/// Kind of a detail, by its number in snapshots.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No detail.
    None = 0,
    /// A port: bits 0 to 15; bit 32 in, 33 string, 34 REP prefix, bits 36 to 38 size in bytes.
    Port = 1,
    /// An MSR: bits 0 to 31; bit 32 write.
    Msr = 2,
    /// Guest-physical address of a device's register.
    Address = 3,
    /// Memory: bits 0 to 21 the address in GiB; bit 32 read, 33 write, 34 fetch.
    Memory = 4,
    /// A vector: bits 0 to 7; bits 8 to 10 its type (SDM, "Information for VM Exits Due to
    /// Vectored Events").
    Vector = 5,
    /// A CPUID leaf: bits 0 to 31; bits 32 to 53 its subleaf, if the leaf has subleaves.
    Cpuid = 6,
    /// A hypercall: bits 0 to 31; bit 32 set for Hyper-V's.
    Hypercall = 7,
    /// A control register: bits 0 to 3; bits 4 and 5 the access (SDM, "Exit Qualification for
    /// Control-Register Accesses").
    Control = 8,
    /// A debug register: bits 0 to 2; bit 4 read.
    Debug = 9,
    /// An APIC access: bits 0 to 11 the offset; bits 12 to 15 its type (SDM, "Exit Qualification
    /// for APIC-Access VM Exits"), on SVM bit 12 write.
    ApicAccess = 10,
    /// A write to the virtual APIC: bits 0 to 11 the offset.
    ApicWrite = 11,
    /// An end of interrupt: bits 0 to 7 the vector.
    Eoi = 12,
}

impl Kind {
    /// Return the kind with a number, or `None` if there is none.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Kind::None,
            1 => Kind::Port,
            2 => Kind::Msr,
            3 => Kind::Address,
            4 => Kind::Memory,
            5 => Kind::Vector,
            6 => Kind::Cpuid,
            7 => Kind::Hypercall,
            8 => Kind::Control,
            9 => Kind::Debug,
            10 => Kind::ApicAccess,
            11 => Kind::ApicWrite,
            12 => Kind::Eoi,
            _ => return None,
        })
    }
}

/// Flag in a key, above the reason: the exit came from a nested guest.
pub const NESTED: u64 = 1 << 63;

/// Sources of details. If VMX has a field for one, its number is the field's (SDM, "Field Encoding
/// in VMCS"), ready for VMREAD.
pub mod source {
    /// No source: the reason has no details.
    pub const NONE: i32 = 0;
    /// The exit qualification, or EXITINFO1.
    pub const QUALIFICATION: i32 = 0x6400;
    /// The guest-physical address.
    pub const ADDRESS: i32 = 0x2400;
    /// The interruption information.
    pub const INTERRUPTION: i32 = 0x4404;
    /// The registers that [`super::hypercall`] reads.
    pub const HYPERCALL: i32 = -1;
    /// The qualification and the address of a page fault.
    pub const FAULT: i32 = -2;
    /// RCX, which names an MSR. On SVM also EXITINFO1, which says whether it was a write.
    pub const MSR: i32 = -3;
    /// EAX, which names a CPUID leaf. A leaf with subleaves needs more: see [`super::leaf`].
    pub const LEAF: i32 = -4;
    /// EXITINFO1 alone.
    pub const INFO: i32 = -5;
}

/// Return the bits that a reason contributes to its keys, combined by XOR. The bits above the
/// detail hold the reason, which is never 0, so no key is 0. The low half holds a number that
/// spreads equal details of different reasons over a table.
#[inline(always)]
const fn tag(slot: Slot) -> u64 {
    let reason = (slot.index() as u64).wrapping_add(1);
    reason << BITS | reason.wrapping_mul(0x9e37_79b9) & 0xffff_ffff
}

/// Return the key of a reason and a detail.
#[inline(always)]
pub const fn key_of(slot: Slot, detail: u64) -> u64 {
    detail ^ tag(slot)
}

/// Return the detail that a key holds.
pub fn detail_of(key: u64) -> u64 {
    let tag = slot_of(key).map_or(0, tag);
    (key ^ tag) & ((1 << BITS) - 1)
}

/// Return the slot that a key's exits belong to.
pub fn slot_of(key: u64) -> Option<Slot> {
    let reason = (key & !NESTED) >> BITS;
    Slot::from_index((reason as usize).wrapping_sub(1))
}

/// Rules for making keys, by reason. Each rule is an array of its own, because that takes the
/// fewest instructions to index.
#[derive(Debug)]
pub struct Rules {
    /// Source that is read: one of [`source`].
    sources: [i32; SLOTS],
    /// Bits of the source that form the detail.
    masks: [u64; SLOTS],
    /// On SVM: the register that is part of the detail.
    registers: [Register; SLOTS],
    /// Bits of that register that are part of the detail.
    register_masks: [u32; SLOTS],
    /// See [`tag`].
    tags: [u64; SLOTS],
}

static VMX: Rules = Rules::new(Isa::Vmx);
static SVM: Rules = Rules::new(Isa::Svm);

impl Rules {
    #[allow(clippy::indexing_slicing, reason = "while this is compiled")]
    const fn new(isa: Isa) -> Self {
        let mut rules = Self {
            sources: [source::NONE; SLOTS],
            masks: [0; SLOTS],
            registers: [Register::Rax; SLOTS],
            register_masks: [0; SLOTS],
            tags: [0; SLOTS],
        };
        let mut place = 0;
        while place < SLOTS {
            if let Some(slot) = Slot::from_index(place) {
                if let Some(code) = reasons::code(isa, slot) {
                    (rules.sources[place], rules.masks[place]) = source_of(isa, code);
                    match rules.sources[place] {
                        source::LEAF => rules.register_masks[place] = u32::MAX,
                        source::MSR => {
                            rules.registers[place] = Register::Rcx;
                            rules.register_masks[place] = u32::MAX;
                        }
                        _ => {}
                    }
                }
                rules.tags[place] = tag(slot);
            }
            place += 1;
        }
        rules
    }

    #[inline(always)]
    const fn of(isa: Isa) -> &'static Self {
        match isa {
            Isa::Vmx => &VMX,
            Isa::Svm => &SVM,
        }
    }

    /// Return the key of an exit from the value of its source, which is masked to the detail.
    #[inline(always)]
    fn key(&self, slot: Slot, value: u64) -> u64 {
        // SAFETY: By the invariant of `Slot` its index is below SLOTS.
        let mask = unsafe { self.masks.get_unchecked(slot.index()) };
        self.key_of_all(slot, value & mask)
    }

    /// Return the key of an exit from a detail that needs no mask.
    #[inline(always)]
    fn key_of_all(&self, slot: Slot, detail: u64) -> u64 {
        // SAFETY: As above.
        detail ^ unsafe { self.tags.get_unchecked(slot.index()) }
    }

    /// Return the key of an SVM exit whose detail is in EXITINFO1 and a register. Both are read for
    /// every reason, so that there is no branch: the masks select what counts.
    #[inline(always)]
    fn key_of_info(&self, slot: Slot, exit: &impl Exit) -> u64 {
        // SAFETY: As above.
        let (mask, register, register_mask) = unsafe {
            (
                self.masks.get_unchecked(slot.index()),
                *self.registers.get_unchecked(slot.index()),
                self.register_masks.get_unchecked(slot.index()),
            )
        };
        let info = exit.read_plain(source::INFO).unwrap_or(0) & mask;
        let register = exit.register(register) as u32 & register_mask;
        // The register stands above bit 0, which holds the write flag of an MSR access.
        let detail = info.wrapping_add(u64::from(register) << SVM_REGISTER);
        self.key_of_all(slot, detail)
    }
}

/// Return the source of a reason's details: one of [`source`].
#[inline(always)]
pub fn source_of_slot(isa: Isa, slot: Slot) -> i32 {
    // SAFETY: By the invariant of `Slot` its index is below SLOTS.
    unsafe { *Rules::of(isa).sources.get_unchecked(slot.index()) }
}

/// Return the source of an exit code's details, and the bits of it that form the detail.
const fn source_of(isa: Isa, code: u32) -> (i32, u64) {
    use source::{
        ADDRESS as AT, FAULT, HYPERCALL, INFO, INTERRUPTION, LEAF, MSR, NONE, QUALIFICATION,
    };
    match (isa, code) {
        (Isa::Vmx, 31 | 32) => (MSR, 0),
        // Bit 0 write, all others 0 (APM, "MSR Intercepts").
        (Isa::Svm, 0x7c) => (MSR, 1),
        // The immediate forms: the MSR is in the qualification (vmx_get_msr_imm_reg() and its
        // callers in vmx.c).
        (Isa::Vmx, 84 | 85) => (QUALIFICATION, MSR_NUMBER),
        // Bits 0 to 2 size less 1, 3 in, 4 string, 5 REP, 16 to 31 port (SDM, "Exit Qualification
        // for I/O Instructions").
        (Isa::Vmx, 30) => (QUALIFICATION, 0xffff_003f),
        // `SVM_IOIO_*` in svm.h: bit 0 in, 2 string, 3 REP, 4 to 6 size, 16 to 31 port.
        (Isa::Svm, 0x7b) => (INFO, 0xffff_007d),
        (Isa::Vmx, 49) => (AT, ADDRESS),
        (Isa::Vmx, 0 | 1) => (INTERRUPTION, 0x7ff),
        (Isa::Vmx, 28) => (QUALIFICATION, 0x3f),
        (Isa::Vmx, 29) => (QUALIFICATION, 0x17),
        (Isa::Vmx, 44) => (QUALIFICATION, 0xffff),
        (Isa::Vmx, 45) => (QUALIFICATION, 0xff),
        (Isa::Vmx, 56) => (QUALIFICATION, 0xfff),
        // `avic_unaccelerated_access_interception()`: bits 4 to 11 the offset, bit 32 write.
        (Isa::Svm, 0x402) => (INFO, 1 << 32 | 0xff0),
        (Isa::Vmx, VMX_CPUID) | (Isa::Svm, SVM_CPUID) => (LEAF, 0),
        (Isa::Vmx, 48) => (FAULT, 7 << FAULT_ACCESS | GIB),
        (Isa::Svm, 0x400) => (FAULT, (PFERR_WRITE | PFERR_FETCH) << FAULT_ACCESS | GIB),
        (Isa::Vmx, 18) | (Isa::Svm, SVM_VMMCALL) => (HYPERCALL, 0),
        _ => (NONE, 0),
    }
}

/// Exit codes that the code below tests by themselves (SDM, "VMX Basic Exit Reasons"; APM, "SVM
/// Intercept Exit Codes").
const VMX_CPUID: u32 = 10;
const SVM_CPUID: u32 = 0x72;
const SVM_VMMCALL: u32 = 0x81;

/// Mask of an MSR's number.
const MSR_NUMBER: u64 = 0xffff_ffff;

/// Shift of the register in a detail of SVM.
const SVM_REGISTER: u32 = 1;

/// Shift of the access in the detail of a page fault: on VMX the exit qualification, on SVM the
/// error code. With this shift, one instruction composes both: see [`memory`].
const FAULT_ACCESS: u32 = 64 - GIB_SHIFT;
/// Mask of an address in GiB.
const GIB: u64 = ADDRESS >> GIB_SHIFT;
const GIB_SHIFT: u32 = 30;

/// Page fault error codes in EXITINFO1 (`PFERR_*` in kvm_host.h): write, reserved bit, fetch.
const PFERR_WRITE: u64 = 1 << 1;
const PFERR_RESERVED: u64 = 1 << 3;
const PFERR_FETCH: u64 = 1 << 4;

/// Shift of the subleaf in the detail of a CPUID. It counts from 1; 0 is a leaf without subleaves.
const SUBLEAF: u32 = 33;

/// A guest register that holds a detail, by its number (SDM, volume 2, table "Register Codes").
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// RAX.
    Rax = 0,
    /// RCX.
    Rcx = 1,
}

/// Access to an exit's information. Each item is read only when it is needed.
pub trait Exit {
    /// Return the value of one of [`source`] that is a field's number, or `None` if it cannot be
    /// read.
    fn read(&self, source: i32) -> Option<u64>;
    /// Return the same for an exit whose detail is that value alone.
    fn read_plain(&self, source: i32) -> Option<u64>;
    /// Return a guest register.
    fn register(&self, register: Register) -> u64;
    /// Return the code of a Hyper-V hypercall, or `None` if the guest's hypercalls are not
    /// Hyper-V's.
    fn hyperv_call(&self) -> Option<u16>;
}

/// Return the key of an exit whose detail is one number, or `None` if the exit has no detail.
/// Return `Err` for any other exit.
///
/// On SVM, a CPUID of a leaf with subleaves gets a key that no exit is booked under, so it has no
/// row. A caller that finds no row calls [`leaf`].
#[inline(always)]
pub fn plain(isa: Isa, slot: Slot, exit: &impl Exit) -> Result<Option<u64>, Composed> {
    match isa {
        Isa::Vmx => plain_vmx(slot, exit),
        Isa::Svm => plain_svm(slot, exit),
    }
}

#[inline(always)]
fn plain_vmx(slot: Slot, exit: &impl Exit) -> Result<Option<u64>, Composed> {
    let source = source_of_slot(Isa::Vmx, slot);
    // The type is as wide as VMREAD's field number, so that no instruction widens it.
    if i64::from(source) > 0 {
        let value = exit.read_plain(source);
        Ok(value.map(|value| VMX.key(slot, value)))
    } else if source == source::FAULT {
        Ok(fault_vmx(exit).map(|value| VMX.key(slot, value)))
    } else if source <= source::MSR {
        // A comparison by order instead of equality makes the compiler keep the order of these
        // branches.
        if source == source::MSR {
            let msr = exit.register(Register::Rcx) as u32;
            return Ok(Some(VMX.key_of_all(slot, msr.into())));
        }
        let leaf = exit.register(Register::Rax) as u32;
        match leaf < FIRST_WITH_SUBLEAVES {
            true => Ok(Some(VMX.key_of_all(slot, leaf.into()))),
            false => Err(Composed),
        }
    } else if source == source::NONE {
        Ok(None)
    } else {
        Err(Composed)
    }
}

#[inline(always)]
fn plain_svm(slot: Slot, exit: &impl Exit) -> Result<Option<u64>, Composed> {
    // One comparison with FAULT separates three cases by order. Comparisons with more numbers would
    // load the source first.
    let source = source_of_slot(Isa::Svm, slot);
    if source < source::FAULT {
        Ok(Some(SVM.key_of_info(slot, exit)))
    } else if source == source::FAULT {
        Ok(fault_svm(slot, exit))
    } else if slot == reasons::slot(Isa::Svm, SVM_VMMCALL) {
        Err(Composed)
    } else {
        Ok(None)
    }
}

/// Error of [`plain`]: the exit's detail is composed of several numbers.
#[derive(Clone, Copy, Debug)]
pub struct Composed;

/// Return the detail of a page fault, or `None` if the CPU does not provide it.
#[inline(always)]
fn fault_vmx(exit: &impl Exit) -> Option<u64> {
    let access = exit.read(source::QUALIFICATION)?;
    let address = exit.read(source::ADDRESS)?;
    Some(memory(address, access))
}

/// Return the key of a page fault. Marked cold, so that the branch to it is the one that jumps.
#[cold]
#[inline(always)]
fn fault_svm(slot: Slot, exit: &impl Exit) -> Option<u64> {
    let error = exit.read(source::QUALIFICATION)?;
    let address = exit.read(source::ADDRESS)?;
    if error & PFERR_RESERVED != 0 {
        return Some(device_svm(slot, address));
    }
    Some(SVM.key(slot, memory(address, error)))
}

/// Return the key of an access to a device's register. KVM emulates the instruction then, so one
/// more jump matters less here than on the other paths.
#[cold]
#[inline(always)]
fn device_svm(slot: Slot, address: u64) -> u64 {
    SVM.key_of_all(slot, address & ADDRESS | IS_ADDRESS)
}

/// Return true if the reason is CPUID.
#[inline(always)]
pub fn is_leaf(isa: Isa, slot: Slot) -> bool {
    let code = match isa {
        Isa::Vmx => VMX_CPUID,
        Isa::Svm => SVM_CPUID,
    };
    slot == reasons::slot(isa, code)
}

/// Return the key of an exit caused by CPUID.
#[inline(always)]
pub fn leaf(isa: Isa, slot: Slot, exit: &impl Exit) -> u64 {
    let leaf = exit.register(Register::Rax) as u32;
    key_of(slot, cpuid(isa, leaf, exit.register(Register::Rcx) as u32))
}

/// Return the key of a hypercall.
#[inline(always)]
pub fn hypercall(slot: Slot, exit: &impl Exit) -> u64 {
    let detail = match exit.hyperv_call() {
        Some(code) => u64::from(code) | 1 << 32,
        None => exit.register(Register::Rax) & 0xffff_ffff,
    };
    key_of(slot, detail)
}

/// Return the key of an exit, made of its reason and detail, or `None` if it has no detail.
#[inline(always)]
pub fn key(isa: Isa, slot: Slot, exit: &impl Exit) -> Option<u64> {
    if is_leaf(isa, slot) {
        return Some(leaf(isa, slot, exit));
    }
    match plain(isa, slot, exit) {
        Ok(key) => key,
        Err(Composed) => Some(hypercall(slot, exit)),
    }
}

/// Combine the address and access of a page fault. One SHLD instruction does this.
#[inline(always)]
fn memory(address: u64, access: u64) -> u64 {
    address >> GIB_SHIFT | access << FAULT_ACCESS
}

/// Return the detail of a CPUID. The low bits differ by subleaf too, because tables spread keys by
/// these.
#[inline(always)]
fn cpuid(isa: Isa, leaf: u32, subleaf: u32) -> u64 {
    let subleaf = match has_subleaves(leaf) {
        true => subleaf.min(LAST_SUBLEAF).wrapping_add(1),
        false => 0,
    };
    let low = u64::from(leaf ^ subleaf);
    let low = match isa {
        Isa::Vmx => low,
        Isa::Svm => low << SVM_REGISTER,
    };
    low | u64::from(subleaf) << SUBLEAF
}

/// Bitmap of the leaves below 64 that have subleaves.
const BASIC_WITH_SUBLEAVES: u64 = 1 << 0x04
    | 1 << 0x07
    | 1 << 0x0b
    | 1 << 0x0d
    | 1 << 0x0f
    | 1 << 0x10
    | 1 << 0x12
    | 1 << 0x14
    | 1 << 0x17
    | 1 << 0x18
    | 1 << 0x1a
    | 1 << 0x1b
    | 1 << 0x1d
    | 1 << 0x1e
    | 1 << 0x1f
    | 1 << 0x20
    | 1 << 0x23
    | 1 << 0x24;

/// First leaf with subleaves. Guests often execute CPUID to serialize, which works with any leaf,
/// and most take 0 or 1.
const FIRST_WITH_SUBLEAVES: u32 = BASIC_WITH_SUBLEAVES.trailing_zeros();

/// Return true if a CPUID leaf depends on ECX.
///
/// These are the leaves that the SDM ("CPUID - CPU Identification") and the APM (volume 3, appendix
/// E) name, and exitmeter's upper four. A reader asks exitmeter's other leaves for hundreds of
/// subleaves, which would take the rows of all other keys.
#[inline(always)]
pub const fn has_subleaves(leaf: u32) -> bool {
    if leaf < 64 {
        return BASIC_WITH_SUBLEAVES >> leaf & 1 != 0;
    }
    matches!(
        leaf,
        0x4fff_fffc..=0x4fff_ffff | 0x8000_001d | 0x8000_0020 | 0x8000_0026
    )
}

/// Return the kind and key of a detail, as the snapshot has them.
pub fn to_wire(isa: Isa, code: u32, detail: u64) -> (Kind, u64) {
    let bit = |from: u32, to: u32| (detail >> from & 1) << to;
    let number = match isa {
        Isa::Vmx => detail & 0xffff_ffff,
        Isa::Svm => detail >> SVM_REGISTER & 0xffff_ffff,
    };
    match (isa, code) {
        (Isa::Vmx, 30) => {
            let port = detail >> 16 & 0xffff;
            let size = (detail & 7).wrapping_add(1) & 7;
            let how = bit(3, 32) | bit(4, 33) | bit(5, 34);
            (Kind::Port, port | how | size << 36)
        }
        (Isa::Svm, 0x7b) => {
            let port = detail >> 16 & 0xffff;
            let size = detail >> 4 & 7;
            let how = bit(0, 32) | bit(2, 33) | bit(3, 34);
            (Kind::Port, port | how | size << 36)
        }
        (Isa::Vmx, 32 | 85) => (Kind::Msr, detail | 1 << 32),
        (Isa::Vmx, 31 | 84) => (Kind::Msr, detail),
        (Isa::Svm, 0x7c) => (Kind::Msr, number | bit(0, 32)),
        (Isa::Vmx, 49) => (Kind::Address, detail),
        (Isa::Svm, 0x400) if detail & IS_ADDRESS != 0 => (Kind::Address, detail & ADDRESS),
        (Isa::Vmx, 48) => (Kind::Memory, detail & GIB | (detail >> FAULT_ACCESS) << 32),
        (Isa::Svm, 0x400) => {
            let error = detail >> FAULT_ACCESS;
            let access = match (error & PFERR_WRITE != 0, error & PFERR_FETCH != 0) {
                (false, false) => 1,
                (write, fetch) => u64::from(write) << 1 | u64::from(fetch) << 2,
            };
            (Kind::Memory, detail & GIB | access << 32)
        }
        (Isa::Vmx, 0 | 1) => (Kind::Vector, detail),
        (Isa::Vmx, 10) | (Isa::Svm, 0x72) => {
            let subleaf = detail >> SUBLEAF;
            let leaf = number ^ subleaf;
            (Kind::Cpuid, leaf | subleaf.saturating_sub(1) << 32)
        }
        (Isa::Vmx, 18) | (Isa::Svm, 0x81) => (Kind::Hypercall, detail),
        (Isa::Vmx, 28) => (Kind::Control, detail),
        (Isa::Vmx, 29) => (Kind::Debug, detail),
        (Isa::Vmx, 44) => (Kind::ApicAccess, detail),
        (Isa::Svm, 0x402) => (Kind::ApicAccess, detail & 0xff0 | bit(32, 12)),
        (Isa::Vmx, 45) => (Kind::Eoi, detail),
        (Isa::Vmx, 56) => (Kind::ApicWrite, detail),
        _ => (Kind::None, detail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An exit with given information.
    #[derive(Default)]
    struct FakeExit {
        qualification: u64,
        address: u64,
        interruption: u32,
        rax: u64,
        rcx: u64,
        hyperv: Option<u16>,
    }

    impl Exit for FakeExit {
        fn read(&self, source: i32) -> Option<u64> {
            Some(match source {
                source::QUALIFICATION | source::INFO => self.qualification,
                source::ADDRESS => self.address,
                source::INTERRUPTION => self.interruption.into(),
                _ => panic!("no field of that number is known"),
            })
        }
        fn read_plain(&self, source: i32) -> Option<u64> {
            self.read(source)
        }
        fn register(&self, register: Register) -> u64 {
            match register {
                Register::Rax => self.rax,
                Register::Rcx => self.rcx,
            }
        }
        fn hyperv_call(&self) -> Option<u16> {
            self.hyperv
        }
    }

    fn wire(isa: Isa, code: u32, exit: FakeExit) -> (Kind, u64) {
        let slot = reasons::slot(isa, code);
        let key = key(isa, slot, &exit).expect("a detail");
        assert_eq!(slot_of(key), Some(slot), "{isa:?} {code:#x}");
        to_wire(isa, code, detail_of(key))
    }

    #[test]
    fn ports_have_the_same_key_on_both_vendors() {
        // IN AL from 0x3f8; REP OUTSW to 0x1f0.
        for (vmx, svm, key) in [
            (0x03f8_0008, 0x03f8_0011, 0x3f8 | 1 << 32 | 1 << 36),
            (0x01f0_0031, 0x01f0_002c, 0x1f0 | 3 << 33 | 2 << 36),
            (0x0cf8_0003, 0x0cf8_0040, 0xcf8 | 4 << 36),
        ] {
            for (isa, code, qualification) in [(Isa::Vmx, 30, vmx), (Isa::Svm, 0x7b, svm)] {
                let exit = FakeExit {
                    qualification,
                    ..FakeExit::default()
                };
                assert_eq!(wire(isa, code, exit), (Kind::Port, key), "{isa:?}");
            }
        }
    }

    #[test]
    fn msr_comes_from_rcx_except_in_immediate_forms() {
        let exit = |qualification, rcx| FakeExit {
            qualification,
            rcx,
            ..FakeExit::default()
        };
        let (read, write) = (0xc000_0080, 0xc000_0080 | 1 << 32);
        for (isa, code, exit, key) in [
            (Isa::Vmx, 31, exit(7, 0xffff_ffff_c000_0080), read),
            (Isa::Vmx, 32, exit(7, 0xc000_0080), write),
            (Isa::Vmx, 84, exit(0xc000_0080, 7), read),
            (Isa::Vmx, 85, exit(0xc000_0080, 7), write),
            (Isa::Svm, 0x7c, exit(0, 0xc000_0080), read),
            (Isa::Svm, 0x7c, exit(1, 0xc000_0080), write),
        ] {
            assert_eq!(wire(isa, code, exit), (Kind::Msr, key), "{isa:?} {code}");
        }
    }

    #[test]
    fn devices_have_an_address_and_memory_a_gib() {
        let exit = |qualification, address| FakeExit {
            qualification,
            address,
            ..FakeExit::default()
        };
        let address = 0xfee0_0300;
        for (isa, code, exit, expected) in [
            (Isa::Vmx, 49, exit(0, address), (Kind::Address, address)),
            (
                Isa::Svm,
                0x400,
                exit(0xd, address),
                (Kind::Address, address),
            ),
            (Isa::Svm, 0x400, exit(0xd, 0), (Kind::Address, 0)),
            (
                Isa::Vmx,
                48,
                exit(0x182, address),
                (Kind::Memory, 3 | 1 << 33),
            ),
            (
                Isa::Vmx,
                48,
                exit(1, 1 << 40),
                (Kind::Memory, 1 << 10 | 1 << 32),
            ),
            (
                Isa::Svm,
                0x400,
                exit(0x1_0000_0006, address),
                (Kind::Memory, 3 | 1 << 33),
            ),
            (
                Isa::Svm,
                0x400,
                exit(4, 1 << 40),
                (Kind::Memory, 1 << 10 | 1 << 32),
            ),
            (Isa::Svm, 0x400, exit(0x14, 5), (Kind::Memory, 1 << 34)),
        ] {
            assert_eq!(wire(isa, code, exit), expected, "{isa:?} {code}");
        }
    }

    #[test]
    fn subleaf_is_kept_for_leaves_that_have_subleaves() {
        let exit = |leaf, subleaf| FakeExit {
            rax: leaf,
            rcx: subleaf,
            ..FakeExit::default()
        };
        for (leaf, subleaf, key) in [
            (1, 9, 1),
            (0xd, 9, 0xd | 9 << 32),
            (
                0xffff_ffff_0000_000d,
                0xffff_ffff,
                0xd | u64::from(LAST_SUBLEAF) << 32,
            ),
            (0x4fff_fffc, 48, 0x4fff_fffc | 48 << 32),
            (0x4fff_fff2, 48, 0x4fff_fff2),
            (0x4fff_fff5, 0x0103_0007, 0x4fff_fff5),
            (0x4000_0000, 48, 0x4000_0000),
        ] {
            for (isa, code) in [(Isa::Vmx, 10), (Isa::Svm, 0x72)] {
                assert_eq!(wire(isa, code, exit(leaf, subleaf)), (Kind::Cpuid, key));
            }
        }
    }

    #[test]
    fn hypercall_comes_from_rax_unless_it_is_hyperv() {
        for (isa, code) in [(Isa::Vmx, 18), (Isa::Svm, 0x81)] {
            for (hyperv, key) in [(None, 5), (Some(0x5c), 0x5c | 1 << 32)] {
                let exit = FakeExit {
                    rax: 5,
                    hyperv,
                    ..FakeExit::default()
                };
                assert_eq!(wire(isa, code, exit), (Kind::Hypercall, key));
            }
        }
    }

    /// No input from a guest or the CPU makes a detail too large.
    #[test]
    fn every_detail_fits_beside_its_reason() {
        let exit = FakeExit {
            qualification: u64::MAX,
            address: u64::MAX,
            interruption: u32::MAX,
            rax: u64::MAX,
            rcx: u64::MAX,
            hyperv: None,
        };
        let mut with_detail = 0;
        for (isa, code) in codes() {
            let slot = reasons::slot(isa, code);
            let Some(key) = key(isa, slot, &exit) else {
                continue;
            };
            assert_eq!(slot_of(key), Some(slot), "{isa:?} {code:#x}: {key:#x}");
            assert_eq!(key & NESTED, 0, "{isa:?} {code:#x}: {key:#x}");
            let (kind, number) = to_wire(isa, code, detail_of(key));
            assert_ne!(kind, Kind::None, "{isa:?} {code:#x}");
            assert_eq!(Kind::from_number(kind as u8), Some(kind));
            assert!(kind != Kind::Address || number & IS_ADDRESS == 0);
            with_detail += 1;
        }
        assert_eq!(with_detail, with_details().count());
    }

    fn codes() -> impl Iterator<Item = (Isa, u32)> {
        [Isa::Vmx, Isa::Svm]
            .into_iter()
            .flat_map(|isa| (0..0x500).map(move |code| (isa, code)))
    }

    fn with_details() -> impl Iterator<Item = (Isa, u32)> {
        codes().filter(|(isa, code)| source_of(*isa, *code).0 != source::NONE)
    }

    /// docs/interface.md has each kind, and docs/why.md each reason with details.
    #[test]
    fn the_documentation_has_all_details() {
        let section = |page: &'static str, title: &str| {
            let (_, rest) = page.split_once(title).expect("the section");
            rest.split("\n#").next().expect("its text")
        };
        let interface = include_str!("../../docs/interface.md");
        let kinds = section(interface, "\n#### Key of a detail\n");
        for kind in (0..=u8::MAX).filter_map(Kind::from_number) {
            let row = format!("\n| {} |", kind as u8);
            assert!(kinds.contains(&row), "{kind:?}");
        }
        let rows = section(include_str!("../../docs/why.md"), "\n## Rows\n");
        let names: Vec<_> = rows
            .split(|letter| !matches!(letter, 'A'..='Z' | '_'))
            .collect();
        for (isa, code) in with_details() {
            let name = reasons::name(isa, code).expect("a name");
            assert!(names.contains(&name), "{name}");
        }
    }

    /// The BPF programs compose the same keys. On VMX they know no guest-physical address.
    #[test]
    fn the_bpf_programs_have_the_same_details() {
        let text = include_str!("../../cli/bpf/tables.h");
        // The rows that a function names, each with the mask that is set behind it.
        let cases = |function: &str| {
            let (_, rest) = text.split_once(&format!(" {function}(")).expect("it");
            let body = rest.split("\n}\n").next().expect("its body");
            let mut found: Vec<(usize, Option<u64>)> = Vec::new();
            for line in body.lines().map(str::trim) {
                if let Some(number) = line.strip_prefix("case ") {
                    let number = number.trim_end_matches(['{', ' ', ':']);
                    found.push((hex_or_decimal(number) as usize, None));
                } else if let Some(mask) = line.strip_prefix("mask = ") {
                    let mask = hex_or_decimal(mask.trim_end_matches(';'));
                    for (_, none) in found.iter_mut().rev().take_while(|it| it.1.is_none()) {
                        *none = Some(mask);
                    }
                }
            }
            found
        };
        let registers = ["svm_key", "vmx_key_of_registers"].map(cases);
        let vmcs = cases("vmx_key_of_vmcs");
        for (isa, code) in with_details() {
            let row = reasons::slot(isa, code).index();
            let (source, mask) = source_of(isa, code);
            let expected = match (isa, source) {
                (Isa::Svm, _) => registers[0].contains(&(row, None)),
                (Isa::Vmx, source::ADDRESS | source::FAULT) => true,
                (Isa::Vmx, ..=source::NONE) => registers[1].contains(&(row, None)),
                (Isa::Vmx, _) => vmcs.contains(&(row, Some(mask))),
            };
            assert!(expected, "{isa:?} {code:#x}");
        }
        let known = registers.iter().flatten().count() + vmcs.len();
        assert_eq!(known + [48, 49].len(), with_details().count());
    }

    fn hex_or_decimal(text: &str) -> u64 {
        match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).expect("a number"),
            None => text.parse().expect("a number"),
        }
    }

    /// Qualification, interruption information and EXITINFO1 with all bits set besides those that
    /// count.
    #[test]
    fn registers_apic_and_vectors_ignore_other_bits() {
        let exit = |qualification, interruption| FakeExit {
            qualification,
            interruption,
            ..FakeExit::default()
        };
        for (isa, code, exit, expected) in [
            // MOV to CR3 from RDI; MOV from CR8 to RSI; CLTS.
            (Isa::Vmx, 28, exit(0x703, 0), (Kind::Control, 3)),
            (Isa::Vmx, 28, exit(0x618, 0), (Kind::Control, 8 | 1 << 4)),
            (Isa::Vmx, 28, exit(0x20, 0), (Kind::Control, 2 << 4)),
            (Isa::Vmx, 28, exit(!0x3f, 0), (Kind::Control, 0)),
            // MOV to DR7 from RAX; MOV from DR6 to R15.
            (Isa::Vmx, 29, exit(0x007, 0), (Kind::Debug, 7)),
            (Isa::Vmx, 29, exit(0xf16, 0), (Kind::Debug, 6 | 1 << 4)),
            (Isa::Vmx, 29, exit(!0x17, 0), (Kind::Debug, 0)),
            // A write of EOI, at its offset; a read of the version.
            (Isa::Vmx, 44, exit(0x10b0, 0), (Kind::ApicAccess, 0x10b0)),
            (Isa::Vmx, 44, exit(0x1_0030, 0), (Kind::ApicAccess, 0x30)),
            (Isa::Vmx, 45, exit(!0xff | 0xd1, 0), (Kind::Eoi, 0xd1)),
            (
                Isa::Vmx,
                56,
                exit(!0xfff | 0x300, 0),
                (Kind::ApicWrite, 0x300),
            ),
            (
                Isa::Svm,
                0x402,
                exit(1 << 32 | 0x380, 0),
                (Kind::ApicAccess, 1 << 12 | 0x380),
            ),
            (
                Isa::Svm,
                0x402,
                exit(!(1 << 32 | 0xff0) | 0x20, 0),
                (Kind::ApicAccess, 0x20),
            ),
            // The timer's interrupt; a page fault; an NMI.
            (Isa::Vmx, 1, exit(0, 0x8000_00ec), (Kind::Vector, 0xec)),
            (Isa::Vmx, 0, exit(0, 0x8000_0b0e), (Kind::Vector, 0x30e)),
            (Isa::Vmx, 0, exit(0, 0x8000_0202), (Kind::Vector, 0x202)),
        ] {
            assert_eq!(wire(isa, code, exit), expected, "{isa:?} {code:#x}");
        }
    }
}
