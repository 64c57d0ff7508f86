#!/bin/bash
# Unpacks Debian's prometheus, promtool, victoria-metrics and vmalert into FOLDER, without installing them: no service is started.
#
#   scripts/prometheus.sh FOLDER    FOLDER/usr/bin/prometheus, promtool, victoria-metrics, vmalert
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# = 1 ] || die "$0 wants a folder."
out=$1
[ -e "$out/.done" ] && exit 0
need_command apt-get apt
need_command dpkg-deb dpkg
mkdir -p "$out"
# Tests that run side by side want it at once.
exec 9>"$out/.lock"
flock 9
[ -e "$out/.done" ] && exit 0
need_space "$out" 400
temporary=$(mktemp -d "$out/.new.XXXXXX")
trap 'rm -rf "$temporary"' EXIT
fetch() { (cd "$temporary" && apt-get -qq -o APT::Sandbox::User=root download "$1" >/dev/null 2>&1); }
for package in prometheus victoria-metrics; do
  say "fetching $package"
  # A new machine may have no lists yet.
  fetch "$package" || { [ "$(id -u)" = 0 ] && apt-get -qq update >/dev/null 2>&1 && fetch "$package"; } ||
    die "the package $package could not be fetched; this takes Debian 12 or later, and up-to-date lists (apt-get update)."
done
# Debian 12 has it in the package prometheus.
fetch promtool || true
for package in "$temporary"/*.deb; do
  dpkg-deb --extract "$package" "$out"
done
for program in prometheus promtool victoria-metrics vmalert; do
  [ -x "$out/usr/bin/$program" ] || die "Debian's packages have no $program; remove $out and try again."
done
touch "$out/.done"
