#!/bin/bash
# Unpacks Debian's prometheus, promtool, victoria-metrics and vmalert into FOLDER, without installing them: no service is started.
# scripts/prometheus-run.sh runs Prometheus from there, with its pages.
#
#   scripts/prometheus.sh FOLDER    FOLDER/usr/bin/prometheus, promtool, victoria-metrics, vmalert
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# = 1 ] || die "$0 wants a folder."
out=$1
# Folders of before have .done, and lack what the pages take.
marker=$out/.done-with-pages
[ -e "$marker" ] && exit 0
need_command apt-get apt
need_command dpkg-deb dpkg
mkdir -p "$out"
# Tests that run side by side want it at once.
exec 9>"$out/.lock"
flock 9
[ -e "$marker" ] && exit 0
need_space "$out" 400
temporary=$(mktemp -d "$out/.new.XXXXXX")
trap 'rm -rf "$temporary"' EXIT
fetch() { (cd "$temporary" && apt-get -qq -o APT::Sandbox::User=root download "$1" >/dev/null 2>&1); }
# These are what prometheus depends on for its pages and consoles.
packages=(libjs-{bootstrap4,d3,eonasdan-bootstrap-datetimepicker,jquery,jquery-hotkeys,moment,moment-timezone,mustache,popper.js,rickshaw}
  fonts-glyphicons-halflings)
[ -e "$out/.done" ] || packages+=(prometheus victoria-metrics)
for package in "${packages[@]}"; do
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
touch "$out/.done" "$marker"
