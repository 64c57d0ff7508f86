// SPDX-License-Identifier: GPL-2.0

//! Compares the prototype of a tracepoint of a module with what a probe takes, by the kernel's own
//! types (BTF, Documentation/bpf/btf.rst).
//!
//! The prototypes of KVM's tracepoints are in a header private to KVM, so no compiler compares them.
//! BTF holds each as a typedef `btf_trace_NAME` (include/trace/bpf_probe.h).
//!
//! A module's types go on where those of the kernel end: its first id is behind their last, and its
//! names behind theirs. So both are read, in one pass each; a look-up takes at most `STRIDE` steps.

use core::fmt;

/// Types between two marks.
const STRIDE: u32 = 8192;

/// Marks of a section, enough for [`MAX_TYPES`].
const MARKS: usize = 128;

/// How many types a section has less than: ids are no larger (linux/btf.h, BTF_MAX_TYPE).
const MAX_TYPES: u32 = 1 << 20;

/// How many typedefs, pointers and qualifiers are followed.
const MAX_DEPTH: usize = 16;

/// How many parameters, and bytes of a name, are shown.
const MAX_SHOWN: usize = 8;
/// See [`MAX_SHOWN`].
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

/// An integer's encoding that says it is a bool (linux/btf.h, BTF_INT_BOOL).
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

/// A probe, which returns nothing.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// The name of the tracepoint's typedef.
    pub typedef: &'static str,
    /// What the probe takes.
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

/// Why a prototype could not be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// The bytes are no types, or of a later version.
    Damaged,
    /// There is no such typedef.
    Missing,
}

/// The first place at which a prototype differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It returns something.
    Return,
    /// It has another number of parameters.
    Count,
    /// One parameter, counted from 1.
    Parameter(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Return => f.write_str("what it returns"),
            Place::Count => f.write_str("the number of parameters"),
            Place::Parameter(number) => write!(f, "parameter {number}"),
        }
    }
}

/// The outcome of a comparison.
#[derive(Clone, Copy, Debug)]
pub enum Verdict<'a> {
    /// The probe may be called.
    Fits,
    /// It may not.
    Differs(Place, Prototype<'a>),
}

/// A type, as BTF lays it out.
#[derive(Clone, Copy, Debug)]
struct Type<'a> {
    name: u32,
    kind: u32,
    /// For a forward declaration: whether it is of a union.
    flag: bool,
    /// Its size in bytes, or another type's id.
    value: u32,
    /// What follows, by the kind.
    tail: &'a [u8],
}

impl Type<'_> {
    /// What has the id 0.
    const VOID: Self = Self {
        name: 0,
        kind: kind::VOID,
        flag: false,
        value: 0,
        tail: &[],
    };
}

/// Return four bytes at a place.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*four))
}

/// Return the type at the begin of `bytes`, and what comes after it.
fn take(bytes: &[u8]) -> Option<(Type<'_>, &[u8])> {
    let info = word(bytes, 4)?;
    // Where these have 16 and 5 bits, as in older kernels, the others are 0.
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

/// The types of the kernel, or those that a module adds.
#[derive(Clone, Copy, Debug)]
struct Section<'a> {
    types: &'a [u8],
    names: &'a [u8],
    first_id: u32,
    count: u32,
    /// Where each [`STRIDE`]th type begins.
    marks: [u32; MARKS],
}

impl<'a> Section<'a> {
    /// Read the header, and pass over all types.
    fn read(bytes: &'a [u8], first_id: u32) -> Option<Self> {
        /// The magic number, and version 1 without flags.
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

    /// Return the first type that is so.
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

    /// Return the id of the first type that is so.
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

    /// Return the type of an id.
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

/// The types of a module and of the kernel under it.
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

    /// Compare what a tracepoint of the module calls with a probe. Typedefs are looked through;
    /// const is a difference, as it is for CFI.
    ///
    /// # Errors
    ///
    /// Why the two cannot be compared.
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

    /// Return where a struct has a member, in bytes from its begin; `None` where there is no such struct or member, or
    /// it is a bit field. The member may be one of a member, as in "arch.vm_type". One of an anonymous struct or union is
    /// named as in C.
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

    /// Return how many parameters come before the first that is a pointer to the struct of this name, in what a
    /// tracepoint passes to a probe. Its own data, the first of all, does not count.
    pub fn parameters_before(&self, tracepoint: &str, structure: &'static str) -> Option<usize> {
        let prototype = self.prototype(self.typedef(tracepoint)?)?;
        let mut parameters = prototype.parameters().skip(1);
        parameters.position(|id| self.is(id, Parameter::PointerTo(structure)))
    }

    /// Return true if the module has a typedef of this name, as for each of its tracepoints (`btf_trace_NAME`).
    pub fn has_typedef(&self, name: &str) -> bool {
        self.typedef(name).is_some()
    }

    /// Return the id of the kernel's struct of a name.
    pub fn kernel_struct_id(&self, name: &str) -> Option<u32> {
        self.id_in(&self.kernel, kind::STRUCT, name)
    }

    /// Return the id of the kernel's function of a name.
    pub fn kernel_function_id(&self, name: &str) -> Option<u32> {
        self.id_in(&self.kernel, kind::FUNC, name)
    }

    /// Return the id of the module's function of a name.
    pub fn module_function_id(&self, name: &str) -> Option<u32> {
        self.id_in(&self.module, kind::FUNC, name)
    }

    /// Return the value of an enumerator of the module's, or of the kernel's.
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

    /// Return the id of a section's first type of a kind and name.
    fn id_in(&self, section: &Section<'a>, kind: u32, name: &str) -> Option<u32> {
        section.id(|it| it.kind == kind && self.name(it) == Some(name.as_bytes()))
    }

    /// Return the struct of a name: the module's, or the kernel's.
    fn structure(&self, name: &str) -> Option<Type<'a>> {
        let is_it =
            |it: &Type<'_>| it.kind == kind::STRUCT && self.name(it) == Some(name.as_bytes());
        self.module.find(is_it).or_else(|| self.kernel.find(is_it))
    }

    /// Return where a struct or union has a member, in bits, and the member's type.
    fn member(&self, of: &Type<'_>, name: &str, depth: usize) -> Option<(u32, u32)> {
        if !matches!(of.kind, kind::STRUCT | kind::UNION) {
            return None;
        }
        for member in of.tail.chunks_exact(12) {
            let (called, id, at) = (word(member, 0)?, word(member, 4)?, word(member, 8)?);
            // Where some members are bit fields, the top byte is how many bits one has (linux/btf.h).
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

    /// Return the type of an id.
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

    /// Return the name at a place.
    fn name_at(&self, at: u32) -> Option<&'a [u8]> {
        let at = at as usize;
        let from = match at.checked_sub(self.kernel.names.len()) {
            None => self.kernel.names.get(at..)?,
            Some(at) => self.module.names.get(at..)?,
        };
        from.split(|byte| *byte == 0).next()
    }

    /// Return the typedef of a name: the module's, or the kernel's.
    fn typedef(&self, name: &str) -> Option<Type<'a>> {
        let is_it =
            |it: &Type<'_>| it.kind == kind::TYPEDEF && self.name(it) == Some(name.as_bytes());
        self.module.find(is_it).or_else(|| self.kernel.find(is_it))
    }

    /// Return the function type behind a tracepoint's typedef, which is of a pointer to it.
    fn prototype(&self, typedef: Type<'a>) -> Option<Prototype<'_>> {
        let pointer = self.get(typedef.value)?;
        let function = self.get(pointer.value)?;
        (pointer.kind == kind::PTR && function.kind == kind::FUNC_PROTO).then_some(Prototype {
            types: self,
            function,
        })
    }

    /// Return the type of an id, behind typedefs and tags.
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

    /// Return true if an id is of the type of a parameter. Not if that cannot be told.
    fn is(&self, id: u32, expected: Parameter) -> bool {
        let Some(this) = self.plain(id) else {
            return false;
        };
        // The encoding, the offset and the number of bits.
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

    /// Write a type as C does, as far as it fits a line of the log.
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
                // Such as "unsigned int".
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

/// The prototype of a tracepoint; it shows as in C.
#[derive(Clone, Copy)]
pub struct Prototype<'a> {
    types: &'a Types<'a>,
    function: Type<'a>,
}

impl Prototype<'_> {
    /// Return the type of what it returns.
    fn returns(&self) -> Option<Type<'_>> {
        self.types.plain(self.function.value)
    }

    /// Return the parameters' types; each follows a name.
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
