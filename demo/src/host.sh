#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# The demo's script on the emulated host: host.sh FIRST LAST [FIRST LAST], with the ranges of reasons to query. Lines that
# begin with "  0x" come from cpuid and go into the tables, "==" begins or ends a table, and all others are shown unchanged.
set -eu
reasons=$(while [ $# -gt 0 ]; do seq "$1" "$2"; shift 2; done | tr '\n' ' ')

# sweep TITLE: query the exits of each reason, the cycles of the reasons that have exits, and both totals.
sweep() {
    echo "== $1"
    guest run -- "for reason in $reasons; do
        exits=\$(cpuid -1 -r -l 0x4ffffffd -s \$reason); echo \"\$exits\"
        case \$exits in *'eax=0x00000000 ebx=0x00000000'*) ;; *) cpuid -1 -r -l 0x4ffffffc -s \$reason;; esac
    done; cpuid -1 -r -l 0x4fffffff; cpuid -1 -r -l 0x4ffffffe"
    echo "=="
}

echo "The host is up: Linux $(uname -r), not modified, with $(lsmod | grep -o '^kvm_[a-z]*') loaded. Now the meter beside it:"
insmod exitmeter.ko
dmesg | grep 'exitmeter: version' | cut -d']' -f2-
echo "A Linux guest boots under KVM..."
guest boot
echo "The guest is up: $(guest run -- uname -sr). It asks how many exits that took..."
guest run -- cpuid -1 -r -l 0x4fffffff
echo "... and, with one run of the stock cpuid tool a leaf and reason, for which they were and what they cost."
sweep "Exits since the guest was started"
echo "The guest reboots..."
guest reboot
echo "It is back, and asks again..."
sweep "Exits that the reboot added, and the first sweep"
echo "What the host sees of it, by exitmeter report:"
echo
exitmeter report
guest stop
echo
echo "The guest is gone. Is all of that right? exitmeter verify runs guests of known exits, and asks the kernel as well:"
echo
exitmeter verify --runs 3 --exits 300
echo
echo "The meter goes, and leaves a table of all it metered in the host's log."
rmmod exitmeter
