#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Makes a Debian 13 host in FOLDER for packaging/test.sh: systemd, DKMS and two kernels with their headers, Debian 13's own
# (6.12, built without Rust) and the newest of its backports.
#
#   packaging/host-root.sh FOLDER    (4 GB)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/../scripts/common.sh"

folder=$1
log=$folder.log
need_namespaces
need_command mmdebstrap mmdebstrap
mkdir -p "$folder"
need_space "$folder" 5000
as_root find "$folder" -mindepth 1 -delete
mirror=$(debian_mirror)
options=()
while IFS= read -r line; do
  [ -z "$line" ] || options+=(--aptopt="$line")
done <<<"$(apt_config)"
# The dependencies of exitmeter-dkms are installed before it, so that everything its removal leaves behind is its own.
depends=$(sed -n '/^Package: exitmeter-dkms/,/^Recommends:/p' "$here/debian/control" | sed -n '/^Depends:/,/^[A-Z][a-z]*:/p' |
  tr -d '\n' | sed 's/Depends://; s/Recommends:.*//; s/\${[^}]*}, *//g; s/exitmeter ([^)]*), *//; s/ //g')
: >"$log"
# shellcheck disable=SC2016
run "$log" mmdebstrap --variant=apt --components=main --dpkgopt=force-unsafe-io --aptopt='APT::Install-Recommends "false"' "${options[@]}" \
  --include="systemd-sysv,udev,kmod,dbus,initramfs-tools,dkms,openssl,linux-image-amd64,linux-headers-amd64,$depends" \
  --customize-hook='sed -n "s/^\(deb .*\) trixie main$/\1 trixie-backports main/p" "$1/etc/apt/sources.list" >"$1/etc/apt/sources.list.d/backports.list"' \
  --customize-hook='chroot "$1" apt-get update' \
  --customize-hook='chroot "$1" apt-get install --yes -t trixie-backports linux-image-amd64 linux-headers-amd64' \
  --customize-hook='echo host >"$1/etc/hostname"' \
  trixie "$folder.tar" ${mirror:+"$mirror"} ||
  die "the Debian host could not be made; check the network and the mirror (the log is $log)."
as_root tar -x --numeric-owner --exclude='./dev/*' -C "$folder" -f "$folder.tar"
rm -f "$folder.tar"
as_root touch "$folder/.made"
