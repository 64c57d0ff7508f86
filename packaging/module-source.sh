#!/bin/bash
# Copies the module's source for DKMS: what is compiled, and what builds it.
#
#   packaging/module-source.sh FOLDER    such as /usr/src/exitmeter-0.2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$1
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)

mkdir -p "$folder/scripts" "$folder/dkms"
# Cargo.toml has the version, which Kbuild reads. Tests and fuzzing are cargo's.
# shellcheck disable=SC2046
cp --parents Kbuild Cargo.toml bindings/kvm.h bindings/layout.c bindings/parameters \
  $(find src -name '*.rs' -o -name 'shim.[ch]' -o -name '*.S' | grep -v -e /tests/ -e /fuzz/) "$folder"
cp scripts/check-kdir.sh scripts/common.sh "$folder/scripts"
cp packaging/dkms/build.sh packaging/dkms/install.sh "$folder/dkms"
sed "s/#MODULE_VERSION#/$version/" packaging/dkms/dkms.conf >"$folder/dkms.conf"
