// SPDX-License-Identifier: GPL-2.0

//! Disassembled functions, and the longest way through one.

use std::collections::{BTreeMap, HashMap};

use anyhow::{bail, Context as _, Result};

/// What comes after an instruction.
#[derive(Clone, Debug, PartialEq)]
enum Next {
    /// The one behind it.
    Behind,
    /// That, or the one at this address.
    Either(u64),
    /// The one at this address.
    Jump(u64),
    /// This function of ours, then the one behind it.
    Call(String),
    /// The caller.
    Return,
    /// What is out of line, and not part of the path.
    Away,
}

/// What comes after each instruction of a function, by its address.
type Function = BTreeMap<u64, Next>;

/// The functions of a module.
#[derive(Debug, Default)]
pub struct Code {
    functions: HashMap<String, Function>,
    /// By the address of a NOP: where the jump goes that takes its place while the key is on.
    branches: HashMap<u64, u64>,
}

/// Functions that a call goes to and comes back from at once: the kernel turns the first
/// into a NOP, the others into the call itself.
const TRANSPARENT: [&str; 2] = ["__fentry__", THUNK];
const THUNK: &str = "__x86_indirect_thunk_";

/// Functions of the module that are part of the path: the readers of the shim.
const OURS: &str = "exitmeter_";

impl Code {
    /// Reads what `objdump -r -j __jump_table` prints: three relocations for each branch, of the NOP,
    /// of where the jump goes, and of the key (struct jump_entry in linux/jump_label.h).
    pub fn add_branches(&mut self, text: &str) {
        let places: Vec<Option<u64>> = text
            .lines()
            .filter_map(|line| line.split_once(" R_X86_64_"))
            .map(|(_, relocation)| {
                let at = relocation.split_once(".text+0x")?.1.trim();
                u64::from_str_radix(at, 16).ok()
            })
            .collect();
        for entry in places.chunks(3) {
            if let [Some(nop), Some(target), None] = entry {
                self.branches.insert(*nop, *target);
            }
        }
    }

    /// Reads what `objdump -dr --no-show-raw-insn` prints.
    pub fn parse(text: &str) -> Self {
        let mut code = Self::default();
        let mut name = String::new();
        let (mut last, mut was_nop) = (None, false);
        for line in text.lines() {
            if let Some((_, rest)) = line.split_once(" <").filter(|_| line.ends_with(">:")) {
                name = rest.trim_end_matches(">:").to_owned();
                code.functions.entry(name.clone()).or_default();
                continue;
            }
            let Some(function) = code.functions.get_mut(&name) else {
                continue;
            };
            if let Some((_, relocation)) = line.split_once(": R_X86_64_") {
                // Belongs to the instruction before it, and says where that really goes.
                if let Some(next) = last.and_then(|at| function.get_mut(&at)) {
                    relocate(next, relocation);
                }
            } else if let Some((at, instruction)) = line.split_once(":\t") {
                let Ok(at) = u64::from_str_radix(at.trim(), 16) else {
                    continue;
                };
                // The kernel makes one NOP of several as it loads the module (optimize_nops()).
                let is_nop = instruction.trim() == "nop";
                if !(is_nop && was_nop) {
                    function.insert(at, next(instruction));
                    last = Some(at);
                }
                was_nop = is_nop;
            }
        }
        code
    }

    /// The instructions of the longest way through a function: one of C's of that name, or one of
    /// Rust's, whose mangled name ends in the length of its own and that (RFC 2603). One that takes
    /// a constant is named with it, as `name::<true>`. `with_branches` tells whether the keys of all
    /// branches are on.
    ///
    /// # Errors
    ///
    /// When there is no such function, or no way through it that stays in line.
    pub fn longest(&self, name: &str, with_branches: bool) -> Result<usize> {
        self.longest_in_line(name, with_branches)?
            .with_context(|| format!("every way through {name} leads to code out of line"))
    }

    /// Return the same; `None` when no way through it stays in line.
    fn longest_in_line(&self, name: &str, with_branches: bool) -> Result<Option<usize>> {
        let (plain, constant) = match name.split_once("::<") {
            Some((plain, "false>")) => (plain, "Kb0_E"),
            Some((plain, "true>")) => (plain, "Kb1_E"),
            _ => (name, ""),
        };
        let mangled = format!("{}{plain}{constant}", plain.len());
        let is_it = |full: &&String| {
            let is_mangled = match constant {
                "" => full.ends_with(&mangled),
                _ => full.contains(&mangled),
            };
            *full == name || is_mangled && !full.starts_with("__pfx_")
        };
        let full = self.functions.keys().find(is_it);
        let full = full.with_context(|| format!("the module has no function {name}"))?;
        let function = &self.functions[full];
        let Some((&start, _)) = function.first_key_value() else {
            bail!("the function {name} is empty");
        };
        let mut ways = Ways {
            code: self,
            with_branches,
            function,
            known: HashMap::new(),
        };
        ways.longest_from(start)
    }
}

/// What comes after an instruction, by itself.
fn next(instruction: &str) -> Next {
    let mut words = instruction.split_whitespace();
    let operation = words.next().unwrap_or_default();
    let target = words
        .next()
        .and_then(|word| u64::from_str_radix(word, 16).ok());
    match (operation, target) {
        ("ret", _) => Next::Return,
        ("jmp", Some(target)) => Next::Jump(target),
        ("jmp" | "ud2", _) => Next::Away,
        ("call", _) => Next::Away,
        (jump, Some(target)) if jump.starts_with('j') => Next::Either(target),
        _ => Next::Behind,
    }
}

/// Where a call or jump goes that the linker or the kernel is to fill in.
fn relocate(next: &mut Next, relocation: &str) {
    let symbol = relocation.split_whitespace().nth(1).unwrap_or_default();
    let symbol = symbol.split(['-', '+']).next().unwrap_or_default();
    *next = match next {
        Next::Jump(_) if symbol == "__x86_return_thunk" => Next::Return,
        // What is called returns in place of this function.
        Next::Jump(_) if symbol.starts_with(THUNK) => Next::Return,
        Next::Jump(_) => Next::Away,
        Next::Away if TRANSPARENT.iter().any(|name| symbol.starts_with(name)) => Next::Behind,
        Next::Away if symbol.starts_with(OURS) => Next::Call(symbol.to_owned()),
        _ => return,
    };
}

/// The ways through one function.
struct Ways<'a> {
    code: &'a Code,
    with_branches: bool,
    function: &'a Function,
    /// The longest from an address; none yet where a way is just being followed.
    known: HashMap<u64, Option<usize>>,
}

impl Ways<'_> {
    /// The longest way from an address to the end, not twice over any instruction.
    fn longest_from(&mut self, at: u64) -> Result<Option<usize>> {
        if let Some(known) = self.known.get(&at) {
            return Ok(*known);
        }
        self.known.insert(at, None);
        let Some(next) = self.function.get(&at) else {
            // Into another function.
            return Ok(None);
        };
        let branch = self.code.branches.get(&at).filter(|_| self.with_branches);
        let next = &branch.map_or_else(|| next.clone(), |target| Next::Jump(*target));
        let behind = self.function.range(at + 1..).next().map(|(&at, _)| at);
        let follow = |this: &mut Self, at: Option<u64>| match at {
            Some(at) => this.longest_from(at),
            None => Ok(None),
        };
        let rest = match next {
            Next::Return => Some(0),
            Next::Away => None,
            Next::Behind => follow(self, behind)?,
            Next::Jump(target) => follow(self, Some(*target))?,
            Next::Either(target) => follow(self, behind)?.max(follow(self, Some(*target))?),
            Next::Call(name) => {
                let called = self.code.longest_in_line(name, self.with_branches)?;
                follow(self, behind)?
                    .zip(called)
                    .map(|(rest, called)| rest + called)
            }
        };
        let longest = rest.map(|rest| rest + 1);
        self.known.insert(at, longest);
        Ok(longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "
exitmeter.ko:     file format elf64-x86-64

Disassembly of section .text:

0000000000000010 <_RNv9exitmeter7on_exit>:
      10:\tendbr64
      14:\ttest   %rdi,%rdi
      17:\tje     28 <_RNv9exitmeter7on_exit+0x18>
      1d:\tmov    0x8(%rdi),%rax
      21:\tsub    $0x1,%rax
      25:\tjb     1d <_RNv9exitmeter7on_exit+0xd>
      27:\tjmp    2c <_RNv9exitmeter7on_exit+0x1c>
\t\t\t28: R_X86_64_PLT32\t__x86_return_thunk-0x4
      28:\tcall   2d <_RNv9exitmeter7on_exit+0x1d>
\t\t\t29: R_X86_64_PLT32\t.text+0x75dc
      2d:\tjmp    1d <_RNv9exitmeter7on_exit+0xd>

0000000000000040 <exitmeter_code>:
      40:\tcall   45 <exitmeter_code+0x5>
\t\t\t41: R_X86_64_PLT32\t__fentry__-0x4
      45:\txor    %eax,%eax
      47:\tret

0000000000000050 <_RNv9exitmeter6on_svm>:
      50:\tcall   55 <_RNv9exitmeter6on_svm+0x5>
\t\t\t51: R_X86_64_PLT32\texitmeter_code-0x4
      55:\tjmp    5a <_RNv9exitmeter6on_svm+0xa>
\t\t\t56: R_X86_64_PLT32\t.text+0x90

0000000000000060 <_RNv9exitmeter8on_other>:
      60:\tcall   65 <_RNv9exitmeter8on_other+0x5>
\t\t\t61: R_X86_64_PLT32\texitmeter_code-0x4
      65:\tret

0000000000000070 <exitmeter_tail>:
      70:\tcall   75 <exitmeter_tail+0x5>
\t\t\t71: R_X86_64_PLT32\t__fentry__-0x4
      75:\txor    %eax,%eax
      77:\tjmp    7c <exitmeter_tail+0xc>
\t\t\t78: R_X86_64_PLT32\t__x86_indirect_thunk_rax-0x4

0000000000000080 <_RINv9exitmeter6on_keyKb1_EB4_>:
      80:\tnopl   0x0(%rax,%rax,1)
      85:\txor    %eax,%eax
      87:\txor    %eax,%eax
      89:\txor    %eax,%eax
      8b:\tret
";

    const TABLE: &str = "
RELOCATION RECORDS FOR [__jump_table]:
OFFSET           TYPE              VALUE
0000000000000000 R_X86_64_PC32     .text+0x0000000000000080
0000000000000004 R_X86_64_PC32     .text+0x000000000000008b
0000000000000008 R_X86_64_PC64     exitmeter_details+0x0000000000000002
";

    #[test]
    fn counts_the_longest_way_in_line() -> Result<()> {
        let code = Code::parse(SAVED);
        // Loops once, and not by the call.
        assert_eq!(code.longest("on_exit", false)?, 7);
        assert_eq!(code.longest("exitmeter_code", false)?, 3);
        assert_eq!(code.longest("on_other", false)?, 5);
        assert_eq!(code.longest("exitmeter_tail", false)?, 3);
        Ok(())
    }

    #[test]
    fn a_branch_goes_where_its_entry_says() -> Result<()> {
        let mut code = Code::parse(SAVED);
        code.add_branches(TABLE);
        assert_eq!(code.longest("on_key::<true>", false)?, 5);
        assert_eq!(code.longest("on_key::<true>", true)?, 2);
        assert_eq!(code.longest("on_exit", true)?, 7);
        assert!(code.longest("on_key::<false>", false).is_err());
        Ok(())
    }

    #[test]
    fn a_path_that_always_leaves_is_none() {
        let code = Code::parse(SAVED);
        assert!(code.longest("on_svm", false).is_err());
        assert!(code.longest("on_entry", false).is_err());
    }
}
