#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Set-up step "debug-kernel": a kernel that checks itself while it runs, in OUT, for `--kernel debug`, `--kernel kcsan` and
# `--kernel cfi`.
#
# Needs: OUT ROOT KERNEL_DIR (what kernel.sh gave: the source is its) JOBS, FLAVOUR ("debug", "kcsan" or "cfi"), and
# CONFIG, the text of configs/common.config and configs/FLAVOUR.config. Gives in OUT what kernel.sh gives, vmlinux,
# modules/ and release; and tree/, what modules are built against, without the objects.
#
# Small, since it is built here, and since each check makes it some times slower: nothing is on but what the fragments
# name and what that needs.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"

need_variables OUT ROOT KERNEL_DIR JOBS FLAVOUR CONFIG
mkdir -p "$OUT/tree"
need_space "$OUT" 5000
log=$OUT/build.log
: >"$log"

# The kernel's Kconfig has Rust beside KASAN by clang alone, and gcc knows no kCFI. KCSAN takes either, and gcc compiles
# faster.
case $FLAVOUR in
  kcsan) compiler=gcc-14 ;;
  *) compiler=clang-19 ;;
esac

inside() {
  "$here/in-root.sh" "$ROOT" --bind "$OUT:/out" --bind "$KERNEL_DIR:/kernel" --bind "$OUT/tree:/tree" \
    --bind "$here:/scripts" --chdir /tree -- nice -n 10 "$@"
}

if [ ! -e "$OUT/.unpacked" ]; then
  say "unpacking"
  # shellcheck disable=SC2016
  run "$log" inside bash -euc '
    shopt -s nullglob
    find . -mindepth 1 -delete
    tar -xJf /kernel/source.tar.xz --strip-components=1 --exclude=Documentation/devicetree/bindings
    for patch in /scripts/patches/debug-kernel-"$1"-*.patch; do
      echo "$patch"
      patch -p1 --no-backup-if-mismatch --fuzz=0 <"$patch"
    done
    touch /out/.unpacked
  ' bash "$FLAVOUR" || die "the kernel's source could not be unpacked or patched; remove $OUT and try again (the log is $log)."
fi

say "configuring"
printf '%s\n' "$CONFIG" >"$OUT/wanted.config"
# Since 7.3 this is SYSCTL alone.
inside grep -q "^config PROC_SYSCTL" fs/proc/Kconfig || sed -i "/^CONFIG_PROC_SYSCTL=/d" "$OUT/wanted.config"
# What Kconfig does not give as it was asked for would be a check that is not there.
# shellcheck disable=SC2016
run "$log" inside sh -euc '
  make -s CC="$1" HOSTCC=gcc-14 KCONFIG_ALLCONFIG=/out/wanted.config allnoconfig
  grep "^CONFIG" /out/wanted.config | grep -vxFf .config >missing || [ ! -s missing ] || { cat missing; exit 1; }
' sh "$compiler" ||
  die "the kernel $FLAVOUR cannot be configured as scripts/configs want it; what is not given is at the end of $log."

say "compiling (10 to 20 minutes on two cores)"
# shellcheck disable=SC2016
run "$log" inside bash -euc '
  shopt -s nullglob
  # Rust of the kernel takes `core` as source. The root is an overlay here: the patch goes when this command ends.
  for patch in /scripts/patches/debug-kernel-library-"$3"-*.patch; do
    echo "$patch"
    patch -d "$(rustc --print sysroot)/lib/rustlib/src/rust" -p1 --no-backup-if-mismatch --fuzz=0 <"$patch"
  done
  export KBUILD_BUILD_TIMESTAMP="1 January 2026" KBUILD_BUILD_USER=lab KBUILD_BUILD_HOST=lab
  make -j "$2" CC="$1" HOSTCC=gcc-14 vmlinux modules
  rm -rf /out/modules
  make -s CC="$1" INSTALL_MOD_PATH=/out/modules modules_install
  make -s CC="$1" kernelrelease >/out/release.part
  rm -f "/out/modules/lib/modules/$(cat /out/release.part)/build"
  cp vmlinux /out/vmlinux
  cp .config /out/config
  cp Module.symvers /out/
' bash "$compiler" "$JOBS" "$FLAVOUR" ||
  die "the kernel $FLAVOUR could not be built; the log is $log, and the next run goes on where it stopped."

# Half of the size, and nothing that a module is built against.
# shellcheck disable=SC2016
run "$log" inside sh -euc '
  find . \( -name "*.o" -o -name "*.a" -o -name "*.ko" \) -not -path "./scripts/*" -not -path "./tools/*" -delete
  test -s rust/libkernel.rmeta
' || die "the tree of the kernel $FLAVOUR is not whole; remove $OUT and try again (the log is $log)."
mv "$OUT/release.part" "$OUT/release"
