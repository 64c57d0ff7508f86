// SPDX-License-Identifier: GPL-2.0

//! Parses disassembled functions and finds the longest path through one.

use std::collections::{BTreeMap, HashMap};

use anyhow::{bail, Context as _, Result};

/// Control flow after an instruction.
#[derive(Clone, Debug, PartialEq)]
enum Flow {
    /// Continues with the next instruction.
    Next,
    /// Continues with the next instruction, or jumps to this address.
    Either(u64),
    /// Jumps to this address.
    Jump(u64),
    /// Calls this function of the module, then continues with the next instruction.
    Call(String),
    /// Returns to the caller.
    Return,
    /// Leaves for code out of line, which is not part of the path.
    OutOfLine,
}

/// Instructions of a function, by address.
type Function = BTreeMap<u64, Flow>;

/// The functions of a module.
#[derive(Debug, Default)]
pub struct Code {
    functions: HashMap<String, Function>,
    /// Static branches: address of the NOP, and target of the jump that replaces it while the key is on.
    branches: HashMap<u64, u64>,
}

/// Callees that count as no call: the kernel turns a call of the first into a NOP, and a call of the
/// others into the indirect call itself.
const TRANSPARENT: [&str; 2] = ["__fentry__", THUNK];
const THUNK: &str = "__x86_indirect_thunk_";

/// Prefix of the shim's functions, which are part of the path.
const SHIM: &str = "exitmeter_";

impl Code {
    /// Add the static branches that `objdump -r -j __jump_table` prints. Each has three relocations: the
    /// NOP, the jump's target and the key (struct jump_entry in linux/jump_label.h).
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

    /// Parse the output of `objdump -dr --no-show-raw-insn`.
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
                // A relocation belongs to the instruction before it and gives its real target.
                if let Some(flow) = last.and_then(|at| function.get_mut(&at)) {
                    relocate(flow, relocation);
                }
            } else if let Some((at, instruction)) = line.split_once(":\t") {
                let Ok(at) = u64::from_str_radix(at.trim(), 16) else {
                    continue;
                };
                // The kernel makes one NOP of several as it loads the module (optimize_nops()).
                let is_nop = instruction.trim() == "nop";
                if !(is_nop && was_nop) {
                    function.insert(at, flow_after(instruction));
                    last = Some(at);
                }
                was_nop = is_nop;
            }
        }
        code
    }

    /// Return the number of instructions on the longest path through a function.
    ///
    /// `name` is that of a C function, or of a Rust function, whose mangled name ends in the name's
    /// length and the name (RFC 2603). A const generic argument follows it, as in `name::<true>`. With
    /// `with_branches` all static keys are on.
    ///
    /// # Errors
    ///
    /// There is no such function, or every path through it leads out of line.
    pub fn longest(&self, name: &str, with_branches: bool) -> Result<usize> {
        self.longest_in_line(name, with_branches)?
            .with_context(|| format!("every path through {name} leads to code out of line"))
    }

    /// Like [`Self::longest`], but return `None` when every path leads out of line.
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
        let mut paths = Paths {
            code: self,
            with_branches,
            function,
            known: HashMap::new(),
        };
        paths.longest_from(start)
    }
}

/// Return the control flow after an instruction, before its relocation is known.
fn flow_after(instruction: &str) -> Flow {
    let mut words = instruction.split_whitespace();
    let operation = words.next().unwrap_or_default();
    let target = words
        .next()
        .and_then(|word| u64::from_str_radix(word, 16).ok());
    match (operation, target) {
        ("ret", _) => Flow::Return,
        ("jmp", Some(target)) => Flow::Jump(target),
        ("jmp" | "ud2", _) => Flow::OutOfLine,
        ("call", _) => Flow::OutOfLine,
        (jump, Some(target)) if jump.starts_with('j') => Flow::Either(target),
        _ => Flow::Next,
    }
}

/// Resolve the target of a call or jump that still has a relocation.
fn relocate(flow: &mut Flow, relocation: &str) {
    let symbol = relocation.split_whitespace().nth(1).unwrap_or_default();
    let symbol = symbol.split(['-', '+']).next().unwrap_or_default();
    *flow = match flow {
        Flow::Jump(_) if symbol == "__x86_return_thunk" => Flow::Return,
        // A tail call: the callee returns in place of this function.
        Flow::Jump(_) if symbol.starts_with(THUNK) => Flow::Return,
        Flow::Jump(_) => Flow::OutOfLine,
        Flow::OutOfLine if TRANSPARENT.iter().any(|name| symbol.starts_with(name)) => Flow::Next,
        Flow::OutOfLine if symbol.starts_with(SHIM) => Flow::Call(symbol.to_owned()),
        _ => return,
    };
}

/// Search for the longest path through one function.
struct Paths<'a> {
    code: &'a Code,
    with_branches: bool,
    function: &'a Function,
    /// Longest path from each address; `None` also while the path from there is being followed.
    known: HashMap<u64, Option<usize>>,
}

impl Paths<'_> {
    /// Return the longest path from an address to the end that takes no instruction twice.
    fn longest_from(&mut self, at: u64) -> Result<Option<usize>> {
        if let Some(known) = self.known.get(&at) {
            return Ok(*known);
        }
        self.known.insert(at, None);
        let Some(flow) = self.function.get(&at) else {
            // The address is in another function.
            return Ok(None);
        };
        let branch = self.code.branches.get(&at).filter(|_| self.with_branches);
        let flow = &branch.map_or_else(|| flow.clone(), |target| Flow::Jump(*target));
        let next = self.function.range(at + 1..).next().map(|(&at, _)| at);
        let follow = |this: &mut Self, at: Option<u64>| match at {
            Some(at) => this.longest_from(at),
            None => Ok(None),
        };
        let rest = match flow {
            Flow::Return => Some(0),
            Flow::OutOfLine => None,
            Flow::Next => follow(self, next)?,
            Flow::Jump(target) => follow(self, Some(*target))?,
            Flow::Either(target) => follow(self, next)?.max(follow(self, Some(*target))?),
            Flow::Call(name) => {
                let called = self.code.longest_in_line(name, self.with_branches)?;
                follow(self, next)?
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

    const DISASSEMBLY: &str = "
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

    const JUMP_TABLE: &str = "
RELOCATION RECORDS FOR [__jump_table]:
OFFSET           TYPE              VALUE
0000000000000000 R_X86_64_PC32     .text+0x0000000000000080
0000000000000004 R_X86_64_PC32     .text+0x000000000000008b
0000000000000008 R_X86_64_PC64     exitmeter_details+0x0000000000000002
";

    #[test]
    fn counts_the_longest_path_in_line() -> Result<()> {
        let code = Code::parse(DISASSEMBLY);
        // The longest path takes the loop once and avoids the call.
        assert_eq!(code.longest("on_exit", false)?, 7);
        assert_eq!(code.longest("exitmeter_code", false)?, 3);
        assert_eq!(code.longest("on_other", false)?, 5);
        assert_eq!(code.longest("exitmeter_tail", false)?, 3);
        Ok(())
    }

    #[test]
    fn a_static_branch_jumps_to_its_target() -> Result<()> {
        let mut code = Code::parse(DISASSEMBLY);
        code.add_branches(JUMP_TABLE);
        assert_eq!(code.longest("on_key::<true>", false)?, 5);
        assert_eq!(code.longest("on_key::<true>", true)?, 2);
        assert_eq!(code.longest("on_exit", true)?, 7);
        assert!(code.longest("on_key::<false>", false).is_err());
        Ok(())
    }

    #[test]
    fn a_function_without_a_path_in_line_is_an_error() {
        let code = Code::parse(DISASSEMBLY);
        assert!(code.longest("on_svm", false).is_err());
        assert!(code.longest("on_entry", false).is_err());
    }
}
