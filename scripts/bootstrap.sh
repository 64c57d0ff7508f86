#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Installs the few commands that everything else starts from, and fetches the crates. All other tools go into the Debian
# root.
#
#   scripts/bootstrap.sh [COMMAND]...           also install these (clang: for the tool's BPF meter; browser: for the tests of
#                                               the page; rustfmt, cargo-clippy, shellcheck: for `make check`)
#   scripts/bootstrap.sh --tool [COMMAND]...    only the commands that the tool needs, on any distribution: `make KDIR=...`
#
# As root on Debian 12 or later it installs missing commands; elsewhere it names them. If none is missing, it takes no
# time.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"
export PATH="${HOME:-/root}/.cargo/bin:$PATH"

# Oldest Rust that builds the workspace.
rust=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$here/../Cargo.toml")

# at_least VERSION WANTED: succeeds if VERSION is WANTED or newer.
at_least() { printf '%s\n%s\n' "$2" "$1" | sort --version-sort --check=quiet; }

# has COMMAND: succeeds if it is installed, and new enough.
has() {
  case $1 in
    cargo)
      command -v cargo >/dev/null && command -v rustc >/dev/null &&
        at_least "$(rustc --version 2>/dev/null | cut -d ' ' -f 2)" "$rust"
      ;;
    # Programs of this workspace are linked statically.
    libc.a) [ -n "$(find /usr/lib /usr/lib64 -maxdepth 2 -name libc.a -print -quit 2>/dev/null)" ] ;;
    ca-certificates) [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -e /etc/ssl/cert.pem ] ;;
    keyring) [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] ;;
    newuidmap) [ "$(id -u)" = 0 ] || command -v newuidmap >/dev/null ;;
    # cli/tests/browser looks for the same names.
    browser)
      local name
      for name in chromium-headless-shell chromium chromium-browser google-chrome; do
        ! command -v "$name" >/dev/null || return 0
      done
      return 1
      ;;
    # The file cargo-clippy may be rustup's proxy, in a toolchain without it.
    rustfmt | cargo-clippy) "$1" --version >/dev/null 2>&1 ;;
    *) command -v "$1" >/dev/null ;;
  esac
}

# package COMMAND: prints the Debian packages that have it.
package() {
  case $1 in
    cargo) printf 'cargo%s rustc%s' "$web" "$web" ;;
    rustfmt) printf 'rustfmt%s' "$web" ;;
    cargo-clippy) printf 'rust%s-clippy' "$web" ;;
    cc) printf gcc ;;
    libc.a) printf libc6-dev ;;
    # Chromium without windows; its libraries bring a font.
    browser) printf chromium-headless-shell ;;
    node) printf nodejs ;;
    keyring) printf debian-archive-keyring ;;
    newuidmap) printf uidmap ;;
    unshare) printf util-linux ;;
    *) printf '%s' "$1" ;;
  esac
}

# candidate PACKAGE: prints the version that apt would install, or nothing if it knows none.
candidate() { LC_ALL=C apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: \([0-9].*\)/\1/p'; }

# logged CMD...: runs CMD, and shows the end of its output if it fails.
logged() {
  if [ -z "$log" ]; then
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
  fi
  run "$log" "$@"
}
log=

# Installs the missing commands, or names them.
install_missing() {
  local packages command
  command -v apt-get >/dev/null ||
    die "this machine lacks ${missing[*]}; install them (cargo means Rust $rust or later)."
  if [ "$(id -u)" = 0 ]; then
    say "installing what this machine lacks: ${missing[*]}"
    logged apt-get update || die "the lists of packages could not be fetched; check the network and the mirror."
  fi
  # Debian 12 has a second, newer Rust, for its browsers.
  web=
  if ! at_least "$(candidate rustc)" "$rust" && at_least "$(candidate rustc-web)" "$rust"; then
    web=-web
  fi
  if ! has cargo && ! at_least "$(candidate "rustc$web")" "$rust"; then
    die "this machine lacks cargo, and its mirror has no Rust $rust or later; install one (rustup, or Debian 13), or run apt-get update if it never ran."
  fi
  read -r -a packages <<<"$(for command in "${missing[@]}"; do package "$command" && printf ' '; done)"
  if [ "$(id -u)" != 0 ]; then
    die "this machine lacks ${missing[*]}; as root, run scripts/bootstrap.sh or apt-get install ${packages[*]}."
  fi
  # No package may be removed for it: the machine belongs to the user.
  logged env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-remove --no-install-recommends "${packages[@]}" ||
    die "the packages ${packages[*]} could not be installed; the reason is above."
  for command in "${missing[@]}"; do
    has "$command" || die "the package $(package "$command") is installed and $command is still missing; see PATH."
  done
}

# Fetches missing crates. This is done here because cargo's own messages about a missing network are long, and name no
# remedy.
fetch_crates() {
  cd "$here/.."
  ! cargo fetch --quiet --locked --offline 2>/dev/null || return 0
  say "fetching the crates"
  # Not --locked, so that dependencies can be changed.
  logged cargo fetch --quiet ||
    die "the crates could not be fetched; check the network, or name its proxy (https_proxy=http://HOST:PORT)."
}

wanted=(make cc libc.a cargo)
if [ "${1:-}" = --tool ]; then
  shift
else
  wanted+=(mmdebstrap unshare mount newuidmap keyring ca-certificates)
fi
missing=()
for command in "${wanted[@]}" "$@"; do
  has "$command" || missing+=("$command")
done
[ "${#missing[@]}" = 0 ] || install_missing
fetch_crates
