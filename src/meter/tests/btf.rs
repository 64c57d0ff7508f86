// SPDX-License-Identifier: GPL-2.0

//! Tests of the comparison of tracepoint prototypes, with hand-made types in the kernel's layout.

use exitmeter_meter::btf::{Parameter, Place, Probe, Types, Unknown, Verdict};
use proptest::prelude::*;

const EXIT: Probe = Probe {
    typedef: "btf_trace_kvm_exit",
    parameters: &[
        Parameter::Pointer,
        Parameter::PointerTo("kvm_vcpu"),
        Parameter::U32,
    ],
};

const ENTRY: Probe = Probe {
    typedef: "btf_trace_kvm_entry",
    parameters: &[
        Parameter::Pointer,
        Parameter::PointerTo("kvm_vcpu"),
        Parameter::Bool,
    ],
};

/// Kinds of types (linux/btf.h).
const INT: u32 = 1;
const PTR: u32 = 2;
const STRUCT: u32 = 4;
const ENUM: u32 = 6;
const FWD: u32 = 7;
const TYPEDEF: u32 = 8;
const CONST: u32 = 10;
const PROTOTYPE: u32 = 13;

/// A BTF file under construction.
struct File {
    types: Vec<u8>,
    names: Vec<u8>,
    next_id: u32,
    first_name: u32,
}

impl File {
    fn of_kernel() -> Self {
        Self {
            types: Vec::new(),
            names: vec![0],
            next_id: 1,
            first_name: 0,
        }
    }

    fn of_module(kernel: &Self) -> Self {
        Self {
            types: Vec::new(),
            names: Vec::new(),
            next_id: kernel.next_id,
            first_name: kernel.names.len() as u32,
        }
    }

    /// Add a type with `count` elements in `tail`. Return its id.
    fn add(&mut self, name: &str, kind: u32, count: u32, value: u32, tail: &[u32]) -> u32 {
        let at = if name.is_empty() {
            0
        } else {
            let at = self.first_name + self.names.len() as u32;
            self.names.extend(name.bytes().chain([0]));
            at
        };
        for word in [at, kind << 24 | count, value].iter().chain(tail) {
            self.types.extend(word.to_le_bytes());
        }
        self.next_id += 1;
        self.next_id - 1
    }

    fn tracepoint(&mut self, name: &str, returns: u32, parameters: &[u32]) {
        let tail: Vec<u32> = parameters.iter().flat_map(|id| [0, *id]).collect();
        let function = self.add("", PROTOTYPE, parameters.len() as u32, returns, &tail);
        let pointer = self.add("", PTR, 0, function, &[]);
        self.add(name, TYPEDEF, 0, pointer, &[]);
    }

    fn bytes(&self) -> Vec<u8> {
        let (types, names) = (self.types.len() as u32, self.names.len() as u32);
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, types, types, names] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&self.types);
        bytes.extend(&self.names);
        bytes
    }
}

/// Ids of some types.
struct Ids {
    int: u32,
    u32: u32,
    u64: u32,
    long: u32,
    bool: u32,
    pointer: u32,
    vcpu: u32,
    const_vcpu: u32,
    other: u32,
}

/// Make the kernel's types, which follow `others` more, and the module's, with the tracepoint that
/// `of` adds.
fn files(others: u32, of: impl Fn(&Ids, &mut File)) -> (Vec<u8>, Vec<u8>) {
    let mut kernel = File::of_kernel();
    for _ in 0..others {
        kernel.add("", ENUM, 1, 4, &[0, 7]);
    }
    let int = kernel.add("int", INT, 0, 4, &[1 << 24 | 32]);
    let unsigned = kernel.add("unsigned int", INT, 0, 4, &[32]);
    let long = kernel.add("unsigned long", INT, 0, 8, &[64]);
    let boolean = kernel.add("_Bool", INT, 0, 1, &[4 << 24 | 8]);
    let under = kernel.add("__u32", TYPEDEF, 0, unsigned, &[]);
    let u32 = kernel.add("u32", TYPEDEF, 0, under, &[]);
    let u64 = kernel.add("u64", TYPEDEF, 0, long, &[]);
    let bool = kernel.add("bool", TYPEDEF, 0, boolean, &[]);
    let pointer = kernel.add("", PTR, 0, 0, &[]);
    let mut module = File::of_module(&kernel);
    let vcpu = module.add("kvm_vcpu", STRUCT, 1, 4, &[0, int, 0]);
    let constant = module.add("", CONST, 0, vcpu, &[]);
    let other = module.add("kvm", FWD, 0, 0, &[]);
    let [vcpu, const_vcpu, other] =
        [vcpu, constant, other].map(|target| module.add("", PTR, 0, target, &[]));
    let ids = Ids {
        int,
        u32,
        u64,
        long,
        bool,
        pointer,
        vcpu,
        const_vcpu,
        other,
    };
    of(&ids, &mut module);
    (kernel.bytes(), module.bytes())
}

/// Return the difference and the tracepoint's text, or `None` if it fits.
fn compared(of: impl Fn(&Ids, &mut File), probe: &Probe) -> Option<(Place, String)> {
    let (kernel, module) = files(20_000, of);
    let types = Types::read(&kernel, &module).expect("the files are whole");
    match types.compare(probe).expect("the tracepoint is there") {
        Verdict::Fits => None,
        Verdict::Differs(place, found) => Some((place, found.to_string())),
    }
}

fn exit_of(parameters: impl Fn(&Ids) -> Vec<u32>) -> Option<(Place, String)> {
    compared(
        |ids, file| file.tracepoint(EXIT.typedef, 0, &parameters(ids)),
        &EXIT,
    )
}

#[test]
fn accepts_matching_probes() {
    assert_eq!(exit_of(|ids| vec![ids.pointer, ids.vcpu, ids.u32]), None);
    let entry = |ids: &Ids, file: &mut File| {
        file.tracepoint(ENTRY.typedef, 0, &[ids.pointer, ids.vcpu, ids.bool]);
    };
    assert_eq!(compared(entry, &ENTRY), None);
}

#[test]
fn names_each_difference() {
    let differs = |place, found: &str| Some((place, found.to_owned()));
    assert_eq!(
        exit_of(|ids| vec![ids.pointer, ids.vcpu, ids.u64]),
        differs(Place::Parameter(3), "void (void *, struct kvm_vcpu *, u64)")
    );
    assert_eq!(
        exit_of(|ids| vec![ids.pointer, ids.vcpu, ids.int]),
        differs(Place::Parameter(3), "void (void *, struct kvm_vcpu *, int)")
    );
    // Before Linux 5.14.
    assert_eq!(
        exit_of(|ids| vec![ids.pointer, ids.u32, ids.vcpu, ids.u32]),
        differs(Place::Count, "void (void *, u32, struct kvm_vcpu *, u32)")
    );
    assert_eq!(
        exit_of(|ids| vec![ids.pointer, ids.u32, ids.vcpu]),
        differs(Place::Parameter(2), "void (void *, u32, struct kvm_vcpu *)")
    );
    assert_eq!(
        exit_of(|ids| vec![ids.pointer, ids.other, ids.u32]),
        differs(Place::Parameter(2), "void (void *, struct kvm *, u32)")
    );
    assert_eq!(
        exit_of(|ids| vec![ids.pointer, ids.const_vcpu, ids.u32]),
        differs(
            Place::Parameter(2),
            "void (void *, const struct kvm_vcpu *, u32)"
        )
    );
    assert_eq!(
        exit_of(|ids| vec![ids.vcpu, ids.vcpu, ids.u32]),
        differs(
            Place::Parameter(1),
            "void (struct kvm_vcpu *, struct kvm_vcpu *, u32)"
        )
    );
    assert_eq!(
        exit_of(|ids| vec![ids.pointer, ids.vcpu, ids.long]),
        differs(
            Place::Parameter(3),
            "void (void *, struct kvm_vcpu *, unsigned long)"
        )
    );
    assert_eq!(
        exit_of(|ids| vec![ids.pointer]),
        differs(Place::Count, "void (void *)")
    );
    let entry = |ids: &Ids, file: &mut File| {
        file.tracepoint(ENTRY.typedef, 0, &[ids.pointer, ids.vcpu, ids.u32]);
    };
    assert_eq!(
        compared(entry, &ENTRY),
        differs(Place::Parameter(3), "void (void *, struct kvm_vcpu *, u32)")
    );
    let returns = |ids: &Ids, file: &mut File| {
        file.tracepoint(EXIT.typedef, ids.int, &[ids.pointer, ids.vcpu, ids.u32]);
    };
    assert_eq!(
        compared(returns, &EXIT),
        differs(Place::Return, "int (void *, struct kvm_vcpu *, u32)")
    );
}

#[test]
fn expected_prototypes_show_as_in_c() {
    assert_eq!(EXIT.to_string(), "void (void *, struct kvm_vcpu *, u32)");
    assert_eq!(ENTRY.to_string(), "void (void *, struct kvm_vcpu *, bool)");
}

#[test]
fn separates_missing_tracepoints_from_damage() {
    let (kernel, module) = files(0, |ids, file| {
        file.tracepoint(EXIT.typedef, 0, &[ids.pointer]);
    });
    let types = Types::read(&kernel, &module).unwrap();
    assert_eq!(types.compare(&ENTRY).unwrap_err(), Unknown::Missing);
    let damaged = |kernel: &[u8], module: &[u8]| {
        assert_eq!(Types::read(kernel, module).unwrap_err(), Unknown::Damaged);
    };
    damaged(&kernel, &[]);
    damaged(&[], &module);
    // Cut short, and of another version.
    damaged(&kernel, &module[..module.len() - 1]);
    let mut later = module.clone();
    later[2] = 2;
    damaged(&kernel, &later);
    // An unknown kind: the size of its data is unknown, too.
    let mut unknown = module.clone();
    unknown[24 + 7] = 20;
    damaged(&kernel, &unknown);
}

/// A typedef of itself, and pointers to pointers without end.
#[test]
fn circular_types_end() {
    for kind in [TYPEDEF, PTR] {
        let circle = |ids: &Ids, file: &mut File| {
            let own = file.next_id;
            file.add("circle", kind, 0, own, &[]);
            file.tracepoint(EXIT.typedef, 0, &[own, ids.vcpu, own]);
        };
        let (place, found) = compared(circle, &EXIT).unwrap();
        assert_eq!(place, Place::Parameter(1));
        assert!(found.len() < 100, "{found}");
    }
}

/// Check that the reader stops at some point and never reads beyond the bytes.
fn survives(kernel: &[u8], module: &[u8]) {
    let Ok(types) = Types::read(kernel, module) else {
        return;
    };
    for probe in [EXIT, ENTRY] {
        if let Ok(Verdict::Differs(_, found)) = types.compare(&probe) {
            assert!(found.to_string().len() < 2000);
        }
    }
}

proptest! {
    #[test]
    fn survives_random_bytes(
        kernel in prop::collection::vec(any::<u8>(), 0..200),
        module in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        survives(&kernel, &module);
    }

    /// Change a few words of valid files.
    #[test]
    fn survives_damaged_files(
        damage in prop::collection::vec(
            (any::<bool>(), any::<prop::sample::Index>(), prop_oneof![any::<u32>(), 0_u32..40]),
            1..8,
        ),
    ) {
        let (mut kernel, mut module) = files(3, |ids, file| {
            file.tracepoint(EXIT.typedef, 0, &[ids.pointer, ids.vcpu, ids.u32]);
            file.tracepoint(ENTRY.typedef, 0, &[ids.pointer, ids.vcpu, ids.bool]);
        });
        for (of_module, at, word) in damage {
            let bytes = if of_module { &mut module } else { &mut kernel };
            let at = at.index(bytes.len() - 3);
            bytes[at..][..4].copy_from_slice(&word.to_le_bytes());
        }
        survives(&kernel, &module);
    }
}

/// Kind of a union (linux/btf.h).
const UNION: u32 = 5;
/// For a struct with bit fields: the top bit of the word that holds its kind.
const WITH_FIELDS: u32 = 1 << 7;

#[test]
fn finds_members_at_the_compilers_offsets() {
    let (kernel, module) = files(20_000, |ids, module| {
        // The struct is: struct inner { u32 one; u64 two; }; the members of the other one are
        // anonymous.
        let name = |module: &mut File, name: &str| {
            let at = module.first_name + module.names.len() as u32;
            module.names.extend(name.bytes().chain([0]));
            at
        };
        let [one, two, three, inner, low, full, field, whole] = [
            "one", "two", "three", "inner", "low", "full", "field", "whole",
        ]
        .map(|it| name(module, it));
        let inner_type = module.add("inner", STRUCT, 2, 16, &[one, ids.u32, 0, two, ids.u64, 64]);
        let renamed = module.add("inner_t", TYPEDEF, 0, inner_type, &[]);
        let both = module.add("", UNION, 2, 8, &[low, ids.u32, 0, full, ids.u64, 0]);
        let nameless = module.add("", STRUCT, 1, 8, &[three, ids.u64, 0]);
        module.add(
            "outer",
            STRUCT,
            4,
            64,
            &[
                one, ids.u32, 0, inner, renamed, 64, 0, both, 192, 0, nameless, 256,
            ],
        );
        // 4 bits at bit 36, then a whole number behind them.
        module.add(
            "fields",
            STRUCT | WITH_FIELDS,
            2,
            16,
            &[field, ids.u32, 4 << 24 | 36, whole, ids.u32, 64],
        );
        module.tracepoint("btf_trace_kvm_exit", 0, &[ids.pointer, ids.u32, ids.vcpu]);
        module.tracepoint("btf_trace_other", 0, &[ids.pointer, ids.u64]);
    });
    let types = Types::read(&kernel, &module).expect("the files are whole");
    for (structure, member, at) in [
        ("outer", "one", Some(0)),
        ("outer", "inner", Some(8)),
        ("outer", "inner.two", Some(16)),
        ("outer", "low", Some(24)),
        ("outer", "full", Some(24)),
        ("outer", "three", Some(32)),
        ("outer", "two", None),
        ("outer", "inner.three", None),
        ("outer", "one.two", None),
        ("outer", "", None),
        ("inner", "two", Some(8)),
        ("inner_t", "two", None),
        ("fields", "field", None),
        ("fields", "whole", Some(8)),
        ("kvm_vcpu", "nothing", None),
        ("nobody", "one", None),
    ] {
        assert_eq!(
            types.offset_of(structure, member),
            at,
            "{structure}.{member}"
        );
    }
    assert_eq!(
        types.parameters_before("btf_trace_kvm_exit", "kvm_vcpu"),
        Some(1)
    );
    assert_eq!(types.parameters_before("btf_trace_other", "kvm_vcpu"), None);
    assert_eq!(types.parameters_before("btf_trace_none", "kvm_vcpu"), None);
    assert!(types.has_typedef("btf_trace_other") && !types.has_typedef("btf_trace_none"));
}

#[test]
fn struct_that_contains_itself_ends() {
    let (kernel, module) = files(0, |ids, module| {
        let own = module.next_id;
        module.add("loop", UNION - 1, 2, 8, &[0, own, 0, 0, ids.u64, 0]);
    });
    let types = Types::read(&kernel, &module).expect("the files are whole");
    assert_eq!(types.offset_of("loop", "nothing"), None);
}
