// SPDX-License-Identifier: GPL-2.0

//! Symbols of a guest's kernel: its /proc/kallsyms, or the System.map of its build.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read as _},
    path::{Path, PathBuf},
};

/// Maximum size of a file, in bytes. A kernel with all of its modules has some 20 MB.
const MAX_FILE_SIZE: u64 = 1 << 30;
/// Maximum length of a line, in bytes: `KSYM_NAME_LEN` of Linux is 512, and a module's name is
/// shorter.
const MAX_LINE: usize = 4096;
/// Maximum distance of code from its symbol when no other symbol follows, in bytes.
const MAX_OFFSET: u64 = 1 << 20;

/// Reason why symbols cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        error: io::Error,
    },
    /// A line is not a symbol.
    #[error(
        "{}: line {line} {what}: each line must be an address, a type and a name, as of \
         /proc/kallsyms in the guest or of a System.map",
        path.display()
    )]
    Line {
        /// Path of the file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// Fault of the line.
        what: &'static str,
    },
    /// The file has no symbols of code.
    #[error("{}: none of its {lines} lines is a symbol of code (types t, T, w and W)", path.display())]
    NoCode {
        /// Path of the file.
        path: PathBuf,
        /// Number of lines.
        lines: usize,
    },
    /// The guest hides its addresses.
    #[error(
        "{}: all addresses are 0: the guest hides them from users other than root; \
         read /proc/kallsyms there as root, with kernel.kptr_restrict=0 or 1",
        path.display()
    )]
    Hidden {
        /// Path of the file.
        path: PathBuf,
    },
    /// The file is too large.
    #[error("{}: larger than 1 GiB: this is not a list of symbols", path.display())]
    Large {
        /// Path of the file.
        path: PathBuf,
    },
}

/// A symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Symbol {
    address: u64,
    /// Quality of the name for code at this address: 0 for data, more is better.
    rank: u8,
    name: Box<str>,
}

/// Symbols of a guest.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    /// Symbols sorted by address, each address once.
    symbols: Vec<Symbol>,
}

/// Place in the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// Symbol, with the module's name in brackets as in kallsyms.
    pub symbol: &'a str,
    /// Bytes from the start of the symbol.
    pub offset: u64,
}

impl Symbols {
    /// Read the symbols of a file.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be read, or is no list of symbols. Then the error names
    /// the line.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let unreadable = |error| Error::Unreadable {
            path: path.to_owned(),
            error,
        };
        let file = File::open(path).map_err(unreadable)?;
        Self::parse(BufReader::new(file.take(MAX_FILE_SIZE + 1)), path)
    }

    /// Read the symbols of a file, or return none without a file.
    ///
    /// # Errors
    ///
    /// See [`Self::read`].
    pub fn read_optional(path: Option<&Path>) -> Result<Self, Error> {
        path.map_or_else(|| Ok(Self::default()), Self::read)
    }

    fn parse(mut from: impl BufRead, path: &Path) -> Result<Self, Error> {
        let mut symbols = Vec::new();
        let mut bytes = Vec::new();
        let (mut lines, mut size) = (0, 0);
        loop {
            bytes.clear();
            // Read up to one byte more than allowed, so that a longer line is noticed.
            let limit = MAX_LINE as u64 + 1;
            let read = from.by_ref().take(limit).read_until(b'\n', &mut bytes);
            let read = read.map_err(|error| Error::Unreadable {
                path: path.to_owned(),
                error,
            })?;
            if read == 0 {
                break;
            }
            size += read as u64;
            if size > MAX_FILE_SIZE {
                return Err(Error::Large {
                    path: path.to_owned(),
                });
            }
            lines += 1;
            let symbol = symbol(&bytes).map_err(|what| Error::Line {
                path: path.to_owned(),
                line: lines,
                what,
            })?;
            symbols.push(symbol);
        }
        if !symbols.is_empty() && symbols.iter().all(|symbol| symbol.address == 0) {
            return Err(Error::Hidden {
                path: path.to_owned(),
            });
        }
        if symbols.iter().all(|symbol| symbol.rank == 0) {
            return Err(Error::NoCode {
                path: path.to_owned(),
                lines,
            });
        }
        // Sort the best symbol of an address first, and equal ones in the order of the file.
        symbols.sort_by_key(|symbol| (symbol.address, u8::MAX - symbol.rank));
        symbols.dedup_by_key(|symbol| symbol.address);
        Ok(Self { symbols })
    }

    /// Find the symbol that the code at an address belongs to.
    pub fn find(&self, address: u64) -> Option<Place<'_>> {
        let behind = self
            .symbols
            .partition_point(|symbol| symbol.address <= address);
        let symbol = self.symbols.get(behind.checked_sub(1)?)?;
        let offset = address.checked_sub(symbol.address)?;
        (symbol.rank != 0 && offset < MAX_OFFSET).then_some(Place {
            symbol: &symbol.name,
            offset,
        })
    }
}

/// Parse a line: `ffffffff81000000 T _text`, in kallsyms with a tab and `[module]` behind it.
fn symbol(line: &[u8]) -> Result<Symbol, &'static str> {
    if line.len() > MAX_LINE {
        return Err("is too long");
    }
    let line = std::str::from_utf8(line).map_err(|_| "is no text")?;
    let line = line.trim_end_matches(['\n', '\r']);
    let mut words = line.split([' ', '\t']).filter(|word| !word.is_empty());
    let address = words.next().ok_or("is empty")?;
    let digits = address.bytes().all(|byte| byte.is_ascii_hexdigit());
    let address = u64::from_str_radix(address, 16).ok().filter(|_| digits);
    let address = address.ok_or("does not begin with an address")?;
    let kind = words.next().filter(|kind| kind.len() == 1);
    let kind = kind.ok_or("has no type of one letter")?;
    let mut name = words.next().ok_or("has no name")?.to_owned();
    if let Some(module) = words.next() {
        if !(module.starts_with('[') && module.ends_with(']')) {
            return Err("has more than a module's name in brackets after the symbol");
        }
        name = format!("{name} {module}");
    }
    if words.next().is_some() {
        return Err("has too many words");
    }
    if name.contains(char::is_control) {
        return Err("has control characters");
    }
    let rank = match kind {
        "T" => 3,
        "W" | "w" => 2,
        "t" => 1,
        _ => 0,
    };
    Ok(Symbol {
        address,
        rank,
        name: name.into(),
    })
}

/// Return the half of the address space that an address is in.
pub fn half(address: u64) -> &'static str {
    match address >> 63 {
        1 => "kernel",
        _ => "user",
    }
}

/// Describe a place in the guest's code: by its symbol and the bytes from the start of the symbol,
/// or by its address.
pub fn words(address: u64, symbol: Option<(&str, u64)>) -> String {
    match symbol {
        Some((symbol, offset)) => format!("{symbol}+{offset:#x}"),
        None => format!("{address:#x} ({})", half(address)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KALLSYMS: &str = "\
0000000000000000 A fixed_percpu_data
ffffffff9a000000 T _text
ffffffff9a000000 T startup_64
ffffffff9a000040 t local
ffffffff9a000040 T global
ffffffff9a000080 D data
ffffffffc0001000 t of_module\t[virtio_net]
";

    fn parse(text: impl AsRef<[u8]>) -> Result<Symbols, String> {
        let parsed = Symbols::parse(text.as_ref(), Path::new("k"));
        parsed.map_err(|error| error.to_string())
    }

    #[test]
    fn code_is_found_by_its_symbol() {
        let symbols = parse(KALLSYMS).unwrap();
        let find = |address| {
            symbols
                .find(address)
                .map(|place| (place.symbol, place.offset))
        };
        assert_eq!(find(0xffff_ffff_9a00_0000), Some(("_text", 0)));
        assert_eq!(find(0xffff_ffff_9a00_003f), Some(("_text", 0x3f)));
        assert_eq!(find(0xffff_ffff_9a00_0041), Some(("global", 1)));
        // Data, user space, an address before all symbols of code, and one far behind the last.
        assert_eq!(find(0xffff_ffff_9a00_0081), None);
        assert_eq!(find(0x40_0000), None);
        assert_eq!(find(0xffff_ffff_99ff_ffff), None);
        assert_eq!(
            find(0xffff_ffff_c000_1008),
            Some(("of_module [virtio_net]", 8))
        );
        assert_eq!(find(u64::MAX), None);
        assert_eq!(
            [half(0x40_0000), half(0xffff_ffff_9a00_0000)],
            ["user", "kernel"]
        );
    }

    #[test]
    fn other_files_are_refused_with_the_line() {
        let refused = |text: &[u8], line: usize, what: &str| {
            let error = parse(text).unwrap_err();
            assert!(
                error.starts_with(&format!("k: line {line} {what}: ")),
                "{error}"
            );
        };
        refused(b"ffffffff9a000000 T _text\n\n", 2, "is empty");
        refused(b"hello\n", 1, "does not begin with an address");
        refused(b"+1 T name\n", 1, "does not begin with an address");
        refused(
            b"11112222333344445 T name\n",
            1,
            "does not begin with an address",
        );
        refused(b"ff TT name\n", 1, "has no type of one letter");
        refused(b"ff T\n", 1, "has no name");
        refused(
            b"ff T a b\n",
            1,
            "has more than a module's name in brackets after the symbol",
        );
        refused(b"ff T a [b] c\n", 1, "has too many words");
        refused(b"ff T a\x1b[31m\n", 1, "has control characters");
        refused(b"1 T a\nff T \xff\xfe\n", 2, "is no text");
        refused(
            &[&b"1 T a\nff T "[..], &[b'x'; 5000]].concat(),
            2,
            "is too long",
        );
        refused(&[0; 4096], 1, "does not begin with an address");
        let error = parse("00 T a\n00 t b\n").unwrap_err();
        assert!(error.contains("all addresses are 0"), "{error}");
        for none in ["", "ff D data\n"] {
            let error = parse(none).unwrap_err();
            assert!(error.contains("is a symbol of code"), "{error}");
        }
        let error = Symbols::read(Path::new("/nonexistent")).unwrap_err();
        assert!(error.to_string().starts_with("cannot read /nonexistent: "));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, address: u64) {
            if let Ok(symbols) = parse(&bytes) {
                let _ = symbols.find(address);
            }
        }
    }
}
