// SPDX-License-Identifier: GPL-2.0

//! Names of the numbers in details: MSRs, ports, CPUID leaves, hypercalls, registers, addresses and
//! vectors. Each table is data, with its source. Numbers without an entry have no name.

pub mod apic;
pub mod cpuid;
pub mod exit;
pub mod hypercall;
pub mod memory;
pub mod msr;
pub mod port;
pub mod vector;

/// Names, sorted by number.
type Names = &'static [(u32, &'static str)];

/// Return the name of a number.
fn find(names: Names, number: u32) -> Option<&'static str> {
    let place = names.binary_search_by_key(&number, |(number, _)| *number);
    names.get(place.ok()?).map(|(_, name)| *name)
}

/// Consecutive numbers under one name.
struct Range<N: 'static> {
    first: N,
    last: N,
    name: &'static str,
    /// Names of single numbers, counted from the first; empty for a number without one.
    parts: &'static [&'static str],
}

impl<N: Copy + PartialOrd + Into<u64>> Range<N> {
    /// Return the name of a number, with that of its part.
    fn name(&self, number: N) -> Option<String> {
        if number < self.first || number > self.last {
            return None;
        }
        let place = number.into().checked_sub(self.first.into())?;
        let part = usize::try_from(place)
            .ok()
            .and_then(|at| self.parts.get(at));
        Some(match part.filter(|part| !part.is_empty()) {
            Some(part) => format!("{} {part}", self.name),
            None => self.name.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_can_be_found() {
        for names in [
            msr::NAMES,
            cpuid::NAMES,
            exit::NAMES,
            hypercall::KVM,
            hypercall::HYPERV,
            hypercall::XEN,
            apic::NAMES,
            vector::EXCEPTIONS,
            vector::LINUX,
        ] {
            assert!(names.is_sorted_by(|one, next| one.0 < next.0), "{names:x?}");
            for (number, name) in names {
                assert_eq!(find(names, *number), Some(*name));
            }
        }
        assert_eq!(find(exit::NAMES, 44), None);
    }

    #[test]
    fn ranges_of_ports_do_not_overlap() {
        let ports = port::RANGES;
        assert!(ports.iter().all(|range| range.first <= range.last));
        assert!(ports.is_sorted_by(|one, next| one.last < next.first));
    }

    #[test]
    fn well_known_numbers_have_names() {
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(msr::name(0x6e0), some("IA32_TSC_DEADLINE"));
        assert_eq!(msr::name(0x830), some("X2APIC_ICR"));
        assert_eq!(msr::name(0x80b), some("X2APIC_EOI"));
        assert_eq!(msr::name(0x831), None);
        assert_eq!(msr::name(0x4000_0070), some("HV_X64_MSR_EOI"));
        assert_eq!(msr::name(0x4b56_4d03), some("KVM_STEAL_TIME"));
        assert_eq!(msr::name(0x40d), some("IA32_MC3_STATUS"));
        assert_eq!(msr::name(0xc000_2012), some("AMD64_SMCA_MC1_ADDR"));
        assert_eq!(msr::name(0xc000_0080), some("EFER"));
        assert_eq!(msr::name(u32::MAX), None);
        assert_eq!(port::name(0x3f8), some("COM1 data"));
        assert_eq!(port::name(0x2fd), some("COM2 line status"));
        assert_eq!(port::name(0x608), some("ACPI PM timer"));
        assert_eq!(port::name(0xcfc), some("PCI config data"));
        assert_eq!(port::name(0x1234), None);
        assert_eq!(memory::name(0xfee0_0300), some("APIC ICR"));
        assert_eq!(memory::name(0xfec0_0010), some("IOAPIC IOWIN"));
        assert_eq!(memory::name(0xfed0_00f0), some("HPET main counter"));
        assert_eq!(memory::name(0xfed0_0128), some("HPET timer 1 comparator"));
        assert_eq!(memory::name(0x1_0000_0000), None);
        assert_eq!(cpuid::name(0x4fff_fffd).as_deref(), Some("exitmeter"));
        assert_eq!(vector::host(0xec), some("local timer (LOC)"));
        assert_eq!(vector::host(0x31), some("a device"));
    }
}
