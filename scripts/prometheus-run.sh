#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs a program that scripts/prometheus.sh has unpacked, as if its packages were installed: it finds their /usr/share, where
# Prometheus's pages are, in a mount namespace of its own.
#
#   scripts/prometheus-run.sh FOLDER PROGRAM [ARGUMENT...]    it ends when its parent does
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || die "$0 wants a folder and a program."
folder=$(cd "$1" && pwd)
program=$2
shift 2
need_command unshare util-linux
namespaces=(--mount)
[ "$(id -u)" = 0 ] || namespaces+=(--map-root-user)
# Relative, the folder's name may have a colon or a comma in it: mount would take them for its own.
# shellcheck disable=SC2016
exec unshare "${namespaces[@]}" -- sh -euc '
  (cd "$1" && mount -t overlay -o ro,lowerdir=.:/usr/share overlay /usr/share)
  shift
  exec setpriv --pdeathsig KILL -- "$@"
' sh "$folder/usr/share" "$folder/usr/bin/$program" "$@"
