#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Checks Grafana's boards (packaging/prometheus/grafana) against Grafana's own schema, which Grafana Labs publish for
# TypeScript. It rejects unknown fields, values of another type and unknown words of an enum. Each run first checks that it
# does reject them.
#
#   scripts/boards-check.sh FOLDER [BOARD.json]...    FOLDER keeps the packages of tests/fleet/schema/package.json
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"
[ $# -ge 1 ] || die "$0 wants a folder."
schema=$here/../tests/fleet/schema
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
boards=("$@")
[ "${#boards[@]}" != 0 ] || boards=("$here"/../packaging/prometheus/grafana/*.json)
need_command node nodejs
need_command npm npm

if ! cmp --quiet "$schema/package.json" "$out/.done"; then
  say "fetching Grafana's schema"
  cp "$schema/package.json" "$out/package.json"
  npm install --prefix "$out" --silent --no-fund --no-audit --no-package-lock --ignore-scripts ||
    die "Grafana's schema could not be fetched; check the network and npm's registry (npm ping)."
  cp "$schema/package.json" "$out/.done"
fi
work=$(mktemp -d "$out/check.XXXXXX")
trap 'rm -rf "$work"' EXIT

# checked: prints the compiler's messages about the boards in $work, and fails if there are any.
checked() {
  (cd "$work" && node "$out/node_modules/typescript/bin/tsc" --noEmit --strict --skipLibCheck --module preserve \
    --moduleResolution bundler --target es2022 ./*.ts)
}

# put NAME TEXT: writes a board as TypeScript.
put() {
  printf 'import type { Board } from "./board";\nexport const board: Board = %s;\n' "$2" >"$work/$1.ts"
}

for version in grafana-10.4 grafana-11.6 grafana-latest; do
  rm -f "$work"/*.ts
  sed "s/VERSION/$version/" "$schema/board.ts" >"$work/board.ts"
  # One fault at a time, in a board that is valid without it.
  whole=$(cat "${boards[0]}")
  for fault in 's/"gridPos": {/&"depth": 1,/' 's/"showHeader": true/"showHeader": "yes"/' 's/"colorMode": "value"/"colorMode": "colour"/' \
    's/"refId": "A"/&, "range_query": true/'; do
    broken=$(sed "$fault" <<<"$whole")
    [ "$broken" != "$whole" ] || die "the fault $fault has no place in ${boards[0]}."
    put broken "$broken"
    ! said=$(checked) || die "$version accepts a board with the fault $fault, so this check proves nothing."
    grep -q 'broken.ts' <<<"$said" || die "$version: the compiler reports something else: $said"
  done
  rm "$work/broken.ts"
  for board in "${boards[@]}"; do
    put "$(basename "$board" .json)" "$(cat "$board")"
  done
  checked || die "the boards do not match the schema of $version; the compiler's messages are above."
  say "${#boards[@]} boards match the schema of $version, and 4 faults were rejected"
done
