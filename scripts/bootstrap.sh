#!/bin/bash
# Sees to it that this machine has the few commands that all else starts from; the rest comes into the Debian root.
#
#   scripts/bootstrap.sh [COMMAND]...    (rustfmt, cargo-clippy, shellcheck: what `make check` wants besides)
#
# As root on Debian 12 or later it installs what is missing; elsewhere it says what that is. When nothing is, it
# takes no time.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"
export PATH="${HOME:-/root}/.cargo/bin:$PATH"

# The oldest Rust that the workspace is for.
rust=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$here/../Cargo.toml")

# at_least VERSION WANTED
at_least() { printf '%s\n%s\n' "$2" "$1" | sort --version-sort --check=quiet; }

# has COMMAND: whether it is there, and new enough.
has() {
  case $1 in
    cargo) command -v cargo rustc >/dev/null && at_least "$(rustc --version 2>/dev/null | cut -d ' ' -f 2)" "$rust" ;;
    # Programs of the lab are linked statically.
    libc.a) [ -n "$(find /usr/lib /usr/lib64 -maxdepth 2 -name libc.a -print -quit 2>/dev/null)" ] ;;
    ca-certificates) [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -e /etc/ssl/cert.pem ] ;;
    keyring) [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] ;;
    newuidmap) [ "$(id -u)" = 0 ] || command -v newuidmap >/dev/null ;;
    # cargo-clippy alone may be rustup's proxy of a toolchain without it.
    rustfmt | cargo-clippy) "$1" --version >/dev/null 2>&1 ;;
    *) command -v "$1" >/dev/null ;;
  esac
}

# package COMMAND: what Debian has it in.
package() {
  case $1 in
    cargo) printf 'cargo%s rustc%s' "$web" "$web" ;;
    rustfmt) printf 'rustfmt%s' "$web" ;;
    cargo-clippy) printf 'rust%s-clippy' "$web" ;;
    cc) printf gcc ;;
    libc.a) printf libc6-dev ;;
    keyring) printf debian-archive-keyring ;;
    newuidmap) printf uidmap ;;
    unshare) printf util-linux ;;
    *) printf '%s' "$1" ;;
  esac
}

missing=()
for command in make cc libc.a cargo mmdebstrap unshare mount newuidmap keyring ca-certificates "$@"; do
  has "$command" || missing+=("$command")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
  die "this machine lacks ${missing[*]}; install them (cargo means Rust $rust or later)."
fi
web=
packages() { for command in "${missing[@]}"; do package "$command" && printf ' '; done; }
if [ "$(id -u)" != 0 ]; then
  die "this machine lacks ${missing[*]}; as root, run scripts/bootstrap.sh or apt-get install $(packages)."
fi

say "installing what this machine lacks: ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
run "$log" apt-get update || die "the lists of packages could not be fetched; check the network and the mirror."
candidate() { apt-cache policy "$1" | sed -n 's/^  Candidate: //p'; }
# Debian 12 has a second, newer Rust, for its browsers.
at_least "$(candidate rustc)" "$rust" || web=-web
if ! has cargo && ! at_least "$(candidate "rustc$web")" "$rust"; then
  die "no Rust $rust or later is to be had from this machine's mirror; install one (rustup, or Debian 13)."
fi
# Nothing is removed for it: the machine is not ours.
# shellcheck disable=SC2046
run "$log" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-remove --no-install-recommends $(packages) ||
  die "the packages $(packages) could not be installed; the reason is above."
for command in "${missing[@]}"; do
  has "$command" || die "the package $(package "$command") is installed and $command is still missing; see PATH."
done
