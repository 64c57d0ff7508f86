#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Set-up step "perf": Debian's perf with the libraries it needs, to be copied into an emulated host by the benchmark.
#
# Needs: OUT EXITMETER_CACHE ROOT. Gives OUT/perf, a folder with
#   perf         the program, as packaged in backports, where it is of the newest kernel
#   lib/         its libraries and their loader; run it by lib/ld-linux-x86-64.so.2 --library-path lib ./perf
# Only what comes out of the packages is kept: they are installed over ROOT in memory, and ROOT stays as it is.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"

need_variables OUT EXITMETER_CACHE ROOT
mkdir -p "$OUT" "$EXITMETER_CACHE/downloads/perf/partial"
need_space "$OUT" 200
log=$OUT/perf.log
: >"$log"

say "perf"
# shellcheck disable=SC2016
run "$log" "$here/in-root.sh" "$ROOT" --bind "$OUT:/out" --bind "$EXITMETER_CACHE/downloads/perf:/downloads" \
  -- env DEBIAN_FRONTEND=noninteractive bash -euc '
  # What apt unpacks is left to the kernel to write, when it likes: it is gone in a minute anyway.
  apt-get -o Dir::Cache::Archives=/downloads -o Dpkg::Options::=--force-unsafe-io -o APT::Keep-Downloaded-Packages=true \
    install --yes --no-install-recommends --target-release "$(. /etc/os-release && echo "$VERSION_CODENAME")-backports" linux-perf
  rm -rf /out/perf.part /out/perf
  mkdir -p /out/perf.part/lib
  cp -L /usr/bin/perf /out/perf.part/perf
  ldd /usr/bin/perf | sed -n "s/.*=> \(\/[^ ]*\) .*/\1/p; s/^[[:space:]]*\(\/[^ ]*ld-linux[^ ]*\) .*/\1/p" |
    xargs cp -L -t /out/perf.part/lib
  # It has to run with these alone, as it will in the host.
  /out/perf.part/lib/ld-linux-x86-64.so.2 --library-path /out/perf.part/lib /out/perf.part/perf version
  mv /out/perf.part /out/perf
' || die "perf could not be fetched or does not run; check the network and try again (the log is $log)."
