// SPDX-License-Identifier: GPL-2.0
/*
 * Count exits by thread and reason, as bcc's kvmexit does. The thread that exits on a CPU is mostly
 * the one that exited there before, so its counts are in a per-CPU array. Those of the other
 * threads are in a hash.
 */
#include "common.h"

#define REASONS 256

struct counts {
	__u64 thread;
	__u64 exits[REASONS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counts);
} latest SEC(".maps");

/* Counts of a new thread, all zero. They are too large for BPF's stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counts);
} nothing SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct counts);
} others SEC(".maps");

static __always_inline int count(__u32 reason)
{
	struct counts *counts, *known;
	__u64 thread = bpf_get_current_pid_tgid();
	__u32 zero = 0;

	counts = bpf_map_lookup_elem(&latest, &zero);
	if (!counts)
		return 0;
	if (counts->thread != thread) {
		if (counts->thread)
			bpf_map_update_elem(&others, &counts->thread, counts, BPF_ANY);
		known = bpf_map_lookup_elem(&others, &thread);
		if (!known)
			known = bpf_map_lookup_elem(&nothing, &zero);
		if (!known)
			return 0;
		bpf_probe_read_kernel(counts, sizeof(*counts), known);
		counts->thread = thread;
	}
	/* SVM's codes from 0x400 on share the counts of the lowest ones. */
	counts->exits[reason & (REASONS - 1)]++;
	return 0;
}

SEC("tracepoint/kvm/kvm_exit")
int kvm_exit(struct kvm_exit_event *event)
{
	return count(event->exit_reason);
}

SEC("raw_tracepoint/kvm_exit")
int kvm_exit_raw(struct bpf_raw_tracepoint_args *args)
{
	return count(reason_of((const void *)args->args[0]));
}

char gpl[] SEC("license") = "GPL";
