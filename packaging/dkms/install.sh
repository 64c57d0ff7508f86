#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Builds and installs exitmeter.ko by DKMS for the kernels that can load it. It never fails: a kernel's package must not stay
# half-configured because the module cannot be built for it.
#
#   install.sh [RELEASE]...    by default for all kernels that have headers
#
# The reason why a kernel has no module is printed in one line, and logged in full in /var/log/exitmeter-dkms/RELEASE.log.
set -uo pipefail
logs=/var/log/exitmeter-dkms
version=$(sed -n 's/^PACKAGE_VERSION="\(.*\)"/\1/p' "$(dirname "${BASH_SOURCE[0]}")/../dkms.conf")

kernels=("$@")
if [ $# = 0 ]; then
  for folder in /lib/modules/*/build; do
    [ ! -e "$folder/include" ] || kernels+=("$(basename "$(dirname "$folder")")")
  done
fi
[ "${#kernels[@]}" != 0 ] ||
  echo "exitmeter: no kernel has its headers here, so the module is built for none; install linux-headers-amd64 or the like."

for release in "${kernels[@]}"; do
  # A kernel's image may be set up before its headers. Then the hook of the headers calls this again.
  [ -e "/lib/modules/$release/build/include" ] || continue
  case $(dkms status -m exitmeter -v "$version" -k "$release" 2>/dev/null) in
    *installed*) continue ;;
  esac
  mkdir -p "$logs"
  log=$logs/$release.log
  echo "exitmeter: building the module for $release, which may take some minutes"
  if dkms install -m exitmeter -v "$version" -k "$release" >"$log" 2>&1 </dev/null; then
    rm -f "$log"
    echo "exitmeter: the module for $release is installed"
    continue
  fi
  made=/var/lib/dkms/exitmeter/$version/build/make.log
  [ ! -e "$made" ] || cat "$made" >>"$log"
  reason=$(sed -n 's/^exitmeter: //p' "$log" | tail -n 1)
  echo "exitmeter: no module for $release: ${reason:-DKMS could not build it.}"
  echo "exitmeter: the system is complete without it; the log is $log"
done
rmdir "$logs" 2>/dev/null
exit 0
