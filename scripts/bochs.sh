#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Set-up step "bochs": the Bochs PC emulator, built from Debian's source with the corrections in patches/.
#
# Needs: OUT EXITMETER_CACHE JOBS ROOT. Gives OUT/bochs (runs in ROOT by in-root.sh), OUT/bios and OUT/vgabios
# (what romimage and vgaromimage want).
# The patches say themselves why they are there.
#
# Debian's own binary has neither the corrections nor the speed: it is built with Bochs's debugger, which looks
# at every instruction (facts: 1.55 times slower).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"

need_variables OUT EXITMETER_CACHE JOBS ROOT
mkdir -p "$OUT" "$EXITMETER_CACHE/downloads"
need_space "$OUT" 400
log=$OUT/build.log
: >"$log"

# inside FOLDER CMD...
inside() {
  local folder=$1
  shift
  "$here/in-root.sh" "$ROOT" --bind "$OUT:/out" --bind "$EXITMETER_CACHE/downloads:/downloads" \
    --bind "$here:/scripts" --chdir "$folder" -- "$@"
}

# The tarball as it came from Bochs. `apt-get source` would ask for the .dsc too, whose name some mirrors cannot
# serve; apt's own list vouches for the checksum of the tarball alone just as well.
say "fetching and correcting the source"
# shellcheck disable=SC2016
run "$log" inside /downloads bash -euc '
  . /scripts/common.sh
  # Not here: it does not name a file that is there already.
  line=$(cd / && apt-get source --download-only --print-uris bochs | grep -m 1 "orig\.tar")
  # The address is quoted for a shell.
  read -r uri name size sum < <(printf "%s\n" "$line" | tr -d "\47\42")
  fetch "$uri" "$name" "$sum"
  if [ ! -e /out/source/.patched ]; then
    rm -rf /out/source
    mkdir /out/source
    tar -xf "$name" -C /out/source --strip-components=1
    cd /out/source
    for patch in /scripts/patches/bochs-*.patch; do
      echo "$patch"
      patch -p1 --no-backup-if-mismatch --fuzz=0 <"$patch"
    done
    touch .patched
  fi
' || die "the source of Bochs could not be fetched or corrected; check the network and the mirror (the log is $log)."

say "configuring"
if [ ! -e "$OUT/source/.configured" ]; then
  options=(
    # The CPUs: 64 bits, VMX with EPT and SVM, several of them, and CET (arrow_lake has it). Without EVEX, which is
    # AVX-512 and a quarter of the time to compile.
    --enable-cpu-level=6 --enable-x86-64 --enable-vmx=2 --enable-svm --enable-smp
    --enable-avx --enable-cet --enable-memtype
    # The board: nothing but PCI with its disks, and no screen.
    --enable-pci --disable-plugins --with-nogui --disable-docbook
    # Speed.
    --enable-repeat-speedups --enable-handlers-chaining --enable-all-optimizations
    # All memory of the machine is at hand, so that a saved one is restored by reading one file.
    --disable-large-ramfile
    # Once a second a signal writes the speed to the log, and waits for ever when the log is being written to.
    --disable-show-ips
  )
  # shellcheck disable=SC2016
  # -O1 for what a kernel seldom runs: devices, AVX, the x87, the other CPUs' names. A host boots as fast as with -O3 all
  # over (13.5 to 15.7 s in three runs of each), and compiling takes a seventh less.
  run "$log" inside /out/source sh -euc '
    ./configure "$@"
    for folder in cpu/avx cpu/cpudb cpu/fpu cpu/softfloat3e gui iodev iodev/display iodev/hdimage; do
      sed -i "s/-O3/-O1/g" "$folder/Makefile"
    done
    touch .configured' sh \
    CC=gcc-14 CXX=g++-14 CFLAGS='-O3 -pipe' CXXFLAGS='-O3 -pipe' "${options[@]}" ||
    die "Bochs could not be configured; remove $OUT and try again (the log is $log)."
fi

say "compiling (1 to 2 minutes)"
# The tree beside it is made by a longer chain of compilers that wait for each other.
run "$log" inside /out/source nice -n 3 make -j "$JOBS" bochs ||
  die "Bochs could not be built; remove $OUT and try again (the log is $log)."

# shellcheck disable=SC2016
run "$log" inside /out/source sh -euc '
  strip -o /out/bochs bochs
  cp /usr/share/bochs/BIOS-bochs-latest /out/bios
  cp /usr/share/vgabios/vgabios.bin /out/vgabios
  # Its help text is the least that shows that it runs.
  /out/bochs --help cpu 2>&1 | grep -q corei7_ivy_bridge_3770k
' || die "the Bochs that was built does not run; remove $OUT and try again (the log is $log)."
as_root rm -rf "$OUT/source"
