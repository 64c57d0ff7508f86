#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Prints the folder of a Debian 13 root that makes packages, and makes it first if it is not there (1.2 GB).
#
#   packaging/root.sh
#
# It is apart from the lab's root: whatever that has decides what is built anew in the lab.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/../scripts/common.sh"

packages=build-essential,debhelper,dh-dkms,dkms,lintian,dpkg-dev,gcc,clang,libc6-dev,make,cargo,rustc,rpm,rpmlint,e2fsprogs,xz-utils,ovmf,python3-virt-firmware,shim-signed,grub-efi-amd64-signed,mtools,openssl,sbsigntool
# Another list is another root.
root=${XDG_CACHE_HOME:-$HOME/.cache}/exitmeter/packages-$(sha256sum "${BASH_SOURCE[0]}" | cut -c 1-12)
if [ ! -e "$root/.made" ]; then
  need_namespaces
  need_command mmdebstrap mmdebstrap
  mkdir -p "$root"
  need_space "$root" 2000
  exec 9>"$root.lock"
  flock 9
fi
if [ ! -e "$root/.made" ]; then
  say "making the root for packages in $root" >&2
  as_root find "$root" -mindepth 1 -delete
  mirror=$(debian_mirror)
  options=()
  while IFS= read -r line; do
    [ -z "$line" ] || options+=(--aptopt="$line")
  done <<<"$(apt_config)"
  # A tar on the way, because only so mmdebstrap works alike with root and with user namespaces.
  TMPDIR=/tmp run "$root.log" mmdebstrap --variant=apt --components=main --include="$packages" --dpkgopt=force-unsafe-io \
    --aptopt='APT::Install-Recommends "false"' "${options[@]}" trixie "$root.tar" ${mirror:+"$mirror"} ||
    die "the root for packages could not be made; check the network and the mirror (the log is $root.log)."
  as_root tar -x --numeric-owner --exclude='./dev/*' -C "$root" -f "$root.tar"
  rm -f "$root.tar"
  as_root touch "$root/.made"
fi
echo "$root"
