#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Lints the RPM spec and the PKGBUILD, and publishes the crates as a dry run. `make packaging-check` runs this. Only bash
# checks the PKGBUILD, since namcap and makepkg are not in Debian.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

root=$(packaging/root.sh)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
packaged() { scripts/in-root.sh "$root" --bind "$PWD:/src" --chdir /src -- "$@"; }

say "PKGBUILD"
bash -n packaging/PKGBUILD
# shellcheck disable=SC2016
[ "$(bash -c '. packaging/PKGBUILD && echo "$pkgver"')" = "$version" ] || die "packaging/PKGBUILD has another version than Cargo.toml."
say "exitmeter.spec"
[ "$(packaged rpmspec --query --queryformat '%{VERSION}\n' packaging/exitmeter.spec | sort -u)" = "$version" ] ||
  die "packaging/exitmeter.spec has another version than Cargo.toml."
# rpmlint still asks for BuildRoot, which RPM itself has long been setting.
packaged rpmlint packaging/exitmeter.spec
say "debian/changelog and CHANGELOG.md"
head -n 1 packaging/debian/changelog | grep -q "($version)" || die "packaging/debian/changelog has another version than Cargo.toml."
grep -q "^## \[$version\]" CHANGELOG.md || die "CHANGELOG.md has no version $version."
say "the crates"
cargo publish --dry-run --allow-dirty -p exitmeter-meter -p exitmeter-guest
RUSTDOCFLAGS=--deny=warnings cargo doc --quiet --release --no-deps -p exitmeter-meter -p exitmeter-guest
