#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Unpacks Debian's prometheus, promtool, victoria-metrics and vmalert into FOLDER. They are not installed, so no service
# starts. scripts/prometheus-run.sh runs Prometheus from there, with its pages.
#
#   scripts/prometheus.sh FOLDER            FOLDER/usr/bin/prometheus, promtool, victoria-metrics, vmalert
#   scripts/prometheus.sh --pages FOLDER    FOLDER/usr/share, with the files that Prometheus's pages and consoles need
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
packages=(prometheus victoria-metrics)
programs=(prometheus promtool victoria-metrics vmalert)
marker=.done
# The tests of rules, which are always run, do not need the pages.
if [ "${1-}" = --pages ]; then
  packages=(libjs-{bootstrap4,d3,eonasdan-bootstrap-datetimepicker,jquery,jquery-hotkeys,moment,moment-timezone,mustache,popper.js,rickshaw}
    fonts-glyphicons-halflings)
  programs=()
  marker=.done-pages
  shift
fi
[ $# = 1 ] || die "$0 wants a folder."
out=$1
marker=$out/$marker
[ -e "$marker" ] && exit 0
need_command apt-get apt
need_command dpkg-deb dpkg
mkdir -p "$out"
# Concurrent tests may call this at the same time.
exec 9>"$out/.lock"
flock 9
[ -e "$marker" ] && exit 0
need_space "$out" 400
temporary=$(mktemp -d "$out/.new.XXXXXX")
trap 'rm -rf "$temporary"' EXIT
fetch() { (cd "$temporary" && apt-get -qq -o APT::Sandbox::User=root download "$1" >/dev/null 2>&1); }
for package in "${packages[@]}"; do
  say "fetching $package"
  # A new machine may have no lists yet.
  fetch "$package" || { [ "$(id -u)" = 0 ] && apt-get -qq update >/dev/null 2>&1 && fetch "$package"; } ||
    die "the package $package could not be fetched; this takes Debian 12 or later, and up-to-date lists (apt-get update)."
done
# In Debian 12, promtool is in the package prometheus.
[ "${#programs[@]}" = 0 ] || fetch promtool || true
for package in "$temporary"/*.deb; do
  dpkg-deb --extract "$package" "$out"
done
for program in "${programs[@]}"; do
  [ -x "$out/usr/bin/$program" ] || die "Debian's packages have no $program; remove $out and try again."
done
touch "$marker"
