# shellcheck shell=bash
# What deb.sh and dist.sh share: a copy of the checkout's files, and commands in it in the root for packages. Sourced by
# them, with `here` set.
cd "${here:?}/.." || exit
# shellcheck source=scripts/common.sh
. scripts/common.sh

root=$(packaging/root.sh)
# Used by those that source this.
# shellcheck disable=SC2034
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
out=$PWD/build/packages
# The time of what is packed: that of the latest commit.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
# One name for all versions: cargo then knows what it has compiled.
source=$out/source

# Copies what git knows or would add to a fresh folder.
copy_source() {
  say "copying the source"
  mkdir -p "$out"
  rm -rf "$source"
  mkdir "$source"
  git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --no-dereference --preserve=timestamps -t "$source"
}

# in_source CMD...: runs CMD in the copy, in the root. The folder of crates is this machine's: cargo has no network there.
in_source() {
  scripts/in-root.sh "$root" --bind "$out:/out" --bind "${CARGO_HOME:-$HOME/.cargo}:/cargo" --chdir /out/source -- \
    env CARGO_HOME=/cargo CARGO_TARGET_DIR=/out/target SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" nice "$@"
}
