#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The part of packaging/test.sh that runs in the booted host. A systemd unit starts it, and the kernel's command line selects
# the checks (check=MODE). Its lines go to the second serial port; the last one is "passed" or "failed: ...".
# `expect` calls functions below, which shellcheck takes for unreachable.
# shellcheck disable=SC2317
set -uo pipefail
exec 3>/dev/ttyS1
mode=$(sed -n 's/.*\bcheck=\([a-z-]*\).*/\1/p' /proc/cmdline)

tell() { printf '%s\n' "$*" >&3; }
end() {
  tell "$*"
  systemctl --no-block poweroff
  exit
}
# expect TEXT CMD...: checks that CMD succeeds.
expect() {
  local text=$1 output
  shift
  if output=$("$@" 2>&1); then
    tell "ok: $text"
  else
    tell "$output"
    journalctl --no-pager -b -p warning >&3
    end "failed: $text"
  fi
}
loaded() { grep -q '^exitmeter ' /proc/modules; }
not_loaded() { ! loaded; }
# This script's unit is part of the boot, so the system's state is still "starting". It is healthy if no unit has failed.
nothing_failed() { [ -z "$(systemctl --failed --plain --no-legend | tee /dev/stderr)" ]; }
# in_groups GROUPS CMD...: runs CMD as the user nobody, in these groups alone.
in_groups() { setpriv --reuid=nobody --regid=nogroup --groups="$1" -- "${@:2}"; }
not() { ! "$@"; }
# scrape: prints the exporter's answer.
scrape() { (exec 3<>/dev/tcp/127.0.0.1/10479 && printf 'GET /metrics HTTP/1.1\r\nHost: host\r\n\r\n' >&3 && cat <&3) 2>/dev/null; }
# up NUMBER: succeeds if the exporter's exitmeter_up is NUMBER; 1 means that it can read the meter.
up() { scrape | grep -q "^exitmeter_up $1\$"; }
# reads SOURCE: succeeds if the exporter reads this meter.
reads() { scrape | grep -q "^exitmeter_meter_info{source=\"$1\","; }
# same_exits SOURCE: succeeds if exporter and report have the same exits. All VMs of `exitmeter verify` are gone, so the
# numbers stand still meanwhile.
same_exits() {
  local exported reported
  exported=$(scrape | sed -n 's/^exitmeter_host_exits_total{[^}]*} //p' | awk '{ sum += $1 } END { print sum }')
  reported=$(exitmeter report --source "$1" --csv | awk -F, '$4 == "departed" { sum += $10 } END { print sum }')
  tell "exported $exported, reported $reported"
  [ -n "$exported" ] && [ "$exported" -gt 0 ] && [ "$exported" = "$reported" ]
}
# exporter: prints the main process of the exporter.
exporter() { systemctl show --value -p MainPID exitmeter-export.service; }
# is_nobody_else: succeeds if the exporter has a user ID of DynamicUser= (systemd.exec(5)), and no capability.
is_nobody_else() { [ "$(stat -c %u "/proc/$(exporter)")" -ge 61184 ] && grep -q '^CapEff:[[:space:]]*0*$' "/proc/$(exporter)/status"; }
# no_bpf: succeeds if BPF has left nothing behind.
no_bpf() { [ -z "$(ls /sys/fs/bpf)" ] && [ ! -e /run/exitmeter.sock ] && systemctl show --value -p ActiveState exitmeter-bpf.socket | grep -qx inactive; }

# Checks the units for BPF and the exporter, which reads BPF's numbers with no privilege but the group kvm.
check_bpf() {
  expect "the pins are root's alone" test "$(stat -c '%U:%G %a' /sys/fs/bpf/exitmeter)" = "root:root 700"
  expect "the exporter reads BPF" waits_for reads bpf
  expect "by a socket that is for the group kvm" test "$(stat -c '%U:%G %a' /run/exitmeter.sock)" = "root:kvm 660"
  expect "as a user of its own without a capability" is_nobody_else
  expect "a member of the group kvm reads a report of BPF" in_groups kvm exitmeter report --source bpf
  expect "but not the pins" not in_groups kvm exitmeter bpf snapshot
  expect "anybody else reads neither" not in_groups nogroup exitmeter report --source bpf
  expect "VMs run, and exitmeter verify finds BPF right" exitmeter verify --source bpf --runs 1 --exits 100
  expect "the exporter's exits are those of the report" same_exits bpf
  expect "nothing of it has failed" nothing_failed
}
waits_for() { for _ in $(seq 60); do ! "$@" || return 0; sleep 1; done; return 1; }

udevadm settle --timeout 120
tell "the host is up: Linux $(uname -r), check $mode"
expect "no unit has failed" nothing_failed
case $mode in
  metered)
    expect "the module is loaded" waits_for loaded
    expect "/dev/exitmeter is for the group kvm" test "$(stat -c '%U:%G %a' /dev/exitmeter)" = "root:kvm 440"
    expect "tool and module have one version" test "$(exitmeter --version)" = "exitmeter $(cat /sys/module/exitmeter/version)"
    expect "the options of /etc/modprobe.d hold" test "$(cat /sys/module/exitmeter/parameters/leaf_cpl)" = 0
    expect "a member of the group kvm reads a report" in_groups kvm exitmeter report
    expect "anybody else does not" not in_groups nogroup exitmeter report
    expect "exitmeter verify finds it right" exitmeter verify
    expect "the exporter waits to be asked for" test "$(systemctl is-enabled exitmeter-export.service)" = disabled
    expect "the exporter starts in its sandbox" systemctl start exitmeter-export.service
    expect "and reads the meter as a user of its own" waits_for up 1
    expect "it is the module that it reads" reads module
    expect "its exits are those of the report" same_exits module
    expect "its number is one of systemd's, and it has no capability" is_nobody_else
    expect "KVM is loaded again" sh -c 'modprobe -r exitmeter kvm_amd && modprobe kvm_amd'
    expect "and the module comes with it" waits_for loaded
    expect "and the exporter reads it, whatever number its device has now" waits_for up 1
    expect "the module goes" modprobe -r exitmeter
    expect "and the exporter says so" waits_for up 0
    expect "BPF waits to be asked for" no_bpf
    # This fulfils the condition of packaging/test.sh.
    expect "BPF starts in its sandbox" sh -c 'touch /run/bpf-too && systemctl start exitmeter-bpf.service && systemctl is-active exitmeter-bpf.service'
    check_bpf
    expect "BPF goes" systemctl stop exitmeter-bpf.service
    expect "and leaves nothing" no_bpf
    expect "and the exporter says so" waits_for up 0
    expect "BPF comes back" systemctl start exitmeter-bpf.service
    expect "and the exporter reads it, without a restart" waits_for reads bpf
    expect "the module comes back" modprobe exitmeter
    expect "and is what the exporter reads, beside BPF" waits_for reads module
    expect "the exporter ends" systemctl stop exitmeter-export.service
    expect "a socket of systemd brings it" sh -c 'systemctl start exitmeter-export.socket'
    expect "at the first scrape" waits_for up 1
    expect "and all of it ends" systemctl stop exitmeter-export.socket exitmeter-export.service
    expect "BPF runs still" systemctl is-active exitmeter-bpf.service
    rm -r /etc/systemd/system/exitmeter-bpf.service.d
    expect "the packages go" dpkg --purge exitmeter-dkms exitmeter
    expect "and the module with them" not_loaded
    expect "and BPF" no_bpf
    expect "and it is not found" sh -c '! modinfo exitmeter'
    expect "nothing of that name is left" test -z "$(find / -xdev -iname '*exitmeter*' -not -path '/var/log/journal/*' | tee /dev/stderr)"
    ;;
  without)
    expect "no module is loaded" not_loaded
    expect "KVM is there" test -e /dev/kvm
    expect "the tool says what is missing" sh -c 'exitmeter report --source module 2>&1 | grep "there is no /dev/exitmeter"'
    expect "BPF was started by the boot" waits_for systemctl is-active exitmeter-bpf.service
    expect "the exporter starts" systemctl start exitmeter-export.service
    check_bpf
    ;;
  refused)
    expect "KVM is there" test -e /dev/kvm
    expect "no module is loaded" not_loaded
    expect "modprobe says that the key is rejected" sh -c 'modprobe exitmeter 2>&1 | grep "Key was rejected by service"'
    expect "the tool says so, too" sh -c 'exitmeter report --source module 2>&1 | grep "Key was rejected by service"'
    ;;
  trusted)
    expect "Secure Boot is on, and the kernel locked down" grep -q '\[integrity\]' /sys/kernel/security/lockdown
    tell "$(dmesg | grep -i -e 'secure boot' -e 'MokListRT' -e 'DKMS module signing key' | head -n 8)"
    expect "the module is loaded" waits_for loaded
    expect "it taints by nothing but being out of tree" test "$(cat /sys/module/exitmeter/taint)" = O
    expect "a member of the group kvm reads a report" in_groups kvm exitmeter report
    ;;
  *) end "failed: there is no check $mode" ;;
esac
end passed
