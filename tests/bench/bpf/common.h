/* SPDX-License-Identifier: GPL-2.0 */
/* Shared by the programs: map declarations, the kernel's helpers, reading the exit reason. */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#include <linux/bpf.h>
#include <linux/types.h>

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) =
	(void *)BPF_FUNC_map_lookup_elem;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value,
					 __u64 flags) = (void *)BPF_FUNC_map_update_elem;
static __u64 (*const bpf_ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static __u64 (*const bpf_get_current_pid_tgid)(void) = (void *)BPF_FUNC_get_current_pid_tgid;
static long (*const bpf_probe_read_kernel)(void *to, __u32 size, const void *from) =
	(void *)BPF_FUNC_probe_read_kernel;

/* Layout of the event kvm:kvm_exit. The loader compares it with the event's format file. */
struct kvm_exit_event {
	__u64 common;
	__u32 exit_reason;
	__u64 guest_rip;
};

/*
 * Offsets of the exit reason, which the raw tracepoint does not pass. KVM keeps it in struct
 * vcpu_vmx, or in the VMCB that struct vcpu_svm points to. The loader takes the offsets from the
 * BTF of kvm_intel or kvm_amd.
 */
#define NO_POINTER 0xffffffff
volatile const __u32 pointer_offset = NO_POINTER;
volatile const __u32 reason_offset = 0;

static __always_inline __u32 reason_of(const void *vcpu)
{
	const char *from = vcpu;
	__u32 reason = 0;

	if (pointer_offset != NO_POINTER)
		bpf_probe_read_kernel(&from, sizeof(from), from + pointer_offset);
	bpf_probe_read_kernel(&reason, sizeof(reason), from + reason_offset);
	return reason;
}

#endif
