#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Builds Debian's packages exitmeter and exitmeter-dkms in a Debian 13 root, and lints them with lintian. They go to
# build/packages. `make deb` runs this.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=packaging/source.sh
. "$here/source.sh"

copy_source
cp -r packaging/debian "$source/debian"
rm -f "$out"/*.deb "$out"/*.changes "$out"/*.buildinfo

say "building (the first time some minutes)"
rm -f "$out/build.log"
run "$out/build.log" in_source dpkg-buildpackage --build=binary --no-sign ||
  die "the packages could not be built; the log is $out/build.log."

say "lintian"
in_source lintian --allow-root --fail-on error,warning --tag-display-limit 0 "../exitmeter_${version}_amd64.changes" ||
  die "lintian found faults in the packages; they are above."
rm -rf "$source"
ls -l "$out"/*.deb
