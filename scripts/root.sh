#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Set-up step "root": a Debian 13 root in OUT, with everything that builds and runs the lab.
#
# Needs: OUT. About 3 GB, most of it fetched from the machine's own Debian mirror, or from
# mmdebstrap's default when the machine has none. Interrupted, it goes on where it stopped: what is fetched stays.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"

suite=trixie
packages=(
  # The kernel tree and the module: C, Rust as CONFIG_RUST wants it, clippy for what we write.
  gcc-14 libc6-dev make bc flex bison pahole libelf-dev libssl-dev kmod cpio xz-utils zstd python3-minimal perl
  rustc rust-src rust-clippy rustfmt bindgen clang-19
  # Bochs, with the tables its machine boots from.
  g++-14 pkg-config patch bochsbios vgabios
  # The AMD host; QEMU's microvm is the guest's VMM on both. From backports, as Debian 13's own loses interrupts of a
  # host with SVM (docs/testing.md, "Where the emulators are not sound").
  {qemu-system-x86,qemu-system-common,qemu-system-data,seabios}/trixie-backports
  # What host and guest run.
  busybox-static cpuid
)

need_variables OUT
need_namespaces
need_command mmdebstrap mmdebstrap
mkdir -p "$OUT"
[ -e "$OUT/.base" ] || need_space "$OUT" 3500
log=$OUT/set-up.log

# The base. It is unpacked in one go and marked when whole; a part of it from an interrupted run is worthless.
if [ ! -e "$OUT/.base" ]; then
  say "the base of Debian $suite"
  as_root find "$OUT" -mindepth 1 -delete
  : >"$log"
  mirror=$(debian_mirror)
  options=(
    --variant=apt --components=main --format=tar
    # No tables of contents for people: they are a third of the files.
    --dpkgopt='path-exclude=/usr/share/man/*'
    --dpkgopt='path-exclude=/usr/share/locale/*'
    --dpkgopt='path-exclude=/usr/share/doc/*'
    --dpkgopt='path-include=/usr/share/doc/*/copyright'
    --dpkgopt='path-exclude=/usr/share/info/*'
    # Nothing is linked with clang's libraries, and of Rust's source only the library is compiled: a third of all
    # that is unpacked, and most files.
    --dpkgopt='path-exclude=/usr/lib/llvm-*/lib/*.a'
    --dpkgopt='path-exclude=/usr/src/rustc-*'
    --dpkgopt='path-include=/usr/src/rustc-*/library/*'
    # The folder counts only when it is whole, so no package has to reach the disk before the next.
    --dpkgopt=force-unsafe-io
    --aptopt='APT::Install-Recommends "false"'
    --aptopt='Acquire::Languages "none"'
    --aptopt='Acquire::Retries "3"'
    --aptopt='APT::Sandbox::User "root"'
  )
  while IFS= read -r line; do
    [ -z "$line" ] || options+=(--aptopt="$line")
  done <<<"$(apt_config)"
  # Where it works. Without root that has to be /tmp: the sub-ids may not enter a home.
  temporary=/tmp
  if [ "$(id -u)" = 0 ]; then
    temporary=$OUT/.mmdebstrap
    mkdir "$temporary"
  fi
  # A tar on the way, because only so mmdebstrap works alike with root and with user namespaces.
  if ! { TMPDIR=$temporary mmdebstrap "${options[@]}" "$suite" - ${mirror:+"$mirror"} 2>>"$log" |
    as_root tar -x --numeric-owner --exclude='./dev/*' -C "$OUT"; }; then
    tail -n 15 "$log" >&2
    die "the base of Debian $suite could not be fetched; check the network and the mirror (the log is $log)."
  fi
  # shellcheck disable=SC2016
  as_root sh -c '
    set -e
    rm -rf "$1/.mmdebstrap"
    sources=$1/etc/apt/sources.list
    main=$(grep -m 1 "^deb .* $2 " "$sources")
    grep -q " $2-updates " "$sources" || printf "%s\n" "$main" | sed "s| $2 | $2-updates |" >>"$sources"
    printf "%s\n" "$main" | sed "s| $2 | $2-backports |" >>"$sources"
    # Sources too: Bochs is built from one.
    sed -n "s|^deb \(.* $2 .*\)|deb-src \1|p" "$sources" >"$1/tmp/sources" && cat "$1/tmp/sources" >>"$sources"
    rm "$1/tmp/sources"
    touch "$1/.base"' sh "$OUT" "$suite" || die "the sources of $OUT could not be written; remove it and try again."
fi

inside() {
  "$here/in-root.sh" "$OUT" --write -- env DEBIAN_FRONTEND=noninteractive "$@"
}

say "the lists of packages"
run "$log" inside apt-get update ||
  die "the lists of packages could not be fetched; check the network and try again (the log is $log)."
# An earlier run may have been stopped between unpacking and setting up.
run "$log" inside dpkg --configure -a ||
  die "the root in $OUT is damaged; remove it and try again."
say "the packages: fetching"
run "$log" inside apt-get install --yes --download-only "${packages[@]}" ||
  die "the packages could not be fetched; check the network and try again, what is fetched stays (the log is $log)."
say "the packages: installing"
run "$log" inside apt-get install --yes "${packages[@]}" ||
  die "the packages could not be installed; remove $OUT and try again (the log is $log)."
run "$log" inside apt-get clean || true
