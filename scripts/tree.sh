#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Set-up step "tree": the kernel's source, prepared for building Rust modules outside of it.
#
# Needs: OUT ROOT KERNEL_DIR (what kernel.sh gave) JOBS. Gives OUT/tree.
#
# Debian's linux-headers have no rust/ folder, and so no metadata of the crates that a module is built against. They
# are made here from the same source with the same configuration; vermagic and layouts then are the packaged
# kernel's, and the module loads into it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"

need_variables OUT ROOT KERNEL_DIR JOBS
mkdir -p "$OUT"
need_space "$OUT" 2500
release=$(cat "$KERNEL_DIR/release")
log=$OUT/tree.log
: >"$log"

inside() {
  "$here/in-root.sh" "$ROOT" --bind "$OUT:/out" --bind "$KERNEL_DIR:/kernel" --bind "$OUT/tree:/tree" \
    --chdir /tree -- "$@"
}

mkdir -p "$OUT/tree"
if [ ! -e "$OUT/.unpacked" ]; then
  say "unpacking"
  # shellcheck disable=SC2016
  run "$log" inside sh -euc '
    find . -mindepth 1 -delete
    # Leave out what no module takes: 1.4 of 2.0 GB. Each folder keeps its Kconfig and Makefile, which are read.
    top=$(tar -tJf /kernel/source.tar.xz | head -n 1)
    top=${top%%/*}
    set --
    for folder in drivers sound fs net "arch/[a-wyz]*"; do set -- "$@" --exclude="$top/$folder/*.[cS]"; done
    for folder in "arch/[a-wyz]*" drivers/gpu/drm/amd; do set -- "$@" --exclude="$top/$folder/*.h"; done
    for folder in "arch/*/boot/dts" "Documentation/*" tools/testing tools/perf; do
      set -- "$@" --exclude="$top/$folder/*"
    done
    tar -xJf /kernel/source.tar.xz --strip-components=1 "$@"
    # The libraries of the procedural macros run in the compiler alone. Optimized, they are a fifth of the chain of
    # compilers that this step waits for (15 s).
    sed -i "s/ --crate-type rlib -O / --crate-type rlib /" rust/Makefile
    touch /out/.unpacked
  ' || die "the source of $release could not be unpacked; remove $OUT and try again (the log is $log)."
fi

say "preparing (1 to 2 minutes)"
# LOCALVERSION is what the packaged kernel has behind its version; the tree's own say in it is taken away.
# shellcheck disable=SC2016
run "$log" inside sh -euc '
  release=$1 jobs=$2
  cp /kernel/config .config
  version=$(make -s kernelversion)
  set -- CC=gcc-14 HOSTCC=gcc-14 LOCALVERSION="${release#"$version"}"
  make "$@" olddefconfig
  make -j "$jobs" "$@" modules_prepare
  made=$(make -s "$@" kernelrelease)
  [ "$made" = "$release" ] || { echo "the tree calls itself $made"; exit 1; }
  # Where no exported symbol is known, modpost could not check ours.
  cp /kernel/Module.symvers .
  grep -q "^CONFIG_RUST=y" .config || { echo "this kernel is built without Rust"; exit 1; }
  test -s rust/libkernel.rmeta
' sh "$release" "$JOBS" ||
  die "the tree of $release could not be prepared; the log is $log (a kernel without CONFIG_RUST cannot carry the module)."
