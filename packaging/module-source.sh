#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Copies the module's source for DKMS, and the scripts that build it.
#
#   packaging/module-source.sh FOLDER    such as /usr/src/exitmeter-0.2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$1
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)

mkdir -p "$folder/scripts" "$folder/dkms"
# Kbuild reads the version from Cargo.toml. Only cargo needs tests and fuzzing.
# shellcheck disable=SC2046
cp --parents Kbuild Cargo.toml bindings/kvm.h bindings/layout.c bindings/parameters \
  $(find src -name '*.rs' -o -name 'shim.[ch]' -o -name '*.S' | grep -v -e /tests/ -e /fuzz/) "$folder"
cp scripts/check-kdir.sh scripts/common.sh "$folder/scripts"
cp packaging/dkms/build.sh packaging/dkms/install.sh "$folder/dkms"
sed "s/#MODULE_VERSION#/$version/" packaging/dkms/dkms.conf >"$folder/dkms.conf"
