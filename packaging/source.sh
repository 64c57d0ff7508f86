# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Functions that deb.sh and dist.sh share: they copy the checkout's files, and run commands on the copy in the root for
# packages. Both source this file with `here` set.
cd "${here:?}/.." || exit
# shellcheck source=scripts/common.sh
. scripts/common.sh

root=$(packaging/root.sh)
# The scripts that source this use it.
# shellcheck disable=SC2034
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
out=$PWD/build/packages
# Packed files have the time of the latest commit.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
# The folder has the same name for all versions, so that cargo finds what it has compiled.
source=$out/source

# Copies the files that git tracks or would add to a new folder.
copy_source() {
  say "copying the source"
  mkdir -p "$out"
  rm -rf "$source"
  mkdir "$source"
  git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --no-dereference --preserve=timestamps -t "$source"
}

# in_source CMD...: runs CMD on the copy, in the root. cargo has no network there, so it uses this machine's folder of crates.
in_source() {
  scripts/in-root.sh "$root" --bind "$out:/out" --bind "${CARGO_HOME:-$HOME/.cargo}:/cargo" --chdir /out/source -- \
    env CARGO_HOME=/cargo CARGO_TARGET_DIR=/out/target SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" nice "$@"
}
