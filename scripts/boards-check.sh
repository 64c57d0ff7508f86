#!/bin/bash
# Holds Grafana's boards (packaging/prometheus/grafana) against Grafana's own schema, as Grafana Labs publish it for
# TypeScript: a field that it does not know, a value of another type and a word that is none of an enum are refused. Each
# time it first sees that it refuses them.
#
#   scripts/boards-check.sh FOLDER [BOARD.json]...    FOLDER takes the packages of tests/fleet/schema/package.json, for another time
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

# checked: what the compiler says about the boards in $work; fails when that is anything.
checked() {
  (cd "$work" && node "$out/node_modules/typescript/bin/tsc" --noEmit --strict --skipLibCheck --module preserve \
    --moduleResolution bundler --target es2022 ./*.ts)
}

# put NAME TEXT: a board as TypeScript.
put() {
  printf 'import type { Board } from "./board";\nexport const board: Board = %s;\n' "$2" >"$work/$1.ts"
}

for version in grafana-10.4 grafana-11.6 grafana-latest; do
  rm -f "$work"/*.ts
  sed "s/VERSION/$version/" "$schema/board.ts" >"$work/board.ts"
  # One fault at a time, in a board that is well without it.
  whole=$(cat "${boards[0]}")
  for fault in 's/"gridPos": {/&"depth": 1,/' 's/"showHeader": true/"showHeader": "yes"/' 's/"colorMode": "value"/"colorMode": "colour"/' \
    's/"refId": "A"/&, "range_query": true/'; do
    broken=$(sed "$fault" <<<"$whole")
    [ "$broken" != "$whole" ] || die "the fault $fault has no place in ${boards[0]}."
    put broken "$broken"
    ! said=$(checked) || die "$version takes a board with the fault $fault; this check is none."
    grep -q 'broken.ts' <<<"$said" || die "$version: the compiler says of something else: $said"
  done
  rm "$work/broken.ts"
  for board in "${boards[@]}"; do
    put "$(basename "$board" .json)" "$(cat "$board")"
  done
  checked || die "the boards are not as $version has them; what the compiler says is above."
  say "${#boards[@]} boards are as the schema of $version has them, and 4 faults were refused"
done
