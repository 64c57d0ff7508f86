#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs a program that scripts/prometheus.sh has unpacked, as if its packages were installed. A mount namespace shows it their
# /usr/share, which has Prometheus's pages.
#
#   scripts/prometheus-run.sh FOLDER PROGRAM [ARGUMENT...]    the program ends with its parent
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
# The path is relative, since mount would misread a colon or a comma in the folder's name.
# shellcheck disable=SC2016
exec unshare "${namespaces[@]}" -- sh -euc '
  (cd "$1" && mount -t overlay -o ro,lowerdir=.:/usr/share overlay /usr/share)
  shift
  exec setpriv --pdeathsig KILL -- "$@"
' sh "$folder/usr/share" "$folder/usr/bin/$program" "$@"
