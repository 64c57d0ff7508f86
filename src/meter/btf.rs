// SPDX-License-Identifier: GPL-2.0

//! Comparison of a module's tracepoint prototype with a probe's parameters, by the kernel's own
//! types (BTF, Documentation/bpf/btf.rst).
//!
//! The prototypes of KVM's tracepoints are in a header private to KVM, so no compiler compares
//! them. BTF holds each as a typedef `btf_trace_NAME` (include/trace/bpf_probe.h).
//!
//! A module's types continue those of the kernel: its first id follows the kernel's last id, and
//! its names follow the kernel's names. So both sections are read, in one pass each. A look-up
//! takes at most `STRIDE` steps.

use core::fmt;

/// Number of types between two marks.
const STRIDE: u32 = 8192;

/// Number of marks in a section, enough for [`MAX_TYPES`].
const MARKS: usize = 128;

/// Limit for the number of types in a section, exclusive: ids are no larger (linux/btf.h,
/// BTF_MAX_TYPE).
const MAX_TYPES: u32 = 1 << 20;

/// Maximum length of a chain of typedefs, pointers and qualifiers.
const MAX_DEPTH: usize = 16;

/// Maximum number of parameters shown.
const MAX_SHOWN: usize = 8;
/// Maximum length of a name shown, in bytes.
const MAX_NAME: usize = 48;

/// Kinds of types (linux/btf.h, BTF_KIND_*).
mod kind {
    pub(super) const VOID: u32 = 0;
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const FWD: u32 = 7;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const FLOAT: u32 = 16;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// Encoding of a bool integer (linux/btf.h, BTF_INT_BOOL).
const INT_BOOL: u32 = 4;

/// A parameter of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// `void *`.
    Pointer,
    /// A pointer to the struct of this name.
    PointerTo(&'static str),
    /// `u32`.
    U32,
    /// `bool`.
    Bool,
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Parameter::Pointer => f.write_str("void *"),
            Parameter::PointerTo(name) => write!(f, "struct {name} *"),
            Parameter::U32 => f.write_str("u32"),
            Parameter::Bool => f.write_str("bool"),
        }
    }
}

/// A probe. It returns nothing.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// Name of the tracepoint's typedef.
    pub typedef: &'static str,
    /// Parameters of the probe.
    pub parameters: &'static [Parameter],
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("void (")?;
        for (place, parameter) in self.parameters.iter().enumerate() {
            let comma = if place == 0 { "" } else { ", " };
            write!(f, "{comma}{parameter}")?;
        }
        f.write_str(")")
    }
}

/// Reason why a prototype could not be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// The bytes are not BTF, or of a later version.
    Damaged,
    /// The typedef does not exist.
    Missing,
}

/// First difference between two prototypes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The return type.
    Return,
    /// The number of parameters.
    Count,
    /// One parameter, counted from 1.
    Parameter(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Return => f.write_str("the return type"),
            Place::Count => f.write_str("the number of parameters"),
            Place::Parameter(number) => write!(f, "parameter {number}"),
        }
    }
}

/// Result of a comparison.
#[derive(Clone, Copy, Debug)]
pub enum Verdict<'a> {
    /// The kernel may call the probe.
    Fits,
    /// The kernel may not call the probe.
    Differs(Place, Prototype<'a>),
}

/// A type, as BTF lays it out.
#[derive(Clone, Copy, Debug)]
struct Type<'a> {
    name: u32,
    kind: u32,
    /// For a forward declaration: set if it is a union.
    flag: bool,
    /// Its size in bytes, or the id of another type.
    value: u32,
    /// Data behind the head, by kind.
    tail: &'a [u8],
}

impl Type<'_> {
    /// Type with the id 0.
    const VOID: Self = Self {
        name: 0,
        kind: kind::VOID,
        flag: false,
        value: 0,
        tail: &[],
    };
}

/// Return the four bytes at an offset.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*four))
}

/// Split `bytes` into its first type and the rest.
fn take(bytes: &[u8]) -> Option<(Type<'_>, &[u8])> {
    let info = word(bytes, 4)?;
    // In older kernels these fields have 16 and 5 bits, and the other bits are 0.
    let (count, kind) = (info & 0x00ff_ffff, (info >> 24) & 0x7f);
    let (each, count) = match kind {
        kind::INT | kind::VAR | kind::DECL_TAG => (4, 1),
        kind::ARRAY => (12, 1),
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => (12, count),
        kind::ENUM | kind::FUNC_PROTO => (8, count),
        kind::PTR
        | kind::FWD
        | kind::TYPEDEF
        | kind::VOLATILE
        | kind::CONST
        | kind::RESTRICT
        | kind::FUNC
        | kind::FLOAT
        | kind::TYPE_TAG => (0, 0),
        _ => return None,
    };
    let size = (count as usize).checked_mul(each)?;
    let (tail, rest) = bytes.get(12..)?.split_at_checked(size)?;
    let this = Type {
        name: word(bytes, 0)?,
        kind,
        flag: info >> 31 != 0,
        value: word(bytes, 8)?,
        tail,
    };
    Some((this, rest))
}

/// Types of the kernel, or types that a module adds.
#[derive(Clone, Copy, Debug)]
struct Section<'a> {
    types: &'a [u8],
    names: &'a [u8],
    first_id: u32,
    count: u32,
    /// Offset of each [`STRIDE`]th type.
    marks: [u32; MARKS],
}

impl<'a> Section<'a> {
    /// Read the header, and walk over all types.
    fn read(bytes: &'a [u8], first_id: u32) -> Option<Self> {
        /// Magic number, and version 1 without flags.
        const BEGIN: u32 = 0x0001_eb9f;

        if word(bytes, 0)? != BEGIN {
            return None;
        }
        let body = bytes.get(word(bytes, 4)? as usize..)?;
        let part = |at| {
            let (offset, size) = (word(bytes, at)?, word(bytes, at.checked_add(4)?)?);
            body.get(offset as usize..)?.get(..size as usize)
        };
        let mut section = Self {
            types: part(8)?,
            names: part(16)?,
            first_id,
            count: 0,
            marks: [0; MARKS],
        };
        let mut rest = section.types;
        while !rest.is_empty() {
            if section.count.checked_rem(STRIDE) == Some(0) {
                let at = section.types.len().checked_sub(rest.len())?;
                let mark = section.marks.get_mut((section.count / STRIDE) as usize)?;
                *mark = u32::try_from(at).ok()?;
            }
            rest = take(rest)?.1;
            section.count = section.count.checked_add(1)?;
            if section.count >= MAX_TYPES {
                return None;
            }
        }
        Some(section)
    }

    /// Return the first type that matches.
    fn find(&self, is_it: impl Fn(&Type<'a>) -> bool) -> Option<Type<'a>> {
        let mut rest = self.types;
        while let Some((this, after)) = take(rest) {
            if is_it(&this) {
                return Some(this);
            }
            rest = after;
        }
        None
    }

    /// Return the id of the first type that matches.
    fn id(&self, is_it: impl Fn(&Type<'a>) -> bool) -> Option<u32> {
        let mut rest = self.types;
        let mut id = self.first_id;
        while let Some((this, after)) = take(rest) {
            if is_it(&this) {
                return Some(id);
            }
            rest = after;
            id = id.checked_add(1)?;
        }
        None
    }

    /// Return the type with an id.
    fn get(&self, id: u32) -> Option<Type<'a>> {
        let place = id.checked_sub(self.first_id)?;
        if place >= self.count {
            return None;
        }
        let mark = *self.marks.get((place / STRIDE) as usize)?;
        let mut rest = self.types.get(mark as usize..)?;
        for _ in 0..place % STRIDE {
            rest = take(rest)?.1;
        }
        Some(take(rest)?.0)
    }
}

/// Types of a module and of the kernel under it.
#[derive(Clone, Copy, Debug)]
pub struct Types<'a> {
    kernel: Section<'a>,
    module: Section<'a>,
}

impl<'a> Types<'a> {
    /// Read the bytes of `/sys/kernel/btf/vmlinux` and of the module's file beside it.
    ///
    /// # Errors
    ///
    /// [`Unknown::Damaged`].
    pub fn read(kernel: &'a [u8], module: &'a [u8]) -> Result<Self, Unknown> {
        let both = || {
            let kernel = Section::read(kernel, 1)?;
            let module = Section::read(module, kernel.count.checked_add(1)?)?;
            Some(Self { kernel, module })
        };
        both().ok_or(Unknown::Damaged)
    }

    /// Compare the prototype of a module's tracepoint with a probe. Typedefs are resolved; const is
    /// a difference, as it is for CFI.
    ///
    /// # Errors
    ///
    /// The reason why the two cannot be compared.
    pub fn compare(&self, probe: &Probe) -> Result<Verdict<'_>, Unknown> {
        let typedef = self.typedef(probe.typedef).ok_or(Unknown::Missing)?;
        let found = self.prototype(typedef).ok_or(Unknown::Damaged)?;
        let fits = |(expected, id)| self.is(id, expected);
        let place = if found.returns().ok_or(Unknown::Damaged)?.kind != kind::VOID {
            Place::Return
        } else if found.parameters().count() != probe.parameters.len() {
            Place::Count
        } else {
            let mut pairs = probe.parameters.iter().copied().zip(found.parameters());
            match pairs.position(|pair| !fits(pair)) {
                None => return Ok(Verdict::Fits),
                Some(place) => Place::Parameter(place.saturating_add(1)),
            }
        };
        Ok(Verdict::Differs(place, found))
    }

    /// Return the offset of a struct's member, in bytes, or `None` if there is no such struct or
    /// member, or the member is a bit field. The member may be nested, as in "arch.vm_type".
    /// Members of an anonymous struct or union are named as in C.
    pub fn offset_of(&self, structure: &str, member: &str) -> Option<u32> {
        let mut of = self.structure(structure)?;
        let mut bits = 0_u32;
        let mut names = member.split('.').peekable();
        while let Some(name) = names.next() {
            let (at, id) = self.member(&of, name, MAX_DEPTH)?;
            bits = bits.checked_add(at)?;
            if names.peek().is_some() {
                of = self.plain(id)?;
            }
        }
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// Return the number of parameters that a tracepoint passes to a probe before the first pointer
    /// to the named struct. The probe's own data, which comes first, does not count.
    pub fn parameters_before(&self, tracepoint: &str, structure: &'static str) -> Option<usize> {
        let prototype = self.prototype(self.typedef(tracepoint)?)?;
        let mut parameters = prototype.parameters().skip(1);
        parameters.position(|id| self.is(id, Parameter::PointerTo(structure)))
    }

    /// Return true if the module has a typedef with this name. Each of its tracepoints has one
    /// (`btf_trace_NAME`).
    pub fn has_typedef(&self, name: &str) -> bool {
        self.typedef(name).is_some()
    }

    /// Return the id of a struct of the kernel, by its name.
    pub fn kernel_struct_id(&self, name: &str) -> Option<u32> {
        self.id_in(&self.kernel, kind::STRUCT, name)
    }

    /// Return the id of a function of the kernel, by its name.
    pub fn kernel_function_id(&self, name: &str) -> Option<u32> {
        self.id_in(&self.kernel, kind::FUNC, name)
    }

    /// Return the id of a function of the module, by its name.
    pub fn module_function_id(&self, name: &str) -> Option<u32> {
        self.id_in(&self.module, kind::FUNC, name)
    }

    /// Return the value of an enumerator of the module or, failing that, of the kernel.
    pub fn enumerator(&self, name: &str) -> Option<u32> {
        let value = |of: &Type<'_>| {
            let mut all = of.tail.chunks_exact(8);
            let is_it =
                |one: &[u8]| word(one, 0).and_then(|at| self.name_at(at)) == Some(name.as_bytes());
            all.find(|one| is_it(one)).and_then(|one| word(one, 4))
        };
        let has = |it: &Type<'_>| it.kind == kind::ENUM && value(it).is_some();
        let found = self.module.find(has).or_else(|| self.kernel.find(has))?;
        value(&found)
    }

    /// Return the id of a section's first type with this kind and name.
    fn id_in(&self, section: &Section<'a>, kind: u32, name: &str) -> Option<u32> {
        section.id(|it| it.kind == kind && self.name(it) == Some(name.as_bytes()))
    }

    /// Return the struct with a name, from the module or the kernel.
    fn structure(&self, name: &str) -> Option<Type<'a>> {
        let is_it =
            |it: &Type<'_>| it.kind == kind::STRUCT && self.name(it) == Some(name.as_bytes());
        self.module.find(is_it).or_else(|| self.kernel.find(is_it))
    }

    /// Return the offset of a member, in bits, and the id of its type.
    fn member(&self, of: &Type<'_>, name: &str, depth: usize) -> Option<(u32, u32)> {
        if !matches!(of.kind, kind::STRUCT | kind::UNION) {
            return None;
        }
        for member in of.tail.chunks_exact(12) {
            let (called, id, at) = (word(member, 0)?, word(member, 4)?, word(member, 8)?);
            // If some members are bit fields, the top byte holds the size of the field in bits
            // (linux/btf.h).
            let (at, field) = if of.flag {
                (at & 0x00ff_ffff, at >> 24)
            } else {
                (at, 0)
            };
            if called == 0 {
                let within = depth
                    .checked_sub(1)
                    .and_then(|depth| self.member(&self.plain(id)?, name, depth));
                if let Some((inner, id)) = within {
                    return Some((at.checked_add(inner)?, id));
                }
            } else if self.name_at(called) == Some(name.as_bytes()) {
                return (field == 0).then_some((at, id));
            }
        }
        None
    }

    /// Return the type with an id.
    fn get(&self, id: u32) -> Option<Type<'a>> {
        if id == 0 {
            return Some(Type::VOID);
        }
        self.kernel.get(id).or_else(|| self.module.get(id))
    }

    /// Return a type's name.
    fn name(&self, of: &Type<'_>) -> Option<&'a [u8]> {
        self.name_at(of.name)
    }

    /// Return the name at an offset.
    fn name_at(&self, at: u32) -> Option<&'a [u8]> {
        let at = at as usize;
        let from = match at.checked_sub(self.kernel.names.len()) {
            None => self.kernel.names.get(at..)?,
            Some(at) => self.module.names.get(at..)?,
        };
        from.split(|byte| *byte == 0).next()
    }

    /// Return the typedef with a name, from the module or the kernel.
    fn typedef(&self, name: &str) -> Option<Type<'a>> {
        let is_it =
            |it: &Type<'_>| it.kind == kind::TYPEDEF && self.name(it) == Some(name.as_bytes());
        self.module.find(is_it).or_else(|| self.kernel.find(is_it))
    }

    /// Return the function type of a tracepoint's typedef, which names a pointer to it.
    fn prototype(&self, typedef: Type<'a>) -> Option<Prototype<'_>> {
        let pointer = self.get(typedef.value)?;
        let function = self.get(pointer.value)?;
        (pointer.kind == kind::PTR && function.kind == kind::FUNC_PROTO).then_some(Prototype {
            types: self,
            function,
        })
    }

    /// Return the type with an id, after resolving typedefs and tags.
    fn plain(&self, mut id: u32) -> Option<Type<'a>> {
        for _ in 0..MAX_DEPTH {
            let this = self.get(id)?;
            if !matches!(this.kind, kind::TYPEDEF | kind::TYPE_TAG) {
                return Some(this);
            }
            id = this.value;
        }
        None
    }

    /// Return true if an id has the type of a parameter. Return false if that cannot be determined.
    fn is(&self, id: u32, expected: Parameter) -> bool {
        let Some(this) = self.plain(id) else {
            return false;
        };
        // Size, and the word with encoding, offset and number of bits.
        let integer = || (this.kind == kind::INT).then(|| (this.value, word(this.tail, 0)));
        let target = || {
            (this.kind == kind::PTR)
                .then(|| self.plain(this.value))
                .flatten()
        };
        match expected {
            Parameter::Pointer => target().is_some_and(|it| it.kind == kind::VOID),
            Parameter::PointerTo(name) => target().is_some_and(|it| {
                let is_struct = it.kind == kind::STRUCT || it.kind == kind::FWD && !it.flag;
                is_struct && self.name(&it) == Some(name.as_bytes())
            }),
            Parameter::U32 => integer() == Some((4, Some(32))),
            Parameter::Bool => integer() == Some((1, Some(INT_BOOL << 24 | 8))),
        }
    }

    /// Format a type as in C, within the limits of a line of the log.
    fn write(&self, f: &mut fmt::Formatter<'_>, mut id: u32) -> fmt::Result {
        let mut pointers = 0_usize;
        for _ in 0..MAX_DEPTH {
            let Some(this) = self.get(id) else {
                break;
            };
            let before = match this.kind {
                kind::PTR => {
                    pointers = pointers.saturating_add(1);
                    id = this.value;
                    continue;
                }
                kind::CONST | kind::VOLATILE | kind::RESTRICT | kind::TYPE_TAG => {
                    f.write_str(match this.kind {
                        kind::CONST => "const ",
                        kind::VOLATILE => "volatile ",
                        _ => "",
                    })?;
                    id = this.value;
                    continue;
                }
                kind::VOID => "void",
                kind::STRUCT => "struct ",
                kind::UNION => "union ",
                kind::FWD if this.flag => "union ",
                kind::FWD => "struct ",
                kind::ENUM | kind::ENUM64 => "enum ",
                kind::FUNC_PROTO => "function",
                kind::ARRAY => "array",
                _ => "",
            };
            f.write_str(before)?;
            for byte in self.name(&this).unwrap_or(b"?").iter().take(MAX_NAME) {
                // A name may have spaces, as in "unsigned int".
                let is_fit = byte.is_ascii_graphic() || *byte == b' ';
                let shown = if is_fit { *byte } else { b'?' };
                write!(f, "{}", char::from(shown))?;
            }
            for place in 0..pointers {
                f.write_str(if place == 0 { " *" } else { "*" })?;
            }
            return Ok(());
        }
        f.write_str("?")
    }
}

/// Prototype of a tracepoint, displayed as in C.
#[derive(Clone, Copy)]
pub struct Prototype<'a> {
    types: &'a Types<'a>,
    function: Type<'a>,
}

impl Prototype<'_> {
    /// Return the return type.
    fn returns(&self) -> Option<Type<'_>> {
        self.types.plain(self.function.value)
    }

    /// Return the ids of the parameters' types. Each follows a name.
    fn parameters(&self) -> impl Iterator<Item = u32> + '_ {
        let tail = self.function.tail.chunks_exact(8);
        tail.filter_map(|parameter| word(parameter, 4))
    }
}

impl fmt::Debug for Prototype<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Prototype<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.types.write(f, self.function.value)?;
        f.write_str(" (")?;
        for (place, parameter) in self.parameters().enumerate() {
            f.write_str(if place == 0 { "" } else { ", " })?;
            if place >= MAX_SHOWN {
                f.write_str("...")?;
                break;
            }
            self.types.write(f, parameter)?;
        }
        f.write_str(")")
    }
}
