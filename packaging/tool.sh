#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Builds the static tool, its manual pages and completions, and the list of its crates with their licences.
#
#   packaging/tool.sh PREFIX    PREFIX/bin, PREFIX/share; crates come from CARGO_HOME, without the network
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
prefix=$1
target=$(sed -n 's/^target = "\(.*\)"/\1/p' .cargo/config.toml)

# Without this, paths of this machine would be in panics and debug info, and another folder would give another program.
export RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo --remap-path-prefix=$PWD=/exitmeter"
export CARGO_PROFILE_RELEASE_DEBUG=0 CARGO_PROFILE_RELEASE_STRIP=symbols CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1
cargo build --locked --offline --release -p exitmeter
install -D "${CARGO_TARGET_DIR:-target}/$target/release/exitmeter" "$prefix/bin/exitmeter"
tool=$prefix/bin/exitmeter

"$tool" man "$prefix/share/man/man1"
install -d "$prefix"/share/{bash-completion/completions,zsh/vendor-completions,fish/vendor_completions.d,doc/exitmeter}
"$tool" completions bash >"$prefix/share/bash-completion/completions/exitmeter"
"$tool" completions zsh >"$prefix/share/zsh/vendor-completions/_exitmeter"
"$tool" completions fish >"$prefix/share/fish/vendor_completions.d/exitmeter.fish"
{
  echo "The tool is linked statically with these crates, each under the licence named; their sources are in Rust's public registry."
  echo
  cargo tree --locked --offline -p exitmeter --edges normal --target "$target" --prefix none --format '{p}  {l}' |
    sed 's/ (\*)$//; s/ ([^)]*)  /  /; s/ (proc-macro)//' | LC_ALL=C sort -u
} >"$prefix/share/doc/exitmeter/crates.txt"
