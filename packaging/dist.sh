#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Makes build/packages/exitmeter-VERSION-x86_64-linux.tar.xz: the static tool with its manual pages and completions, for any
# Linux and for guests. `make dist` runs this. The same commit gives the same bytes: the compiler comes from the root, names
# are sorted, and times are those of the commit.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=packaging/source.sh
. "$here/source.sh"

copy_source
name=exitmeter-$version-x86_64-linux
say "building (the first time some minutes)"
rm -f "$out/dist.log"
run "$out/dist.log" in_source packaging/tool.sh "../dist/$name" || die "the tool could not be built; the log is $out/dist.log."
cp LICENSE CHANGELOG.md docs/install.md scripts/60-exitmeter.rules scripts/exitmeter-modprobe.conf packaging/61-exitmeter-load.rules \
  packaging/62-exitmeter-bpf.rules packaging/exitmeter-*.service packaging/exitmeter-*.socket packaging/prometheus/exitmeter.rules.yml packaging/prometheus/consoles/exitmeter.html docs/fleet.md \
  "$out/dist/$name/share/doc/exitmeter/"
# Permissions do not depend on the umask.
chmod -R u=rwX,go=rX "$out/dist/$name"
tar --create --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --format=gnu -C "$out/dist" "$name" |
  xz --threads=1 -6 >"$out/$name.tar.xz"
rm -rf "$source" "$out/dist"
sha256sum "$out/$name.tar.xz"
