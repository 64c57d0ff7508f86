#!/bin/bash
# Makes Debian's packages in build/packages: exitmeter and exitmeter-dkms, in a Debian 13 root, and has lintian look at
# them. What `make deb` runs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

root=$(packaging/root.sh)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
out=$PWD/build/packages
source=$out/exitmeter-$version

say "copying the source"
mkdir -p "$out"
rm -rf "$source" "$out"/*.deb "$out"/*.changes "$out"/*.buildinfo
mkdir "$source"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --no-dereference -t "$source"
cp -r packaging/debian "$source/debian"

say "building (the first time some minutes)"
# The folder of crates is this machine's; in the root there is no network for cargo.
run "$out/build.log" scripts/in-root.sh "$root" --bind "$out:/out" --bind "${CARGO_HOME:-$HOME/.cargo}:/cargo" \
  --chdir "/out/exitmeter-$version" -- env CARGO_HOME=/cargo CARGO_TARGET_DIR=/out/target \
  SOURCE_DATE_EPOCH="$(git log -1 --format=%ct)" nice dpkg-buildpackage --build=binary --no-sign ||
  die "the packages could not be built; the log is $out/build.log."

say "lintian"
scripts/in-root.sh "$root" --bind "$out:/out" --chdir /out -- \
  lintian --allow-root --fail-on error --tag-display-limit 0 "exitmeter_${version}_amd64.changes"
rm -rf "$source"
ls -l "$out"/*.deb
