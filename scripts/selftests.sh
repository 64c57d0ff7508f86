#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Set-up step "selftests": KVM's own selftests, from the source of the kernel that the hosts boot.
#
# Needs: OUT EXITMETER_CACHE ROOT KERNEL_DIR (what kernel.sh gave) JOBS. Gives OUT/kvm, a folder with
#   bin/       the tests, static and stripped, as many as build; x86/ in it has those of x86 alone, as in the source
#   unbuilt    the names of those that do not build, usually none
# Libraries and headers that they take are installed over ROOT in memory, and ROOT stays as it is; so does the build.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"

need_variables OUT EXITMETER_CACHE ROOT KERNEL_DIR JOBS
mkdir -p "$OUT" "$EXITMETER_CACHE/downloads/selftests/partial"
need_space "$OUT" 300
log=$OUT/selftests.log
: >"$log"

say "KVM's selftests (1 to 2 minutes)"
# shellcheck disable=SC2016
run "$log" "$here/in-root.sh" "$ROOT" --bind "$OUT:/out" --bind "$KERNEL_DIR:/kernel" \
  --bind "$EXITMETER_CACHE/downloads/selftests:/downloads" \
  -- env DEBIAN_FRONTEND=noninteractive JOBS="$JOBS" bash -euc '
  # What apt unpacks is left to the kernel to write, when it likes: it is gone in a minute anyway.
  apt-get -o Dir::Cache::Archives=/downloads -o Dpkg::Options::=--force-unsafe-io -o APT::Keep-Downloaded-Packages=true \
    install --yes --no-install-recommends uuid-dev libnuma-dev libcap-dev rsync
  mkdir /tmp/tree
  cd /tmp/tree
  # Of the source only what the headers and the tests are made of.
  parts=()
  for part in Makefile Kbuild Kconfig scripts include arch/x86 usr tools/arch tools/build tools/include tools/lib \
    tools/scripts tools/testing/selftests; do parts+=("*/$part"); done
  # The tests hold links to headers of these.
  parts+=("*/drivers/dma" "*/drivers/net/ethernet/intel")
  tar -xJf /kernel/source.tar.xz --strip-components=1 --wildcards --no-wildcards-match-slash "${parts[@]}"
  make -j "$JOBS" ARCH=x86 HOSTCC=gcc-14 CC=gcc-14 headers_install

  cd tools/testing/selftests/kvm
  # These ask for more rounds or threads than an emulator does in minutes, and take no arguments.
  fewer() {
    grep -q "^#define $2[[:space:]]*$3\$" "$1"
    sed -i "s/^\(#define $2[[:space:]]*\)$3\$/\1$4/" "$1"
  }
  fewer hardware_disable_test.c NR_ITERATIONS 512 16
  fewer hardware_disable_test.c NR_SLEEPERS_PER_VCPU 16 2
  fewer rseq_test.c NR_TASK_MIGRATIONS 100000 2000
  fewer x86/save_restore_pf_stress_test.c NR_ITERATIONS 500 20
  # Static, as the hosts have no libraries. One test that does not build is not to take the others with it.
  set -- ARCH=x86 CC=gcc-14 OUTPUT=/tmp/kvm EXTRA_CFLAGS=-static
  make -k -j "$JOBS" "$@" || true
  rm -rf /out/kvm.part /out/kvm
  mkdir -p /out/kvm.part/bin/x86
  : >/out/kvm.part/unbuilt
  built=0
  for path in $(make -s "$@" --eval="names:; @echo \$(TEST_GEN_PROGS) \$(TEST_GEN_PROGS_EXTENDED)" names); do
    name=${path#/tmp/kvm/}
    if [ -x "$path" ]; then
      strip -o "/out/kvm.part/bin/$name" "$path"
      built=$((built + 1))
    else
      echo "$name" >>/out/kvm.part/unbuilt
    fi
  done
  # The one that is no program of its own.
  cp x86/*.sh /out/kvm.part/bin/x86/
  chmod 755 /out/kvm.part/bin/x86/*.sh
  [ "$built" -ge 50 ] || { echo "only $built tests were built"; exit 1; }
  mv /out/kvm.part /out/kvm
' || die "KVM's selftests could not be built; check the network and try again (the log is $log)."
